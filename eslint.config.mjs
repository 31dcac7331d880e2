import js from '@eslint/js';
import globals from 'globals';
import tseslint from 'typescript-eslint';

export default tseslint.config(
  {
    ignores: [
      '.venv/',
      'artifacts/',
      'build/',
      'dist/',
      'lib/',
      'jupyter_mlinfra/labextension/'
    ]
  },
  js.configs.recommended,
  {
    files: ['labextension/src/**/*.{ts,tsx}'],
    extends: [tseslint.configs.strictTypeChecked],
    languageOptions: {
      parserOptions: { projectService: true }
    },
    rules: {
      '@typescript-eslint/restrict-template-expressions': [
        'error',
        { allowNumber: true }
      ]
    }
  },
  {
    files: ['{benchmarks,tests/browser}/**/*.mjs'],
    languageOptions: { globals: { ...globals.node, ...globals.browser } }
  }
);
