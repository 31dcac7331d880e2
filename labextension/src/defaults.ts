/** What `%%remote` means in a notebook: kept in its metadata, told to each of its kernels. */

import type { ISharedNotebook } from '@jupyter/ydoc';
import type { ISessionContext } from '@jupyterlab/apputils';

import type { ISignal } from '@lumino/signaling';

import { choiceOf, readChoice, written, type IChoice } from './magic';
import { execute, LOAD, type ICell, type NotebookPanel } from './notebooks';

const KEY = 'mlinfra';

/** The notebook's choice; null if it has none. */
export function defaultOf(panel: NotebookPanel): IChoice | null {
  const saved = shared(panel).getMetadata(KEY) as
    { default?: unknown } | undefined;
  return saved ? readChoice(saved.default) : null;
}

/** Emitted when it may be another one. */
export function metadataChanged(
  panel: NotebookPanel
): ISignal<unknown, unknown> {
  return shared(panel).metadataChanged;
}

/** Sets it, or takes it back. */
export async function setDefault(
  panel: NotebookPanel,
  choice: IChoice | null
): Promise<void> {
  if (choice) {
    shared(panel).setMetadata(KEY, { default: written(choice).join(' ') });
  } else {
    shared(panel).deleteMetadata(KEY);
  }
  await tellKernel(panel.context.sessionContext, choice ?? {});
}

/** Has every kernel that the notebook gets know the magics, if a cell has them, and its choice. */
export function keepTold(panel: NotebookPanel): void {
  const { sessionContext } = panel.context;
  let fresh = true;
  const tell = () => {
    const choice = defaultOf(panel);
    if (!fresh || panel.isDisposed) {
      return;
    }
    fresh = false;
    if (choice) {
      void tellKernel(sessionContext, choice);
    } else if (panel.content.widgets.some(isRemote)) {
      void load(sessionContext);
    }
  };
  sessionContext.kernelChanged.connect(() => {
    fresh = true;
  });
  sessionContext.statusChanged.connect((_, status) => {
    if (status === 'restarting' || status === 'autorestarting') {
      fresh = true;
      // What is sent now waits for the new process, before all cells that are run meanwhile;
      // but what was sent before is being dropped at this very moment.
      setTimeout(tell);
    } else if (status === 'idle') {
      tell();
    }
  });
}

/** Has the notebook's kernel know the magics; one of another language takes no notice. */
export async function load(context: ISessionContext): Promise<void> {
  await execute(context, LOAD);
}

function isRemote(cell: ICell): boolean {
  return choiceOf(cell.model.sharedModel.getSource()) !== null;
}

async function tellKernel(
  context: ISessionContext,
  choice: IChoice
): Promise<void> {
  // What is not chosen is taken back. `written` lets nothing pass that is no name.
  const keys = [
    ...(choice.gpu ? [] : ['gpu=']),
    ...(choice.on ? [] : ['on=']),
    ...written(choice)
  ].join(' ');
  // Its listing of all settings belongs under no cell.
  const magic = `get_ipython().run_line_magic('remote', ${JSON.stringify(`use ${keys}`)})`;
  const code = `import contextlib, io\n${LOAD}\nwith contextlib.redirect_stdout(io.StringIO()):\n    ${magic}\ndel contextlib, io`;
  await execute(context, code);
}

function shared(panel: NotebookPanel): ISharedNotebook {
  return panel.context.model.sharedModel as ISharedNotebook;
}
