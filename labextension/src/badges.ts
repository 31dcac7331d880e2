/** A word in a corner of each cell about where it ran, made of the card among its outputs, so it is
 * there whenever the outputs are. */

import type { TranslationBundle } from '@jupyterlab/translation';

import { factsOf, hasEnded, type IFacts } from './facts';
import { duration, usd } from './format';
import type { ICell, INotebook } from './notebooks';

const CLASS = 'mlinfra-badge';

/** Brings the badges of all cells up to date. */
export function showBadges(
  notebook: INotebook,
  trans: TranslationBundle,
  wanted: boolean
): void {
  for (const cell of notebook.widgets) {
    const facts = wanted ? cardOf(cell) : null;
    show(cell, facts && hasEnded(facts) ? badge(facts, trans) : '', trans);
  }
}

/** `A10 on modal · 12s · $0.02` */
export function badge(facts: IFacts, trans: TranslationBundle): string {
  const place = facts.gpu
    ? trans.__('%1 on %2', facts.gpu, facts.target)
    : facts.target;
  const cost = facts.cost === null ? [] : [usd(facts.cost)];
  return [place, duration(facts.elapsed), ...cost].join(' · ');
}

function cardOf(cell: ICell): IFacts | null {
  const outputs = cell.model.outputs;
  for (let index = 0; outputs && index < outputs.length; index += 1) {
    const facts = factsOf(outputs.get(index).data);
    if (facts) {
      return facts;
    }
  }
  return null;
}

function show(cell: ICell, text: string, trans: TranslationBundle): void {
  const area = cell.node.querySelector('.jp-InputArea');
  let shown = area?.querySelector(`.${CLASS}`);
  if (!text) {
    shown?.remove();
    return;
  }
  if (!shown && area) {
    shown = document.createElement('span');
    shown.className = CLASS;
    shown.setAttribute('role', 'note');
    area.append(shown);
  }
  if (shown && shown.textContent !== text) {
    shown.textContent = text;
    shown.setAttribute('aria-label', trans.__('Last run: %1', text));
  }
}
