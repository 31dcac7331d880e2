/** The side bar, the item in the status bar, and what both can do. */

import {
  ILayoutRestorer,
  type JupyterFrontEnd,
  type JupyterFrontEndPlugin
} from '@jupyterlab/application';
import {
  Dialog,
  ICommandPalette,
  Notification,
  showDialog
} from '@jupyterlab/apputils';
import { IStatusBar } from '@jupyterlab/statusbar';
import {
  ITranslator,
  nullTranslator,
  type TranslationBundle
} from '@jupyterlab/translation';
import { offlineBoltIcon, SidePanel } from '@jupyterlab/ui-components';

import { Api, IApi } from './api';
import { Catalog } from './catalog';
import { Costs } from './costs';
import { load } from './defaults';
import { LogView } from './logs';
import { Machines } from './machines';
import { withChoice } from './magic';
import { activeCode, attach, currentNotebook } from './notebooks';
import { RunList } from './runlist';
import { Settings } from './settings';
import type { IMachine, IRun } from './state';
import { StatusItem } from './status';
import { PanelWidget, type IActs } from './view';

const OPEN = 'jupyter-mlinfra:open-panel';
const STOP_ALL = 'jupyter-mlinfra:stop-all';
const ID = 'jupyter-mlinfra-panel';
const EXTENSION_S = 1800;
/** JupyterLab's own; a server without terminals has none. */
const TERMINAL = 'terminal:create-new';

/** Provides what all parts know of the server. */
export const api: JupyterFrontEndPlugin<Api> = {
  id: 'jupyter-mlinfra:api',
  description: 'Follows what goes on with machines and runs.',
  provides: IApi,
  activate: (app: JupyterFrontEnd) => new Api(app.serviceManager.serverSettings)
};

const panel: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-mlinfra:panel',
  description: 'Shows machines, runs, costs, the catalog and settings.',
  autoStart: true,
  requires: [IApi],
  optional: [ICommandPalette, ILayoutRestorer, IStatusBar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    api: Api,
    palette: ICommandPalette | null,
    restorer: ILayoutRestorer | null,
    statusBar: IStatusBar | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load('jupyter-mlinfra');
    const props = { api, trans, acts: actsOf(app, api, trans) };
    const side = new SidePanel({ translator: translator ?? nullTranslator });
    side.id = ID;
    side.addClass('mlinfra-side');
    side.node.tabIndex = -1;
    side.title.icon = offlineBoltIcon;
    side.title.caption = trans.__('Machines and runs');
    for (const [component, label] of [
      [Machines, trans.__('Machines')],
      [RunList, trans.__('Runs')],
      [Costs, trans.__('Cost')],
      [Catalog, trans.__('Catalog')],
      [Settings, trans.__('Settings')]
    ] as const) {
      const widget = new PanelWidget(component, props);
      widget.title.label = label;
      side.addWidget(widget);
    }
    app.shell.add(side, 'left', { rank: 450, type: 'Machines' });
    restorer?.add(side, ID);

    app.commands.addCommand(OPEN, {
      label: trans.__('Show Machines, Runs and Costs'),
      execute: () => {
        app.shell.activateById(ID);
        side.node.focus(); // from where Tab goes on
      }
    });
    app.commands.addCommand(STOP_ALL, {
      label: trans.__('Stop All Machines…'),
      isEnabled: () => (api.state?.machines.length ?? 0) > 0,
      execute: () => stopAll(api, trans)
    });
    for (const command of [OPEN, STOP_ALL]) {
      palette?.addItem({ command, category: trans.__('Remote machines') });
    }
    statusBar?.registerStatusItem('jupyter-mlinfra:status', {
      item: new StatusItem(api, trans, () => {
        app.shell.activateById(ID);
      }),
      align: 'left',
      rank: 50
    });
  }
};

export default panel;

function actsOf(
  app: JupyterFrontEnd,
  api: Api,
  trans: TranslationBundle
): IActs {
  return {
    stop: machine => void stop(api, trans, [machine]),
    get terminal() {
      return app.commands.hasCommand(TERMINAL)
        ? (machine: IMachine) => void openTerminal(app, machine, trans)
        : null;
    },
    extend: machine => {
      const path = `machines/${machine.id}/extend`;
      void tell(api.post(path, { seconds: EXTENSION_S }));
    },
    logs: run => {
      show(app, api, trans, run);
    },
    attach: run => {
      const notebook = currentNotebook(app);
      if (notebook) {
        const below = notebook.content.activeCellIndex + 1;
        void attach(app, notebook, below, run.name);
      } else {
        Notification.info(trans.__('Open the notebook that is to have it.'));
      }
    },
    cancel: run => void tell(api.post(`runs/${run.id}/cancel`)),
    use: (gpu, on) => {
      const notebook = currentNotebook(app);
      const cell = activeCode(notebook);
      if (notebook && cell) {
        void load(notebook.context.sessionContext);
        const { sharedModel } = cell.model;
        const choice = { ...(gpu && { gpu }), ...(on && { on }) };
        sharedModel.setSource(withChoice(sharedModel.getSource(), choice));
        cell.activate();
      } else {
        Notification.info(trans.__('Go to a cell of a notebook first.'));
      }
    },
    open: path => void app.commands.execute('docmanager:open', { path })
  };
}

/** What is used of the widget that JupyterLab makes for a terminal. */
interface ITerminal {
  readonly content: {
    readonly session: {
      send(message: { type: 'stdin'; content: string[] }): void;
    };
  };
  readonly title: { label: string };
}

/** Opens a terminal of the server and types the command for a shell on a machine. */
async function openTerminal(
  app: JupyterFrontEnd,
  machine: IMachine,
  trans: TranslationBundle
): Promise<void> {
  try {
    const widget = (await app.commands.execute(TERMINAL)) as ITerminal;
    widget.content.session.send({
      type: 'stdin',
      content: [`${machine.shell}\r`]
    });
  } catch (error) {
    Notification.error(
      trans.__('No terminal could be opened: %1', String(error)),
      { autoClose: 8000 }
    );
  }
}

async function stopAll(api: Api, trans: TranslationBundle): Promise<void> {
  await stop(api, trans, api.state?.machines ?? []);
}

/** Asks before work is lost. */
async function stop(
  api: Api,
  trans: TranslationBundle,
  machines: readonly IMachine[]
): Promise<void> {
  const ids = new Set(machines.map(machine => machine.id));
  const runs = (api.state?.runs ?? []).filter(run => ids.has(run.machine_id));
  const names = machines.map(machine => machine.name).join(', ');
  if (runs.length || machines.length > 1) {
    const { button } = await showDialog({
      title: trans.__('Stop %1?', names),
      body: runs.length
        ? trans._n(
            'One run is lost with its output and variables.',
            '%1 runs are lost with their outputs and variables.',
            runs.length
          )
        : trans.__('Nothing runs there.'),
      buttons: [
        Dialog.cancelButton(),
        Dialog.warnButton({ label: trans.__('Stop') })
      ]
    });
    if (!button.accept) {
      return;
    }
  }
  await Promise.all(
    machines.map(machine => tell(api.post(`machines/${machine.id}/stop`)))
  );
}

/** Shows what became of an act. */
async function tell(act: Promise<string>): Promise<void> {
  try {
    Notification.success(await act, { autoClose: 4000 });
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    Notification.error(text, { autoClose: false });
  }
}

function show(
  app: JupyterFrontEnd,
  api: Api,
  trans: TranslationBundle,
  run: IRun
): void {
  const view = new LogView(api, run, trans);
  // Which widgets are down there, JupyterLab tells only from 4.3 on.
  if (document.getElementById(view.id)) {
    view.dispose();
  } else {
    app.shell.add(view, 'down');
    if (!view.parent) {
      app.shell.add(view, 'right'); // Notebook before 7.3 has nothing down there
    }
  }
  app.shell.activateById(`mlinfra-log-${run.id}`);
}
