/** Loads of JupyterLab for benchmarks/lab.py, each in a browser context of its own: milliseconds
 * until the lab is restored; with PANEL the list of runs too. Prints JSON. */

import { chromium } from 'playwright-core';

const { CHROMIUM, PANEL, URL: SERVER, TOKEN } = process.env;

const browser = await chromium.launch({
  args: ['--no-sandbox', '--disable-gpu'],
  ...(CHROMIUM && { executablePath: CHROMIUM })
});
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(60_000);
  await page.goto(`${SERVER}lab?token=${TOKEN}&reset`);
  await page.waitForFunction(() => globalThis.jupyterapp);
  const loaded = await page.evaluate(async () => {
    await globalThis.jupyterapp.restored;
    return performance.now();
  });
  const figures = { loaded };
  if (PANEL) {
    Object.assign(figures, await page.evaluate(listRuns));
  }
  console.log(JSON.stringify(figures));
} finally {
  await browser.close();
}

/** Opens the side bar, has all runs listed, scrolls through them: milliseconds of the longest
 * frame, and how many are in the list. */
async function listRuns() {
  const frame = () => new Promise(done => requestAnimationFrame(done));
  const until = async condition => {
    while (!condition()) {
      await frame();
    }
  };
  const rows = () => document.querySelectorAll('.mlinfra-past');
  const began = performance.now();
  await globalThis.jupyterapp.commands.execute('jupyter-mlinfra:open-panel');
  await until(() => rows().length > 0);
  const opened = performance.now() - began;
  const more = () =>
    Array.from(document.querySelectorAll('.mlinfra-panel button')).find(
      it => it.textContent === 'Show earlier ones'
    );
  while (more()) {
    const before = rows().length;
    more().click();
    await until(() => rows().length > before || !more());
  }
  const panel = rows()[0].closest('.mlinfra-panel');
  let longest = 0;
  let last = await frame();
  for (let step = 0; step < 100; step += 1) {
    panel.scrollTop = (step / 99) * panel.scrollHeight;
    const now = await frame();
    longest = Math.max(longest, now - last);
    last = now;
  }
  return { opened, longest, rows: rows().length };
}
