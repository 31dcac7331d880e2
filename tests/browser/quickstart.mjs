/** The quickstart notebook runs to its end in the browser. */

import assert from 'node:assert/strict';
import { join } from 'node:path';
import { withNotebook } from './lab.mjs';

const { APP, NOTEBOOK, SCREENSHOTS } = process.env;

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.runAll();
  // The command ends early, at the error that is meant to be.
  await page.waitForFunction(
    () =>
      [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(
        prompt => /^\[\d+\]:$/.test(prompt.textContent)
      ),
    null,
    { timeout: 90_000 }
  );
  const errors = page.locator('.jp-RenderedText', { hasText: 'Traceback' });
  assert.equal(await errors.count(), 1);
  assert.equal(await page.locator('.progress-bar-success').count(), 1);

  // The pictures in the README: from the training cell to the plot.
  await notebook.command('application:toggle-left-area');
  await page.setViewportSize({ width: 980, height: 1500 });
  const [first, last] = [5, 9].map(index => notebook.cell(index));
  await first.evaluate(cell => cell.scrollIntoView());
  await page.evaluate(() => document.activeElement?.blur());
  for (const theme of ['Dark', 'Light']) {
    await notebook.theme(theme);
    const { x, y, width } = await first.boundingBox();
    const end = await last.boundingBox();
    const clip = { x, y, width, height: end.y + end.height - y };
    const name = `quickstart-${APP}-${theme.toLowerCase()}.png`;
    const path = join(SCREENSHOTS, name);
    await page.screenshot({ path, clip });
  }
});
