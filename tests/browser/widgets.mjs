/**
 * The widgets of test_widgets.py: a slider is moved while a remote cell runs, and the page is
 * loaded again while another one runs.
 */

import assert from 'node:assert/strict';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { withNotebook } from './lab.mjs';

const { APP, FOLDER, NOTEBOOK } = process.env;
const [, SLIDER, LOOP, HERE, LINK, INTERACT, PLOT, BARS, WAIT] =
  Array(9).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  const handle = index => notebook.output(index).locator('.noUi-handle');

  // Never ends: the page is left before.
  notebook.runAll().catch(() => {});
  await notebook.card(LOOP).waitFor();
  await handle(SLIDER).press('PageUp');
  await notebook.output(SLIDER).getByText('saw 8').waitFor();
  await notebook.output(LOOP).getByText('the loop saw 8').waitFor();

  await notebook.card(WAIT).waitFor();
  await shown(notebook);
  await notebook.save();
  page.once('dialog', dialog => dialog.accept());
  await page.reload();
  await writeFile(join(FOLDER, 'reloaded'), '');
  await handle(LINK).first().waitFor();
  await shown(notebook);
  await notebook.output(SLIDER).getByText('saw 8').waitFor();

  await handle(HERE).press('PageUp');
  await notebook.output(SLIDER).getByText('saw 13').waitFor();
  await handle(LINK).first().press('PageUp');
  await page.waitForFunction(
    cell => cell.innerText.match(/a\s+6\s+b\s+6/),
    await notebook.cell(LINK).elementHandle()
  );
  await handle(INTERACT).press('PageUp');
  await notebook.output(INTERACT).getByText('two to the 8 is 256').waitFor();
  assert.doesNotMatch(await notebook.text(INTERACT), /is 8\b/);
  await page.evaluate(() => document.activeElement?.blur());
  await notebook.screenshots(`widgets-${APP}`);
});

/** What the cells show before they are touched. */
async function shown(notebook) {
  assert.match(await notebook.text(LINK), /a\s+1\s+b\s+1/);
  const interact = await notebook.text(INTERACT);
  assert.match(interact, /^k\s+3\s+two to the 3 is 8$/);
  const image = 'img[src^="data:image/png"]';
  const inside = notebook.output(PLOT).locator(`.jupyter-widgets ${image}`);
  await inside.waitFor();
  assert.equal(await notebook.cell(PLOT).locator(image).count(), 1);
  const bars = await notebook.text(BARS);
  assert.match(
    bars,
    /^outer:\s+100%\s+2\/2(.|\n)*(inner:\s+100%\s+3\/3(.|\n)*){2}$/
  );
}
