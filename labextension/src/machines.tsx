/** The machines that run. */

import { addIcon, stopIcon, terminalIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import { accelerator, basename, duration, size, usd } from './format';
import { costAt, isIdle, nextEnd, type IMachine, type IState } from './state';
import {
  Action,
  Empty,
  load,
  memory,
  Sparkline,
  useLatest,
  useNow,
  useProblem,
  type IPanelProps
} from './view';

export function Machines(props: IPanelProps): React.JSX.Element {
  const { api, acts, trans } = props;
  const state = useLatest(api);
  const problem = useProblem(api);
  const ticking = useNow(!problem && (state?.machines.length ?? 0) > 0);
  const silence = problem && (
    <div role="alert" className="mlinfra-warning">
      {trans.__('The server does not answer: %1', problem)}
    </div>
  );
  if (!state) {
    return <Empty>{silence || trans.__('Looking…')}</Empty>;
  }
  if (problem && !state.machines.length) {
    return <Empty>{silence}</Empty>; // by now one may run
  }
  if (!state.machines.length) {
    return (
      <Empty>
        <p>{trans.__('No machine runs, and nothing costs.')}</p>
        <p>
          {trans.__('A cell runs on a machine when its first line is')}{' '}
          <code>%%remote</code>
          {trans.__(
            ': alone in a process on this computer, with gpu=A10 on the cheapest machine that has one.'
          )}
        </p>
        <button
          type="button"
          className="mlinfra-action"
          onClick={() => {
            acts.use('', '');
          }}
        >
          {trans.__('Put it on top of the active cell')}
        </button>
      </Empty>
    );
  }
  return (
    <>
      {silence}
      <ul
        className={problem ? 'mlinfra-list mlinfra-mod-old' : 'mlinfra-list'}
        aria-label={trans.__('Machines')}
      >
        {state.machines.map(machine => (
          <Machine
            key={machine.id}
            {...props}
            machine={machine}
            state={state}
            now={problem ? state.now : ticking} // what came since, nobody knows
          />
        ))}
      </ul>
    </>
  );
}

function Machine(
  props: IPanelProps & { machine: IMachine; state: IState; now: number }
): React.JSX.Element {
  const { acts, trans, machine, state, now } = props;
  const what = accelerator(machine.gpu, machine.gpu_count);
  const idle = isIdle(machine);
  const up = duration(now - (machine.started_at ?? machine.intended_at));
  const cost = costAt(machine, state, now);
  return (
    <li className="mlinfra-item" data-idle={idle} data-state={machine.state}>
      <div className="mlinfra-line">
        <b>{what}</b>
        <span className="mlinfra-faint">
          {trans.__('on %1', machine.target)} · {machine.name}
        </span>
      </div>
      <div className="mlinfra-line">
        <span>
          {machine.state === 'starting'
            ? trans.__('starting for %1', up)
            : trans.__('up %1', up)}
        </span>
        <span title={machine.price}>
          {cost === null
            ? trans.__('price unknown')
            : `${usd(cost)} (${usd(machine.usd_per_hour ?? 0)}/h)`}
        </span>
      </div>
      {machine.waits && (
        <div className="mlinfra-line mlinfra-faint">{machine.waits}</div>
      )}
      <Notebook {...props} path={machine.path} notebook={machine.notebook} />
      <Usage {...props} />
      <Ending {...props} idle={idle} />
      <div className="mlinfra-actions">
        <Action
          icon={stopIcon}
          label={trans.__('Stop')}
          title={trans.__('Stop %1', machine.name)}
          onClick={() => {
            acts.stop(machine);
          }}
        />
        {machine.reachable && (
          <Action
            icon={addIcon}
            label={trans.__('30 min')}
            title={trans.__('Keep %1 for at least 30 minutes', machine.name)}
            onClick={() => {
              acts.extend(machine);
            }}
          />
        )}
        {machine.shell && acts.terminal && (
          <Action
            icon={terminalIcon}
            label={trans.__('Terminal')}
            title={trans.__('Open a terminal on %1', machine.name)}
            onClick={() => {
              acts.terminal?.(machine);
            }}
          />
        )}
      </div>
    </li>
  );
}

/** The notebook that something belongs to; opens it if the server has it. */
export function Notebook(
  props: IPanelProps & { path: string; notebook: string }
): React.JSX.Element | null {
  const { acts, trans, path, notebook } = props;
  if (!notebook) {
    return null;
  }
  const name = basename(notebook);
  return path ? (
    <button
      type="button"
      className="mlinfra-link"
      title={trans.__('Open %1', path)}
      onClick={() => {
        acts.open(path);
      }}
    >
      {name}
    </button>
  ) : (
    <span className="mlinfra-faint">{name}</span>
  );
}

function Usage(
  props: IPanelProps & { machine: IMachine }
): React.JSX.Element | null {
  const { trans, machine } = props;
  const latest = machine.usage.at(-1);
  if (!latest) {
    return null;
  }
  const percent = (share: number) => `${Math.round(100 * share)} %`;
  const busy = percent(load(latest));
  const part = (used: number, total: number) =>
    `${size(used)} / ${size(total)}`;
  const ram = `RAM ${part(latest.used, latest.total)}`;
  const text = latest.gpus.length
    ? `GPU ${busy} · VRAM ${latest.gpus.map(it => part(it.used, it.total)).join(', ')} · ${ram}`
    : `CPU ${busy} · ${ram}`;
  return (
    <div className="mlinfra-line">
      <Sparkline
        busy={machine.usage.map(load)}
        memory={machine.usage.map(memory)}
        label={trans.__(
          'The last minutes: use (line, now %1) and memory (dashes, now %2)',
          busy,
          percent(memory(latest))
        )}
      />
      <span className="mlinfra-faint">{text}</span>
    </div>
  );
}

function Ending(
  props: IPanelProps & { machine: IMachine; idle: boolean; now: number }
): React.JSX.Element | null {
  const { trans, machine, idle, now } = props;
  if (machine.problem) {
    return <div className="mlinfra-warning">{machine.problem}</div>;
  }
  const end = nextEnd(machine);
  if (machine.busy && !end) {
    return <div className="mlinfra-faint">{trans.__('busy')}</div>;
  }
  if (!end) {
    return null;
  }
  const left = duration(end.at - now);
  const text = {
    idle: trans.__('nothing runs: stops in %1', left),
    time: trans.__('stops in %1: its time is over then', left),
    budget: trans.__('stops in %1: its budget is spent then', left)
  }[end.cause];
  return (
    <div className={idle ? 'mlinfra-warning' : 'mlinfra-faint'}>
      {machine.busy ? `${trans.__('busy')} · ` : ''}
      {text ?? end.reason}
    </div>
  );
}
