// What changed between two views of the cluster, in sentences for the log. No drawing.

import { counted, layers } from "./format.js";

/** `{level, text}` for each change; level is `good`, `bad` or `note`. Without a view before, what is amiss now. */
export function changesBetween(before, after) {
  const found = [];
  const say = (level, text) => found.push({ level, text });
  if (before && before.started_at !== after.started_at) {
    say("note", "another master serves now");
    before = null;
  }
  if (!before) {
    say("note", `watching ${after.model_name}: ${counted(after.num_layers, "layer")}, ${placementOf(after)}`);
    if (after.failure) say("bad", `no request can be answered: ${after.failure}`);
    for (const worker of after.workers) if (worker.status === "lost") say("bad", lost(worker));
    return found;
  }
  const old = new Map(before.workers.map((worker) => [worker.worker_id, worker]));
  for (const worker of after.workers) {
    const was = old.get(worker.worker_id);
    old.delete(worker.worker_id);
    if (was?.status === worker.status) continue;
    if (worker.status === "lost") say("bad", lost(worker));
    else if (!was) say("note", `worker ${worker.worker_id} joined: ${worker.status}`);
    else say(worker.status === "ready" ? "good" : "note", `worker ${worker.worker_id} is ${worker.status}`);
  }
  for (const id of old.keys()) say("note", `worker ${id} is gone from the list`);
  const reason = after.snapshot.recovering_from;
  if (reason && reason !== before.snapshot.recovering_from) say("bad", `the model is placed again: ${reason}`);
  if (after.snapshot.total_recoveries > before.snapshot.total_recoveries) say("good", "recovered: the new pipeline takes steps");
  if (before.snapshot.epoch !== after.snapshot.epoch) {
    say("note", `epoch ${after.snapshot.epoch} begins: ${placementOf(after)}`);
  }
  if (after.failure && after.failure !== before.failure) {
    const isTold = found.some(({ level }) => level === "bad"); // the lost worker, with the same reason
    say("bad", isTold ? "no request can be answered" : `no request can be answered: ${after.failure}`);
  }
  if (!after.failure && before.failure) say("good", "requests can be answered again");
  if (after.is_ready && !before.is_ready) say("good", "ready: a token went through the pipeline");
  if (!after.is_ready && before.is_ready && !after.failure) say("bad", "not ready: no token went through the pipeline lately");
  const counts = new Map(before.num_errors);
  for (const [kind, number] of after.num_errors) {
    const more = number - (counts.get(kind) ?? 0);
    if (more > 0) say("bad", `${counted(more, "error")} of kind ${kind}`);
  }
  return found;
}

function lost(worker) {
  return `worker ${worker.worker_id} is lost${worker.reason ? `: ${worker.reason}` : ""}`;
}

function placementOf(view) {
  const stages = view.snapshot.stages;
  if (!stages.length) return "no pipeline";
  return stages.map((stage) => `${stage.worker_id} ${layers(stage.layers.start, stage.layers.end)}`).join(", ");
}

/**
 * Remembers which layers workers held, so that a lost one is still shown in its place once the pipeline is gone.
 */
export class Placement {
  #held = new Map();

  /** Learn from a view; gives its workers with `place`: `{index, first, end, isPast}` or null, in the order to show. */
  take(view) {
    if (view.snapshot.stages.length) {
      this.#held.clear();
      for (const { worker_id: id, stage_index: index, layers: range } of view.snapshot.stages) {
        this.#held.set(id, { index, first: range.start, end: range.end });
      }
    }
    const hasPipeline = view.snapshot.stages.length > 0;
    const placed = view.workers.map((worker) => {
      if (Number.isInteger(worker.first_layer) && worker.stage_index !== null) {
        const place = { index: worker.stage_index, first: worker.first_layer, end: worker.end_layer };
        return { worker, place: { ...place, isPast: !hasPipeline } };
      }
      const held = this.#held.get(worker.worker_id);
      return { worker, place: held && !hasPipeline ? { ...held, isPast: true } : null };
    });
    const order = ({ place }) => place?.index ?? Infinity;
    return placed.map((each, number) => [each, number])
      .sort(([a, i], [b, j]) => (order(a) === order(b) ? i - j : order(a) - order(b)))
      .map(([each]) => each);
  }
}
