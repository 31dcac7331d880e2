/** The cells of test_outputs.py show what they should, in both themes, wherever they run. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, MODE, NOTEBOOK } = process.env;
const [, KERNEL, PLOT, TABLE, BAR, SLIDER, ERROR, AFTER] = Array(8).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.runAll();

  const image = notebook.output(PLOT).locator('img[src^="data:image/png"]');
  await image.waitFor();
  assert.equal(await image.count(), 1);
  assert.ok((await image.evaluate(img => img.naturalWidth)) > 200);

  const table = notebook.output(TABLE).locator('table.dataframe');
  assert.match(await table.innerText(), /square\s+n\s+0\s+0\s+1\s+1\s+1\s+2/);

  const bar = notebook.output(BAR);
  await bar.locator('.progress-bar-success').waitFor();
  assert.match(await notebook.text(BAR), /work:\s+100%\s+20\/20/);
  assert.equal(await bar.locator('.progress-bar').count(), 1);

  const kernel = await notebook.text(KERNEL);
  const slider = notebook.output(SLIDER);
  const handle = slider.locator('.noUi-handle');
  // Notebook 7 keeps the arrow keys to itself.
  await handle.press('PageUp');
  const label = slider.locator('.widget-label', { hasText: '8 squared is 64' });
  await label.waitFor();
  const process = /in process (\d+)/.exec(await label.innerText())?.[1];
  assert.equal(process === kernel, MODE === 'local');
  await slider
    .locator('.jp-OutputArea-output pre', { hasText: 'moved to 8' })
    .waitFor();
  await handle.press('PageUp');
  await slider.getByText('13 squared is 169').waitFor();
  await slider.getByText('moved to 13').waitFor();
  assert.equal(await slider.getByText('moved to').count(), 1);

  const error = await notebook.text(ERROR);
  assert.match(
    error,
    /ZeroDivisionError\s+Traceback \(most recent call last\)/
  );
  assert.match(error, /ZeroDivisionError: division by zero\s*$/);
  assert.equal(await notebook.executionCount(AFTER), null);

  await page.evaluate(() => document.activeElement?.blur());
  await notebook.screenshots(`outputs-${MODE}-${APP}`);
  await notebook.save();
});
