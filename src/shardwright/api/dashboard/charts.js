// The last hour as lines: five charts with axes, units, and a cursor for pointer and keyboard.

import { h, setAttribute, setText, svg, watchSize } from "./dom.js";
import { clock, duration, number, percent, ticks, tokenRate, UNKNOWN } from "./format.js";

const HOUR_S = 3600;
const HEIGHT = 168;
const MARGIN = { top: 8, right: 10, bottom: 22, left: 56 };
const LEAST_SPAN_S = 60;

const seconds = { format: duration, axis: (value) => duration(value) };
const CHARTS = [
  { id: "throughput", title: "Throughput", format: tokenRate, axis: (value) => number(value), unit: "tokens/s",
    lines: [["output_tokens_per_s", "output"], ["prompt_tokens_per_s", "prompt, computed"]] },
  { id: "ttft", title: "Time to first token", ...seconds, unit: "", lines: [["ttft_p50_s", "p50"], ["ttft_p95_s", "p95"]] },
  { id: "itl", title: "Inter-token latency", ...seconds, unit: "", lines: [["inter_token_p50_s", "p50"], ["inter_token_p95_s", "p95"]] },
  { id: "blocks", title: "KV blocks in use", format: percent, axis: (value) => percent(value), unit: "", top: 1, lines: [["kv_used_ratio", "in use"]] },
  { id: "prefix", title: "Prefix cache hits", format: percent, axis: (value) => percent(value), unit: "", top: 1, lines: [["prefix_hit_ratio", "of prompt tokens"]] },
  { id: "load", title: "Requests", format: number, axis: (value) => number(value), unit: "", least: 4,
    lines: [["num_running", "running"], ["num_waiting", "waiting"]] },
];

/** A line's points as SVG path data; a gap (null) lifts the pen, a lone point gets a short stroke to be seen. */
export function pathOf(points) {
  let path = "";
  let isDown = false;
  points.forEach((point, index) => {
    if (point === null) {
      isDown = false;
      return;
    }
    const [x, y] = point.map((each) => each.toFixed(1));
    if (isDown) path += `L${x} ${y}`;
    else path += points[index + 1] ? `M${x} ${y}` : `M${x} ${y}h1`;
    isDown = true;
  });
  return path;
}

/** What a line did, in words. */
export function summaryOf(label, values, format) {
  const known = values.filter((value) => Number.isFinite(value));
  if (!known.length) return `${label}: nothing yet`;
  const mean = known.reduce((sum, each) => sum + each, 0) / known.length;
  return `${label}: lately ${format(known.at(-1))}, mean ${format(mean)}, least ${format(Math.min(...known))}, most ${format(Math.max(...known))}`;
}

/** Draws the history; call `set` with all points, then `add` with each new one. */
export class Charts {
  #points = [];
  #charts;
  #isDirty = true;

  constructor(parent) {
    this.#charts = CHARTS.map((spec) => new Chart(spec));
    parent.append(...this.#charts.map((chart) => chart.element));
    watchSize(parent, () => this.#draw());
    document.addEventListener("visibilitychange", () => {
      if (this.#isDirty) this.#draw();
    });
  }

  /** Replace all points. */
  set(points) {
    this.#points = [...points];
    this.#draw();
  }

  /** Take points that are new; those that are known already are left as they are. */
  add(points) {
    const newest = this.#points.at(-1)?.at ?? -Infinity;
    this.#points.push(...points.filter((point) => point.at > newest));
    const last = this.#points.at(-1);
    if (last) this.#points = this.#points.filter((point) => point.at > last.at - HOUR_S);
    this.#draw();
  }

  #draw() {
    this.#isDirty = document.hidden;
    if (document.hidden) return;
    for (const chart of this.#charts) chart.draw(this.#points);
  }
}

class Chart {
  #spec;
  #points = [];
  #cursor = null; // index of the point that is looked at
  #scale = null;

  constructor(spec) {
    this.#spec = spec;
    this.values = spec.lines.map(() => h("b", { class: "figure" }, UNKNOWN));
    this.legend = h("p", { class: "chart-legend small" }, ...spec.lines.map(([, label], index) =>
      h("span", {}, h("span", { class: `swatch line-${index}`, "aria-hidden": "true" }), `${label} `, this.values[index])));
    this.time = h("span", { class: "muted small" });
    this.grid = svg("g", { class: "grid" });
    this.paths = spec.lines.map((_, index) => svg("path", { class: `line line-${index}`, fill: "none" }));
    this.marks = spec.lines.map((_, index) => svg("circle", { class: `mark line-${index}`, r: 3.5, visibility: "hidden" }));
    this.rule = svg("line", { class: "rule", visibility: "hidden" });
    this.picture = svg("svg", { height: HEIGHT, "aria-hidden": "true", focusable: "false" }, this.grid, this.rule, ...this.paths, ...this.marks);
    this.plot = h("div", {
      class: "plot", tabindex: "0", role: "slider", "aria-label": `${spec.title}, the time that is read`, "aria-valuemin": "0", "aria-valuemax": "0",
      "aria-valuenow": "0", "aria-valuetext": "no point yet",
      onpointermove: (event) => this.#point(event), onpointerdown: (event) => this.#point(event),
      onpointerleave: () => this.#look(null), onkeydown: (event) => this.#key(event), onblur: () => this.#look(null),
    }, this.picture);
    this.summary = h("p", { class: "unseen" });
    this.element = h("figure", { class: "chart", id: `chart-${spec.id}` },
      h("figcaption", {}, h("h3", {}, spec.title), spec.unit ? h("span", { class: "muted small" }, spec.unit) : null, this.time),
      this.legend, this.plot, this.summary);
  }

  draw(points) {
    const { lines, top, format, axis, least = 0 } = this.#spec;
    this.#points = points;
    if (this.#cursor !== null && this.#cursor >= points.length) this.#cursor = null;
    const width = Math.max(this.plot.clientWidth, 120);
    setAttribute(this.picture, "width", width);
    const newest = points.at(-1)?.at ?? 0;
    const span = Math.min(Math.max(newest - (points[0]?.at ?? newest), LEAST_SPAN_S), HOUR_S);
    const begin = newest - span;
    const values = lines.map(([field]) => points.map((point) => point[field]));
    const most = Math.max(least, ...values.flat().filter((value) => Number.isFinite(value)));
    const marks = top ? [0, 0.25, 0.5, 0.75, 1] : ticks(most > 0 ? most : 1);
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    const x = (at) => MARGIN.left + ((at - begin) / span) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => MARGIN.top + (1 - value / marks.at(-1)) * height;
    this.#scale = { x, y, width };
    const grid = [];
    for (const mark of marks) {
      grid.push(svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(mark), y2: y(mark) }));
      grid.push(svg("text", { x: MARGIN.left - 6, y: y(mark) + 4, "text-anchor": "end" }, axis(mark)));
    }
    for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const at = begin + span * part;
      if (points.length) grid.push(svg("text", { x: x(at), y: HEIGHT - 6, "text-anchor": anchor }, clock(at)));
    }
    this.grid.replaceChildren(...grid);
    lines.forEach((_, index) => {
      const path = pathOf(points.map((point, at) => (Number.isFinite(values[index][at]) ? [x(point.at), y(values[index][at])] : null)));
      setAttribute(this.paths[index], "d", path);
    });
    setText(this.summary, points.length
      ? `${duration(newest - points[0].at)} until ${clock(newest)}. ${lines.map(([, label], index) => summaryOf(label, values[index], format)).join(". ")}.`
      : "No point yet.");
    setAttribute(this.plot, "aria-valuemax", Math.max(points.length - 1, 0));
    this.#look(this.#cursor);
  }

  #point(event) {
    if (!this.#points.length) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    this.#points.forEach((point, index) => {
      if (Math.abs(this.#scale.x(point.at) - at) < Math.abs(this.#scale.x(this.#points[best].at) - at)) best = index;
    });
    this.#look(best);
  }

  #key(event) {
    const last = this.#points.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const now = this.#cursor ?? last;
    const moves = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - 12, PageUp: now + 12, Home: 0, End: last };
    if (event.key === "Escape") this.#look(null);
    else if (event.key in moves) this.#look(Math.min(Math.max(moves[event.key], 0), last));
    else return;
    event.preventDefault();
  }

  /** Show the figures of a point, or of the newest one. */
  #look(index) {
    this.#cursor = index;
    const shown = index ?? this.#points.length - 1;
    const point = this.#points[shown];
    const { lines, format } = this.#spec;
    const isAsked = index !== null && point !== undefined;
    setAttribute(this.rule, "visibility", isAsked ? "visible" : "hidden");
    lines.forEach(([field], at) => {
      const value = point?.[field];
      setText(this.values[at], format(value ?? NaN));
      const isMarked = isAsked && Number.isFinite(value);
      setAttribute(this.marks[at], "visibility", isMarked ? "visible" : "hidden");
      if (isMarked) {
        setAttribute(this.marks[at], "cx", this.#scale.x(point.at));
        setAttribute(this.marks[at], "cy", this.#scale.y(value));
      }
    });
    if (!point) return;
    setText(this.time, isAsked ? clock(point.at) : "now");
    if (isAsked) {
      for (const [name, value] of [["x1", this.#scale.x(point.at)], ["x2", this.#scale.x(point.at)], ["y1", MARGIN.top], ["y2", HEIGHT - MARGIN.bottom]]) {
        setAttribute(this.rule, name, value);
      }
    }
    setAttribute(this.plot, "aria-valuenow", shown);
    setAttribute(this.plot, "aria-valuetext", `${clock(point.at)}: ${lines.map(([field, label]) => `${label} ${format(point[field] ?? NaN)}`).join(", ")}`);
  }
}
