/** Where cells run, chosen in notebooks: toolbars, commands, badges; see test_panel.py. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { APP, NOTEBOOK, SHOW } = process.env;
const [FIRST, SECOND, THIRD] = Array(3).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  const menu = page.locator('.mlinfra-menu');
  const item = text => menu.locator('.lm-Menu-item', { hasText: text });
  const source = index =>
    notebook.cell(index).locator('.cm-content').innerText();
  // JupyterLab's buttons are web components: what they are called is inside of them.
  const cellPicker = notebook.cell(FIRST).locator('.mlinfra-picker');
  const shown = text => cellPicker.getByText(text, { exact: true });

  // By the mouse: there and back.
  await notebook.cell(FIRST).locator('.jp-InputArea').click();
  await shown('Here').click();
  await item(/^A10 · \$\d/).waitFor();
  await notebook.screenshot(`picker-menu-${APP}`);
  await item(/^A10 · \$\d/).click();
  assert.match(await source(FIRST), /^%%remote gpu=A10\nhere = 1$/);
  await shown('A10').click();
  await item('Here').click();
  assert.equal(await source(FIRST), 'here = 1');

  // By the keyboard: run this cell on the second entry but one.
  await notebook.cell(FIRST).locator('.jp-InputPrompt').click();
  await page.keyboard.press('Control+Alt+Enter');
  await item('On local').waitFor();
  await page.keyboard.press('ArrowDown');
  await page.keyboard.press('ArrowDown');
  await page.keyboard.press('Enter');
  await notebook.card(FIRST).getByText('Done').waitFor();
  assert.equal(await source(FIRST), '%%remote on=local\nhere = 1');
  await notebook.cell(FIRST).locator('.mlinfra-badge').waitFor();

  // What %%remote means in this notebook, also after its kernel was restarted.
  await page.getByText('%%remote: default').click();
  await item('On local').click();
  await page.getByText('%%remote: local').waitFor();
  const restarted = notebook.command('kernelmenu:restart');
  await page.locator('.jp-Dialog .jp-mod-accept').click();
  await restarted;
  await notebook.run(SECOND);
  await notebook.output(SECOND).getByText('on: local').waitFor();

  // All below.
  await notebook.cell(THIRD).locator('.jp-InputPrompt').click();
  await notebook.command('jupyter-mlinfra:run-below-on');
  await item('On local').click();
  await notebook.card(THIRD).getByText('Done').waitFor();
  assert.equal(await source(SECOND), SHOW);
  await notebook.screenshots(`picker-${APP}`);

  // Saved and loaded again.
  await notebook.save();
  await notebook.open(NOTEBOOK);
  const badge = notebook.cell(THIRD).locator('.mlinfra-badge');
  await badge.getByText(/^local · \d+s · \$0\.00$/).waitFor();
  await page.getByText('%%remote: local').waitFor();
});
