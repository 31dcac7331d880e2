import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { Dialog, ICommandPalette, showDialog } from '@jupyterlab/apputils';
import { IMainMenu } from '@jupyterlab/mainmenu';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { version } from '../../package.json';

const COMMAND = 'jupyter-mlinfra:about';

/** Says in the Help menu and the command palette which version runs. */
const about: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-mlinfra:about',
  description: 'Shows the version of jupyter-mlinfra.',
  autoStart: true,
  optional: [IMainMenu, ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    menu: IMainMenu | null,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load('jupyter-mlinfra');
    app.commands.addCommand(COMMAND, {
      label: trans.__('About jupyter-mlinfra'),
      execute: async () => {
        await showDialog({
          title: trans.__('About jupyter-mlinfra'),
          body: trans.__('Version %1', version),
          buttons: [Dialog.okButton({ label: trans.__('Close') })]
        });
      }
    });
    menu?.helpMenu.addGroup([{ command: COMMAND }], 1);
    palette?.addItem({ command: COMMAND, category: trans.__('Help') });
  }
};

export default about;
