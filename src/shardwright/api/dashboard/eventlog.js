// The short log of what happened to the cluster and to the connection, newest first.

import { h } from "./dom.js";
import { clock } from "./format.js";

const MOST_ENTRIES = 100;

/** Writes sentences with their times into a list. */
export class EventLog {
  #list;

  constructor(list) {
    this.#list = list;
  }

  /** Add a sentence; `at` is in seconds since 1970, level `good`, `bad` or `note`. */
  add(at, level, text) {
    const time = h("time", { datetime: new Date(at * 1000).toISOString() }, clock(at));
    this.#list.prepend(h("li", { "data-level": level }, time, h("span", {}, text)));
    while (this.#list.children.length > MOST_ENTRIES) this.#list.lastElementChild.remove();
  }
}
