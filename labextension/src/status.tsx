/** The item in the status bar: what runs costs now, and what was spent today. */

import { ReactWidget } from '@jupyterlab/ui-components';
import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import type { Api } from './api';
import { usd } from './format';
import { isIdle, todayAt } from './state';
import { useLatest, useNow, useProblem } from './view';

export class StatusItem extends ReactWidget {
  constructor(
    private readonly _api: Api,
    private readonly _trans: TranslationBundle,
    private readonly _open: () => void
  ) {
    super();
  }

  protected override render(): React.JSX.Element {
    return <Status api={this._api} trans={this._trans} open={this._open} />;
  }
}

function Status(props: {
  api: Api;
  trans: TranslationBundle;
  open: () => void;
}): React.JSX.Element | null {
  const { api, trans, open } = props;
  const state = useLatest(api);
  const running = state?.machines.length ?? 0;
  const problem = useProblem(api);
  const now = useNow(running > 0 && !problem);
  if (!state) {
    return null;
  }
  if (problem) {
    return (
      <button
        type="button"
        className="mlinfra-status"
        title={trans.__('The server does not answer: %1', problem)}
        onClick={open}
      >
        {trans.__('machines: unknown')}
      </button>
    );
  }
  const idle = state.machines.filter(isIdle);
  const today = usd(todayAt(state, now));
  const parts = running
    ? [
        trans._n('%1 machine', '%1 machines', running),
        `${usd(state.spent.usd_per_hour)}/h`,
        trans.__('%1 today', today)
      ]
    : [trans.__('no machine'), trans.__('%1 today', today)];
  const title = idle.length
    ? trans.__(
        'Idle, and still there: %1',
        idle.map(machine => machine.name).join(', ')
      )
    : trans.__('Machines, runs and costs');
  return (
    <button
      type="button"
      className="mlinfra-status"
      data-idle={idle.length > 0}
      title={title}
      aria-label={`${parts.join(', ')}. ${title}`}
      onClick={open}
    >
      {parts.join(' · ')}
    </button>
  );
}
