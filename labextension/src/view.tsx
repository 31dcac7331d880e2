/** What the panels share: re-drawing with the state and with time, and small parts. */

import { ReactWidget, type LabIcon } from '@jupyterlab/ui-components';
import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import type { Api } from './api';
import type { IMachine, IRun, IState, IUsage } from './state';

/** What panels let the user do. */
export interface IActs {
  stop(machine: IMachine): void;
  /** Opens a terminal on a machine; null where there are no terminals. */
  readonly terminal: ((machine: IMachine) => void) | null;
  extend(machine: IMachine): void;
  logs(run: IRun): void;
  attach(run: IRun): void;
  cancel(run: IRun): void;
  /** Puts a `%%remote` line on top of the active cell. */
  use(gpu: string, on: string): void;
  open(path: string): void;
}

export interface IPanelProps {
  readonly api: Api;
  readonly acts: IActs;
  readonly trans: TranslationBundle;
}

/** A panel that is drawn by a React component. */
export class PanelWidget extends ReactWidget {
  constructor(
    private readonly _component: React.FunctionComponent<IPanelProps>,
    private readonly _props: IPanelProps
  ) {
    super();
    this.addClass('mlinfra-panel');
  }

  protected override render(): React.JSX.Element {
    return <this._component {...this._props} />;
  }
}

/** The latest state, drawn again with each new one. */
export function useLatest(api: Api): IState | null {
  return useApi(api, it => it.state);
}

/** Why the server tells nothing right now, empty while it does; drawn again when that changes. */
export function useProblem(api: Api): string {
  return useApi(api, it => it.problem);
}

function useApi<T>(api: Api, pick: (api: Api) => T): T {
  return React.useSyncExternalStore(
    React.useCallback(
      redraw => {
        api.changed.connect(redraw);
        return () => api.changed.disconnect(redraw);
      },
      [api]
    ),
    () => pick(api)
  );
}

/** Unix time, drawn again every second while `ticking`. */
export function useNow(ticking: boolean): number {
  const [, tick] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    const timer = ticking ? setInterval(tick, 1000) : undefined;
    return () => {
      clearInterval(timer);
    };
  }, [ticking]);
  return Date.now() / 1000;
}

export function Action(props: {
  icon: LabIcon;
  label: string;
  title: string;
  onClick: () => void;
}): React.JSX.Element {
  const { label, title } = props;
  return (
    <button
      type="button"
      className="mlinfra-action"
      title={title}
      // Who speaks to the computer says what is written on the button.
      aria-label={title.startsWith(label) ? title : `${label}: ${title}`}
      onClick={props.onClick}
    >
      <props.icon.react tag="span" width="14px" height="14px" />
      {label}
    </button>
  );
}

/** What a newcomer can do about an empty list. */
export function Empty(props: { children: React.ReactNode }): React.JSX.Element {
  return <div className="mlinfra-empty">{props.children}</div>;
}

const WIDTH = 120;
const HEIGHT = 24;

/** The last minutes of shares between 0 and 1: what is busy as a line, memory as a dashed one. */
export function Sparkline(props: {
  busy: readonly number[];
  memory: readonly number[];
  label: string;
}): React.JSX.Element {
  return (
    <svg
      className="mlinfra-sparkline"
      role="img"
      aria-label={props.label}
      viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
      preserveAspectRatio="none"
    >
      <title>{props.label}</title>
      <polyline className="mlinfra-mod-memory" points={points(props.memory)} />
      <polyline points={points(props.busy)} />
    </svg>
  );
}

function points(values: readonly number[]): string {
  const step = WIDTH / Math.max(values.length - 1, 1);
  return values
    .map((value, index) => {
      const y = (1 - Math.min(Math.max(value, 0), 1)) * (HEIGHT - 2) + 1;
      return `${(index * step).toFixed(1)},${y.toFixed(1)}`;
    })
    .join(' ');
}

/** How busy the machine's most wanted part was: its GPUs, else its processor; 0 to 1. */
export function load(usage: IUsage): number {
  const { gpus } = usage;
  if (!gpus.length) {
    return usage.cpu / 100;
  }
  return gpus.reduce((sum, gpu) => sum + gpu.busy, 0) / gpus.length / 100;
}

/** How full the memory of the machine's GPUs was, without any its own; 0 to 1. */
export function memory(usage: IUsage): number {
  const parts = usage.gpus.length ? usage.gpus : [usage];
  const total = parts.reduce((sum, it) => sum + it.total, 0);
  return total ? parts.reduce((sum, it) => sum + it.used, 0) / total : 0;
}
