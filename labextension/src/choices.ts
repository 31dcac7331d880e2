/** Where cells can run, as a menu offers it. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { Api } from './api';
import { accelerator, usd } from './format';
import type { IChoice } from './magic';
import { cheapest, type IOffer, type ITarget } from './state';

export interface IOption {
  readonly label: string;
  /** Null: in the notebook's own kernel. */
  readonly choice: IChoice | null;
}

/** The options, the notebook's kernel first and then the cheapest GPUs. What cannot be found out is
 * left out. */
export async function options(
  api: Api,
  trans: TranslationBundle,
  most: number
): Promise<readonly IOption[]> {
  const [targets, offers] = await Promise.all([
    items<ITarget>(api, 'targets', {}),
    items<IOffer>(api, 'catalog', { limit: '500' })
  ]);
  const ready = targets.filter(target => target.ready);
  return [
    { label: trans.__('Here, in the notebook’s kernel'), choice: null },
    { label: trans.__('%1, with the defaults', '%%remote'), choice: {} },
    ...ready.map(({ name }) => ({
      label: trans.__('On %1', name),
      choice: { on: name }
    })),
    ...cheapest(offers)
      .slice(0, most)
      .map(offer => gpuOption(offer, ready, trans))
  ];
}

function gpuOption(
  offer: IOffer,
  ready: readonly ITarget[],
  trans: TranslationBundle
): IOption {
  const gpu = accelerator(offer.gpu, offer.count);
  const price = `${usd(offer.usd_per_hour)}/h`;
  const stale = offer.stale ? `, ${trans.__('stale')}` : '';
  return {
    label:
      trans.__('%1 · %2 at %3 (%4)', gpu, price, offer.vendor, offer.date) +
      stale,
    choice: ready.some(target => target.name === offer.vendor)
      ? { gpu, on: offer.vendor }
      : { gpu }
  };
}

async function items<T>(
  api: Api,
  path: string,
  query: Record<string, string>
): Promise<readonly T[]> {
  try {
    const found = await api.get<{ items: readonly T[] }>(path, query);
    return found.items;
  } catch {
    return [];
  }
}
