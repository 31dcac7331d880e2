/** The notebook of test_money_browser.py: what it costs before, and what stops it. */

import assert from 'node:assert/strict';
import { withNotebook } from './lab.mjs';

const { NOTEBOOK } = process.env;
const [SETUP, QUOTE, REFUSED, STARTED, USE, IDLE, PRICE, SPENT] =
  Array(8).keys();

await withNotebook(NOTEBOOK, async notebook => {
  const { page } = notebook;
  await notebook.run(SETUP);
  await notebook.run(QUOTE);
  await notebook.output(QUOTE).getByText('unknown').first().waitFor();
  await notebook.screenshots('money-quote');

  const refused = notebook.run(REFUSED);
  const question = notebook.card(REFUSED).getByText('A10 on cheap at');
  await question.waitFor();
  await notebook.screenshots('money-question');
  await button(notebook, REFUSED, 'Do not start').click();
  await refused;
  assert.match(await notebook.text(REFUSED), /you said no/);
  assert.equal(await button(notebook, REFUSED, 'Start it').count(), 0);

  const started = notebook.run(STARTED);
  await button(notebook, STARTED, 'Start it').click();
  await started;
  assert.match(await notebook.text(STARTED), /yes\s[^]*45$/);
  await left(notebook, STARTED, /^stops in 1[45]m/).waitFor();
  await notebook.screenshots('money-countdown');

  await notebook.run(USE);
  await notebook.run(IDLE);
  await left(notebook, IDLE, /^stops in \ds/).waitFor();
  assert.equal(await left(notebook, STARTED, /stops/).count(), 0);
  const toast = page
    .locator('.Toastify__toast')
    .filter({ hasText: 'The machine stops in' });
  await toast.waitFor();
  await notebook.screenshot('money-ending-light');
  await toast.getByRole('button', { name: 'Extend' }).click();
  await left(notebook, IDLE, /^stops in (30m|29m)/).waitFor();
  await notebook.screenshots('money-extended');

  await notebook.run(PRICE);
  const spent = notebook.run(SPENT);
  const warning = notebook
    .card(SPENT)
    .getByText("of this run's budget are left");
  await warning.waitFor();
  await notebook.screenshot('money-budget-light');
  await spent;
  await notebook.card(SPENT).getByText('This run was stopped').waitFor();
  await notebook.screenshots('money-spent');
  await notebook.save();
});

function button(notebook, index, name) {
  return notebook.card(index).getByRole('button', { name, exact: true });
}

function left(notebook, index, text) {
  return notebook.card(index).locator('.mlinfra-card-left').getByText(text);
}
