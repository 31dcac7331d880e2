/** What a run card tells, as the Python side publishes it beside the card's HTML. */

export const MIME_TYPE = 'application/vnd.mlinfra.run+json';

export interface IFacts {
  /** What `%remote attach` calls the run; empty if it cannot be attached. */
  readonly run: string;
  readonly phase: string;
  /** The name of the machine; empty if it has none yet. */
  readonly machine: string;
  /** When the machine stops if nothing more runs on it, in ms since the epoch. */
  readonly stops: number | null;
  /** Whether that is near, and nobody may be looking at the cell. */
  readonly ending: boolean;
  readonly note: string;
  /** Whether other cells can run while this one goes on. */
  readonly background: boolean;
  /** Whether the run has ended and nobody may be looking at its cell. */
  readonly notify: boolean;
  readonly target: string;
  readonly gpu: string;
  /** Seconds. */
  readonly elapsed: number;
  /** USD; null if nobody states a price. */
  readonly cost: number | null;
}

const ENDED = new Set(['done', 'error', 'interrupted', 'lost']);
// A notebook of someone else's may say anything, and the name goes into code.
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/;

/** The facts in a mime bundle that holds a card. */
export function factsOf(
  data: Readonly<Record<string, unknown>>
): IFacts | null {
  const facts = data[MIME_TYPE] as Record<string, unknown> | undefined;
  if (!facts) {
    return null;
  }
  const { run, phase, background, notify, machine, stops, note } = facts;
  const { elapsed, cost_micro_usd: cost } = facts;
  return {
    run: nameOf(run),
    phase: String(phase),
    machine: nameOf(machine),
    stops: typeof stops === 'number' ? stops * 1000 : null,
    ending: facts['ending'] === true,
    note: typeof note === 'string' ? note : '',
    background: background === true,
    notify: notify === true,
    target: text(facts['target']),
    gpu: text(facts['gpu']),
    elapsed: typeof elapsed === 'number' ? elapsed : 0,
    cost: typeof cost === 'number' ? cost / 1e6 : null
  };
}

function nameOf(value: unknown): string {
  return typeof value === 'string' && NAME.test(value) ? value : '';
}

function text(value: unknown): string {
  return typeof value === 'string' ? value : '';
}

export function hasEnded(facts: IFacts): boolean {
  return ENDED.has(facts.phase);
}
