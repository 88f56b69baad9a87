// The way to the server: every request goes through here, with the user's key where one is needed.

import { eventsOf } from "./events.js";

const KEY_NAME = "shardwright.key";
const SILENCE_MS = 15_000; // the server sends something each second: after this the connection counts as dead
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;

/** An answer that is none: its HTTP status and what the server says about it. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }
}

/** How long to wait before try number `attempt` (from 0): doubled each time, bounded, spread by `random` (0 to 1). */
export function pauseMs(attempt, random = Math.random()) {
  return Math.min(FIRST_PAUSE_MS * 2 ** attempt, LONGEST_PAUSE_MS) * (0.75 + 0.5 * random);
}

/** The user's key lives in this tab's session storage and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY_NAME) ?? "",
  set: (value) => sessionStorage.setItem(KEY_NAME, value),
  forget: () => sessionStorage.removeItem(KEY_NAME),
};

/** Ask the server. Raises `ServerError` for any status but 2xx, and what `fetch` raises when there is no answer. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
    credentials: "omit",
    referrerPolicy: "no-referrer",
  });
  if (response.ok) return response;
  let message = response.statusText || `status ${response.status}`;
  try {
    message = (await response.json()).error?.message ?? message;
  } catch {
    // not one of the API's own errors: a proxy's page, say
  }
  throw new ServerError(response.status, message);
}

/** Ask for JSON. */
export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

/**
 * Listens to the server's events for as long as the page lives, and comes back by itself when the connection breaks.
 *
 * `onEvent(name, data)` gets each event. `onChange(status)` gets `{phase, reason, retryAtMs}`, phase being `connecting`,
 * `open`, `waiting` (lost; tries again at `retryAtMs`), `key` (the server wants another key; `start` goes on) or
 * `asleep`.
 */
export class Listener {
  #onEvent;
  #onChange;
  #path;
  #abort = null;
  #timer = 0;
  #watch = 0;
  #attempt = 0;

  constructor(path, { onEvent, onChange }) {
    this.#path = path;
    this.#onEvent = onEvent;
    this.#onChange = onChange;
  }

  /** Connect now, whatever was under way before. */
  start() {
    this.#stop();
    this.#attempt = 0;
    this.#connect();
  }

  /** Let the connection go until `start`. */
  sleep() {
    this.#stop();
    this.#onChange({ phase: "asleep" });
  }

  #stop() {
    this.#abort?.abort();
    this.#abort = null;
    clearTimeout(this.#timer);
    clearTimeout(this.#watch);
  }

  #tell(event, data) {
    try {
      this.#onEvent(event, JSON.parse(data));
    } catch (error) {
      console.error(error); // a part of the page that fails is no reason to let the connection go
    }
  }

  async #connect() {
    const abort = new AbortController();
    this.#abort = abort;
    this.#onChange({ phase: "connecting" });
    const stillAlive = () => {
      clearTimeout(this.#watch);
      if (abort === this.#abort) this.#watch = setTimeout(() => abort.abort("silence"), SILENCE_MS);
    };
    let reason = "the server ended the connection";
    try {
      stillAlive();
      const response = await ask(this.#path, { signal: abort.signal });
      for await (const { event, data } of eventsOf(response, stillAlive)) {
        if (abort !== this.#abort) return;
        if (this.#attempt >= 0) {
          this.#attempt = -1; // the first event, not the headers: a server that fails at once is not one that is back
          this.#onChange({ phase: "open" });
        }
        this.#tell(event, data);
      }
    } catch (error) {
      if (abort !== this.#abort) return; // stopped on purpose
      if (error instanceof ServerError && error.status === 401) {
        this.#stop();
        this.#onChange({ phase: "key", reason: error.message });
        return;
      }
      if (abort.signal.aborted) reason = `nothing came for ${SILENCE_MS / 1000} seconds`;
      else reason = error instanceof ServerError ? error.message : "the server can't be reached";
    }
    if (abort !== this.#abort) return;
    clearTimeout(this.#watch);
    this.#attempt = Math.max(this.#attempt, 0);
    const pause = pauseMs(this.#attempt);
    this.#attempt += 1;
    this.#onChange({ phase: "waiting", reason, retryAtMs: Date.now() + pause });
    this.#timer = setTimeout(() => this.#connect(), pause);
  }
}
