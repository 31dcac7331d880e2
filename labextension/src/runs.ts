/** What the kernels of the open notebooks have told of their runs. */

import { ISignal, Signal } from '@lumino/signaling';

import { hasEnded, type IFacts } from './facts';

/** A thing that a card offers to do with its run. */
export type Action = 'attach' | 'cancel';

export class Runs {
  /** Emitted when what cards offer may have changed. */
  get changed(): ISignal<this, undefined> {
    return this._changed;
  }

  /** Takes what a kernel has just published. */
  heard(kernel: string, facts: IFacts): void {
    if (facts.run) {
      const before = this._latest.get(facts.run);
      this._latest.set(facts.run, { kernel, facts });
      if (before?.kernel !== kernel || before.facts.phase !== facts.phase) {
        this._changed.emit(undefined);
      }
    }
  }

  /** This kernel has ended: it will bring no run to its end. */
  forget(kernel: string): void {
    for (const [run, latest] of this._latest) {
      if (latest.kernel === kernel) {
        this._latest.delete(run);
      }
    }
    this._changed.emit(undefined);
  }

  /** What a card with these facts, which may be an old one, offers. */
  actions(facts: IFacts): readonly Action[] {
    if (!facts.run || hasEnded(facts)) {
      return [];
    }
    const latest = this._latest.get(facts.run)?.facts;
    if (!latest || latest.phase === 'detached') {
      return ['attach', 'cancel'];
    }
    // It has been attached, or a cell of a living kernel waits for it.
    return latest.background && !hasEnded(latest) ? ['cancel'] : [];
  }

  private _latest = new Map<string, { kernel: string; facts: IFacts }>();
  private _changed = new Signal<this, undefined>(this);
}
