// Figures, sentences and events.

import assert from "node:assert/strict";
import { test } from "node:test";

const load = (name) => import(`${process.env.DASHBOARD}/${name}`);
const { bytes, clock, counted, duration, layers, number, percent, rate, ticks, tokenRate, UNKNOWN } = await load("format.js");
const { EventParser } = await load("events.js");
const { changesBetween, Placement } = await load("changes.js");
const { pauseMs } = await load("server.js");
const { fieldsOf, Pace } = await load("chat.js");
const { pathOf, summaryOf } = await load("charts.js");
const { figuresOf, stateOf } = await load("requests.js");

const plain = (text) => text.replaceAll("\u202f", " ");

test("figures have three digits and a unit", () => {
  const table = [
    [bytes(0), "0 B"], [bytes(1023), "1 023 B"], [bytes(1024), "1 KiB"], [bytes(1024 ** 2 - 1), "1 MiB"],
    [bytes(1.5 * 1024 ** 3), "1.50 GiB"], [rate(2048), "2 KiB/s"],
    [duration(0), "0 s"], [duration(0.0000123), "12.3 \u00b5s"], [duration(0.00099999), "1 ms"], [duration(0.0125), "12.5 ms"],
    [duration(0.9999), "1 s"], [duration(1.234), "1.23 s"], [duration(59.99), "1 min 0 s"], [duration(3599.9), "1 h 0 min"],
    [duration(90061), "1 d 1 h"], [duration(86399), "1 d 0 h"], [duration(-0.002), "-2 ms"],
    [percent(0), "0 %"], [percent(0.0004), "<0.1 %"], [percent(0.034), "3.4 %"], [percent(0.996), "100 %"], [percent(1), "100 %"],
    [tokenRate(31.25), "31.3 tok/s"], [number(1234567), "1 234 567"], [number(99.96), "100"], [number(0.0451), "0.0451"],
    [counted(1, "step"), "1 step"], [counted(2000, "step"), "2 000 steps"], [clock(3661.25, { tenths: true }), "01:01:01.2"],
  ];
  for (const [actual, expected] of table) assert.equal(plain(actual), expected);
  for (const nothing of [bytes(NaN), duration(NaN), percent(null), rate(undefined), number(Infinity), clock(NaN), layers(null, null)]) {
    assert.equal(nothing, UNKNOWN);
  }
  assert.equal(layers(0, 15), "0\u201314");
  assert.equal(layers(7, 8), "7");
});

test("an axis has round ticks from 0 to above the highest value", () => {
  assert.deepEqual(ticks(10, 5), [0, 2, 4, 6, 8, 10]);
  assert.deepEqual(ticks(0.37), [0, 0.1, 0.2, 0.3, 0.4]);
  for (const top of [1e-6, 0.013, 7, 96, 12345]) {
    const found = ticks(top);
    assert.ok(found.at(-1) >= top && found.length >= 3 && found.length <= 7, `${top}: ${found}`);
  }
  assert.deepEqual(ticks(0), [0, 1]);
});

test("events are the same wherever the stream is cut", () => {
  const stream = ': hello\r\n\r\nevent: state\r\ndata: {"a":1}\r\n\r\ndata: one\ndata:two\n\nid: 7\n\nevent: last\rdata: \u00e9\r\r';
  const expected = [{ event: "state", data: '{"a":1}' }, { event: "message", data: "one\ntwo" }, { event: "last", data: "\u00e9" }];
  for (let size = 1; size <= stream.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < stream.length; at += size) found.push(...parser.push(stream.slice(at, at + size)));
    assert.deepEqual(found, expected, `pieces of ${size}`);
  }
});

test("it waits longer after each failure, up to a bound, and never all pages at once", () => {
  const pauses = [0, 1, 2, 3, 4, 5, 20].map((attempt) => pauseMs(attempt, 0.5));
  assert.deepEqual(pauses, [500, 1000, 2000, 4000, 8000, 15000, 15000]);
  assert.ok(pauseMs(3, 0) < pauseMs(3, 1));
});

const worker = (id, status, place = null, reason = "") => ({
  worker_id: id, status, reason, stage_index: place?.index ?? null, first_layer: place?.first ?? null, end_layer: place?.end ?? null,
});
const view = (changes = {}) => ({
  started_at: 1, model_name: "m", num_layers: 4, is_ready: true, failure: "", num_errors: [],
  workers: [worker("a", "ready", { index: 0, first: 0, end: 2 }), worker("b", "ready", { index: 1, first: 2, end: 4 })],
  snapshot: { epoch: 1, stages: [
    { worker_id: "a", stage_index: 0, layers: { start: 0, end: 2 } }, { worker_id: "b", stage_index: 1, layers: { start: 2, end: 4 } },
  ] },
  ...changes,
});
const texts = (before, after) => changesBetween(before, after).map(({ level, text }) => `${level}: ${text}`);

test("changes are told once, in sentences", () => {
  assert.deepEqual(texts(null, view()), ["note: watching m: 4 layers, a 0\u20131, b 2\u20133"]);
  assert.deepEqual(texts(view(), view()), []);
  const failed = view({
    is_ready: false, failure: "worker b is lost", num_errors: [["LinkLostError", 2]],
    workers: [view().workers[0], worker("b", "lost", null, "its stream broke")], snapshot: { epoch: 1, stages: [] },
  });
  assert.deepEqual(texts(view(), failed), [
    "bad: worker b is lost: its stream broke", "bad: no request can be answered", "bad: 2 errors of kind LinkLostError",
  ]);
  assert.deepEqual(texts(view(), view({ failure: "all is over" })), ["bad: no request can be answered: all is over"]);
  assert.deepEqual(texts(view(), view({ is_ready: false })), ["bad: not ready: no token went through the pipeline lately"]);
  assert.deepEqual(texts(failed, failed), []);
  const back = view({
    num_errors: [["LinkLostError", 2]],
    snapshot: { epoch: 2, stages: [{ worker_id: "a", stage_index: 0, layers: { start: 0, end: 4 } }] },
    workers: [worker("a", "ready", { index: 0, first: 0, end: 4 }), worker("c", "joining")],
  });
  assert.deepEqual(texts(failed, back), [
    "note: worker c joined: joining", "note: worker b is gone from the list", "note: epoch 2 begins: a 0\u20133",
    "good: requests can be answered again", "good: ready: a token went through the pipeline",
  ]);
  assert.match(texts(view(), view({ started_at: 2 }))[0], /another master/);
});

test("a lost worker is shown where its layers were, until there is another pipeline", () => {
  const placement = new Placement();
  placement.take(view());
  const lost = view({ workers: [view().workers[1], worker("a", "lost")], snapshot: { epoch: 1, stages: [] } });
  assert.deepEqual(placement.take(lost).map(({ worker: { worker_id: id }, place }) => [id, place]), [
    ["a", { index: 0, first: 0, end: 2, isPast: true }], ["b", { index: 1, first: 2, end: 4, isPast: true }],
  ]);
  const next = view({
    workers: [worker("a", "lost"), worker("b", "ready", { index: 0, first: 0, end: 4 })],
    snapshot: { epoch: 2, stages: [{ worker_id: "b", stage_index: 0, layers: { start: 0, end: 4 } }] },
  });
  assert.deepEqual(placement.take(next).map(({ worker: { worker_id: id }, place }) => [id, place]), [
    ["b", { index: 0, first: 0, end: 4, isPast: false }], ["a", null],
  ]);
});

test("a request's fields are numbers or left out; what is wrong is told by name", () => {
  const empty = { temperature: "", topP: " ", maxTokens: "", seed: "" };
  assert.deepEqual(fieldsOf(empty), {});
  assert.deepEqual(fieldsOf({ temperature: "0", topP: "0.5", maxTokens: "7", seed: "0" }), { temperature: 0, top_p: 0.5, max_tokens: 7, seed: 0 });
  for (const [field, value] of [["temperature", "2.1"], ["topP", "0"], ["maxTokens", "1.5"], ["seed", "-1"], ["seed", "x"]]) {
    assert.throws(() => fieldsOf({ ...empty, [field]: value }), RangeError);
  }
});

test("an answer's pace counts from its first token", () => {
  const pace = new Pace(1000);
  assert.equal(String(pace), "");
  for (const at of [1200, 1300, 1400]) pace.piece(at);
  assert.equal(plain(String(pace)), "200 ms to the first token, about 3 tokens at 10.0 tok/s");
  pace.numTokens = 5;
  assert.equal(plain(String(pace)), "200 ms to the first token, 5 tokens at 20.0 tok/s");
});

test("a line is broken where there is no value, and told in words", () => {
  assert.equal(pathOf([[0, 1], [2, 3], null, [4, 5], null, [6, 7], [8, 9]]), "M0.0 1.0L2.0 3.0M4.0 5.0h1M6.0 7.0L8.0 9.0");
  assert.equal(summaryOf("p50", [1, null, 3], String), "p50: lately 3, mean 2, least 1, most 3");
  assert.equal(summaryOf("p50", [null], String), "p50: nothing yet");
});

test("a request's row says how far it has come", () => {
  const request = { submitted_at: 0, started_at: null, first_token_at: null, finished_at: null, reason: null, num_output_tokens: 0 };
  assert.deepEqual(stateOf(request), ["warn", "waiting"]);
  assert.deepEqual(figuresOf(request, 3), { waited: 3, firstToken: null, total: 3, pace: null });
  const done = { ...request, started_at: 1, first_token_at: 2, finished_at: 4, reason: "stop", num_output_tokens: 9 };
  assert.deepEqual(figuresOf(done, 99), { waited: 1, firstToken: 2, total: 4, pace: 4 });
  assert.equal(stateOf({ ...done, reason: "error" })[0], "bad");
});
