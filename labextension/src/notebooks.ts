/** Notebooks as this extension uses them. Only what is needed of JupyterLab's notebook package is
 * described here: to depend on it would install all of its editors. */

import type { ISharedCell, ISharedNotebook } from '@jupyter/ydoc';
import type { JupyterFrontEnd } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import { DocumentWidget } from '@jupyterlab/docregistry';
import type { Kernel, KernelMessage } from '@jupyterlab/services';
import type { ISignal } from '@lumino/signaling';
import type { Widget } from '@lumino/widgets';

/** The outputs of a code cell. */
export interface IOutputs {
  readonly length: number;
  readonly changed: ISignal<unknown, unknown>;
  get(index: number): { readonly data: Readonly<Record<string, unknown>> };
}

export interface ICell extends Widget {
  readonly model: {
    readonly type: string;
    readonly sharedModel: ISharedCell;
    readonly outputs?: IOutputs;
  };
}

export interface INotebook extends Widget {
  readonly widgets: readonly ICell[];
  readonly activeCell: ICell | null;
  activeCellIndex: number;
}

export type NotebookPanel = DocumentWidget<INotebook>;

/** The magics may not be there yet. */
export const LOAD =
  "get_ipython().extension_manager.load_extension('jupyter_mlinfra')";

/** A widget that JupyterLab says is a notebook's. */
export function asNotebook(widget: Widget): NotebookPanel {
  const panel: unknown = widget;
  return panel as NotebookPanel;
}

/** The notebook that the user sees, if that is one. */
export function currentNotebook(app: JupyterFrontEnd): NotebookPanel | null {
  const widget: Widget | null = app.shell.currentWidget;
  if (!(widget instanceof DocumentWidget)) {
    return null;
  }
  const { content } = widget as DocumentWidget;
  return content.hasClass('jp-Notebook') ? (widget as NotebookPanel) : null;
}

/** Its active cell, if that is one of code. */
export function activeCode(panel: NotebookPanel | null): ICell | null {
  const cell = panel?.content.activeCell ?? null;
  return cell?.model.type === 'code' ? cell : null;
}

/** Runs code in a notebook's kernel beside its cells. */
export async function execute(
  context: ISessionContext,
  code: string
): Promise<KernelMessage.IExecuteReplyMsg | undefined> {
  const kernel: Kernel.IKernelConnection | null | undefined =
    context.session?.kernel;
  return kernel?.requestExecute({
    code,
    silent: true,
    store_history: false,
    stop_on_error: false
  }).done;
}

/** Runs `%remote attach` in a new cell of a notebook. */
export async function attach(
  app: JupyterFrontEnd,
  panel: NotebookPanel,
  index: number,
  run: string
): Promise<void> {
  const { sharedModel } = panel.context.model;
  void execute(panel.context.sessionContext, LOAD);
  (sharedModel as ISharedNotebook).insertCell(index, {
    cell_type: 'code',
    source: `%remote attach ${run}`
  });
  app.shell.activateById(panel.id);
  panel.content.activeCellIndex = index;
  await app.commands.execute('notebook:run-cell');
}
