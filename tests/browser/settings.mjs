/** The form of test_panel.py's test of settings, in two tabs. */

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { withNotebook } from './lab.mjs';

const { CONFIG, NOTEBOOK } = process.env;

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  const before = readFileSync(CONFIG, 'utf8');
  const form = await openForm(page);
  const idle = form.getByLabel('Stop when idle for');
  assert.equal(await idle.inputValue(), '20m');
  assert.equal(
    await form.getByLabel('Where').getAttribute('placeholder'),
    'auto'
  );
  await form
    .getByText('Overridden by the environment variable MLINFRA_TIME: 7m')
    .waitFor();
  await notebook.screenshots('settings-lab');

  // By the keyboard alone, and what is wrong stands beside the field.
  await form.getByLabel('GPU').focus();
  await page.keyboard.type('A10');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Tab');
  await page.keyboard.type('soon');
  await page.keyboard.press('Enter');
  const alert = form.getByRole('alert');
  await alert.getByText('idle=soon in the form is not understood.').waitFor();
  assert.equal(await idle.getAttribute('aria-invalid'), 'true');
  assert.ok(await idle.evaluate(it => it === it.ownerDocument.activeElement));
  assert.equal(readFileSync(CONFIG, 'utf8'), before);
  await notebook.screenshots('settings-wrong-lab');

  // Another tab, in which somebody is typing.
  const other = await page.context().browser().newPage();
  await other.goto(notebook.url);
  const there = await openForm(other);
  await there.getByLabel('Budget of a month (USD)').fill('200');

  await idle.fill('90m');
  await page.keyboard.press('Enter');
  await form.getByText('Saved.').waitFor();
  assert.equal(await alert.count(), 0);
  const after = before
    .replace('20m', '90m')
    .replace('\n\n[', '\ngpu = "A10"\n\n[');
  assert.equal(readFileSync(CONFIG, 'utf8'), after);
  assert.equal(await idle.inputValue(), '1h30m');

  await there.locator('input[value="1h30m"]').waitFor({ timeout: 2000 });
  assert.equal(await there.getByLabel('GPU').inputValue(), 'A10');
  await there.getByRole('button', { name: 'Save' }).click();
  await there.getByText('Saved.').waitFor();
  assert.match(readFileSync(CONFIG, 'utf8'), /^month_budget = 200$/m);

  const side = page.locator('#jupyter-mlinfra-panel');
  await side.getByText('of $200.00').waitFor();
  await form.locator('input[value="200"]').waitFor();
  await notebook.screenshots('settings-saved-lab');
});

async function openForm(page) {
  await page.waitForFunction(() => globalThis.jupyterapp?.commands);
  await page.evaluate(() =>
    globalThis.jupyterapp.restored.then(() =>
      globalThis.jupyterapp.commands.execute('jupyter-mlinfra:open-panel')
    )
  );
  const side = page.locator('#jupyter-mlinfra-panel');
  const form = side.getByRole('form', { name: 'Settings' });
  await form.waitFor();
  return form;
}
