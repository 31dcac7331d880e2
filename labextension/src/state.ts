/** What the server extension answers, as `/mlinfra/openapi.json` describes it. */

export interface IGpuUsage {
  readonly busy: number;
  readonly used: number;
  readonly total: number;
}

/** Of a whole machine at an instant: `cpu` in percent, memory in bytes. */
export interface IUsage {
  readonly cpu: number;
  readonly used: number;
  readonly total: number;
  readonly gpus: readonly IGpuUsage[];
}

/** When a machine ends by itself (Unix time). */
export interface IEnd {
  readonly cause: string;
  readonly at: number;
  readonly reason: string;
}

export interface IMachine {
  readonly id: string;
  readonly name: string;
  readonly target: string;
  readonly gpu: string;
  readonly gpu_count: number;
  readonly state: 'starting' | 'running' | 'ended';
  readonly notebook: string;
  readonly path: string;
  readonly intended_at: number;
  readonly started_at: number | null;
  readonly usd_per_hour: number | null;
  readonly price: string;
  /** At the state's `now`. */
  readonly usd: number | null;
  readonly reachable: boolean | null;
  readonly problem: string;
  readonly busy: boolean | null;
  readonly idle_seconds: number | null;
  readonly ends: readonly IEnd[];
  readonly usage: readonly IUsage[];
  /** What it waits for while it starts. */
  readonly waits: string;
  /** The command that opens a shell on it in a terminal of the server. */
  readonly shell: string;
}

/** A run's outermost loop; `total` is 0 and `left` (seconds) null where nobody knows. */
export interface IProgress {
  readonly label: string;
  readonly unit: string;
  readonly done: number;
  readonly total: number;
  readonly left: number | null;
}

export interface IRun {
  readonly id: string;
  readonly name: string;
  readonly kind: string;
  readonly title: string;
  readonly machine: string;
  readonly machine_id: string;
  readonly target: string;
  readonly notebook: string;
  readonly path: string;
  readonly status: string;
  readonly opened_at: number;
  readonly seconds: number | null;
  readonly usd: number | null;
  readonly live: boolean;
  readonly followed: boolean;
  readonly progress: IProgress | null;
}

export interface ISpent {
  readonly usd_per_hour: number;
  readonly unpriced: number;
  readonly usd_today: number;
  readonly usd_month: number;
  readonly usd_total: number;
  readonly basis: string;
}

export interface IState {
  readonly now: number;
  /** Changes with every record of the ledger. */
  readonly ledger: number;
  /** Changes with the user's `config.toml`. */
  readonly settings: number;
  readonly machines: readonly IMachine[];
  readonly runs: readonly IRun[];
  readonly spent: ISpent;
}

export interface IPage<T> {
  readonly items: readonly T[];
  readonly next: string;
}

export interface ILog {
  readonly text: string;
  readonly next: number;
  readonly ended: boolean;
  readonly dropped: boolean;
}

export interface IOffer {
  readonly gpu: string;
  readonly count: number;
  readonly memory_gb: number | null;
  readonly vendor: string;
  readonly region: string;
  readonly spot: boolean;
  readonly usd_per_hour: number;
  readonly source: string;
  readonly date: string;
  readonly stale: boolean;
}

export interface ITarget {
  readonly name: string;
  readonly provider: string;
  readonly ready: boolean;
  readonly problem: string;
  readonly mend: string;
}

export interface ICosts {
  readonly items: readonly {
    readonly labels: Readonly<Record<string, string>>;
    readonly usd: number;
    readonly seconds: number;
    readonly runs: number;
  }[];
  readonly total: number;
  readonly usd: number;
}

/** Seconds without work after which a running machine counts as idle for the eye. */
const STILL = 60;

/** Whether a machine runs, costs and does nothing. */
export function isIdle(machine: IMachine): boolean {
  return (
    machine.state === 'running' &&
    machine.busy === false &&
    (machine.idle_seconds ?? 0) > STILL
  );
}

/** What a machine has cost at an instant after the state was taken. */
export function costAt(
  machine: IMachine,
  state: IState,
  now: number
): number | null {
  if (machine.usd === null || machine.state !== 'running') {
    return machine.usd;
  }
  const hours = Math.max(now - state.now, 0) / 3600;
  return machine.usd + (machine.usd_per_hour ?? 0) * hours;
}

/** What was spent today at an instant after the state was taken. */
export function todayAt(state: IState, now: number): number {
  const hours = Math.max(now - state.now, 0) / 3600;
  return state.spent.usd_today + state.spent.usd_per_hour * hours;
}

/** The next of a machine's own ends that nothing postpones meanwhile. */
export function nextEnd(machine: IMachine): IEnd | null {
  const coming = machine.ends.filter(
    end => end.cause !== 'lease' && !(end.cause === 'idle' && machine.busy)
  );
  return coming[0] ?? null;
}

/** The cheapest offer of one of each GPU, the cheapest GPU first. */
export function cheapest(offers: readonly IOffer[]): readonly IOffer[] {
  const best = new Map<string, IOffer>();
  for (const offer of offers) {
    const known = best.get(offer.gpu);
    if (
      offer.count === 1 &&
      !offer.spot &&
      (!known || offer.usd_per_hour < known.usd_per_hour)
    ) {
      best.set(offer.gpu, offer);
    }
  }
  return [...best.values()].sort((a, b) => a.usd_per_hour - b.usd_per_hour);
}
