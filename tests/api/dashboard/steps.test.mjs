// Merging steps, and the arithmetic of a request's time.

import assert from "node:assert/strict";
import { test } from "node:test";

const { StepStore, endOf, kindOf, phasesBetween, quantile, spansOf, timesOf, tripOf, waterfall } = await import(`${process.env.DASHBOARD}/steps.js`);

const passage = (index, arrived, finished, changes = {}) => ({
  worker_id: `w${index}`, stage_index: index, arrived_at: arrived, started_at: arrived + 0.25, finished_at: finished,
  sent_at: finished + 0.125, serialise_s: 0.125, wire_s: 0.5, bytes_in: 0, bytes_out: 0, ...changes,
});
const step = (number, sentAt, changes = {}) => ({
  number, epoch: 1, step: number, num_sequences: 1, num_tokens: 1, sent_at: sentAt, returned_at: sentAt + 4,
  stages: [passage(0, sentAt + 0.5, sentAt + 1.5), passage(1, sentAt + 2, sentAt + 3.5)], ...changes,
});
const close = (actual, expected) => assert.ok(Math.abs(actual - expected) < 1e-9, `${actual} is not ${expected}`);

test("a step that comes again more complete replaces what was known, and never the other way round", () => {
  const store = new StepStore();
  const whole = step(2, 10);
  store.add([step(1, 5), { ...whole, returned_at: null, stages: [] }]);
  assert.equal(store.get(2).returned_at, null);
  store.add([{ ...whole, stages: whole.stages.slice(0, 1) }]);
  assert.equal(store.get(2).stages.length, 1);
  store.add([whole]);
  store.add([{ ...whole, returned_at: null, stages: [] }]);
  assert.deepEqual(store.get(2), whole);
  assert.deepEqual(store.all.map(({ number }) => number), [1, 2]);
});

test("a return that was known stays known when the stages come without it", () => {
  const store = new StepStore();
  const whole = step(1, 0);
  store.add([{ ...whole, stages: [] }]);
  store.add([{ ...whole, returned_at: null }]);
  assert.deepEqual(store.get(1), whole);
});

test("steps are kept in the order of their numbers, whatever order they come in, and old ones go", () => {
  const store = new StepStore(20);
  store.add([step(3, 30), step(1, 10), step(2, 20)]);
  assert.deepEqual(store.all.map(({ number }) => number), [1, 2, 3]);
  store.add([step(4, 41)]);
  assert.deepEqual(store.all.map(({ number }) => number), [3, 4]);
  assert.equal(store.get(1), undefined);
});

test("a window holds the steps that were under way in it", () => {
  const store = new StepStore();
  store.add([step(1, 0), step(2, 10), step(3, 20)]);
  assert.deepEqual(store.within(3, 12).map(({ number }) => number), [1, 2]);
  assert.deepEqual(store.within(4.5, 9.5), []);
  const copy = store.copy();
  store.add([step(4, 21)]);
  assert.equal(copy.get(4), undefined);
});

test("a step that brings more tokens than sequences computes prompts", () => {
  assert.equal(kindOf({ num_tokens: 4, num_sequences: 4 }), "decode");
  assert.equal(kindOf({ num_tokens: 5, num_sequences: 4 }), "prefill");
});

test("a passage's spans follow each other and are never negative, clocks being what they are", () => {
  const spans = Object.fromEntries(spansOf(passage(0, 1, 3)).map(({ kind, from, to }) => [kind, [from, to]]));
  assert.deepEqual(spans, { wire: [0.5, 1], queue: [1, 1.25], serialise: [1.25, 1.375], compute: [1.375, 3], send: [3, 3.125] });
  const odd = passage(0, 2, 1, { started_at: 1.5, sent_at: 0.5, serialise_s: 9, wire_s: null });
  for (const { from, to } of spansOf(odd)) assert.ok(to >= from);
});

test("the parts of a trip sum up to it, without gaps and overlaps", () => {
  for (const each of [step(1, 7), step(1, 7, { stages: [] }), step(1, 7, { stages: [passage(0, 6, 8), passage(1, 7.5, 9)] })]) {
    const parts = tripOf(each);
    close(parts.reduce((sum, { from, to }) => sum + to - from, 0), 4);
    parts.forEach((part, index) => close(part.from, index ? parts[index - 1].to : 7));
  }
  const half = step(1, 7, { num_stages: 2 });
  const kinds = (stages) => tripOf({ ...half, stages }).map(({ kind }) => kind);
  assert.deepEqual(kinds(half.stages), ["wire", "queue", "serialise", "compute", "send", "wire", "queue", "serialise", "compute", "send", "back"]);
  assert.deepEqual(kinds(half.stages.slice(0, 1)), ["wire", "queue", "serialise", "compute", "send", "unknown"]);
  assert.deepEqual(kinds(half.stages.slice(1)), ["unknown", "queue", "serialise", "compute", "send", "back"]);
  assert.equal(endOf(step(1, 7, { returned_at: null })), 10.625);
  assert.equal(endOf(step(1, 7, { returned_at: null, stages: [] })), Infinity);
});

const request = (changes = {}) => ({
  seq_id: 1, submitted_at: 0, started_at: 2, first_token_at: 6, finished_at: 13, reason: "stop", num_prompt_tokens: 5,
  num_cached_tokens: 0, num_output_tokens: 2, num_preemptions: 0, num_steps: 2,
  steps: [{ number: 1, num_tokens: 5, is_prompt: true }, { number: 2, num_tokens: 1, is_prompt: false }], ...changes,
});
const known = new Map([[1, step(1, 2)], [2, step(2, 8)]]);
const sumOf = (totals) => Object.values(totals).reduce((sum, each) => sum + each, 0);

test("a request's time is its wait, its steps' parts and what lies between; nothing is counted twice", () => {
  const fall = waterfall(request(), (number) => known.get(number), 99);
  close(fall.total, 13);
  close(sumOf(fall.totals), 13);
  close(fall.totals.queued, 2);
  close(fall.totals.between, 2 + 1);
  close(fall.totals.compute, 2 * (0.625 + 1.125));
  close(fall.totals.serialise, 4 * 0.125);
  close(fall.totals.queue, 4 * 0.25);
  close(fall.totals.back, 2 * 0.375);
  close(fall.totals.unknown, 0);
  assert.deepEqual(fall.rows.map(({ kind, number }) => [kind, number]), [["wait", null], ["prefill", 1], ["decode", 2]]);
  assert.equal(fall.numMissing, 0);
  const first = fall.byStage.prefill.get(0);
  assert.equal(first.worker, "w0");
  assert.equal(first.steps.size, 1);
  close(first.seconds.compute, 0.625);
  close(fall.byStage.decode.get(1).seconds.compute, 1.125);
});

test("steps whose details are gone are told, and their time is not known", () => {
  const fall = waterfall(request(), (number) => (number === 2 ? known.get(2) : undefined), 99);
  assert.equal(fall.numMissing, 1);
  close(sumOf(fall.totals), 13);
  close(fall.totals.unknown, 6);
  close(fall.totals.between, 1);
});

test("where steps are left out of a long list, the gap counts as not known", () => {
  const cut = request({ num_steps: 40, finished_at: 33, steps: [...request().steps, { number: 40, num_tokens: 1, is_prompt: false }] });
  const steps = new Map([...known, [40, step(40, 28)]]);
  const fall = waterfall(cut, (number) => steps.get(number), 99);
  assert.equal(fall.numMissing, 37);
  close(sumOf(fall.totals), 33);
  close(fall.totals.unknown, 28 - 12);
  close(fall.totals.between, 2 + 1);
});

test("a request that waits or runs is counted until now", () => {
  const waiting = waterfall(request({ started_at: null, finished_at: null, steps: [], num_steps: 0 }), () => undefined, 5);
  close(waiting.totals.queued, 5);
  close(sumOf(waiting.totals), 5);
  const running = waterfall(request({ finished_at: null }), (number) => known.get(number), 20);
  close(sumOf(running.totals), 20);
  close(running.totals.unknown, 8);
});

test("a worker's phases are means of the steps between two reports", () => {
  const report = (count, total) => ({ report: { phases: [{ phase: "compute", counts: [count, 0], total_s: total }] }, wire: { counts: [count], total: 0.5 * count } });
  const found = phasesBetween(timesOf(report(10, 3)), timesOf(report(14, 5)));
  assert.deepEqual(found, { means: { compute: 0.5, wire: 0.5 }, numSteps: 4 });
  assert.equal(phasesBetween(timesOf(report(10, 3)), timesOf(report(10, 3))), null);
  assert.deepEqual(timesOf({ report: null, wire: null }), {});
});

test("a quantile lies inside its bucket, and the last bound stands for all that is above", () => {
  const times = { bounds: [1, 2, 4], counts: [0, 2, 2, 1] };
  assert.equal(quantile(times, 0.4), 2);
  assert.equal(quantile(times, 0.2), 1.5);
  assert.equal(quantile(times, 0.6), 3);
  assert.equal(quantile(times, 1), 4);
  assert.ok(Number.isNaN(quantile({ bounds: [1], counts: [0, 0] }, 0.5)));
});
