/** The side bar and the rest of test_a11y.py by axe in each theme, and by the keyboard alone. */

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import axe from 'axe-core';
import { withNotebook } from './lab.mjs';

const { CONFIG, NOTEBOOK } = process.env;
const [SETUP, DETACHED, DONE] = Array(3).keys();
const THEMES = ['Dark High Contrast', 'Dark', 'Light'];
const OURS = [
  '#jupyter-mlinfra-panel',
  '.mlinfra-status',
  '.mlinfra-picker',
  '.mlinfra-menu',
  '.mlinfra-badge',
  '.mlinfra-log',
  '.jp-OutputArea [role="status"]'
];

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await page.evaluate(axe.source);
  await notebook.command('jupyter-mlinfra:open-panel');
  const side = page.locator('#jupyter-mlinfra-panel');
  await side.getByText('No machine runs, and nothing costs.').waitFor();
  await side.locator('.mlinfra-offers tbody tr').first().waitFor();
  await side.getByRole('form', { name: 'Settings' }).waitFor();
  await check(notebook, 'empty');

  await notebook.run(SETUP);
  await notebook.run(DONE);
  await notebook.cell(DONE).locator('.mlinfra-badge').waitFor();
  await notebook.run(DETACHED);
  const machine = side.locator('.mlinfra-item[data-state="running"]');
  await machine.locator('.mlinfra-sparkline').waitFor();
  await side.locator('.mlinfra-past').first().waitFor();

  await readLog(notebook);
  await choose(notebook);
  await set(notebook);
  await check(notebook, 'running');
  await fromTheCatalog(notebook);
  await stop(notebook);
});

/** A run's log, which has the focus then. */
async function readLog(notebook) {
  const { page } = notebook;
  await tabTo(page, /^Logs: /);
  await redrawn(page);
  assert.match(await focused(page), /^Logs: /);
  await page.keyboard.press('Enter');
  await page.getByRole('log').getByText('begun').waitFor();
  await page.waitForFunction(() => document.activeElement.role === 'log');
  assert.ok(await hasRing(page));
}

/** The menu of targets, left again without a choice. */
async function choose(notebook) {
  const { page } = notebook;
  await notebook.cell(DONE).locator('.jp-InputPrompt').click();
  const before = await page.evaluate(() => document.activeElement.className);
  await page.keyboard.press('Control+Alt+m');
  await page.locator('.mlinfra-menu .lm-Menu-item').first().waitFor();
  await check(notebook, 'menu');
  await page.keyboard.press('Escape');
  await page.locator('.mlinfra-menu').waitFor({ state: 'detached' });
  const after = await page.evaluate(() => document.activeElement.className);
  assert.equal(after, before);
}

/** A setting that is wrong, then right. */
async function set(notebook) {
  const { page } = notebook;
  await notebook.command('jupyter-mlinfra:open-panel');
  await tabTo(page, /^Stop when idle for$/);
  await page.keyboard.type('soon');
  await page.keyboard.press('Enter');
  const form = page.getByRole('form', { name: 'Settings' });
  await form.getByRole('alert').waitFor();
  assert.equal(await focused(page), 'Stop when idle for');
  await check(notebook, 'wrong');
  await page.keyboard.press('Control+a');
  await page.keyboard.type('90m');
  await tabTo(page, /^Save$/);
  await page.keyboard.press('Enter');
  await form.getByText('Saved.').waitFor();
  // The stream has told of it, and the form was filled again.
  await form.locator('input[value="1h30m"]').waitFor();
  await redrawn(page);
  assert.equal(await focused(page), 'Save');
  assert.match(readFileSync(CONFIG, 'utf8'), /^idle = "90m"$/m);
}

async function fromTheCatalog(notebook) {
  const { page } = notebook;
  await notebook.command('jupyter-mlinfra:open-panel');
  await tabTo(page, /^Use .+ in the active cell$/);
  await page.keyboard.press('Enter');
  const source = notebook.cell(DONE).locator('.cm-content');
  await source.getByText(/^%%remote gpu=/).waitFor();
}

/** From the editor of a cell, where no Tab leads out, by the command that shows the side bar. */
async function stop(notebook) {
  const { page } = notebook;
  await notebook.command('jupyter-mlinfra:open-panel');
  await tabTo(page, /^Stop local-/);
  await page.keyboard.press('Enter');
  await page.locator('.jp-Dialog .jp-mod-warn').waitFor();
  await page.keyboard.press('Enter');
  await page.getByText('No machine runs, and nothing costs.').waitFor();
}

/** No violation of WCAG 2 A and AA in what is ours, in any theme. */
async function check(notebook, name) {
  const { page } = notebook;
  for (const theme of THEMES) {
    await notebook.theme(theme);
    await page.evaluate(() => document.fonts.ready);
    await notebook.screenshot(
      `a11y-${name}-${theme.toLowerCase().replaceAll(' ', '-')}`
    );
    const found = await page.evaluate(async selectors => {
      const { violations } = await globalThis.axe.run(
        { include: selectors.filter(it => document.querySelector(it)) },
        {
          runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'],
          rules: { 'label-content-name-mismatch': { enabled: true } },
          resultTypes: ['violations']
        }
      );
      return violations.flatMap(({ id, nodes }) =>
        nodes
          // JupyterLab's own: inside of its web components.
          .filter(it => !it.target.some(Array.isArray))
          .map(it => `${id}: ${it.html}\n  ${it.failureSummary}`)
      );
    }, OURS);
    assert.deepEqual(found, [], `${name}, ${theme}:\n${found.join('\n')}`);
  }
}

/** Presses Tab until something with this name has the focus; each stop of ours must be seen. */
async function tabTo(page, name) {
  const passed = [];
  for (let stops = 0; stops < 200; stops += 1) {
    await page.keyboard.press('Tab');
    const at = await focused(page);
    passed.push(at);
    assert.ok(await hasRing(page), `nothing shows that "${at}" has the focus`);
    if (name.test(at)) {
      return;
    }
  }
  assert.fail(`Tab does not reach ${name}:\n${passed.join('\n')}`);
}

/** What is focused, as a screen reader calls it. */
async function focused(page) {
  return page.evaluate(() => {
    const it = document.activeElement;
    const label = it.labels?.[0] ?? it;
    return (it.ariaLabel ?? label.textContent).trim();
  });
}

/** Whether what has the focus looks so, if it is ours. */
async function hasRing(page) {
  return page.evaluate(() => {
    const it = document.activeElement;
    const ours = it.closest('.mlinfra-panel, .mlinfra-log, .mlinfra-status');
    // Web components of JupyterLab's show it inside.
    return (
      !ours || it.shadowRoot || getComputedStyle(it).outlineStyle !== 'none'
    );
  });
}

/** Waits until the side bar was drawn again: it counts seconds while a machine runs. */
async function redrawn(page) {
  const up = page.getByText(/^up \d+s$/);
  const text = await up.innerText();
  await page.waitForFunction(
    before =>
      ![...document.querySelectorAll('.mlinfra-line span')].some(
        it => it.textContent === before
      ),
    text
  );
}
