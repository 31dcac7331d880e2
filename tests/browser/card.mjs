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

  const [sent, shown] = await page.evaluate(() => [
    globalThis.sent,
    globalThis.shown
  ]);
  const first = untilDone(sent);
  assert.match(first[0], /^Starting the machine · local · /);
  assert.match(first.at(-1), /^Done · local · [3-9](\.\d)?s · \$0\.00 · ↑ /);
  const running = first.filter(text => text.startsWith('Running · local · '));
  assert.ok(new Set(running).size >= 3, first.join('\n'));
  // A busy page may leave some out.
  const seen = untilDone(shown);
  assert.ok(seen.length >= 3, seen.join('\n'));
  assert.deepEqual(
    seen,
    first.filter(text => seen.includes(text))
  );

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

function untilDone(labels) {
  return labels.slice(0, labels.findIndex(text => /^Done/.test(text)) + 1);
}

/** Keeps every label that the kernel gave a card, and every one that was in the page. */
function recordLabels() {
  const keep = (labels, text) => labels.includes(text) || labels.push(text);
  globalThis.sent = [];
  const { sessionContext } = globalThis.jupyterapp.shell.currentWidget.context;
  sessionContext.iopubMessage.connect((_, { content }) => {
    const card = new DOMParser()
      .parseFromString(content.data?.['text/html'] ?? '', 'text/html')
      .querySelector('[role="status"][aria-label]');
    if (card) {
      keep(globalThis.sent, card.getAttribute('aria-label'));
    }
  });
  globalThis.shown = [];
  new MutationObserver(() => {
    for (const card of document.querySelectorAll(
      '[role="status"][aria-label]'
    )) {
      keep(globalThis.shown, card.getAttribute('aria-label'));
    }
  }).observe(document.body, { subtree: true, childList: true });
}
