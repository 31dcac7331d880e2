/** Help > About jupyter-mlinfra shows the version. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, NOTEBOOK, VERSION } = process.env;

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await page.getByRole('menuitem', { name: 'Help', exact: true }).click();
  await page.getByRole('menuitem', { name: 'About jupyter-mlinfra' }).click();
  const dialog = page.locator('.jp-Dialog-content');
  await dialog.waitFor();
  await notebook.screenshot(`about-${APP}`);
  assert.match(await dialog.innerText(), new RegExp(`Version ${VERSION}\\b`));
  await dialog.getByRole('button', { name: 'Close' }).click();
  await dialog.waitFor({ state: 'detached' });
});
