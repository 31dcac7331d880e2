/** The quickstart notebook runs to its end in the browser. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, NOTEBOOK } = process.env;

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.runAll();
  // The command ends early, at the error that is meant to be.
  await page.waitForFunction(() =>
    [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(
      prompt => /^\[\d+\]:$/.test(prompt.textContent)
    )
  );
  const errors = page.locator('.jp-RenderedText', { hasText: 'Traceback' });
  assert.equal(await errors.count(), 1);

  await notebook.command('application:toggle-left-area');
  const start = page.getByRole('heading', { name: 'Train somewhere else' });
  await start.evaluate(heading => heading.scrollIntoView());
  await notebook.screenshots(`quickstart-${APP}`);
});
