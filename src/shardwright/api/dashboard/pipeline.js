// The pipeline as a picture: the master, then each stage with the link that leads to it.

import { Placement } from "./changes.js";
import { arrange, byId, h, setAttribute, setPart, setText } from "./dom.js";
import { bytes, count, counted, duration, layers, number, percent, rate, UNKNOWN } from "./format.js";
import { KINDS, phasesBetween, quantile, timesOf } from "./steps.js";

const PHASES = ["wait", "wire", "queue", "serialise", "compute", "send"];
const PHASE_LABELS = { ...Object.fromEntries(KINDS.map(({ id, label }) => [id, label])), wait: "nothing to do" };
const PHASE_WINDOW_S = 10; // phases are means over about so long

/** Draws views of the cluster; call `show` with each one. */
export class Pipeline {
  #placement = new Placement();
  #cards = new Map();
  #master = new MasterCard();
  #facts = new Facts(byId("facts"));

  /** Draw this view. */
  show(view) {
    const placed = this.#placement.take(view);
    const inside = placed.filter(({ place }) => place !== null);
    const outside = placed.filter(({ place }) => place === null);
    const links = new Map(view.links.map((link) => [`${link.sender}>${link.receiver}`, link]));
    const known = new Set(view.workers.map((worker) => worker.worker_id));
    for (const id of this.#cards.keys()) if (!known.has(id)) this.#cards.delete(id);

    this.#facts.show(view);
    this.#master.show(view);
    const cards = inside.map(({ worker, place }, index) => {
      const sender = index === 0 ? "" : inside[index - 1].worker.worker_id;
      const isLast = index === inside.length - 1;
      const card = this.#card(worker.worker_id);
      card.show(worker, place, {
        sender,
        inLink: links.get(`${sender}>${worker.worker_id}`),
        outLink: isLast ? links.get(`${worker.worker_id}>`) : undefined,
        isLast,
      });
      return card.element;
    });
    arrange(byId("stages"), [this.#master.element, ...cards]);
    arrange(byId("other-workers"), outside.map(({ worker }) => {
      const card = this.#card(worker.worker_id);
      card.show(worker, null, {});
      return card.element;
    }));
    byId("others").hidden = outside.length === 0;
    const failure = byId("failure");
    const trouble = troubleWords(view);
    failure.hidden = !trouble;
    setText(failure, trouble);
    showLayerMap(byId("layer-map"), view, inside);
  }

  #card(id) {
    if (!this.#cards.has(id)) this.#cards.set(id, new WorkerCard());
    return this.#cards.get(id);
  }
}

function troubleWords({ failure, snapshot }) {
  if (failure) return `No request can be answered: ${failure}`;
  if (!snapshot.recovering_from) return "";
  return `Recovering: ${snapshot.recovering_from}; requests that wait: ${count(snapshot.num_waiting + snapshot.num_running)}`;
}

/** Pairs of a name and a figure. */
class Facts {
  #element;
  #values = new Map();

  constructor(element) {
    this.#element = element;
  }

  show(view) {
    const { snapshot } = view;
    const used = snapshot.num_blocks - snapshot.num_free_blocks;
    const errors = view.num_errors.reduce((sum, [, each]) => sum + each, 0);
    const bound = snapshot.max_waiting ? ` of at most ${count(snapshot.max_waiting)}` : "";
    this.#set("Epoch", count(snapshot.epoch));
    this.#set("Running", counted(snapshot.num_running, "request"));
    this.#set("Waiting", `${count(snapshot.num_waiting)}${bound}`);
    this.#set("Steps under way", `${count(snapshot.num_steps_in_flight)} of at most ${count(snapshot.max_steps_in_flight)}`);
    this.#set("KV blocks used", snapshot.num_blocks ? `${percent(used / snapshot.num_blocks)} of ${count(snapshot.num_blocks)}` : UNKNOWN);
    this.#set("Tokens made", count(snapshot.total_output_tokens));
    this.#set("Preemptions", count(snapshot.total_preemptions));
    this.#set("Errors", count(errors));
    this.#set("Up for", duration(view.at - view.started_at));
  }

  #set(name, text) {
    if (!this.#values.has(name)) {
      const value = h("dd");
      this.#values.set(name, value);
      this.#element.append(h("div", {}, h("dt", {}, name), value));
    }
    setText(this.#values.get(name), text);
  }
}

function showLayerMap(element, view, inside) {
  const parts = inside.filter(({ place }) => place.end > place.first);
  const key = JSON.stringify([view.num_layers, parts.map(({ worker, place }) => [worker.worker_id, worker.status, place])]);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.replaceChildren(...parts.map(({ worker, place }) => {
    const level = worker.status === "lost" ? "bad" : place.isPast ? "none" : "good";
    const part = h("div", { class: "layer-part", "data-level": level },
      h("span", { class: "layer-name" }, worker.worker_id), h("span", {}, layers(place.first, place.end)));
    part.style.flexGrow = String(place.end - place.first);
    return part;
  }));
  const told = parts.map(({ worker, place }) =>
    `${worker.worker_id} ${worker.status === "lost" ? "(lost) " : ""}${place.isPast ? "held" : "holds"} layers ${layers(place.first, place.end)}`);
  setAttribute(element, "aria-label", told.length ? `${counted(view.num_layers, "layer")}: ${told.join("; ")}` : "No pipeline");
}

class MasterCard {
  constructor() {
    this.badge = h("span", { class: "badge" });
    this.name = h("p", { class: "card-line strong" });
    this.blocks = new Bar(["used", "cached"]);
    this.queue = h("p", { class: "card-line muted small" });
    this.firstToken = h("p", { class: "card-line small" });
    this.nextToken = h("p", { class: "card-line small" });
    this.element = h("li", { class: "stage master" }, h("article", { class: "card", "aria-label": "Master" },
      h("div", { class: "card-head" }, h("h3", {}, "Master"), this.badge), this.name,
      h("p", { class: "card-line muted small" }, "schedules steps, holds no weights"), this.blocks.element, this.queue, this.firstToken, this.nextToken));
  }

  show(view) {
    const { snapshot } = view;
    const [level, text] = view.failure ? ["bad", "failed"] : view.is_ready ? ["good", "ready"] : ["warn", "not ready"];
    setAttribute(this.badge, "data-level", level);
    setText(this.badge, text);
    setText(this.name, view.model_name);
    const total = snapshot.num_blocks;
    const used = total - snapshot.num_free_blocks;
    this.blocks.show("KV blocks", total ? percent(used / total) : UNKNOWN, [used / total, snapshot.num_cached_blocks / total],
      total ? `${count(used)} in use, ${count(snapshot.num_cached_blocks)} more hold known prefixes, of ${count(total)}` : "no pipeline");
    setText(this.queue, `${counted(snapshot.total_prompt_tokens, "prompt token")}, ${count(snapshot.total_cached_tokens)} from the prefix cache`);
    const typical = (times) => `p50 ${duration(quantile(times, 0.5))}, p95 ${duration(quantile(times, 0.95))}`;
    setText(this.firstToken, `First token since the start: ${typical(view.time_to_first_token)}`);
    setText(this.nextToken, `Next token since the start: ${typical(view.inter_token_latency)}`);
  }
}

/** A label, a figure, a bar of parts, and what they are in words. */
class Bar {
  constructor(kinds) {
    this.label = h("span", {});
    this.figure = h("span", { class: "figure" });
    this.parts = kinds.map((kind) => h("span", { class: `bar-part ${kind}` }));
    this.words = h("p", { class: "muted small bar-words" });
    this.element = h("div", { class: "bar-box" }, h("p", { class: "bar-head" }, this.label, this.figure),
      h("div", { class: "bar", "aria-hidden": "true" }, ...this.parts), this.words);
  }

  show(label, figure, parts, words) {
    setText(this.label, label);
    setText(this.figure, figure);
    this.parts.forEach((part, index) => setPart(part, "width", parts[index]));
    setText(this.words, words);
  }
}

class WorkerCard {
  #told = []; // its times of the last seconds, oldest first

  constructor() {
    this.link = h("p", { class: "link" });
    this.linkBox = h("div", { class: "link-box" }, h("span", { class: "arrow", "aria-hidden": "true" }), this.link);
    this.title = h("h3", {});
    this.numRanks = h("span", { class: "num-ranks muted small", hidden: true });
    this.badge = h("span", { class: "badge" });
    this.layers = h("p", { class: "card-line strong" });
    this.device = h("p", { class: "card-line muted small" });
    this.reason = h("p", { class: "failure", hidden: true });
    this.busy = new Bar(["busy"]);
    this.memory = new Bar(["weights", "kv"]);
    this.machine = h("p", { class: "card-line small" });
    this.gpu = h("p", { class: "card-line small" });
    this.rankList = h("ul", { class: "ranks small" });
    this.ranks = h("details", { hidden: true }, h("summary", {}, "Ranks: what each device does"), this.rankList);
    this.phaseBar = h("div", { class: "bar", "aria-hidden": "true" });
    this.phaseList = h("ul", { class: "phases small" });
    this.phaseNote = h("p", { class: "muted small" });
    this.phases = h("details", {}, h("summary", {}, "Where a step's time goes"), this.phaseBar, this.phaseList, this.phaseNote);
    this.back = h("p", { class: "link back", hidden: true });
    this.card = h("article", { class: "card" }, h("div", { class: "card-head" }, this.title, this.numRanks, this.badge),
      this.layers, this.device, this.reason, this.busy.element, this.memory.element, this.machine, this.gpu, this.ranks,
      this.phases, this.back);
    this.element = h("li", { class: "stage" }, this.linkBox, this.card);
  }

  show(worker, place, { inLink, outLink, isLast }) {
    const levels = { ready: "good", lost: "bad", loading: "warn", joining: "warn" };
    setAttribute(this.card, "aria-label", `Worker ${worker.worker_id}`);
    setAttribute(this.element, "data-status", worker.status);
    setText(this.title, worker.worker_id);
    setAttribute(this.badge, "data-level", levels[worker.status] ?? "none");
    setText(this.badge, worker.status);
    this.linkBox.hidden = place === null;
    setText(this.layers, place ? `Stage ${place.index}: ${place.isPast ? "held" : "layers"} ${layers(place.first, place.end)}` : "No layers");
    setText(this.device, [worker.device, worker.device_name, worker.address].filter(Boolean).join(" \u00b7 "));
    this.reason.hidden = worker.status !== "lost";
    setText(this.reason, worker.status === "lost" ? `Lost: ${worker.reason || "no reason was told"}` : "");
    const isGone = worker.status === "lost";
    const report = worker.report;
    const age = worker.report_age_s;
    this.busy.show("Busy", isGone ? UNKNOWN : percent(worker.busy_ratio), [isGone ? 0 : worker.busy_ratio],
      report === null ? "no report yet"
        : `queue ${count(report.queue_depth)}, ${counted(report.steps_done, "step")} done${age > 3 ? `, told ${duration(age)} ago` : ""}`);
    const limit = worker.memory_limit_bytes;
    const held = worker.weight_bytes + worker.kv_bytes;
    const free = Math.max(limit - held, 0);
    this.memory.show("Memory", limit > 0 ? `${bytes(held)} of ${bytes(limit)}` : bytes(held),
      [worker.weight_bytes / Math.max(limit, held), worker.kv_bytes / Math.max(limit, held)],
      `weights ${bytes(worker.weight_bytes)}, KV ${bytes(worker.kv_bytes)}${limit > 0 ? `, free ${bytes(free)}` : ""}`);
    this.#showMachine(report);
    this.#showRanks(worker);
    this.#showPhases(worker);
    setText(this.link, linkWords(inLink));
    this.back.hidden = !isLast || !outLink;
    setText(this.back, outLink ? `Tokens to the master: ${linkWords(outLink)}` : "");
  }

  #showMachine(report) {
    setText(this.machine, report === null ? "" : `CPU ${percent(report.cpu_utilization / 100)}, RAM ${bytes(report.memory_used_bytes)} of `
      + `${bytes(report.memory_total_bytes)}, this process ${bytes(report.process_memory_bytes)}`);
    const parts = report === null ? [] : gpuParts(report);
    this.gpu.hidden = parts.length === 0;
    setText(this.gpu, parts.join(", "));
  }

  #showRanks({ num_ranks: number, ranks }) {
    this.numRanks.hidden = number < 2;
    setText(this.numRanks, number < 2 ? "" : `\u00d7 ${counted(number, "rank")}`);
    this.ranks.hidden = ranks.length === 0;
    arrange(this.rankList, ranks.map((load, index) => {
      const item = this.rankList.children[index] ?? h("li");
      const device = [load.device, load.device_name].filter(Boolean).join(" \u00b7 ");
      setText(item, `Rank ${load.rank} on ${device}: ${[...gpuParts(load), `process ${bytes(load.process_memory_bytes)}`].join(", ")}`);
      return item;
    }));
  }

  #showPhases(worker) {
    const { report } = worker;
    if (report === null) {
      this.phases.hidden = true;
      return;
    }
    const newest = this.#told.at(-1);
    if (newest && (newest.epoch !== report.epoch || newest.uptime > report.uptime_s)) this.#told = [];
    if (newest?.at !== report.timestamp) {
      this.#told.push({ at: report.timestamp, epoch: report.epoch, uptime: report.uptime_s, times: timesOf(worker) });
    }
    while (this.#told.length > 2 && this.#told[1].at < report.timestamp - PHASE_WINDOW_S) this.#told.shift();
    this.phases.hidden = !(report.phases ?? []).length;
    if (!this.phases.open) return;
    const [first, last] = [this.#told[0], this.#told.at(-1)];
    const found = phasesBetween(first.times, last.times);
    const shown = found ? PHASES.filter((phase) => found.means[phase] !== undefined) : [];
    const total = shown.reduce((sum, phase) => sum + found.means[phase], 0);
    arrange(this.phaseBar, shown.map((phase, index) => {
      const part = this.phaseBar.children[index] ?? h("span");
      setAttribute(part, "class", `bar-part kind-${phase}`);
      setPart(part, "width", total > 0 ? found.means[phase] / total : 0);
      return part;
    }));
    arrange(this.phaseList, shown.map((phase, index) => {
      const item = this.phaseList.children[index] ?? h("li", {}, h("span", {}), h("span", {}), h("span", { class: "figure" }));
      setAttribute(item.children[0], "class", `swatch kind-${phase}`);
      setText(item.children[1], PHASE_LABELS[phase]);
      setText(item.children[2], duration(found.means[phase]));
      return item;
    }));
    setText(this.phaseNote, found ? `Means of ${counted(found.numSteps, "step")} in the last ${duration(last.at - first.at)}.`
      : "No step in the last seconds.");
  }
}

function gpuParts(load) {
  const parts = [];
  if (load.gpu_utilization !== null) parts.push(`GPU ${percent(load.gpu_utilization / 100)}`);
  if (load.gpu_memory_total_bytes) parts.push(`${bytes(load.gpu_memory_used_bytes)} of ${bytes(load.gpu_memory_total_bytes)}`);
  if (Number.isFinite(load.gpu_temperature_c ?? NaN)) parts.push(`${number(load.gpu_temperature_c)}\u202f\u00b0C`);
  if (Number.isFinite(load.gpu_power_w ?? NaN)) parts.push(`${number(load.gpu_power_w)}\u202fW`);
  return parts;
}

function linkWords(link) {
  if (!link) return "no link";
  const parts = [];
  if (link.round_trip_s !== null) parts.push(`round trip ${duration(link.round_trip_s)}`);
  if (link.bytes_per_s !== null) parts.push(rate(link.bytes_per_s));
  if (link.wire_s !== null) parts.push(`wire ${duration(link.wire_s)}`);
  return parts.length ? parts.join(", ") : "not measured yet";
}
