/** What the scripts share: one page of JupyterLab or Notebook 7 in headless Chromium. */

import { join } from 'node:path';
import { chromium } from 'playwright-core';

const { APP, CHROMIUM, SCREENSHOTS, TOKEN, URL: SERVER, VERSION } = process.env;

const FLAGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync'
];

/** Opens a page, hands it to `scenario`, and closes the browser whatever happens. */
export async function withPage(scenario) {
  const browser = await chromium.launch({
    args: FLAGS,
    ...(CHROMIUM && { executablePath: CHROMIUM })
  });
  try {
    const page = await browser.newPage({
      viewport: { width: 1280, height: 1400 }
    });
    page.setDefaultTimeout(30_000);
    await scenario(page);
  } finally {
    await browser.close();
  }
}

/** Opens a notebook, after what comes `before` that, and hands it to `scenario`. */
export async function withNotebook(path, scenario, before = async () => {}) {
  await withPage(async page => {
    const notebook = new Notebook(page);
    try {
      await before(page);
      await notebook.open(path);
      await scenario(notebook);
    } catch (error) {
      await notebook.explain(path);
      throw error;
    }
  });
}

export async function take(page, name) {
  const file = VERSION ? `${name}-${VERSION}.png` : `${name}.png`;
  await page.screenshot({ path: join(SCREENSHOTS, file) });
}

class Notebook {
  /** What the page wrote to the browser's console, errors first of all. */
  messages = [];

  constructor(page) {
    this.page = page;
    page.on('console', message => {
      this.messages.push(`${message.type()}: ${message.text()}`);
    });
    page.on('pageerror', error => {
      this.messages.push(`page error: ${error.message}`);
    });
  }

  async open(path) {
    // A workspace of its own: no tab of another notebook is restored.
    const workspace = `lab/workspaces/${path.replace('.ipynb', '')}/tree`;
    const place = APP === 'lab' ? workspace : 'notebooks';
    this.url = `${SERVER}${place}/${path}?token=${TOKEN}`;
    await this.page.goto(this.url);
    await this.page.locator('.jp-Notebook .jp-CodeCell').first().waitFor();
    await this.page.waitForFunction(() => {
      const { currentWidget } = globalThis.jupyterapp.shell;
      const session = currentWidget?.context?.sessionContext;
      return session?.isReady && session.session?.kernel?.status === 'idle';
    });
  }

  /** Executes a command of the application. */
  async command(id, options = {}) {
    return this.page.evaluate(
      ([id, options]) => globalThis.jupyterapp.commands.execute(id, options),
      [id, options]
    );
  }

  /** Runs all cells, as the Run menu does, and waits until they have ended. */
  async runAll() {
    await this.command('notebook:run-all-cells');
  }

  /** Runs one cell and waits for its end. */
  async run(index) {
    await this.cell(index).locator('.jp-InputArea').click();
    await this.command('notebook:run-cell');
  }

  async save() {
    await this.command('docmanager:save');
  }

  cell(index) {
    return this.page.locator('.jp-Notebook .jp-Cell').nth(index);
  }

  /** What a cell shows of its own. */
  output(index) {
    return this.cell(index).locator(
      '.jp-Cell-outputArea > .jp-OutputArea-child:not(:has(> * > [role="status"]))'
    );
  }

  /** All text of it. */
  async text(index) {
    return (await this.output(index).allInnerTexts()).join('\n').trim();
  }

  /** The run card above it. */
  card(index) {
    return this.cell(index).locator('[role="status"]');
  }

  /** The number in brackets beside a cell; `null` if the cell was not run to its end. */
  async executionCount(index) {
    const prompt = await this.cell(index)
      .locator('.jp-InputPrompt')
      .textContent();
    const count = /\[(\d+)\]/.exec(prompt ?? '');
    return count ? Number(count[1]) : null;
  }

  async theme(name) {
    await this.command('apputils:change-theme', {
      theme: `JupyterLab ${name}`
    });
    await this.page
      .locator(`body[data-jp-theme-name="JupyterLab ${name}"]`)
      .waitFor({ state: 'attached' });
    const splash = this.page.locator('#jupyterlab-splash');
    await splash.waitFor({ state: 'detached' });
  }

  /** Leaves what is needed to understand a failure. */
  async explain(path) {
    await this.screenshot(`failed-${path}`);
    console.log(this.messages.join('\n'));
    const errors = '[data-mime-type="application/vnd.jupyter.stderr"]';
    console.log(await this.page.locator(errors).allInnerTexts());
  }

  async screenshot(name) {
    await take(this.page, name);
  }

  /** Takes one screenshot in the light theme and one in the dark. */
  async screenshots(name) {
    for (const theme of ['Dark', 'Light']) {
      await this.theme(theme);
      await this.screenshot(`${name}-${theme.toLowerCase()}`);
    }
  }
}
