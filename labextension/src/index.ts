/** The JupyterLab and Notebook 7 part of jupyter-mlinfra. */

import about from './about';
import notebook from './notebook';
import panel, { api } from './panel';
import runs from './plugin';

export default [about, api, notebook, panel, runs];
