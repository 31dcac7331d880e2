/** A person acts while the cells of test_interaction.py run: input, password, interrupt. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, MODE, NOTEBOOK } = process.env;
const [, INPUT, LOOP] = Array(3).keys();

await withNotebook(NOTEBOOK, async notebook => {
  await Promise.all([notebook.runAll(), act(notebook)]);
  await notebook.screenshot(`interaction-${MODE}-${APP}`);
});

async function act(notebook) {
  const { page } = notebook;

  const input = notebook.output(INPUT);
  await input.locator('.jp-Stdin-input').fill('Ada');
  await page.keyboard.press('Enter');
  const password = input.locator('.jp-Stdin-input[type="password"]');
  await password.fill('secret');
  await page.keyboard.press('Enter');
  await input.getByText('Ada has a password of 6 letters').waitFor();
  assert.doesNotMatch(await notebook.text(INPUT), /secret/);

  const loop = notebook.output(LOOP);
  await loop.locator('pre', { hasText: 'running' }).waitFor();
  await page.getByRole('menuitem', { name: 'Kernel', exact: true }).click();
  await page.getByRole('menuitem', { name: 'Interrupt Kernel' }).click();
  await loop.getByText('KeyboardInterrupt').first().waitFor();
  assert.match(await notebook.text(LOOP), /KeyboardInterrupt:?\s*$/);
}
