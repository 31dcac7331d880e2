/** The side bar while the server is killed, and after another one has taken its place. */

import { existsSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { withNotebook } from './lab.mjs';

const { FOLDER, NOTEBOOK } = process.env;
const WANTED = join(FOLDER, 'wanted');

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.command('jupyter-mlinfra:open-panel');
  const side = page.locator('#jupyter-mlinfra-panel');
  await notebook.run(0);
  await notebook.run(1);
  const machine = side.locator('.mlinfra-item[data-state="running"]').first();
  await machine.getByText(/up \d+s/).waitFor();
  const status = page.locator('.mlinfra-status');
  await status.getByText('1 machine').waitFor();

  // JupyterLab says so, too, more than once.
  const said = page.getByRole('dialog', { name: 'Server Connection Error' });
  await page.addLocatorHandler(said, async () => {
    await said.first().locator('button').last().click();
  });
  writeFileSync(WANTED, '');
  while (!existsSync(join(FOLDER, 'ended'))) {
    await page.waitForTimeout(50);
  }
  const silence = side.getByText('The server does not answer');
  await silence.waitFor();
  await status.getByText('machines: unknown').waitFor();
  await machine.waitFor();
  await notebook.screenshot('panel-silence');

  rmSync(WANTED);
  await silence.waitFor({ state: 'detached', timeout: 60_000 });
  await status.getByText('1 machine').waitFor();
  const run = side.locator('.mlinfra-item[data-status="running"]');
  await run.getByText('train', { exact: true }).waitFor();
  await notebook.screenshot('panel-silence-over');

  // The run can be ended from here, and its machine stopped.
  await run.getByRole('button', { name: 'Interrupt or discard' }).click();
  await machine.getByRole('button', { name: 'Stop' }).click();
  const sure = page.locator('.jp-Dialog .jp-mod-warn');
  const none = side.getByText('No machine runs, and nothing costs.');
  await sure.or(none).first().waitFor();
  if (await sure.count()) {
    await sure.click();
  }
  await none.waitFor();
});
