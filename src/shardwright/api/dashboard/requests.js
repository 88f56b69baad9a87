// The list of requests, and where the time of the chosen one went.

import { arrange, byId, h, setAttribute, setPart, setText } from "./dom.js";
import { clock, count, counted, duration, percent, tokenRate, UNKNOWN } from "./format.js";
import { askJson, ServerError } from "./server.js";
import { KINDS, StepStore, waterfall } from "./steps.js";

const MOST_ROWS = 60;
const MOST_PREFILL = 8; // bars that are drawn one by one; the rest is summed up
const MOST_DECODE = 6;
const MOST_DRAWN = 60; // steps of a row that stands for several
const LABELS = Object.fromEntries(KINDS.map(({ id, label }) => [id, label]));
const STATES = { stop: "done", length: "limit reached", abort: "given up", error: "failed", deadline: "out of time", rejected: "refused" };

/** A request's state in words, and how it is to be seen. */
export function stateOf(request) {
  if (request.finished_at !== null) {
    const level = ["stop", "length"].includes(request.reason) ? "none" : request.reason === "abort" ? "warn" : "bad";
    return [level, STATES[request.reason] ?? request.reason];
  }
  if (request.started_at === null) return ["warn", "waiting"];
  return ["good", request.first_token_at === null ? "prefill" : "decode"];
}

/** The figures of one row of the list. `now` is the master's time. */
export function figuresOf(request, now) {
  const end = request.finished_at ?? now;
  const decode = request.first_token_at === null ? null : end - request.first_token_at;
  return {
    waited: (request.started_at ?? end) - request.submitted_at,
    firstToken: request.first_token_at === null ? null : request.first_token_at - request.submitted_at,
    total: end - request.submitted_at,
    pace: decode > 0 && request.num_output_tokens > 1 ? (request.num_output_tokens - 1) / decode : null,
  };
}

/** Shows requests; `store` holds the steps that are known, `now` gives the master's time. */
export class Requests {
  #store;
  #now;
  #rows = new Map();
  #chosen = null;
  #trace = null;
  #steps = new StepStore(Infinity); // of the chosen request: they stay when the others go
  #isAsking = false;
  #note = "";
  #shown = "";

  constructor(store, now) {
    this.#store = store;
    this.#now = now;
  }

  /** Draw this list, newest first. Call it each second: the running ones' times grow, and steps are told late. */
  show(requests) {
    const shown = requests.slice(0, MOST_ROWS);
    const ids = new Set(shown.map((request) => request.seq_id));
    for (const id of this.#rows.keys()) if (!ids.has(id)) this.#rows.delete(id);
    arrange(byId("request-table").tBodies[0], shown.map((request) => this.#row(request)));
    byId("no-requests").hidden = shown.length > 0;
    if (this.#chosen === null) return;
    const known = shown.find((request) => request.seq_id === this.#chosen);
    // A finished one's last steps are told about two seconds after its end, by busy workers later.
    const isOver = this.#trace?.finished_at != null && this.#now() - this.#trace.finished_at > 30;
    if (known && !isOver) this.#load();
  }

  /** Forget everything: another master numbers anew. */
  clear() {
    this.#choose(null);
  }

  #row(request) {
    const id = request.seq_id;
    if (!this.#rows.has(id)) {
      const cells = Array.from({ length: 9 }, (_, index) => h("td", { class: index >= 2 ? "figure" : undefined }));
      const badge = h("span", { class: "badge" });
      cells[0].append(badge);
      const button = h("button", {
        type: "button", class: "choose", "aria-pressed": "false",
        onclick: () => this.#choose(this.#chosen === id ? null : id),
      }, `#${id}`);
      const element = h("tr", { "data-request": id }, h("th", { scope: "row" }, button), ...cells);
      this.#rows.set(id, { element, button, badge, cells });
    }
    const row = this.#rows.get(id);
    const [level, text] = stateOf(request);
    const figures = figuresOf(request, this.#now());
    setAttribute(row.badge, "data-level", level);
    setText(row.badge, text);
    setAttribute(row.button, "aria-pressed", this.#chosen === id);
    setAttribute(row.button, "aria-label", `Where the time of request ${id} went`);
    const told = [clock(request.submitted_at), count(request.num_prompt_tokens), count(request.num_cached_tokens),
      count(request.num_output_tokens), duration(figures.waited), duration(figures.firstToken ?? NaN), duration(figures.total),
      tokenRate(figures.pace ?? NaN)];
    told.forEach((each, index) => setText(row.cells[index + 1], each));
    return row.element;
  }

  #choose(id) {
    this.#chosen = id;
    this.#trace = null;
    this.#note = "";
    this.#shown = "";
    this.#steps.clear();
    for (const [each, row] of this.#rows) setAttribute(row.button, "aria-pressed", each === id);
    const box = byId("waterfall");
    box.hidden = id === null;
    box.replaceChildren();
    if (id === null) return;
    box.append(h("p", { class: "muted" }, `Asking for request #${id}`));
    this.#load();
  }

  async #load() {
    if (this.#isAsking) return;
    this.#isAsking = true;
    const id = this.#chosen;
    try {
      const trace = await askJson(`api/requests/${id}`);
      if (this.#chosen !== id) return;
      this.#trace = trace;
      this.#note = "";
      await this.#collect(trace);
    } catch (error) {
      if (error instanceof ServerError && error.status === 404) this.#note = "The server does not keep this request any more.";
      else if (error instanceof ServerError) this.#note = error.message;
      else if (!(error instanceof TypeError)) throw error; // a broken connection is told by the banner
    } finally {
      this.#isAsking = false;
      if (this.#chosen === id) this.#draw();
      else if (this.#chosen !== null) this.#load();
    }
  }

  /** Take the request's steps from those that are known; ask for those that came before the page was opened. */
  async #collect(trace) {
    const missing = [];
    for (const { number } of trace.steps) {
      const known = this.#store.get(number);
      if (known) this.#steps.add([known]);
      else if (!this.#steps.get(number)) missing.push(number);
    }
    const newest = this.#store.all.at(-1)?.number ?? 0;
    const old = missing.filter((number) => number <= newest);
    if (!old.length || this.#asked === trace.seq_id) return;
    this.#asked = trace.seq_id; // once: what the server has forgotten does not come back
    const wanted = new Set(trace.steps.map(({ number }) => number));
    const { steps } = await askJson(`api/steps?since=${old[0] - 1}`);
    this.#steps.add(steps.filter((step) => wanted.has(step.number)));
  }

  #asked = null;

  // --- drawing --------------------------------------------------------------------------------

  #draw() {
    const box = byId("waterfall");
    const trace = this.#trace;
    if (!trace) {
      box.replaceChildren(h("p", { class: "failure" }, this.#note || "The server did not answer."));
      return;
    }
    const fall = waterfall(trace, (number) => this.#steps.get(number), this.#now());
    // The totals change too when a worker tells late of a step that was known before.
    const key = JSON.stringify([trace.seq_id, trace.finished_at, fall.rows.length, fall.total, fall.totals, fall.numMissing, this.#note]);
    if (key === this.#shown) return;
    this.#shown = key;
    const focusedId = box.contains(document.activeElement) ? document.activeElement.id : "";
    const [, state] = stateOf(trace);
    const tokens = `${counted(trace.num_prompt_tokens, "prompt token")} (${count(trace.num_cached_tokens)} cached), ${counted(trace.num_output_tokens, "token")} made`;
    const preempted = trace.num_preemptions ? `, ${counted(trace.num_preemptions, "preemption")}` : "";
    const parts = [
      h("div", { class: "panel-head" },
        h("h3", {}, `Request #${trace.seq_id}: ${state}`),
        h("button", { type: "button", id: "waterfall-close", onclick: () => this.#close() }, "Close")),
      h("p", { class: "muted small" }, `${tokens}${preempted}. ${duration(fall.total)} in ${counted(trace.num_steps, "step")}`
        + (fall.numMissing ? `; the details of ${count(fall.numMissing)} of them are not known${trace.finished_at === null ? " yet" : ""}` : "")
        + (trace.trace_id ? `. Trace ${trace.trace_id}` : "") + "."),
      this.#note ? h("p", { class: "failure" }, this.#note) : null,
      totalsOf(fall),
      stepsOf(fall),
      ...["prefill", "decode"].filter((kind) => fall.byStage[kind].size).map((kind) => stagesOf(fall, kind)),
    ];
    box.replaceChildren(...parts.filter((part) => part !== null));
    if (focusedId) byId(focusedId)?.focus();
  }

  #close() {
    const row = this.#rows.get(this.#chosen);
    this.#choose(null);
    row?.button.focus();
  }
}

/** All of its time, by kind. */
function totalsOf(fall) {
  const shown = KINDS.filter(({ id }) => fall.totals[id] > fall.total * 1e-6);
  const parts = shown.map(({ id }) => {
    const part = h("span", { class: `bar-part kind-${id}` });
    setPart(part, "width", fall.totals[id] / fall.total);
    return part;
  });
  return h("div", {}, h("div", { class: "bar tall", "aria-hidden": "true" }, ...parts),
    h("ul", { class: "phases totals", "aria-label": "Where its time went" }, ...shown.map(({ id, label, about }) =>
      h("li", { title: about }, h("span", { class: `swatch kind-${id}` }), h("span", {}, label),
        h("span", { class: "figure" }, `${duration(fall.totals[id])}, ${percent(fall.totals[id] / fall.total)}`)))));
}

/** The first steps one by one, on one axis from its arrival to the last of them. */
function stepsOf(fall) {
  const counts = { wait: 0, prefill: 0, decode: 0 };
  const most = { wait: 1, prefill: MOST_PREFILL, decode: MOST_DECODE };
  const shown = fall.rows.filter(({ kind }) => (counts[kind] += 1) <= most[kind]);
  if (!shown.length) return h("p", { class: "muted" }, "None of its steps is known.");
  // Chunks that are not shown one by one share a row: the axis has them anyway.
  const others = fall.rows.filter(({ kind }) => kind === "prefill").slice(MOST_PREFILL);
  if (others.length) {
    const [begin, end] = [others[0].from, others.at(-1).to];
    const parts = others.length <= MOST_DRAWN ? others.flatMap((row) => row.parts)
      : [{ kind: "compute", stage: null, worker: "", from: begin, to: end }];
    const numTokens = others.reduce((sum, row) => sum + row.numTokens, 0);
    const at = shown.findIndex(({ kind }) => kind === "decode");
    shown.splice(at < 0 ? shown.length : at, 0,
      { label: `prefill, ${counted(others.length, "more step")}`, kind: "prefill", number: null, numTokens, from: begin, to: end, parts });
  }
  const from = shown[0].from;
  const span = Math.max(...shown.map(({ to }) => to)) - from || 1;
  const rows = shown.map((row) => {
    const bars = row.parts.map((part) => {
      const bar = h("span", { class: `span kind-${part.kind === "compute" ? row.kind : part.kind}`, "data-odd": part.stage !== null && part.stage % 2 === 1, title: `${LABELS[part.kind]}${part.stage === null ? "" : `, stage ${part.stage}`}: ${duration(part.to - part.from)}` });
      setPart(bar, "left", (part.from - from) / span);
      setPart(bar, "width", (part.to - part.from) / span);
      return bar;
    });
    const name = row.number === null ? row.label : `${row.label}, step ${count(row.number)}`;
    return h("tr", {}, h("th", { scope: "row" }, name),
      h("td", { class: "figure tokens" }, row.numTokens ? count(row.numTokens) : UNKNOWN),
      h("td", { class: "figure after" }, duration(row.from - from)),
      h("td", { class: "figure" }, duration(row.to - row.from)),
      h("td", { class: "spans" }, h("div", { "aria-hidden": "true" }, ...bars)));
  });
  const rest = ["prefill", "decode"].flatMap((kind) => {
    const left = fall.rows.filter((row) => row.kind === kind).slice(most[kind]);
    if (!left.length) return [];
    const times = left.map((row) => row.to - row.from).sort((a, b) => a - b);
    const mean = times.reduce((sum, each) => sum + each, 0) / times.length;
    return [`${counted(times.length, `more ${kind} step`)}: ${duration(mean)} on average, ${duration(times[Math.floor(times.length / 2)])} in the middle, ${duration(times.at(-1))} the longest`];
  });
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Its first steps" },
    h("table", { class: "spans-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Step"), h("th", { scope: "col", class: "figure tokens" }, "Tokens"),
        h("th", { scope: "col", class: "figure after" }, "After"), h("th", { scope: "col", class: "figure" }, "Took"),
        h("th", { scope: "col", class: "axis" }, `${duration(span)} from left to right, every second stage lighter`))),
      h("tbody", {}, ...rows)),
    ...rest.map((text) => h("p", { class: "muted small" }, text)));
}

/** Means a step, for each stage. */
function stagesOf(fall, kind) {
  const names = ["wire", "queue", "serialise", "compute", "send"];
  const rows = [...fall.byStage[kind]].sort(([a], [b]) => a - b).map(([stage, sums]) =>
    h("tr", {}, h("th", { scope: "row" }, `${stage}: ${sums.worker}`), h("td", { class: "figure" }, count(sums.steps.size)),
      ...names.map((name) => h("td", { class: "figure" }, duration((sums.seconds[name] ?? 0) / sums.steps.size)))));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Stages, ${kind}` },
    h("table", {}, h("caption", {}, `Means of a ${kind} step, by stage`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Stage"), h("th", { scope: "col", class: "figure" }, "Steps"),
        ...names.map((name) => h("th", { scope: "col", class: "figure" }, LABELS[name])))),
      h("tbody", {}, ...rows)));
}
