/** The output of a run that goes on elsewhere, as text. */

import type { TranslationBundle } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';

import type { Api } from './api';
import type { ILog, IRun } from './state';

const EVERY = 1000;

/** Shows what a run has printed, and what it prints, until it has ended or the view is closed. */
export class LogView extends Widget {
  constructor(
    private readonly _api: Api,
    private readonly _run: IRun,
    private readonly _trans: TranslationBundle
  ) {
    super();
    const name = _run.name || _run.kind;
    this.id = `mlinfra-log-${_run.id}`;
    this.addClass('mlinfra-log');
    this.title.label = _trans.__('Log of %1', name);
    this.title.closable = true;
    this._text.tabIndex = 0;
    this._text.setAttribute('role', 'log');
    this._text.setAttribute('aria-label', this.title.label);
    this.node.append(this._text);
    void this._follow();
  }

  override dispose(): void {
    clearTimeout(this._timer);
    super.dispose();
  }

  /** Whoever opens it by the keyboard wants to scroll it. */
  protected override onActivateRequest(): void {
    this._text.focus();
  }

  private async _follow(): Promise<void> {
    try {
      const log = await this._api.get<ILog>(`runs/${this._run.id}/log`, {
        after: String(this._next)
      });
      if (this.isDisposed) {
        return;
      }
      this._next = log.next;
      this._append(log.text);
      if (log.ended && !log.text) {
        this._append(`\n— ${this._trans.__('ended')}\n`);
        return;
      }
    } catch (error) {
      this._append(`\n— ${error instanceof Error ? error.message : '?'}\n`);
      return;
    }
    this._timer = setTimeout(() => void this._follow(), EVERY);
  }

  /** Stays at the end unless the user has scrolled up. */
  private _append(text: string): void {
    const { scrollTop, scrollHeight, clientHeight } = this._text;
    this._text.append(text);
    if (scrollTop + clientHeight >= scrollHeight - 8) {
      this._text.scrollTop = this._text.scrollHeight;
    }
  }

  private readonly _text = document.createElement('pre');
  private _next = 0;
  private _timer: ReturnType<typeof setTimeout> | undefined;
}
