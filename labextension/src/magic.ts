/** The `%%remote` line on top of a cell, as text: read, written, and taken away. */

/** Where a cell runs: `{}` is remote with the notebook's defaults, `null` here in its kernel. */
export interface IChoice {
  readonly gpu?: string;
  readonly on?: string;
}

const LINE = /^%%remote(?=[ \t]|$)[ \t]*(.*)$/;
// Names of GPUs and targets; they go into code.
const VALUE = /^[A-Za-z0-9][A-Za-z0-9 :|._@/-]{0,120}$/;

/** The choice that a cell's first line states. */
export function choiceOf(source: string): IChoice | null {
  const words = wordsOf(source);
  if (!words) {
    return null;
  }
  const gpu = valueOf(words, 'gpu');
  const on = valueOf(words, 'on');
  return { ...(gpu && { gpu }), ...(on && { on }) };
}

/** The same cell with another choice; other keys of its line stay. */
export function withChoice(source: string, choice: IChoice | null): string {
  const words = wordsOf(source);
  if (!choice) {
    return words ? source.replace(/^[^\n]*\n?/, '') : source;
  }
  const kept = (words ?? []).filter(word => !/^(gpu|on)=/.test(word));
  const line = ['%%remote', ...written(choice), ...kept].join(' ');
  return words ? source.replace(/^[^\n]*/, () => line) : `${line}\n${source}`;
}

/** A choice as keys: `gpu=A10 on=modal`. Throws a RangeError for what cannot be one. */
export function written(choice: IChoice): string[] {
  return (['gpu', 'on'] as const).flatMap(key => {
    const value = choice[key];
    if (!value) {
      return [];
    }
    if (!VALUE.test(value)) {
      throw new RangeError(`${key}=${value}`);
    }
    return [`${key}=${value.includes(' ') ? `"${value}"` : value}`];
  });
}

/** The inverse of `written`, for what was saved; null if it is anything else. */
export function readChoice(text: unknown): IChoice | null {
  if (typeof text !== 'string') {
    return null;
  }
  const choice = choiceOf(`%%remote ${text}`) ?? {};
  try {
    return written(choice).join(' ') === text.trim() ? choice : null;
  } catch {
    return null;
  }
}

/** The words of the line, quoted ones as one; null if the cell has no such line. */
function wordsOf(source: string): string[] | null {
  const match = LINE.exec(source.split('\n', 1)[0] ?? '');
  if (!match) {
    return null;
  }
  return (match[1] ?? '').match(/(?:[^\s"']|"[^"]*"|'[^']*')+/g) ?? [];
}

function valueOf(words: readonly string[], key: string): string {
  const word = words.find(it => it.startsWith(`${key}=`)) ?? '';
  return word.slice(key.length + 1).replace(/^(["'])(.*)\1$/, '$2');
}
