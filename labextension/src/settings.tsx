/** The user's defaults, written into `config.toml`. */

import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { ApiError } from './api';
import {
  afterSaving,
  changesOf,
  isOverruled,
  type Draft,
  type ISetting,
  type ISettings
} from './form';
import { Empty, useLatest, type IPanelProps } from './view';

/** What the server refused; `field` is empty if that concerns none or all. */
interface IProblem {
  readonly field: string;
  readonly text: string;
}

export function Settings(props: IPanelProps): React.JSX.Element {
  const { api, trans } = props;
  const revision = useLatest(api)?.settings;
  const [settings, setSettings] = React.useState<ISettings | null>(null);
  const [draft, setDraft] = React.useState<Draft>({});
  const [problem, setProblem] = React.useState<IProblem | null>(null);
  const [saved, setSaved] = React.useState(false);
  const form = React.useRef<HTMLFormElement>(null);
  React.useEffect(() => {
    if (revision !== undefined) {
      api.get<ISettings>('settings').then(
        found => {
          setSettings(found);
          setProblem(null);
        },
        (error: unknown) => {
          // Fields of a file that cannot be read would be wrong.
          setSettings(null);
          setProblem(problemOf(error));
        }
      );
    }
  }, [api, revision]);
  React.useEffect(() => {
    if (problem?.field) {
      const input = form.current?.elements.namedItem(problem.field);
      (input as HTMLElement | null)?.focus();
    }
  }, [problem]);
  if (!settings) {
    return <Empty>{problem?.text ?? trans.__('Looking…')}</Empty>;
  }

  const save = async (): Promise<void> => {
    try {
      const found = await api.patch<ISettings>(
        'settings',
        changesOf(settings, draft)
      );
      setSettings(found);
      setDraft(current => afterSaving(current, draft));
      setProblem(null);
      setSaved(true);
    } catch (error) {
      setProblem(problemOf(error));
      setSaved(false);
    }
  };
  return (
    <form
      ref={form}
      className="mlinfra-form"
      aria-label={trans.__('Settings')}
      onSubmit={event => {
        event.preventDefault();
        void save();
      }}
    >
      {settings.items
        .filter(setting => setting.writable)
        .map(setting => (
          <Field
            key={setting.name}
            setting={setting}
            trans={trans}
            file={settings.file}
            text={draft[setting.name] ?? setting.own}
            problem={problem?.field === setting.name ? problem.text : ''}
            onChange={text => {
              setDraft({ ...draft, [setting.name]: text });
              setSaved(false);
            }}
          />
        ))}
      <div className="mlinfra-actions">
        <button type="submit" className="mlinfra-action">
          {trans.__('Save')}
        </button>
        <span role="status" className="mlinfra-faint">
          {saved ? trans.__('Saved.') : ''}
        </span>
      </div>
      {problem && !problem.field && (
        <div role="alert" className="mlinfra-warning">
          {problem.text}
        </div>
      )}
      <p className="mlinfra-faint">
        {trans.__(
          'Written to %1. What a notebook or a cell says has the last word.',
          settings.file
        )}
      </p>
    </form>
  );
}

function Field(props: {
  setting: ISetting;
  trans: TranslationBundle;
  file: string;
  text: string;
  problem: string;
  onChange: (text: string) => void;
}): React.JSX.Element {
  const { setting, trans, problem } = props;
  const id = React.useId();
  const overruled = isOverruled(setting, props.file);
  const about = [problem && `${id}-problem`, overruled && `${id}-overruled`];
  return (
    <div className="mlinfra-field">
      <label htmlFor={id}>{labelOf(setting.name, trans)}</label>
      <input
        id={id}
        name={setting.name}
        list={`${id}-list`}
        value={props.text}
        placeholder={setting.default}
        title={trans.__('%1, as in %2', setting.help, setting.example)}
        autoComplete="off"
        spellCheck={false}
        maxLength={200}
        aria-invalid={problem !== ''}
        aria-describedby={about.filter(Boolean).join(' ') || undefined}
        onChange={event => {
          props.onChange(event.target.value);
        }}
      />
      <datalist id={`${id}-list`}>
        {setting.suggestions.map(text => (
          <option key={text} value={text} />
        ))}
      </datalist>
      {problem && (
        <div id={`${id}-problem`} role="alert" className="mlinfra-warning">
          {problem}
        </div>
      )}
      {overruled && (
        <div id={`${id}-overruled`} className="mlinfra-faint">
          {trans.__('Overridden by %1: %2', setting.origin, setting.value)}
        </div>
      )}
    </div>
  );
}

function labelOf(name: string, trans: TranslationBundle): string {
  const labels: Readonly<Record<string, string>> = {
    gpu: trans.__('GPU'),
    on: trans.__('Where'),
    idle: trans.__('Stop when idle for'),
    time: trans.__('Stop after'),
    budget: trans.__('Budget of a run (USD)'),
    month_budget: trans.__('Budget of a month (USD)'),
    confirm: trans.__('Ask above (USD/h)')
  };
  return labels[name] ?? name;
}

function problemOf(error: unknown): IProblem {
  return {
    field: error instanceof ApiError ? error.field : '',
    text: error instanceof Error ? error.message : String(error)
  };
}
