/** Runs: those that go on or wait to be collected, then those that were. */

import { closeIcon, downloadIcon, listIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import { basename, counted, duration, usd } from './format';
import { Notebook } from './machines';
import type { IPage, IProgress, IRun } from './state';
import { Action, Empty, useLatest, useNow, type IPanelProps } from './view';

const PAGE = 100;

export function RunList(props: IPanelProps): React.JSX.Element {
  const { api, trans } = props;
  const state = useLatest(api);
  const going = state?.runs ?? [];
  const now = useNow(going.some(run => run.seconds === null));
  const known = new Set(going.map(run => run.id));
  const { past, more, problem } = usePast(props, state?.ledger ?? -1);
  const earlier = past.filter(
    run => !known.has(run.id) && run.seconds !== null
  );
  if (state && !going.length && !earlier.length && !problem) {
    return (
      <Empty>
        <p>{trans.__('No cell has run on a machine yet.')}</p>
        <p>
          {trans.__('With')} <code>%%remote detach name=train</code>{' '}
          {trans.__(
            'a cell goes on by itself, also when this computer is off; it waits here until you attach it.'
          )}
        </p>
      </Empty>
    );
  }
  return (
    <>
      {going.length > 0 && (
        <ul className="mlinfra-list" aria-label={trans.__('Runs that go on')}>
          {going.map(run => (
            <Run key={run.id} {...props} run={run} now={now} />
          ))}
        </ul>
      )}
      {earlier.length > 0 && (
        <ul className="mlinfra-list" aria-label={trans.__('Earlier runs')}>
          {earlier.map(run => (
            <Past key={run.id} run={run} />
          ))}
        </ul>
      )}
      {problem && <div className="mlinfra-warning">{problem}</div>}
      {more && (
        <button type="button" className="mlinfra-action" onClick={more}>
          {trans.__('Show earlier ones')}
        </button>
      )}
    </>
  );
}

/** Pages of all runs, the first one read again when the ledger changes. */
function usePast(
  { api }: IPanelProps,
  ledger: number
): {
  past: readonly IRun[];
  more: (() => void) | null;
  problem: string;
} {
  const [past, setPast] = React.useState<readonly IRun[]>([]);
  const [next, setNext] = React.useState('');
  const [problem, setProblem] = React.useState('');
  const read = React.useCallback(
    (cursor: string) => {
      api
        .get<IPage<IRun>>('runs', { limit: String(PAGE), cursor })
        .then(page => {
          setPast(before => merged(before, page.items));
          setNext(known => (cursor || !known ? page.next : known));
          setProblem('');
        })
        .catch((error: unknown) => {
          setProblem(String(error));
        });
    },
    [api]
  );
  React.useEffect(() => {
    if (ledger < 0) {
      return;
    }
    const timer = setTimeout(() => {
      read('');
    }, 300);
    return () => {
      clearTimeout(timer);
    };
  }, [ledger, read]);
  const more = next
    ? () => {
        read(next);
      }
    : null;
  return { past, more, problem };
}

function merged(
  before: readonly IRun[],
  news: readonly IRun[]
): readonly IRun[] {
  const all = new Map([...before, ...news].map(run => [run.id, run]));
  return [...all.values()].sort((a, b) => b.opened_at - a.opened_at);
}

function Run(
  props: IPanelProps & { run: IRun; now: number }
): React.JSX.Element {
  const { acts, trans, run, now } = props;
  const name = run.name || run.kind;
  const seconds = run.seconds ?? now - run.opened_at;
  return (
    <li className="mlinfra-item" data-status={run.status}>
      <div className="mlinfra-line">
        <b>{name}</b>
        <span>{words(props, run)}</span>
      </div>
      <div className="mlinfra-line mlinfra-faint">
        <span>
          {duration(seconds)}
          {run.usd === null ? '' : ` · ${usd(run.usd)}`}
        </span>
        <span>{trans.__('on %1', run.machine)}</span>
      </div>
      {run.progress && <Progress {...props} progress={run.progress} />}
      {run.title && <code className="mlinfra-title">{run.title}</code>}
      <Notebook {...props} path={run.path} notebook={run.notebook} />
      {run.live && (
        <div className="mlinfra-actions">
          <Action
            icon={listIcon}
            label={trans.__('Logs')}
            title={trans.__('Show what %1 has printed', name)}
            onClick={() => {
              acts.logs(run);
            }}
          />
          {!run.followed && (
            <Action
              icon={downloadIcon}
              label={trans.__('Attach')}
              title={trans.__(
                'Bring %1 into the current notebook: its output and its variables',
                name
              )}
              onClick={() => {
                acts.attach(run);
              }}
            />
          )}
          <Action
            icon={closeIcon}
            label={
              run.seconds === null ? trans.__('Cancel') : trans.__('Discard')
            }
            title={trans.__('Interrupt or discard %1', name)}
            onClick={() => {
              acts.cancel(run);
            }}
          />
        </div>
      )}
    </li>
  );
}

/** How far the run's outermost loop is, as a bar where its end is known. */
function Progress(
  props: IPanelProps & { progress: IProgress }
): React.JSX.Element {
  const { trans, progress } = props;
  const { label, done, total, left } = progress;
  return (
    <div className="mlinfra-progress">
      {total > 0 && (
        <progress
          max={total}
          value={done}
          aria-label={label || trans.__('Progress')}
        />
      )}
      <span className="mlinfra-faint">
        {label && `${label}: `}
        {counted(progress)}
        {left !== null && ` · ${trans.__('about %1 left', duration(left))}`}
      </span>
    </div>
  );
}

function words({ trans }: IPanelProps, run: IRun): string {
  if (run.seconds !== null) {
    return trans.__('%1, not collected', run.status);
  }
  if (run.status === 'queued') {
    return trans.__('waits');
  }
  return run.followed || !run.live
    ? trans.__('runs')
    : trans.__('runs, detached');
}

/** Made once: it costs more than all else in a row. */
const WHEN = new Intl.DateTimeFormat(undefined, {
  dateStyle: 'short',
  timeStyle: 'short'
});

/** Drawn anew only when its run has changed: there may be a thousand of them. */
const Past = React.memo(function Past(props: { run: IRun }): React.JSX.Element {
  const { run } = props;
  const place = run.notebook ? basename(run.notebook) : run.kind;
  return (
    <li className="mlinfra-past" data-status={run.status} title={run.machine}>
      <span className="mlinfra-faint">{WHEN.format(1000 * run.opened_at)}</span>
      <span className="mlinfra-place">{place}</span>
      <span>{run.status}</span>
      <span>{duration(run.seconds ?? 0)}</span>
      <span>{run.usd === null ? '?' : usd(run.usd)}</span>
    </li>
  );
});
