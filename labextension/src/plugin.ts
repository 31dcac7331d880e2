/** Runs in notebooks: the buttons on their cards, and notifications of their ends. */

import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { Notification, type ISessionContext } from '@jupyterlab/apputils';
import { DocumentWidget } from '@jupyterlab/docregistry';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { KernelMessage } from '@jupyterlab/services';
import {
  ITranslator,
  nullTranslator,
  type TranslationBundle
} from '@jupyterlab/translation';
import type { Widget } from '@lumino/widgets';

import { type Api, IApi } from './api';
import { RunCard } from './card';
import { factsOf, MIME_TYPE, type IFacts } from './facts';
import { attach, execute, LOAD, type NotebookPanel } from './notebooks';
import { Runs } from './runs';

const GONE = ['restarting', 'autorestarting', 'terminating', 'dead'];

const plugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-mlinfra:runs',
  description: 'Attaches and cancels runs from their cards, tells their end.',
  autoStart: true,
  requires: [IRenderMimeRegistry],
  optional: [IApi, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    rendermime: IRenderMimeRegistry,
    api: Api | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load('jupyter-mlinfra');
    const runs = new Runs();
    api?.changed.connect(() => {
      if (api.state) {
        runs.told(new Set(api.state.machines.map(it => it.name)));
      }
    });
    const known = new WeakSet<ISessionContext>();
    rendermime.addFactory({
      safe: true,
      mimeTypes: [MIME_TYPE],
      defaultRank: 40, // before HTML
      createRenderer: options =>
        new RunCard(options, runs, trans, async (action, card, facts) => {
          const panel = panelOf(card);
          if (action === 'start' || action === 'refuse') {
            answer(card, action === 'start' ? 'yes' : 'no');
          } else if (panel && action === 'attach') {
            const cells = panel.content.widgets;
            const at = cells.findIndex(it => it.node.contains(card.node));
            await attach(app, panel, at + 1, facts.run);
          } else if (panel && action === 'extend') {
            const { sessionContext } = panel.context;
            await extend(sessionContext, facts.machine, trans);
          } else if (panel) {
            await cancel(panel.context.sessionContext, facts.run, trans);
          }
        })
    });
    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: (_, context) => {
        // A notebook may have several views.
        if (!known.has(context.sessionContext)) {
          known.add(context.sessionContext);
          listen(context.sessionContext, runs, facts => {
            if (facts.ending) {
              warn(facts, context.sessionContext, trans);
            } else {
              tell(facts, context.localPath, trans);
            }
          });
        }
      }
    });
  }
};

export default plugin;

function panelOf(card: Widget): NotebookPanel | null {
  let widget: Widget | null = card;
  while (widget && !(widget instanceof DocumentWidget)) {
    widget = widget.parent;
  }
  return widget as NotebookPanel | null;
}

/** Types an answer into the line that the cell waits at, below its card. */
function answer(card: Widget, text: string): void {
  const cell = card.node.closest('.jp-Cell');
  const input = cell?.querySelector<HTMLInputElement>('.jp-Stdin-input');
  if (input) {
    input.value = text;
    const enter = { key: 'Enter', bubbles: true, cancelable: true };
    input.dispatchEvent(new KeyboardEvent('keydown', enter));
  }
}

/** Puts a machine's end off. */
async function extend(
  context: ISessionContext,
  machine: string,
  trans: TranslationBundle
): Promise<void> {
  const magic = `get_ipython().run_line_magic('remote', 'extend ${machine}')`;
  const reply = await execute(context, `${LOAD}\n${magic}`);
  if (!reply) {
    Notification.error(trans.__('The notebook has no kernel.'));
  } else if (reply.content.status === 'error') {
    Notification.error(reply.content.evalue, { autoClose: 8000 });
  }
}

async function cancel(
  context: ISessionContext,
  run: string,
  trans: TranslationBundle
): Promise<void> {
  const magic = `get_ipython().run_line_magic('remote', 'cancel ${run}')`;
  const reply = await execute(context, `${LOAD}\n${magic}`);
  if (!reply) {
    Notification.error(trans.__('The notebook has no kernel.'));
  } else if (reply.content.status === 'error') {
    Notification.error(reply.content.evalue, { autoClose: 8000 });
  } else {
    Notification.info(trans.__('%1 is cancelled.', run), { autoClose: 5000 });
  }
}

/** Takes what a notebook's kernel tells of its runs. */
function listen(
  context: ISessionContext,
  runs: Runs,
  tellEnd: (facts: IFacts) => void
): void {
  let kernel = context.session?.kernel?.id ?? '';
  context.kernelChanged.connect((_, { newValue }) => {
    runs.forget(kernel);
    kernel = newValue?.id ?? '';
  });
  context.statusChanged.connect((_, status) => {
    if (GONE.includes(status)) {
      runs.forget(kernel);
    }
  });
  context.iopubMessage.connect((_, message) => {
    if (
      KernelMessage.isDisplayDataMsg(message) ||
      KernelMessage.isUpdateDisplayDataMsg(message)
    ) {
      const facts = factsOf(message.content.data);
      if (facts) {
        runs.heard(kernel, facts);
        if (facts.notify || facts.ending) {
          tellEnd(facts);
        }
      }
    }
  });
}

/** Notifies of a machine's end, which one click puts off. */
function warn(
  facts: IFacts,
  context: ISessionContext,
  trans: TranslationBundle
): void {
  Notification.warning(facts.note, {
    autoClose: false,
    actions: [
      {
        label: trans.__('Extend'),
        callback: () => {
          void extend(context, facts.machine, trans);
        }
      }
    ]
  });
}

/** Notifies of the end of a run. */
function tell(facts: IFacts, path: string, trans: TranslationBundle): void {
  const notebook = path.split('/').at(-1) ?? path;
  if (facts.phase === 'done') {
    Notification.success(trans.__('%1 in %2 is done.', facts.run, notebook), {
      autoClose: 8000
    });
  } else {
    Notification.error(
      trans.__('%1 in %2 has ended: %3.', facts.run, notebook, facts.phase),
      { autoClose: false }
    );
  }
}
