/** The form of settings without its looks: what was typed against what the server knows. */

export interface ISetting {
  readonly name: string;
  readonly value: string;
  readonly origin: string;
  readonly help: string;
  readonly example: string;
  readonly default: string;
  /** What the user's `config.toml` says; empty: nothing. */
  readonly own: string;
  readonly writable: boolean;
  readonly suggestions: readonly string[];
}

export interface ISettings {
  readonly items: readonly ISetting[];
  /** The path of the user's `config.toml`. */
  readonly file: string;
}

/** What was typed and not saved yet, by the names of settings. */
export type Draft = Readonly<Record<string, string>>;

/** What is to be saved. Only that is sent: another tab may have changed the rest. */
export function changesOf(settings: ISettings, draft: Draft): Draft {
  return Object.fromEntries(
    settings.items
      .map(({ name, own }) => [name, draft[name]?.trim() ?? own, own] as const)
      .filter(([, text, own]) => text !== own)
      .map(([name, text]) => [name, text])
  );
}

/** What is left of a draft after a save: what was typed meanwhile. */
export function afterSaving(draft: Draft, saved: Draft): Draft {
  return Object.fromEntries(
    Object.entries(draft).filter(([name, text]) => text !== saved[name])
  );
}

/** Whether another place than `config.toml` has the last word. */
export function isOverruled(setting: ISetting, file: string): boolean {
  return setting.origin !== 'default' && setting.origin !== file;
}
