/** Run cards as JupyterLab shows them: the card's own HTML, and buttons. */

import { RenderedHTML, type IRenderMime } from '@jupyterlab/rendermime';
import type { TranslationBundle } from '@jupyterlab/translation';

import { factsOf, type IFacts } from './facts';
import type { Action, Runs } from './runs';

/** Does what a card offers. */
export type Act = (
  action: Action,
  card: RunCard,
  facts: IFacts
) => Promise<void>;

/** Seconds before its end from which on a machine's countdown is more than a remark. */
const SOON = 120;

/** `14m 05s` */
function duration(seconds: number): string {
  const two = (value: number) => String(value).padStart(2, '0');
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor(seconds / 60) % 60;
  if (hours) {
    return `${String(hours)}h ${two(minutes)}m`;
  }
  return minutes
    ? `${String(minutes)}m ${two(seconds % 60)}s`
    : `${String(seconds)}s`;
}

export class RunCard extends RenderedHTML {
  constructor(
    options: IRenderMime.IRendererOptions,
    private readonly _runs: Runs,
    private readonly _trans: TranslationBundle,
    private readonly _act: Act
  ) {
    super({ ...options, mimeType: 'text/html' });
    this._buttons.className = 'mlinfra-card-buttons';
    this._left.className = 'mlinfra-card-left';
    _runs.changed.connect(this._offer, this);
  }

  override async render(model: IRenderMime.IMimeModel): Promise<void> {
    // Drawn again every second while it runs.
    const focused = this._buttons.contains(document.activeElement)
      ? (document.activeElement as HTMLElement)
      : null;
    await super.render(model);
    this._facts = factsOf(model.data);
    if (this._facts) {
      this._runs.found(this._facts);
    }
    this._offer();
    const line =
      this.node.querySelector('summary') ??
      this.node.querySelector('[role="status"] > :first-child');
    (line ?? this.node).append(this._left, this._buttons);
    focused?.focus({ preventScroll: true });
  }

  override dispose(): void {
    window.clearInterval(this._clock);
    this._runs.changed.disconnect(this._offer, this);
    super.dispose();
  }

  /** Counts down to the machine's end. */
  private _tick(): void {
    const stops = this._facts ? this._runs.stops(this._facts) : null;
    const left = Math.ceil(((stops ?? 0) - Date.now()) / 1000);
    this._left.textContent =
      left > 0 ? this._trans.__('stops in %1', duration(left)) : '';
    this._left.classList.toggle('mlinfra-mod-soon', left < SOON);
    if (left > 0 && !this._clock) {
      this._clock = window.setInterval(() => {
        this._tick();
      }, 1000);
    } else if (left <= 0 && this._clock) {
      window.clearInterval(this._clock);
      this._clock = 0;
      this._offer();
    }
  }

  private readonly _offer = (): void => {
    this._tick();
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
    const button = document.createElement('button');
    button.dataset['action'] = action;
    // Enter and space press it, instead of what they do in a notebook.
    button.dataset['lmSuppressShortcuts'] = 'true';
    const [label, title] = this._words(action);
    button.textContent = label;
    button.title = title;
    button.addEventListener('click', event => {
      event.preventDefault(); // the summary that it is in would open
      if (!this._facts) {
        return;
      }
      button.disabled = true;
      void this._act(action, this, this._facts).finally(() => {
        button.disabled = false;
      });
    });
    return button;
  }

  /** What is written on a button, and what its tooltip says. */
  private _words(action: Action): [string, string] {
    const run = this._facts?.run ?? '';
    const machine = this._facts?.machine ?? '';
    const trans = this._trans;
    switch (action) {
      case 'attach':
        return [
          trans.__('Attach'),
          trans.__('Bring %1 back: its output and its variables', run)
        ];
      case 'cancel':
        return [trans.__('Cancel'), trans.__('Interrupt or discard %1', run)];
      case 'start':
        return [trans.__('Start it'), trans.__('Start it at this price')];
      case 'refuse':
        return [trans.__('Do not start'), trans.__('The cell does not run')];
      case 'extend':
        return [
          trans.__('Extend'),
          trans.__('Keep %1 for at least 30 minutes more', machine)
        ];
    }
  }

  private readonly _left = document.createElement('span');
  private _clock = 0;
  private readonly _buttons = document.createElement('span');
  private _facts: IFacts | null = null;
}
