/** The buttons that say where something runs, and let it be chosen. */

import type { ISharedCell } from '@jupyter/ydoc';
import type { TranslationBundle } from '@jupyterlab/translation';
import {
  caretDownEmptyIcon,
  ReactWidget,
  ToolbarButtonComponent,
  UseSignal
} from '@jupyterlab/ui-components';
import type { ISignal } from '@lumino/signaling';
import * as React from 'react';

import { choiceOf, type IChoice } from './magic';

/** `A10 on modal`; for null the word for here. */
export function inWords(
  choice: IChoice | null,
  trans: TranslationBundle
): string {
  if (!choice) {
    return trans.__('Here');
  }
  const { gpu, on } = choice;
  if (gpu && on) {
    return trans.__('%1 on %2', gpu, on);
  }
  return gpu ?? on ?? trans.__('Remote');
}

/** In the toolbar of a cell. */
export class CellTarget extends ReactWidget {
  constructor(
    private readonly _cell: ISharedCell,
    private readonly _trans: TranslationBundle,
    private readonly _open: (near: HTMLElement) => void
  ) {
    super();
    this.addClass('mlinfra-picker');
    this.node.setAttribute('role', 'group');
    this.node.setAttribute('aria-label', _trans.__('Where this cell runs'));
  }

  protected override render(): React.JSX.Element {
    const signal: ISignal<ISharedCell, unknown> = this._cell.changed;
    return (
      <UseSignal signal={signal}>
        {() => (
          <ToolbarButtonComponent
            aria-haspopup="menu"
            icon={caretDownEmptyIcon}
            label={inWords(choiceOf(this._cell.getSource()), this._trans)}
            tooltip={this._trans.__('Choose where this cell runs')}
            onClick={() => {
              this._open(this.node);
            }}
          />
        )}
      </UseSignal>
    );
  }
}

/** In the toolbar of a notebook: what `%%remote` means there. */
export class NotebookTarget extends ReactWidget {
  constructor(
    private readonly _default: () => IChoice | null,
    private readonly _changed: ISignal<unknown, unknown>,
    private readonly _trans: TranslationBundle,
    private readonly _open: (near: HTMLElement) => void
  ) {
    super();
    this.addClass('mlinfra-picker');
    this.node.setAttribute('role', 'group');
    this.node.setAttribute(
      'aria-label',
      _trans.__('Where remote cells of this notebook run')
    );
  }

  protected override render(): React.JSX.Element {
    return (
      <UseSignal signal={this._changed}>
        {() => {
          const choice = this._default();
          return (
            <ToolbarButtonComponent
              aria-haspopup="menu"
              icon={caretDownEmptyIcon}
              label={`%%remote: ${choice ? inWords(choice, this._trans) : this._trans.__('default')}`}
              tooltip={this._trans.__(
                'Choose where %1 cells of this notebook run',
                '%%remote'
              )}
              onClick={() => {
                this._open(this.node);
              }}
            />
          );
        }}
      </UseSignal>
    );
  }
}
