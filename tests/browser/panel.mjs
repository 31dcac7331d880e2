/** The side bar of test_panel.py, from a newcomer's view to a run that is cancelled there. */

import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { withNotebook } from './lab.mjs';

const { APP, FOLDER, NOTEBOOK, SCREENSHOTS } = process.env;
const [SETUP, DETACHED, EMPTY] = Array(3).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.command('jupyter-mlinfra:open-panel');
  const side = page.locator('#jupyter-mlinfra-panel');
  await side.getByText('No machine runs, and nothing costs.').waitFor();
  const status = page.locator('.mlinfra-status');
  if (APP === 'lab') {
    await status.getByText('no machine · $0.00 today').waitFor();
  }
  await side.getByText('local', { exact: true }).waitFor();
  await side.locator('.mlinfra-offers tbody tr').first().waitFor();
  await notebook.screenshots(`panel-empty-${APP}`);

  // What a newcomer is told can be done with one click.
  await notebook.cell(EMPTY).locator('.jp-InputArea').click();
  await side.getByRole('button', { name: 'Put it on top' }).click();
  assert.equal(await source(notebook, EMPTY), '%%remote\nprint(6 * 7)');

  await notebook.run(SETUP);
  await notebook.run(DETACHED);
  const run = side.locator('.mlinfra-item[data-status="running"]');
  await run.getByText('train', { exact: true }).waitFor();
  await run.getByText(/^epochs: 1\/3 it · about \d+s left$/).waitFor();
  assert.equal(
    await run
      .getByRole('progressbar', { name: 'epochs' })
      .evaluate(bar => bar.position.toFixed(2)),
    '0.33'
  );
  const machine = side.locator('.mlinfra-item[data-state="running"]').first();
  await machine.getByText(/up \d+s/).waitFor();
  await machine
    .getByRole('img', { name: /use \(line, now \d+ %\) and memory \(dashes/ })
    .waitFor();
  await machine.getByText(/^CPU \d+ % · RAM [\d.]+ GB \/ [\d.]+ GB$/).waitFor();
  if (APP === 'lab') {
    await status.getByText('1 machine · $0.00/h').waitFor();
  }
  if (APP === 'lab') {
    await picture(notebook, side);
  }
  await run.getByRole('button', { name: 'Show what train has' }).click();
  const log = page.getByRole('log');
  await log.getByText('begun').waitFor();
  await notebook.screenshots(`panel-running-${APP}`);

  if (APP === 'lab') {
    await enter(notebook, machine);
    await collect(notebook, run, log);
  } else {
    await run.getByRole('button', { name: 'Interrupt or discard' }).click();
  }

  // By the keyboard alone.
  const stop = machine.getByRole('button', { name: 'Stop' });
  await stop.focus();
  await page.keyboard.press('Enter');
  if (APP === 'notebook') {
    // What is left of the run would be lost, so it is asked.
    await page.locator('.jp-Dialog .jp-mod-warn').click();
  }
  await side.getByText('No machine runs, and nothing costs.').waitFor();
  await side.locator('.mlinfra-past').first().waitFor();
  await notebook.screenshots(`panel-after-${APP}`);
});

/** The picture of the side bar in the README, a bit wider than it is at first. */
async function picture(notebook, side) {
  const { page } = notebook;
  const before = page.viewportSize();
  await page.setViewportSize({ ...before, height: 960 });
  const { x, y, width, height } = await side.boundingBox();
  const [edge, middle] = [x + width + 2, y + height / 2];
  await page.mouse.move(edge, middle);
  await page.mouse.down();
  await page.mouse.move(edge + 90, middle, { steps: 3 });
  await page.mouse.up();
  for (const theme of ['Dark', 'Light']) {
    await notebook.theme(theme);
    const path = join(SCREENSHOTS, `side-bar-${theme.toLowerCase()}.png`);
    await side.screenshot({ path });
  }
  await page.setViewportSize(before);
}

/** A terminal of the lab is a shell on the machine. */
async function enter(notebook, machine) {
  const { page } = notebook;
  await machine.getByRole('button', { name: 'Terminal' }).click();
  await page.locator('.jp-Terminal .xterm').waitFor();
  const sign = join(FOLDER, 'entered');
  await page.keyboard.type(`pwd > ${sign}.part; mv ${sign}.part ${sign}\n`);
  for (let tries = 0; !existsSync(sign); tries++) {
    assert.ok(tries < 600, 'nothing came of what was typed');
    await page.waitForTimeout(50);
  }
  assert.match(readFileSync(sign, 'utf8'), /\/machines\/[0-9a-z]+$/m);
  await notebook.screenshots('panel-terminal-lab');
  await page.evaluate(() => globalThis.jupyterapp.shell.currentWidget.close());
}

/** Another tab says the same within two seconds; the end of the run, and its collection. */
async function collect(notebook, run, log) {
  const { page } = notebook;
  const other = await page.context().browser().newPage();
  await other.goto(notebook.url);
  await other.waitForFunction(() => globalThis.jupyterapp?.commands);
  await other.evaluate(() =>
    globalThis.jupyterapp.restored.then(() =>
      globalThis.jupyterapp.commands.execute('jupyter-mlinfra:open-panel')
    )
  );
  const there = other.locator('.mlinfra-item[data-status="running"]');
  await there.waitFor({ state: 'attached' });
  writeFileSync(join(FOLDER, 'go'), '');
  await run.waitFor({ state: 'detached' });
  await there.waitFor({ state: 'detached', timeout: 2000 });
  await other.close();

  await log.getByText('ended').first().waitFor();
  const side = page.locator('#jupyter-mlinfra-panel');
  const ended = side.locator('.mlinfra-item[data-status="done"]');
  await ended.getByText('done, not collected').waitFor();
  await ended.getByRole('button', { name: 'Bring train into' }).click();
  await ended.waitFor({ state: 'detached' });
  assert.equal(await source(notebook, DETACHED + 1), '%remote attach train');
  await notebook
    .output(DETACHED + 1)
    .getByText('begun')
    .waitFor();
}

async function source(notebook, index) {
  return notebook.cell(index).locator('.cm-content').innerText();
}
