/** In notebooks: where a cell runs, chosen in its toolbar, by a command or for all of them. */

import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import {
  ICommandPalette,
  IToolbarWidgetRegistry,
  Notification
} from '@jupyterlab/apputils';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import {
  ITranslator,
  nullTranslator,
  type TranslationBundle
} from '@jupyterlab/translation';
import { Menu, Widget } from '@lumino/widgets';

import { IApi, type Api } from './api';
import { showBadges } from './badges';
import { options } from './choices';
import {
  defaultOf,
  keepTold,
  load,
  metadataChanged,
  setDefault
} from './defaults';
import { withChoice, type IChoice } from './magic';
import {
  activeCode,
  asNotebook,
  currentNotebook,
  type ICell,
  type INotebook,
  type NotebookPanel
} from './notebooks';
import { CellTarget, NotebookTarget } from './picker';

const ID = 'jupyter-mlinfra:notebook';
const APPLY = 'jupyter-mlinfra:apply-target';
const BADGES_MS = 200;

/** What a choice is for; each but `default` is also a command. */
type Scope = 'cell' | 'run' | 'below' | 'default';

interface IApply {
  readonly scope: Scope;
  readonly label: string;
  readonly choice: IChoice | null;
}

const plugin: JupyterFrontEndPlugin<void> = {
  id: ID,
  description: 'Chooses where cells run, and says where they ran.',
  autoStart: true,
  requires: [IApi],
  optional: [
    ICommandPalette,
    ISettingRegistry,
    IToolbarWidgetRegistry,
    ITranslator
  ],
  activate: (
    app: JupyterFrontEnd,
    api: Api,
    palette: ICommandPalette | null,
    settings: ISettingRegistry | null,
    toolbars: IToolbarWidgetRegistry | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load('jupyter-mlinfra');
    const wishes = { badges: true, offers: 12 };
    const open = async (scope: Scope, near?: Element | null) => {
      const rows = await options(api, trans, wishes.offers);
      const menu = new Menu({ commands: app.commands });
      menu.addClass('mlinfra-menu');
      for (const { label, choice } of rows) {
        if (scope !== 'default' || choice) {
          menu.addItem({
            command: APPLY,
            args: { scope, label, choice: choice && { ...choice } }
          });
        }
      }
      if (scope === 'default') {
        const label = trans.__('Whatever the settings say');
        menu.addItem({ command: APPLY, args: { scope, label, choice: null } });
      }
      const before = document.activeElement;
      menu.aboutToClose.connect(() => {
        if (near) {
          currentNotebook(app)?.content.activate(); // the next key is not for the button
        } else if (before instanceof HTMLElement) {
          before.focus();
        }
      });
      const at = near?.getBoundingClientRect();
      menu.open(at?.left ?? 100, at?.bottom ?? 100);
      menu.activeIndex = 0;
    };

    addCommands(app, trans, palette, open);
    toolbars?.addFactory('Cell', 'mlinfra-target', (cell: Widget) => {
      const { model } = cell as ICell;
      return model.type === 'code'
        ? new CellTarget(
            model.sharedModel,
            trans,
            near => void open('cell', near)
          )
        : new Widget();
    });
    toolbars?.addFactory('Notebook', 'mlinfra-default', (panel: Widget) => {
      const notebook = asNotebook(panel);
      return new NotebookTarget(
        () => defaultOf(notebook),
        metadataChanged(notebook),
        trans,
        near => void open('default', near)
      );
    });

    const shown = new Set<() => void>();
    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: widget => {
        const panel = asNotebook(widget);
        const redraw = () => {
          showBadges(panel.content, trans, wishes.badges);
        };
        shown.add(redraw);
        panel.disposed.connect(() => shown.delete(redraw));
        keepTold(panel);
        watch(panel, redraw);
      }
    });
    void settings?.load(ID).then(loaded => {
      const take = () => {
        wishes.badges = loaded.get('badges').composite !== false;
        wishes.offers = Number(loaded.get('offers').composite ?? 12);
        for (const redraw of shown) {
          redraw();
        }
      };
      loaded.changed.connect(take);
      take();
    });
  }
};

export default plugin;

/** Draws badges again, not more often than a few times a second. */
function watch(panel: NotebookPanel, redraw: () => void): void {
  let waiting = false;
  const soon = () => {
    if (!waiting && !panel.isDisposed) {
      waiting = true;
      setTimeout(() => {
        waiting = false;
        if (!panel.isDisposed) {
          redraw();
        }
      }, BADGES_MS);
    }
  };
  panel.context.model.contentChanged.connect(soon);
  void panel.context.ready.then(soon);
}

function addCommands(
  app: JupyterFrontEnd,
  trans: TranslationBundle,
  palette: ICommandPalette | null,
  open: (scope: Scope, near?: Element | null) => Promise<void>
): void {
  const { commands } = app;
  commands.addCommand(APPLY, {
    label: args => (args as unknown as IApply).label,
    execute: args => apply(app, trans, args as unknown as IApply)
  });
  const rows: readonly [string, Scope, string][] = [
    ['choose-target', 'cell', trans.__('Choose Where This Cell Runs…')],
    ['run-on', 'run', trans.__('Run This Cell on…')],
    ['run-below-on', 'below', trans.__('Run All Below on…')],
    ['choose-default', 'default', trans.__('Choose Where %1 Runs…', '%%remote')]
  ];
  for (const [name, scope, label] of rows) {
    const command = `jupyter-mlinfra:${name}`;
    commands.addCommand(command, {
      label,
      isEnabled: () => currentNotebook(app) !== null,
      execute: () => open(scope, activeCode(currentNotebook(app))?.node)
    });
    palette?.addItem({ command, category: trans.__('Remote machines') });
  }
}

async function apply(
  app: JupyterFrontEnd,
  trans: TranslationBundle,
  { scope, choice }: IApply
): Promise<void> {
  const panel = currentNotebook(app);
  if (!panel) {
    return;
  }
  if (scope === 'default') {
    await setDefault(panel, choice);
    return;
  }
  const notebook: INotebook = panel.content;
  const cells = notebook.widgets
    .slice(
      notebook.activeCellIndex,
      scope === 'below' ? undefined : notebook.activeCellIndex + 1
    )
    .filter(cell => cell.model.type === 'code');
  if (!cells.length) {
    Notification.info(trans.__('Go to a cell of code first.'));
    return;
  }
  for (const cell of cells) {
    const { sharedModel } = cell.model;
    const source = sharedModel.getSource();
    // Lines that only this kernel can carry out stay here.
    if (scope !== 'below' || !/^\s*(%[^%]|%%(?!remote\b)|$)/.test(source)) {
      sharedModel.setSource(withChoice(source, choice));
    }
  }
  notebook.activate();
  if (choice) {
    await load(panel.context.sessionContext);
  }
  if (scope !== 'cell') {
    const below = scope === 'below';
    await app.commands.execute(
      below ? 'notebook:run-all-below' : 'notebook:run-cell'
    );
  }
}
