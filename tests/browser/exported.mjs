/** The cards in a page that nbconvert made: no Jupyter, no scripts of ours. */

import assert from 'node:assert/strict';
import { withPage, take } from './lab.mjs';

const { APP, PAGE } = process.env;

await withPage(async page => {
  await page.goto(`file://${PAGE}`, { waitUntil: 'commit' });
  const cards = page.locator('[role="status"]');
  await cards.nth(4).waitFor();
  await page.waitForLoadState('domcontentloaded');
  assert.equal(await cards.count(), 5);
  const first = cards.first();
  assert.match(await first.innerText(), /^\W*Done · local · .* · \$0\.00 · ↑ /);
  await first.locator('summary').click();
  assert.match(await first.innerText(), /Machine local-\w+\s+Time/);
  await take(page, `card-exported-${APP}`);
});
