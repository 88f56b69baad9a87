// The live timeline: a lane for each stage, each step's passage through it as bars, on a canvas.

import { byId, colours, h, setAttribute, setText, wantsLittleMotion, watchSize } from "./dom.js";
import { bytes, clock, count, counted, duration, percent, ticks } from "./format.js";
import { endOf, kindOf, spansOf } from "./steps.js";

const BEHIND_S = 2.5; // workers tell of their steps once a second: so far back, a gap is a gap
const LABEL_PX = 17;
const ROWS = { top: 9, middle: 18, bottom: 6, between: 1 }; // wire and queue; compute; send
const LANE_PX = LABEL_PX + ROWS.top + ROWS.middle + ROWS.bottom + 2 * ROWS.between + 9;
const AXIS_PX = 22;
const MASTER_PX = LABEL_PX + 12 + 9;
const FRAME_MS = 100;
const TABLE_MS = 2000;
const TABLE_STEPS = 30;
const NEAR_PX = 6;
const KINDS = ["wire", "queue", "serialise", "prefill", "decode", "send"];
const ROW_OF = { wire: "top", queue: "top", serialise: "middle", prefill: "middle", decode: "middle", send: "bottom" };
const LEGEND = [
  ["decode", "compute, decode"], ["prefill", "compute, prefill"], ["serialise", "serialise"], ["queue", "queue"],
  ["wire", "wire"], ["send", "send"],
];
const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';

/** Draws the steps of `store` as long as the page is seen; `now` gives the master's time. */
export class Timeline {
  #store;
  #frozen = null; // steps and right edge, while it is paused
  #now;
  #canvas = byId("gantt");
  #context = this.#canvas.getContext("2d");
  #tip = byId("gantt-tip");
  #window = 5;
  #stages = [];
  #epoch = 0; // steps of earlier ones never come back
  #selected = null; // {number, stage}
  #isSeen = true;
  #lastFrame = 0;
  #lastTable = 0;
  #wasEmpty = false;
  #palette = null;
  #size = { width: 0, height: 0, ratio: 1 };
  #pointer = null;

  constructor(store, now) {
    this.#store = store;
    this.#now = now;
    byId("legend").append(...LEGEND.map(([kind, label]) =>
      h("li", {}, h("span", { class: `swatch kind-${kind}`, "aria-hidden": "true" }), label)));
    const select = byId("window");
    select.addEventListener("change", () => {
      this.#window = Number(select.value);
      this.redraw();
    });
    byId("pause").addEventListener("click", () => this.#pause(this.#frozen === null));
    byId("step-table-box").addEventListener("toggle", () => this.#showTable());
    this.#canvas.addEventListener("pointermove", (event) => this.#hover(event));
    this.#canvas.addEventListener("pointerleave", () => {
      this.#pointer = null;
      this.#tip.hidden = true;
      this.redraw();
    });
    this.#canvas.addEventListener("click", (event) => this.#click(event));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("themechange", () => {
      this.#palette = null;
      this.redraw();
    });
    document.addEventListener("visibilitychange", () => this.#schedule());
    new IntersectionObserver((entries) => {
      this.#isSeen = entries.at(-1).isIntersecting;
      this.#schedule();
    }).observe(this.#canvas);
    watchSize(this.#canvas, () => this.redraw());
    this.#fit();
    this.#schedule();
  }

  /** Which workers hold the stages now, in order. Lanes stay when there is no pipeline any more. */
  setPipeline(workers, epoch) {
    this.#epoch = workers.length ? epoch : Infinity;
    if (!workers.length || workers.join("\n") === this.#stages.join("\n")) return;
    this.#stages = workers;
    this.redraw();
  }

  /** Draw once, also while it is paused. */
  redraw() {
    this.#wasEmpty = false;
    if (document.hidden) return;
    requestAnimationFrame(() => this.#draw());
  }

  get #steps() {
    return this.#frozen ? this.#frozen.store : this.#store;
  }

  get #end() {
    return this.#frozen ? this.#frozen.end : this.#now() - BEHIND_S;
  }

  #pause(isPaused) {
    this.#frozen = isPaused ? { store: this.#store.copy(), end: this.#end } : null;
    setAttribute(byId("pause"), "aria-pressed", isPaused);
    setText(byId("pause"), isPaused ? "Go on" : "Pause");
    if (!isPaused) this.#select(null);
    this.redraw();
    this.#schedule();
  }

  // --- when to draw ---------------------------------------------------------------------------

  #isScheduled = false;

  #schedule() {
    if (this.#isScheduled || document.hidden || !this.#isSeen || this.#frozen) return;
    this.#isScheduled = true;
    const frame = (at) => {
      if (document.hidden || !this.#isSeen || this.#frozen) {
        this.#isScheduled = false;
        return;
      }
      const perPixel = (this.#window / Math.max(this.#size.width, 1)) * 1000;
      if (at - this.#lastFrame >= (wantsLittleMotion() ? 1000 : Math.max(FRAME_MS, perPixel))) {
        this.#lastFrame = at;
        this.#draw();
        if (at - this.#lastTable >= TABLE_MS) {
          this.#lastTable = at;
          this.#showTable();
        }
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  // --- drawing --------------------------------------------------------------------------------

  #fit() {
    const height = MASTER_PX + Math.max(this.#stages.length, 1) * LANE_PX + AXIS_PX;
    if (this.#canvas.style.height !== `${height}px`) this.#canvas.style.height = `${height}px`;
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    const width = this.#canvas.clientWidth;
    const [w, hgt] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.#canvas.width !== w || this.#canvas.height !== hgt) {
      this.#canvas.width = w;
      this.#canvas.height = hgt;
    }
    this.#size = { width, height, ratio };
  }

  #colours() {
    if (this.#palette === null) {
      const names = ["surface", "lane", "line", "text", "muted", "focus", ...KINDS.map((kind) => `kind-${kind}`)];
      this.#palette = colours(...names);
      this.#palette.hatch = hatch(this.#palette["kind-prefill"], this.#palette.surface);
    }
    return this.#palette;
  }

  #draw() {
    if (document.hidden) return;
    const end = this.#end;
    const begin = end - this.#window;
    const steps = this.#steps.within(begin, end);
    if (!steps.length && this.#wasEmpty) return;
    this.#wasEmpty = steps.length === 0;
    if (!this.#stages.length) this.#stages = lanesOf(steps);
    this.#fit();
    const context = this.#context;
    const { width, height, ratio } = this.#size;
    const palette = this.#colours();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = FONT;
    context.textBaseline = "middle";
    const x = (at) => ((at - begin) / this.#window) * width;
    this.#drawAxis(context, palette, end);
    context.fillStyle = palette.lane;
    context.fillRect(0, LABEL_PX, width, 12);
    this.#stages.forEach((_, lane) => context.fillRect(0, this.#rowTop(lane, "top"), width, ROWS.top + ROWS.middle + ROWS.bottom + 2));
    const busy = this.#drawBars(context, palette, steps, x, begin, end);
    context.fillStyle = palette.text;
    context.fillText(`Master: ${counted(steps.length, "step")} in ${this.#window}\u202fs`, 2, LABEL_PX / 2 + 1);
    this.#stages.forEach((worker, lane) => {
      const label = `Stage ${lane}: ${worker}, computing ${percent(busy[lane] / this.#window)} of the time`;
      context.fillText(label, 2, this.#laneTop(lane) + LABEL_PX / 2 + 1, width - 4);
    });
    this.#drawEpochs(context, palette, steps, x);
    this.#drawSelected(context, palette, x);
    const lanes = this.#stages.map((worker, lane) => `stage ${lane} on ${worker} computed ${percent(busy[lane] / this.#window)} of the time`);
    const told = [`Steps of ${this.#window} seconds until ${clock(end)}: ${counted(steps.length, "step")}`, ...lanes].join("; ");
    if (this.#frozen || this.#toldOf === 0 || performance.now() - this.#told > 5000) {
      this.#told = performance.now();
      this.#toldOf = steps.length;
      setAttribute(this.#canvas, "aria-label", told);
    }
    if (this.#pointer) this.#showTip();
  }

  #told = -Infinity; // when the picture was last put into words, and of how many steps
  #toldOf = 0;

  #laneTop(lane) {
    return MASTER_PX + lane * LANE_PX;
  }

  #rowTop(lane, row) {
    const top = this.#laneTop(lane) + LABEL_PX;
    if (row === "top") return top;
    if (row === "middle") return top + ROWS.top + ROWS.between;
    return top + ROWS.top + ROWS.middle + 2 * ROWS.between;
  }

  #drawAxis(context, palette, end) {
    const { width, height } = this.#size;
    const top = height - AXIS_PX;
    context.fillStyle = palette.muted;
    context.strokeStyle = palette.line;
    context.lineWidth = 1;
    context.beginPath();
    const wanted = Math.max(2, Math.min(10, Math.floor(width / 90)));
    for (const tick of ticks(this.#window, wanted)) {
      const at = Math.round(width - (tick / this.#window) * width) + 0.5;
      if (at < 0) continue;
      context.moveTo(at, LABEL_PX);
      context.lineTo(at, top + 4);
      const label = tick === 0 ? clock(end) : `\u2212${tick}\u202fs`;
      const size = context.measureText(label).width;
      context.fillText(label, Math.min(Math.max(at - size / 2, 0), width - size), top + 13);
    }
    context.stroke();
  }

  /** Bars of all steps; what is narrower than a pixel is summed up by column. Gives each lane's compute seconds. */
  #drawBars(context, palette, steps, x, begin, end) {
    const { width, ratio } = this.#size;
    const columns = Math.max(Math.ceil(width * ratio), 1);
    const busy = this.#stages.map(() => 0);
    const thin = this.#stages.map(() => Object.fromEntries(KINDS.map((kind) => [kind, null])));
    context.globalAlpha = 0.6;
    for (const step of steps) {
      const [from, to] = [x(Math.max(step.sent_at, begin)), x(Math.min(this.#endOf(step), end))];
      context.fillStyle = palette[`kind-${kindOf(step)}`];
      context.fillRect(from, LABEL_PX + 2, Math.max(to - from, 0.5), 8);
    }
    context.globalAlpha = 1;
    for (const step of steps) {
      const kind = kindOf(step);
      for (const passage of step.stages) {
        const lane = passage.stage_index;
        if (lane >= this.#stages.length) continue;
        busy[lane] += Math.max(Math.min(passage.finished_at, end) - Math.max(passage.started_at, begin), 0);
        for (const span of spansOf(passage)) {
          if (span.to <= span.from || span.to < begin || span.from > end) continue;
          const name = span.kind === "compute" ? kind : span.kind;
          const from = x(Math.max(span.from, begin));
          const size = x(Math.min(span.to, end)) - from;
          if (size * ratio < 1) {
            const sums = (thin[lane][name] ??= new Float32Array(columns));
            const at = Math.min(Math.floor(from * ratio), columns - 1);
            const first = Math.min(size * ratio, at + 1 - from * ratio);
            sums[at] += first;
            if (at + 1 < columns) sums[at + 1] += size * ratio - first;
            continue;
          }
          const row = ROW_OF[name];
          context.fillStyle = name === "prefill" && size > 3 ? palette.hatch : palette[`kind-${name}`];
          context.fillRect(from, this.#rowTop(lane, row), Math.max(size - 0.4, 0.5), ROWS[row]);
        }
      }
    }
    this.#drawThin(context, palette, thin);
    return busy;
  }

  /** When a step was last heard of; one that is under way goes on for ever, as far as is known. */
  #endOf(step) {
    const isGone = step.returned_at === null && step.epoch < this.#epoch;
    return isGone ? (step.stages.at(-1)?.sent_at ?? step.sent_at) : endOf(step);
  }

  #drawThin(context, palette, thin) {
    const { ratio } = this.#size;
    thin.forEach((kinds, lane) => {
      const filled = { top: null, middle: null, bottom: null }; // how much of each column is taken, row by row
      for (const kind of KINDS) {
        const sums = kinds[kind];
        if (sums === null) continue;
        const row = ROW_OF[kind];
        const below = (filled[row] ??= new Float32Array(sums.length));
        context.fillStyle = palette[`kind-${kind}`];
        const bottom = this.#rowTop(lane, row) + ROWS[row];
        for (let column = 0; column < sums.length; column += 1) {
          if (sums[column] === 0) continue;
          const part = Math.min(sums[column], Math.max(1 - below[column], 0));
          context.fillRect(column / ratio, bottom - (below[column] + part) * ROWS[row], 1 / ratio, part * ROWS[row]);
          below[column] += part;
        }
      }
    });
  }

  #drawEpochs(context, palette, steps, x) {
    const { height } = this.#size;
    context.save();
    context.setLineDash([4, 3]);
    context.strokeStyle = palette.text;
    context.fillStyle = palette.text;
    for (let index = 1; index < steps.length; index += 1) {
      if (steps[index].epoch === steps[index - 1].epoch) continue;
      const at = x(steps[index].sent_at);
      context.beginPath();
      context.moveTo(at, LABEL_PX);
      context.lineTo(at, height - AXIS_PX);
      context.stroke();
      context.fillText(`epoch ${steps[index].epoch}`, at + 3, LABEL_PX + 6);
    }
    context.restore();
  }

  #drawSelected(context, palette, x) {
    const selected = this.#selected && this.#steps.get(this.#selected.number);
    if (!selected) return;
    context.strokeStyle = palette.focus;
    for (const passage of selected.stages) {
      if (passage.stage_index >= this.#stages.length) continue;
      const [from, to] = [x(passage.started_at), x(passage.finished_at)];
      context.lineWidth = passage.stage_index === this.#selected.stage ? 2.5 : 1;
      context.strokeRect(from - 1.5, this.#rowTop(passage.stage_index, "middle") - 1.5, Math.max(to - from, 2) + 3, ROWS.middle + 3);
    }
  }

  // --- choosing a step ------------------------------------------------------------------------

  #at(event) {
    const box = this.#canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** The step whose bars are nearest to a point: `{step, passage}`, passage null in the master's lane. */
  #find({ x, y }) {
    const end = this.#end;
    const at = end - this.#window + (x / this.#size.width) * this.#window;
    const near = (NEAR_PX / this.#size.width) * this.#window;
    const lane = y < MASTER_PX ? null : Math.floor((y - MASTER_PX) / LANE_PX);
    let best = null;
    let least = near;
    for (const step of this.#steps.within(at - near, at + near)) {
      const passage = lane === null ? null : step.stages.find((each) => each.stage_index === lane);
      if (lane !== null && !passage) continue;
      const [from, to] = passage ? [passage.started_at, passage.finished_at] : [step.sent_at, Math.min(this.#endOf(step), end)];
      const away = Math.max(from - at, at - to, 0);
      if (away <= least) [best, least] = [{ step, passage }, away];
      if (away === 0) break;
    }
    return best;
  }

  #hover(event) {
    this.#pointer = this.#at(event);
    this.#showTip();
  }

  #showTip() {
    const found = this.#find(this.#pointer);
    this.#tip.hidden = found === null;
    if (!found) return;
    this.#tip.replaceChildren(...factsOf(found).map(([name, value]) => h("div", {}, h("span", {}, name), h("b", {}, value))));
    const { width } = this.#size;
    const size = this.#tip.offsetWidth;
    this.#tip.style.left = `${Math.max(0, Math.min(this.#pointer.x + 14, width - size))}px`;
    this.#tip.style.top = `${this.#pointer.y + 16}px`;
  }

  #click(event) {
    const found = this.#find(this.#at(event));
    this.#select(found ? { number: found.step.number, stage: found.passage?.stage_index ?? 0 } : null);
    this.redraw();
  }

  #select(selected) {
    this.#selected = selected;
    const step = selected && this.#steps.get(selected.number);
    const passage = step?.stages.find((each) => each.stage_index === selected.stage) ?? null;
    setText(byId("gantt-readout"), step ? factsOf({ step, passage }).map(([name, value]) => `${name} ${value}`).join(", ") : "");
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 0, ArrowDown: 0, Home: 0, End: 0 };
    if (event.key === " ") {
      event.preventDefault();
      this.#pause(this.#frozen === null);
      return;
    }
    if (!(event.key in moves)) return;
    event.preventDefault();
    if (!this.#frozen) this.#pause(true); // what moves can't be read
    const { store, end } = this.#frozen;
    const all = store.all.filter((step) => step.stages.length);
    if (!all.length) return;
    const stage = this.#selected?.stage ?? 0;
    const visible = store.within(end - this.#window, end).filter((step) => step.stages.length);
    const index = all.findIndex((step) => step.number === this.#selected?.number);
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const next = stage + (event.key === "ArrowDown" ? 1 : -1);
      const bounded = Math.min(Math.max(next, 0), Math.max(this.#stages.length - 1, 0));
      this.#select({ number: (all[index] ?? visible.at(-1) ?? all.at(-1)).number, stage: bounded });
    } else {
      let step;
      if (event.key === "Home") [step] = visible;
      else if (event.key === "End" || index < 0) step = visible.at(-1);
      else step = all[Math.min(Math.max(index + moves[event.key], 0), all.length - 1)];
      step ??= all.at(-1);
      this.#select({ number: step.number, stage });
      if (step.sent_at < end - this.#window) this.#frozen.end = step.sent_at + this.#window;
      else if (endOf(step) > this.#frozen.end) this.#frozen.end = Math.min(endOf(step), this.#now());
    }
    this.redraw();
  }

  // --- the table ------------------------------------------------------------------------------

  #showTable() {
    if (!byId("step-table-box").open || document.hidden) return;
    const end = this.#end;
    const steps = this.#steps.within(end - this.#window, end).filter((step) => step.stages.length).slice(-TABLE_STEPS).reverse();
    const names = ["Step", "Sent at", "Kind", "Sequences", "Tokens", "Stage", "Wire", "Queue", "Serialise", "Compute", "Send", "In", "Out"];
    const table = byId("step-table");
    if (!table.tHead.rows.length) {
      table.tHead.append(h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, name))));
    }
    table.tBodies[0].replaceChildren(...steps.flatMap((step) => step.stages.map((passage) => {
      const spans = Object.fromEntries(spansOf(passage).map(({ kind, from, to }) => [kind, to - from]));
      const cells = [clock(step.sent_at, { tenths: true }), kindOf(step), count(step.num_sequences), count(step.num_tokens),
        `${passage.stage_index}: ${passage.worker_id}`, duration(passage.wire_s ?? NaN), duration(spans.queue), duration(spans.serialise),
        duration(spans.compute), duration(spans.send), bytes(passage.bytes_in), bytes(passage.bytes_out)];
      return h("tr", {}, h("th", { scope: "row" }, count(step.number)), ...cells.map((cell) => h("td", {}, cell)));
    })));
  }
}

/** The figures of a step, or of its passage through one stage. */
function factsOf({ step, passage }) {
  const facts = [
    ["Step", `${count(step.number)}, ${kindOf(step)}`],
    ["Epoch", count(step.epoch)],
    ["Batch", `${counted(step.num_sequences, "sequence")}, ${counted(step.num_tokens, "token")}`],
    ["Trip", step.returned_at === null ? "under way" : duration(step.returned_at - step.sent_at)],
  ];
  if (!passage) return facts;
  facts.push(["Stage", `${passage.stage_index}: ${passage.worker_id}`]);
  for (const { kind, from, to } of spansOf(passage)) {
    const isKnown = kind !== "wire" || passage.wire_s !== null;
    facts.push([kind[0].toUpperCase() + kind.slice(1), duration(isKnown ? to - from : NaN)]);
  }
  facts.push(["In", bytes(passage.bytes_in)], ["Out", bytes(passage.bytes_out)]);
  return facts;
}

/** The workers of the newest step that went through all stages that were seen. */
function lanesOf(steps) {
  let longest = [];
  for (const step of steps) if (step.stages.length >= longest.length) longest = step.stages;
  return longest.map((passage) => passage.worker_id);
}

/** Stripes: prefill is told from decode without colour too. */
function hatch(colour, stripe) {
  const tile = document.createElement("canvas");
  tile.width = 8;
  tile.height = 8;
  const context = tile.getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 8, 8);
  context.strokeStyle = stripe;
  context.globalAlpha = 0.55;
  context.lineWidth = 1.5;
  context.beginPath();
  for (const offset of [-8, 0, 8]) {
    context.moveTo(offset, 8);
    context.lineTo(offset + 8, 0);
  }
  context.stroke();
  return context.createPattern(tile, "repeat");
}
