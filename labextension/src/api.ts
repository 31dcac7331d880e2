/** The server extension as this page uses it: questions, acts, and the stream of states. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';
import { Token } from '@lumino/coreutils';
import { type ISignal, Signal } from '@lumino/signaling';

import type { IState } from './state';

const FIRST_PAUSE = 1000;
const LONGEST_PAUSE = 30_000;

/** The page's one Api. */
export const IApi = new Token<Api>('jupyter-mlinfra:IApi');

/** What the server refused or could not do, in its own words. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    /** The field of the body that it is about, if there is one. */
    readonly field: string
  ) {
    super(message);
  }
}

/** Knows the latest state while the page is visible; a hidden page holds no connection, of which
 * browsers grant a server six. */
export class Api {
  constructor(private readonly _settings: ServerConnection.ISettings) {
    document.addEventListener('visibilitychange', this._decide);
    this._decide();
  }

  /** Emitted when `state` or `problem` is another one. */
  get changed(): ISignal<this, undefined> {
    return this._changed;
  }

  /** The latest; null before the first. */
  get state(): IState | null {
    return this._state;
  }

  /** Why there is no stream right now, empty if there is one. */
  get problem(): string {
    return this._problem;
  }

  /** Asks for something. Throws an ApiError. */
  async get<T>(path: string, query: Record<string, string> = {}): Promise<T> {
    const text = new URLSearchParams(query).toString();
    return this._json<T>(text ? `${path}?${text}` : path, {});
  }

  /** Has something done; gives the server's word about it. Throws an ApiError. */
  async post(path: string, body?: object): Promise<string> {
    const reply = await this._json<{ message: string }>(path, {
      method: 'POST',
      ...(body && { body: JSON.stringify(body) })
    });
    return reply.message;
  }

  /** Changes something; gives what it is then. Throws an ApiError. */
  async patch<T>(path: string, body: object): Promise<T> {
    return this._json<T>(path, { method: 'PATCH', body: JSON.stringify(body) });
  }

  private async _json<T>(path: string, init: RequestInit): Promise<T> {
    const response = await this._request(path, init);
    return (await response.json()) as T;
  }

  private async _request(path: string, init: RequestInit): Promise<Response> {
    const url = URLExt.join(this._settings.baseUrl, 'mlinfra', path);
    const response = await ServerConnection.makeRequest(
      url,
      init,
      this._settings
    );
    if (!response.ok) {
      const said = (await response.json().catch(() => ({}))) as {
        message?: string;
        hint?: string;
        field?: string;
      };
      const text = [said.message ?? response.statusText, said.hint];
      throw new ApiError(
        text.filter(Boolean).join(' '),
        response.status,
        said.field ?? ''
      );
    }
    return response;
  }

  private readonly _decide = (): void => {
    if (document.visibilityState === 'hidden') {
      this._following?.abort();
      this._following = null;
    } else if (!this._following) {
      this._following = new AbortController();
      void this._follow(this._following.signal);
    }
  };

  /** Reads the stream, and opens it again when it ends. */
  private async _follow(signal: AbortSignal): Promise<void> {
    let pause = FIRST_PAUSE;
    while (!signal.aborted) {
      try {
        const response = await this._request('events', { signal });
        for await (const data of events(response)) {
          this._set(JSON.parse(data) as IState, '');
          pause = FIRST_PAUSE;
        }
      } catch (error) {
        if (isAborted(signal)) {
          return;
        }
        this._set(this._state, error instanceof Error ? error.message : '?');
        if (error instanceof ApiError && error.status === 404) {
          return; // this server has no such extension
        }
      }
      await new Promise(done => setTimeout(done, pause));
      pause = Math.min(2 * pause, LONGEST_PAUSE);
    }
  }

  private _set(state: IState | null, problem: string): void {
    this._state = state;
    this._problem = problem;
    this._changed.emit(undefined);
  }

  private _state: IState | null = null;
  private _problem = '';
  private _following: AbortController | null = null;
  private _changed = new Signal<this, undefined>(this);
}

/** It may have become so since the compiler looked. */
function isAborted(signal: AbortSignal): boolean {
  return signal.aborted;
}

/** The data of each server-sent event. */
async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body
    ?.pipeThrough(new TextDecoderStream())
    .getReader();
  let text = '';
  for (;;) {
    const piece = await reader?.read();
    if (!piece || piece.done) {
      return;
    }
    const blocks = (text + piece.value).split('\n\n');
    text = blocks.pop() ?? '';
    for (const block of blocks) {
      const data = block.split('\n').find(line => line.startsWith('data: '));
      if (data) {
        yield data.slice(6);
      }
    }
  }
}
