// Steps and requests as figures: merging what comes in pieces, and where a request's time went. No drawing.

/** The kinds of time, in the order in which they are told. `lane` kinds belong to a stage. */
export const KINDS = [
  { id: "queued", label: "waiting to start", about: "from its arrival until its first step" },
  { id: "wire", label: "wire", about: "on the way to a stage" },
  { id: "queue", label: "queue", about: "at a stage, behind other steps" },
  { id: "serialise", label: "serialise", about: "bytes to tensors and back" },
  { id: "compute", label: "compute", about: "the layers" },
  { id: "send", label: "send", about: "computed, until the link has taken it" },
  { id: "back", label: "return", about: "from the last stage to the master" },
  { id: "between", label: "between steps", about: "at the master, until its next step" },
  { id: "unknown", label: "not known", about: "steps whose details are no longer kept, and clocks that differ" },
];

/** Whether a step computes prompts, next tokens, or both: a sequence that decodes brings exactly one token. */
export function kindOf(step) {
  return step.num_tokens > step.num_sequences ? "prefill" : "decode";
}

/** One stage's part of a step, as consecutive spans of seconds since 1970; none is negative. */
export function spansOf(passage) {
  const { arrived_at: arrived, started_at: started, finished_at: finished, sent_at: sent } = passage;
  const computed = Math.max(finished - started, 0);
  const serialised = Math.min(Math.max(passage.serialise_s, 0), computed);
  const spans = [
    { kind: "wire", from: arrived - Math.max(passage.wire_s, 0), to: arrived },
    { kind: "queue", from: arrived, to: started },
    // It happens before the layers and behind them; how much on either side is not told.
    { kind: "serialise", from: started, to: started + serialised },
    { kind: "compute", from: started + serialised, to: started + computed },
    { kind: "send", from: finished, to: sent },
  ];
  return spans.map((span) => ({ ...span, to: Math.max(span.to, span.from) }));
}

/** The last steps by number, from pieces that come twice, more complete each time. */
export class StepStore {
  #steps = [];
  #keepS;

  constructor(keepS = 90) {
    this.#keepS = keepS;
  }

  /** All that are kept, oldest first. */
  get all() {
    return this.#steps;
  }

  /** Take steps in the order of their numbers; what is older than the time that is kept goes. */
  add(steps) {
    for (const step of steps) this.#put(step);
    const newest = this.#steps.at(-1);
    if (!newest) return;
    const oldest = newest.sent_at - this.#keepS;
    let gone = 0;
    while (this.#steps[gone].sent_at < oldest) gone += 1;
    if (gone) this.#steps.splice(0, gone);
  }

  /** What is kept now, apart from what comes later. */
  copy() {
    const copied = new StepStore(this.#keepS);
    copied.#steps = [...this.#steps];
    return copied;
  }

  /** Forget all: another master counts from 1 again. */
  clear() {
    this.#steps = [];
  }

  /** A step by its number. */
  get(wanted) {
    const index = this.#find(wanted);
    const step = this.#steps[index];
    return step?.number === wanted ? step : undefined;
  }

  /** Those that were sent before `to` and may have been under way after `from`. */
  within(from, to, longestS = 30) {
    const found = [];
    for (let index = this.#steps.length - 1; index >= 0; index -= 1) {
      const step = this.#steps[index];
      if (step.sent_at < from - longestS) break;
      if (step.sent_at <= to && endOf(step) >= from) found.push(step);
    }
    return found.reverse();
  }

  #put(step) {
    const index = this.#find(step.number);
    if (this.#steps[index]?.number === step.number) this.#steps[index] = moreComplete(this.#steps[index], step);
    else this.#steps.splice(index, 0, step);
  }

  /** Where a step with this number is, or would have to stand. */
  #find(wanted) {
    let low = 0;
    let high = this.#steps.length;
    if (high && this.#steps[high - 1].number < wanted) return high;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#steps[middle].number < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

/** The last moment that is known of a step. */
export function endOf(step) {
  if (step.returned_at !== null) return step.returned_at;
  const last = step.stages.at(-1);
  return last ? last.sent_at : Infinity; // under way, as far as is known
}

function moreComplete(old, fresh) {
  if (fresh.stages.length >= old.stages.length) {
    return fresh.returned_at === null && old.returned_at !== null ? { ...fresh, returned_at: old.returned_at } : fresh;
  }
  return { ...old, returned_at: old.returned_at ?? fresh.returned_at };
}

/**
 * A step's whole trip as consecutive parts `{kind, stage, worker, from, to}`. Between two stages it was on the wire;
 * where a stage between them has not told yet, the time is not known.
 */
export function tripOf(step) {
  const parts = [];
  let at = step.sent_at;
  let next = 0;
  for (const passage of step.stages) {
    for (const span of spansOf(passage)) {
      const to = Math.max(span.to, at);
      const isGap = span.kind === "wire" && passage.stage_index !== next;
      const place = isGap ? { kind: "unknown", stage: null, worker: "" }
        : { kind: span.kind, stage: passage.stage_index, worker: passage.worker_id };
      if (to > at) parts.push({ ...place, from: at, to });
      at = to;
    }
    next = passage.stage_index + 1;
  }
  if (step.returned_at !== null && step.returned_at > at) {
    const isWhole = next > 0 && (!step.num_stages || next === step.num_stages);
    parts.push({ kind: isWhole ? "back" : "unknown", stage: null, worker: "", from: at, to: step.returned_at });
  }
  return parts;
}

/**
 * Where a request's time went.
 *
 * Gives `rows` (waiting, then one for each step that is known, `{label, kind, number, numTokens, from, to, parts}`),
 * `totals` (seconds by kind, which sum up to `total`), `byStage` (for prefill and decode, each stage's seconds by kind
 * and steps), `numMissing` (steps whose details are not known) and `total` in seconds.
 */
export function waterfall(request, stepOf, now) {
  const end = request.finished_at ?? now;
  const total = Math.max(end - request.submitted_at, 0);
  const totals = Object.fromEntries(KINDS.map(({ id }) => [id, 0]));
  const rows = [];
  const byStage = { prefill: new Map(), decode: new Map() };
  const firstEnd = Math.min(Math.max(request.started_at ?? end, request.submitted_at), end);
  if (firstEnd > request.submitted_at || request.started_at === null) {
    const parts = [{ kind: "queued", stage: null, worker: "", from: request.submitted_at, to: firstEnd }];
    rows.push({ label: "waiting", kind: "wait", number: null, numTokens: 0, from: request.submitted_at, to: firstEnd, parts });
    totals.queued = firstEnd - request.submitted_at;
  }
  let at = firstEnd;
  let isAdjacent = true; // whether the step before is known, so that the time since then was spent at the master
  let numKnown = 0;
  const cut = cutOf(request);
  for (const [index, { number, num_tokens: numTokens, is_prompt: isPrompt }] of request.steps.entries()) {
    const step = stepOf(number);
    if (index === cut) isAdjacent = false;
    if (!step || (step.returned_at === null && step.stages.length === 0)) {
      isAdjacent = false;
      continue;
    }
    numKnown += 1;
    const parts = tripOf(step)
      .map((part) => ({ ...part, from: Math.max(part.from, at) }))
      .filter((part) => part.to > part.from);
    const from = Math.max(step.sent_at, at);
    if (isAdjacent) totals.between += from - at;
    const to = parts.at(-1)?.to ?? from;
    const kind = isPrompt ? "prefill" : "decode";
    for (const part of parts) {
      totals[part.kind] += part.to - part.from;
      if (part.stage === null) continue;
      const sums = byStage[kind].get(part.stage) ?? { worker: part.worker, steps: new Set(), seconds: {} };
      sums.seconds[part.kind] = (sums.seconds[part.kind] ?? 0) + (part.to - part.from);
      sums.steps.add(number);
      byStage[kind].set(part.stage, sums);
    }
    rows.push({ label: kind, kind, number, numTokens, from, to, parts });
    at = to;
    isAdjacent = step.returned_at !== null;
  }
  if (request.finished_at !== null && isAdjacent && request.steps.length > 0) totals.between += Math.max(end - at, 0);
  const known = Object.values(totals).reduce((sum, each) => sum + each, 0);
  totals.unknown += Math.max(total - known, 0);
  return { rows, totals, byStage, numMissing: request.num_steps - numKnown, total };
}

/** The value below which `part` (0 to 1) of a histogram's counts lie, linear inside its bucket; NaN of nothing. */
export function quantile({ bounds, counts }, part) {
  const wanted = part * counts.reduce((sum, each) => sum + each, 0);
  let below = 0;
  for (const [index, each] of counts.entries()) {
    if (each && below + each >= wanted) {
      const low = index ? bounds[index - 1] : 0;
      const high = bounds[Math.min(index, bounds.length - 1)]; // what lies above the last bound counts as lying on it
      return low + ((high - low) * Math.max(wanted - below, 0)) / each;
    }
    below += each;
  }
  return NaN;
}

/** Where steps are left out of the list of a request that has very many: the index after the widest gap; -1: nowhere. */
function cutOf({ steps, num_steps: numSteps }) {
  if (numSteps <= steps.length) return -1;
  let cut = steps.length; // behind all: the list was made before they came
  let widest = 1;
  for (let index = 1; index < steps.length; index += 1) {
    const gap = steps[index].number - steps[index - 1].number;
    if (gap > widest) [widest, cut] = [gap, index];
  }
  return cut;
}

/** The times that a worker's view tells, by phase: `{counts, total}` since its process began. */
export function timesOf({ report, wire }) {
  const times = Object.fromEntries((report?.phases ?? []).map(({ phase, counts, total_s: total }) => [phase, { counts, total }]));
  return wire ? { wire, ...times } : times;
}

/** Between two such times: mean seconds a step for each phase, and how many steps; null where there was none. */
export function phasesBetween(old, fresh) {
  const numOf = (times) => times.counts.reduce((sum, each) => sum + each, 0);
  const means = {};
  let most = 0;
  for (const [phase, times] of Object.entries(fresh)) {
    const num = numOf(times) - (old[phase] ? numOf(old[phase]) : 0);
    if (num <= 0) continue;
    means[phase] = (times.total - (old[phase]?.total ?? 0)) / num;
    most = Math.max(most, num);
  }
  return most ? { means, numSteps: most } : null;
}
