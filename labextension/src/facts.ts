/** What a run card tells, as the Python side publishes it beside the card's HTML. */

export const MIME_TYPE = 'application/vnd.mlinfra.run+json';

export interface IFacts {
  /** What `%remote attach` calls the run; empty if it cannot be attached. */
  readonly run: string;
  readonly phase: string;
  /** Whether other cells can run while this one goes on. */
  readonly background: boolean;
  /** Whether the run has ended and nobody may be looking at its cell. */
  readonly notify: boolean;
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
  const { run, phase, background, notify } = facts;
  return {
    run: typeof run === 'string' && NAME.test(run) ? run : '',
    phase: String(phase),
    background: background === true,
    notify: notify === true
  };
}

export function hasEnded(facts: IFacts): boolean {
  return ENDED.has(facts.phase);
}
