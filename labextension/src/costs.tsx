/** What was spent. */

import * as React from 'react';

import type { ISettings } from './form';
import { basename, usd } from './format';
import { todayAt, type ICosts } from './state';
import { Empty, useLatest, useNow, type IPanelProps } from './view';

const MOST = 8;

export function Costs(props: IPanelProps): React.JSX.Element {
  const { api, trans } = props;
  const state = useLatest(api);
  const now = useNow((state?.spent.usd_per_hour ?? 0) > 0);
  const [rows, setRows] = React.useState<ICosts | null>(null);
  const [budget, setBudget] = React.useState<number | null>(null);
  const ledger = state?.ledger ?? -1;
  const settings = state?.settings ?? -1;
  React.useEffect(() => {
    const first = new Date();
    first.setDate(1);
    const since = [
      first.getFullYear(),
      String(first.getMonth() + 1).padStart(2, '0'),
      '01'
    ].join('-');
    const timer = setTimeout(() => {
      api
        .get<ICosts>('costs', { by: 'notebook', since, limit: String(MOST) })
        .then(setRows, () => {
          setRows(null);
        });
      api.get<ISettings>('settings').then(
        found => {
          const set = found.items.find(it => it.name === 'month_budget');
          const amount = parseFloat((set?.value ?? '').replace('$', ''));
          setBudget(Number.isFinite(amount) ? amount : null);
        },
        () => {
          setBudget(null);
        }
      );
    }, 300);
    return () => {
      clearTimeout(timer);
    };
  }, [api, ledger, settings]);
  if (!state) {
    return <Empty>{trans.__('Looking…')}</Empty>;
  }
  const today = todayAt(state, now);
  const month = state.spent.usd_month + today - state.spent.usd_today;
  const share = budget ? month / budget : 0;
  return (
    <>
      <dl className="mlinfra-sums">
        <dt>{trans.__('now')}</dt>
        <dd>{usd(state.spent.usd_per_hour)}/h</dd>
        <dt>{trans.__('today')}</dt>
        <dd>{usd(today)}</dd>
        <dt>{trans.__('this month')}</dt>
        <dd>
          {usd(month)}
          {budget !== null && ` ${trans.__('of %1', usd(budget))}`}
        </dd>
        <dt>{trans.__('in all')}</dt>
        <dd>{usd(state.spent.usd_total)}</dd>
      </dl>
      {budget !== null && (
        <progress
          className="mlinfra-budget"
          data-near={share >= 0.8}
          max={1}
          value={Math.min(share, 1)}
          aria-label={trans.__('Share of the month’s budget that is spent')}
        />
      )}
      {state.spent.unpriced > 0 && (
        <div className="mlinfra-warning">
          {trans._n(
            'One machine runs whose price nobody states; it is not counted.',
            '%1 machines run whose price nobody states; they are not counted.',
            state.spent.unpriced
          )}
        </div>
      )}
      {rows && rows.items.length > 0 && (
        <table className="mlinfra-table">
          <caption>{trans.__('This month by notebook')}</caption>
          <tbody>
            {rows.items.map(row => (
              <tr key={row.labels['notebook']}>
                <td title={row.labels['notebook']}>
                  {basename(row.labels['notebook'] ?? '')}
                </td>
                <td>{usd(row.usd)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      <p className="mlinfra-faint" title={state.spent.basis}>
        {trans.__('Estimated by time and the prices of the offers.')}
      </p>
    </>
  );
}
