/** The JupyterLab and Notebook 7 part of jupyter-mlinfra. */

import about from './about';
import panel from './panel';
import runs from './plugin';

export default [about, panel, runs];
