/** Where cells can run, and what accelerators cost. */

import { FilterBox } from '@jupyterlab/ui-components';
import * as React from 'react';

import { accelerator } from './format';
import type { IOffer, ITarget } from './state';
import { Empty, type IPanelProps } from './view';

interface IOffers {
  readonly items: readonly IOffer[];
}

interface ITargets {
  readonly items: readonly ITarget[];
}

export function Catalog(props: IPanelProps): React.JSX.Element {
  const { api, acts, trans } = props;
  const [offers, setOffers] = React.useState<readonly IOffer[] | null>(null);
  const [targets, setTargets] = React.useState<readonly ITarget[]>([]);
  const [problem, setProblem] = React.useState('');
  const [matches, setMatches] = React.useState<(text: string) => boolean>(
    () => () => true
  );
  React.useEffect(() => {
    api.get<IOffers>('catalog', { limit: '500' }).then(
      found => {
        setOffers(found.items);
      },
      (error: unknown) => {
        setProblem(String(error));
      }
    );
    api.get<ITargets>('targets').then(
      found => {
        setTargets(found.items);
      },
      (error: unknown) => {
        setProblem(String(error));
      }
    );
  }, [api]);
  if (problem) {
    return <Empty>{problem}</Empty>;
  }
  const names = new Set(targets.map(target => target.name));
  const shown = (offers ?? []).filter(it =>
    matches(`${it.gpu} ${it.vendor} ${it.memory_gb ?? ''}GB ${it.region}`)
  );
  return (
    <>
      <div>
        {trans.__('Ready:')}{' '}
        <b className="mlinfra-ready">
          {targets
            .filter(target => target.ready)
            .map(target => target.name)
            .join(', ')}
        </b>
      </div>
      <details className="mlinfra-faint">
        <summary>{trans.__('How to set others up')}</summary>
        <ul className="mlinfra-list">
          {targets
            .filter(target => !target.ready)
            .map(target => (
              <li key={target.name}>
                <b>{target.name}</b> {target.problem} {target.mend}
              </li>
            ))}
        </ul>
      </details>
      <FilterBox
        placeholder={trans.__('Filter by GPU, memory or provider')}
        useFuzzyFilter={false}
        updateFilter={filter => {
          setMatches(() => (text: string) => filter(text) !== null);
        }}
      />
      <table className="mlinfra-table mlinfra-offers">
        <thead>
          <tr>
            <th scope="col">{trans.__('GPU')}</th>
            <th scope="col">{trans.__('at')}</th>
            <th scope="col">{trans.__('USD/h')}</th>
            <td />
          </tr>
        </thead>
        <tbody>
          {shown.map((offer, index) => {
            const gpu = accelerator(offer.gpu, offer.count);
            const on = names.has(offer.vendor) ? offer.vendor : '';
            return (
              <tr key={index} title={`${offer.source}, ${offer.date}`}>
                <td>
                  {gpu}{' '}
                  <span className="mlinfra-faint">
                    {offer.memory_gb === null ? '' : `${offer.memory_gb} GB`}
                  </span>
                </td>
                <td>
                  {offer.vendor}
                  {offer.spot ? ` ${trans.__('spot')}` : ''}
                </td>
                <td>
                  {offer.usd_per_hour.toFixed(2)}
                  {offer.stale ? ` ${trans.__('stale')}` : ''}
                </td>
                <td>
                  <button
                    type="button"
                    className="mlinfra-action"
                    title={trans.__('Use %1 in the active cell', gpu)}
                    aria-label={trans.__('Use %1 in the active cell', gpu)}
                    onClick={() => {
                      acts.use(gpu, on);
                    }}
                  >
                    {trans.__('Use')}
                  </button>
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
      {offers && !shown.length && (
        <Empty>{trans.__('Nothing in the catalog fits.')}</Empty>
      )}
    </>
  );
}
