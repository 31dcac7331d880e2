/** A user of a JupyterHub logs in, starts a machine, and stops it from the side bar. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { HUB, NOTEBOOK, PASSWORD } = process.env;

await withNotebook(
  NOTEBOOK,
  async notebook => {
    const { page } = notebook;
    await notebook.command('jupyter-mlinfra:open-panel');
    const side = page.locator('#jupyter-mlinfra-panel');
    await side.getByText('No machine runs, and nothing costs.').waitFor();
    await notebook.run(0);
    assert.equal(await notebook.text(0), '42');
    const machine = side.locator('.mlinfra-item[data-state="running"]').first();
    await machine.getByText('hub.ipynb').waitFor();
    await notebook.card(0).getByText('stops in').waitFor();
    await machine.getByRole('button', { name: 'Stop' }).click();
    await side.getByText('No machine runs, and nothing costs.').waitFor();
    const card = notebook.card(0);
    await card.getByText('stops in').waitFor({ state: 'detached' });
    assert.equal(await card.getByRole('button', { name: 'Extend' }).count(), 0);
    await side.locator('.mlinfra-past[data-status="done"]').waitFor();
    await notebook.screenshots('hub-lab');
  },
  async page => {
    await page.goto(`${HUB}hub/login`);
    await page.locator('input[name="username"]').fill('alice');
    await page.locator('input[name="password"]').fill(PASSWORD);
    await page.locator('#login_submit').click();
    await page.waitForURL('**/user/alice/lab**', { timeout: 60_000 });
  }
);
