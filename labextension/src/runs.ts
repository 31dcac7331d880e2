/** What the kernels of the open notebooks have told of their runs. */

import { ISignal, Signal } from '@lumino/signaling';

import { hasEnded, type IFacts } from './facts';

/** A thing that a card offers to do with its run, or with its machine. */
export type Action = 'attach' | 'cancel' | 'start' | 'refuse' | 'extend';

/** The run that was last on a machine, and when that stops without another one. */
interface ILatest {
  readonly kernel: string;
  readonly run: string;
  readonly stops: number | null;
}

export class Runs {
  /** Emitted when what cards offer may have changed. */
  get changed(): ISignal<this, undefined> {
    return this._changed;
  }

  /** Takes what a kernel has just published. */
  heard(kernel: string, facts: IFacts): void {
    if (facts.machine) {
      const { run, stops } = facts;
      const before = this._machines.get(facts.machine);
      this._machines.set(facts.machine, { kernel, run, stops });
      if (before?.run !== run || before.stops !== stops) {
        this._changed.emit(undefined);
      }
    }
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
    for (const [machine, latest] of this._machines) {
      if (latest.kernel === kernel) {
        this._machines.set(machine, { kernel, run: '', stops: null });
      }
    }
    this._changed.emit(undefined);
  }

  /** Takes a card that was there before this page: no kernel has told of it. */
  found(facts: IFacts): void {
    const { machine, run, stops } = facts;
    const latest = this._machines.get(machine);
    const later = latest?.kernel === '' && (latest.stops ?? 0) < (stops ?? 0);
    const gone = this._told !== null && !this._told.has(machine);
    if (machine && stops && !gone && (!latest || later)) {
      this._machines.set(machine, { kernel: '', run, stops });
      this._changed.emit(undefined);
    }
  }

  /** The server tells which machines there are: one that was stopped from elsewhere, or that is
   * only in an old card, counts down no longer. One that only its kernel knows may be there. */
  told(machines: ReadonlySet<string>): void {
    const before = this._told;
    this._told = machines;
    for (const [name, latest] of this._machines) {
      const known = latest.kernel === '' || before?.has(name);
      if (latest.stops && known && !machines.has(name)) {
        this._machines.set(name, { ...latest, stops: null });
        this._changed.emit(undefined);
      }
    }
  }

  /** When a card's machine stops, if its run was the last one on it. */
  stops(facts: IFacts): number | null {
    const latest = this._machines.get(facts.machine);
    return latest?.run === facts.run ? latest.stops : null;
  }

  /** What a card with these facts, which may be an old one, offers. */
  actions(facts: IFacts): readonly Action[] {
    if (facts.phase === 'confirm') {
      return ['start', 'refuse'];
    }
    if ((this.stops(facts) ?? 0) > Date.now()) {
      return ['extend', ...this._ofRun(facts)];
    }
    return this._ofRun(facts);
  }

  private _ofRun(facts: IFacts): readonly Action[] {
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

  private _told: ReadonlySet<string> | null = null;
  private _machines = new Map<string, ILatest>();
  private _latest = new Map<string, { kernel: string; facts: IFacts }>();
  private _changed = new Signal<this, undefined>(this);
}
