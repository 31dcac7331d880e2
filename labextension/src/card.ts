/** Run cards as JupyterLab shows them: the card's own HTML, and buttons. */

import { RenderedHTML, type IRenderMime } from '@jupyterlab/rendermime';
import type { TranslationBundle } from '@jupyterlab/translation';

import { factsOf, type IFacts } from './facts';
import type { Action, Runs } from './runs';

/** Does what a card offers. */
export type Act = (action: Action, card: RunCard, run: string) => Promise<void>;

export class RunCard extends RenderedHTML {
  constructor(
    options: IRenderMime.IRendererOptions,
    private readonly _runs: Runs,
    private readonly _trans: TranslationBundle,
    private readonly _act: Act
  ) {
    super({ ...options, mimeType: 'text/html' });
    this._buttons.className = 'mlinfra-card-buttons';
    _runs.changed.connect(this._offer, this);
  }

  override async render(model: IRenderMime.IMimeModel): Promise<void> {
    await super.render(model);
    this._facts = factsOf(model.data);
    this._offer();
    const line = this.node.querySelector('[role="status"] > :first-child');
    (line ?? this.node).append(this._buttons);
  }

  private readonly _offer = (): void => {
    const actions = this._facts ? this._runs.actions(this._facts) : [];
    const offered = Array.from(this._buttons.children, it =>
      it.getAttribute('data-action')
    );
    // A button that the pointer is on must not be replaced by another one.
    if (actions.join() !== offered.join()) {
      this._buttons.replaceChildren(...actions.map(it => this._button(it)));
    }
  };

  private _button(action: Action): HTMLButtonElement {
    const run = this._facts?.run ?? '';
    const button = document.createElement('button');
    button.dataset['action'] = action;
    // Enter and space press it, instead of what they do in a notebook.
    button.dataset['lmSuppressShortcuts'] = 'true';
    if (action === 'attach') {
      button.textContent = this._trans.__('Attach');
      button.title = this._trans.__(
        'Bring %1 back: its output and its variables',
        run
      );
    } else {
      button.textContent = this._trans.__('Cancel');
      button.title = this._trans.__('Interrupt or discard %1', run);
    }
    button.addEventListener('click', () => {
      button.disabled = true;
      void this._act(action, this, run).finally(() => {
        button.disabled = false;
      });
    });
    return button;
  }

  private readonly _buttons = document.createElement('span');
  private _facts: IFacts | null = null;
}
