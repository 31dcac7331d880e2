/** The cards of test_card.py while the cells run, after them, and when the page is loaded again. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, NOTEBOOK } = process.env;
const [, , SLEEP, QUIET, WARNING, WAIT, ERROR, IMPOSSIBLE] = Array(8).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await page.evaluate(recordLabels);
  const done = notebook.runAll();

  await label(notebook, SLEEP, 'Running').waitFor();
  await notebook.screenshots(`card-running-${APP}`);
  await notebook.output(WAIT).getByText('waiting').waitFor();
  await notebook.command('notebook:interrupt-kernel');
  await done;
  for (const index of [ERROR, IMPOSSIBLE]) {
    await notebook.run(index);
  }

  const labels = await page.evaluate(() => globalThis.labels);
  const first = labels.slice(
    0,
    labels.findIndex(text => /^Done/.test(text)) + 1
  );
  assert.match(first[0], /^Starting the machine · local · /);
  assert.match(first.at(-1), /^Done · local · [3-9](\.\d)?s · \$0\.00 · ↑ /);
  const running = first.filter(text => text.startsWith('Running · local · '));
  assert.ok(new Set(running).size >= 3, first.join('\n'));

  await label(notebook, WAIT, 'Interrupted').waitFor();
  await label(notebook, ERROR, 'Error').waitFor();
  assert.equal(await notebook.card(QUIET).count(), 0);
  assert.match(await notebook.card(WARNING).innerText(), /⚠ a generator/);
  assert.match(await notebook.text(IMPOSSIBLE), /gpu=H100:64/);

  const card = notebook.card(SLEEP);
  await card.locator('summary').click();
  assert.match(
    await card.innerText(),
    /Machine local-\w+\s+Time ▬ start .* · ▬ running .*\s+Sent squares .*\s+Received time, total/
  );
  await page.evaluate(() => document.activeElement?.blur());
  await notebook.screenshots(`card-${APP}`);
  await notebook.save();

  await notebook.command('kernelmenu:shutdown');
  await page.reload();
  await label(notebook, SLEEP, 'Done').waitFor();
  await label(notebook, IMPOSSIBLE, 'Error').waitFor();
});

function label(notebook, index, word) {
  return notebook.card(index).and(notebook.page.getByLabel(`${word} · `));
}

/** Keeps every label that a card ever had. */
function recordLabels() {
  globalThis.labels = [];
  new MutationObserver(() => {
    for (const card of document.querySelectorAll(
      '[role="status"][aria-label]'
    )) {
      const text = card.getAttribute('aria-label');
      if (!globalThis.labels.includes(text)) {
        globalThis.labels.push(text);
      }
    }
  }).observe(document.body, { subtree: true, childList: true });
}
