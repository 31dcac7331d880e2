/** The runs of test_jobs_browser.py: cards, their buttons, and notifications. */

import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { withNotebook } from './lab.mjs';

const { FOLDER, NOTEBOOK, SCENARIO } = process.env;

const scenarios = {
  /** Detach, restart the kernel, reload the page, attach by the saved card. */
  async attach(notebook) {
    const { page } = notebook;
    const [SETUP, DETACHED, ATTACHED, ANSWER] = Array(4).keys();
    await notebook.run(SETUP);
    await notebook.run(DETACHED);
    const card = notebook.card(DETACHED);
    await card.getByText('Detached as train').waitFor();
    await card.getByRole('button', { name: 'Attach' }).waitFor();
    await notebook.screenshots('run-detached');
    await notebook.save();

    await restart(notebook);
    await notebook.open(NOTEBOOK);
    const attach = card.getByRole('button', { name: 'Attach' });
    await attach.click();
    const live = notebook.output(ATTACHED).getByText('begun');
    await live.waitFor();
    await attach.waitFor({ state: 'detached' });
    assert.equal(await source(notebook, ATTACHED), '%remote attach train');
    mark('go');

    await toast(page, 'train in attach.ipynb is done').waitFor();
    await notebook.card(ATTACHED).getByText('Done').waitFor();
    assert.equal(await notebook.text(ATTACHED), 'begun\nended');
    const offered = notebook.card(ATTACHED).getByRole('button');
    assert.deepEqual(await offered.allInnerTexts(), ['Extend']);
    await notebook.run(ANSWER);
    assert.equal(await notebook.text(ANSWER), '42');
    await notebook.screenshots('run-attached');
    await notebook.save();

    // Nothing is left to be cancelled: what the kernel says of that is shown.
    await notebook.open(NOTEBOOK);
    await card.getByRole('button', { name: 'Cancel' }).click();
    await toast(page, "There is no run 'train'").waitFor();
  },

  /** A background run goes on under its own cell while another cell runs. */
  async background(notebook) {
    const { page } = notebook;
    const [SETUP, BACKGROUND, BUSY, TOTAL, FAILING] = Array(5).keys();
    await notebook.run(SETUP);
    await notebook.run(BACKGROUND);
    const card = notebook.card(BACKGROUND);
    await notebook.output(BACKGROUND).getByText('side begun').waitFor();
    assert.deepEqual(await card.getByRole('button').allInnerTexts(), [
      'Cancel'
    ]);
    const busy = notebook.run(BUSY);
    await notebook.output(BUSY).getByText('busy').waitFor();
    await notebook.screenshots('run-background');
    mark('side');
    await notebook.output(BACKGROUND).getByText('side ended').waitFor();
    await toast(page, 'side in background.ipynb is done').waitFor();
    await card.getByText('Done').waitFor();
    assert.equal(await notebook.executionCount(BUSY), null);
    mark('free');
    await busy;
    await notebook.run(TOTAL);
    assert.equal(await notebook.text(TOTAL), '1');

    await notebook.run(FAILING);
    await toast(page, 'failing in background.ipynb has ended: error').waitFor();
    assert.match(await notebook.text(FAILING), /ZeroDivisionError/);
  }
};

await withNotebook(NOTEBOOK, scenarios[SCENARIO]);

/** Creates a file that a run waits for. */
function mark(name) {
  writeFileSync(join(FOLDER, name), '');
}

function toast(page, text) {
  return page.locator('.Toastify__toast').filter({ hasText: text });
}

/** Restarts the kernel as the Kernel menu does, and says yes. */
async function restart(notebook) {
  const restarted = notebook.command('kernelmenu:restart');
  await notebook.page.locator('.jp-Dialog .jp-mod-accept').click();
  await restarted;
}

async function source(notebook, index) {
  return notebook.cell(index).locator('.cm-content').innerText();
}
