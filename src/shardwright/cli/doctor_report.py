"""How `doctor` tells what it found: tables with units and sentences, or JSON. Pure but for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shardwright.core.diagnosis import Change, milliseconds, worker_name
from shardwright.core.prediction import MASTER, Cut, Figures, Part, StepPrediction
from shardwright.observation import ClusterView
from shardwright.runtime.doctor import Examination, MeasuredWorker
from shardwright.runtime.measured_steps import StepsSummary, summary_sentences
from shardwright.types import WorkerId

UNKNOWN = "-"


# --- for people --------------------------------------------------------------------------------------


def print_report(console: Console, found: Examination) -> None:
    """All of it, the sentences last."""
    costs, workload = found.model.costs, found.figures.workload
    console.print(f"{costs.name}, {found.model.dtype}, {costs.num_layers} layers", markup=False)
    console.print(_workers(found))
    console.print(_links(found))
    console.print(_stages(found))
    console.print(_parts("Decode of one sequence, as predicted", found.figures.one.parts))
    console.print(_rates(found))
    if not found.probes:
        _say(
            console,
            "Nothing was loaded, so what a layer costs beside reading and arithmetic is not known: this is a bound "
            "from above, which small models stay far below. Without --no-run it is measured.",
        )
    console.print()
    for sentence in found.sentences:
        _say(console, sentence)
    console.print()
    _say(console, _proposals(found.best_changes, workload.num_sequences, is_loaded=bool(found.probes)))
    for number, change in enumerate(found.best_changes, start=1):
        _say(console, f"{number}. {_proposal(change, found.figures)}")


def _proposals(changes: Sequence[Change], num_sequences: int, *, is_loaded: bool) -> str:
    if not changes:
        return "No change that could be predicted from these measurements promises 5% or more."
    load = "one request" if num_sequences == 1 else f"{num_sequences} requests at once"
    how = "by the same prediction" if is_loaded else "by machines and links alone, so at most"
    return f"What would help most, {how}; the gain is of the new tokens a second with {load}:"


def _proposal(change: Change, now: Figures) -> str:
    then = change.figures
    first = change.sentence[0].upper() + change.sentence[1:]
    details = [
        f"decode of {then.workload.num_sequences} {_rate(now.many.tokens_per_s)} -> {_rate(then.many.tokens_per_s)}",
        f"of one {_rate(now.one.tokens_per_s)} -> {_rate(then.one.tokens_per_s)}",
        f"prefill {_rate(now.prompt.tokens_per_s)} -> {_rate(then.prompt.tokens_per_s)} tokens/s",
    ]
    return f"{first}: {change.gain:+.0%} ({', '.join(details)})"


def _workers(found: Examination) -> Table:
    table = Table(
        "worker", "device", "threads", "memory GB/s", "matrix Gop/s", "prompts Gop/s", "layer ms", "disk MB/s", "shared"
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    probed = {probe.worker_id for probe in found.probes}
    for each in found.workers:
        speed = found.cluster.workers[each.worker.worker_id]
        is_probed = speed.worker_id in probed
        overhead = speed.layer_overheads[0][1] if is_probed and speed.layer_overheads else None
        disk = each.measures.disk_bandwidth
        table.add_row(
            speed.worker_id,
            each.worker.description.device,
            str(each.measures.num_threads),
            f"{each.measures.read_bandwidth / 1e9:.1f}",
            f"{each.measures.matrix_rate / 1e9:.0f}",
            UNKNOWN if speed.prompt_rate is None or not is_probed else f"{speed.prompt_rate / 1e9:.0f}",
            UNKNOWN if overhead is None else f"{overhead * 1e3:.3f}",
            UNKNOWN if disk is None else f"{disk / 1e6:.0f}",
            f"+{speed.slowdown:.0%}" if _shares(each, found.workers) else UNKNOWN,
        )
    return table


def _shares(one: MeasuredWorker, workers: Sequence[MeasuredWorker]) -> bool:
    return sum(each.speed.place == one.speed.place for each in workers) > 1


def _links(found: Examination) -> Table:
    table = Table("from", "to", "round trip ms", "MB/s", "decode step ms", "prompt chunk ms")
    for column in table.columns[2:]:
        column.justify = "right"
    decode, chunk = (
        max(link.num_bytes for link in step.links) for step in (found.figures.one, found.figures.prompt.chunks[0])
    )
    for link in found.links:
        speed = link.speed
        rate = speed.bytes_per_s
        table.add_row(
            link.sender or "master",
            link.receiver or "master",
            f"{link.measures.round_trip_s * 1e3:.2f}",
            UNKNOWN if rate is None else f"{rate / 1e6:.0f}",
            f"{speed.seconds(decode) * 1e3:.2f}",
            f"{speed.seconds(chunk) * 1e3:.2f}",
        )
    return table


def _stages(found: Examination) -> Table:
    """Predicted milliseconds of each stage and of the link into it."""
    figures = found.figures
    chunk = figures.prompt.chunks[0]
    columns = {"1 sequence ms": figures.one}
    if figures.workload.num_sequences > 1:
        columns[f"{figures.workload.num_sequences} sequences ms"] = figures.many
    columns[f"{chunk.num_tokens} tokens ms"] = chunk
    table = Table("stage", "worker", "layers", "link ms", *columns)
    for column in table.columns[3:]:
        column.justify = "right"
    for index, stage in enumerate(figures.one.stages):
        table.add_row(
            str(index),
            stage.worker_id,
            f"{stage.start}-{stage.end - 1}",
            f"{figures.one.links[index].seconds * 1e3:.2f}",
            *(f"{step.stages[index].compute_s * 1e3:.2f}" for step in columns.values()),
        )
    return table


def _parts(title: str, parts: Sequence[Part]) -> Table:
    """What a step goes into, in its order."""
    table = Table("part of a step", "at", "ms", "%", title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    total = sum(part.seconds for part in parts)
    for part in parts:
        table.add_row(part.kind.value, _where(part), f"{part.seconds * 1e3:.2f}", f"{part.seconds / total:.0%}")
    return table


def _rates(found: Examination) -> Table:
    table = Table("", "predicted", "achieved", "predicted / achieved")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, predicted, achieved in _compared(found):
        ratio = UNKNOWN if achieved is None else f"{predicted / achieved:.2f}"
        table.add_row(name, _rate(predicted), UNKNOWN if achieved is None else _rate(achieved), ratio)
    return table


def _compared(found: Examination) -> list[tuple[str, float, float | None]]:
    figures, achieved = found.figures, found.achieved
    count = figures.workload.num_sequences
    rows: list[tuple[str, float, float | None]] = [
        (
            "decode of 1 sequence, tokens/s",
            figures.one.tokens_per_s,
            achieved.one_tokens_per_s if achieved is not None else None,
        )
    ]
    if count > 1:
        rows.append(
            (
                f"decode of {count} sequences, tokens/s ({_steps(figures.many)})",
                figures.many.tokens_per_s,
                achieved.many_tokens_per_s if achieved is not None else None,
            )
        )
    rows.append(
        (
            f"prompt of {figures.workload.prompt_tokens} tokens, tokens/s",
            figures.prompt.tokens_per_s,
            achieved.prompt_tokens_per_s if achieved is not None else None,
        )
    )
    rows.append(
        (
            "time to its first token, s",
            figures.prompt.time_to_first_token_s,
            achieved.time_to_first_token_s if achieved is not None else None,
        )
    )
    return rows


def _steps(step: StepPrediction) -> str:
    return "1 step in flight" if step.steps_in_flight == 1 else f"{step.steps_in_flight} steps in flight"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def print_summary(console: Console, view: ClusterView, found: Mapping[str, StepsSummary | None]) -> None:
    """What a running server's steps went into."""
    _say(console, f"{view.model_name}, {view.num_layers} layers, {len(view.snapshot.stages)} stages")
    for what, summary in found.items():
        if summary is None:
            _say(console, f"{what}: no such steps lately.")
            continue
        console.print(_parts(what, summary.parts))
        busy = ", ".join(f"{worker_name(worker_id)} {share:.0%}" for worker_id, share in summary.busy)
        _say(
            console,
            f"{_count(summary.num_steps)} of {summary.sequences_per_step:.1f} sequences and "
            f"{summary.tokens_per_step:.1f} tokens on average, {summary.steps_in_flight:.1f} in flight, "
            f"{milliseconds(summary.trip_s)} each, {_rate(summary.tokens_per_s)} tokens/s; busy with them: {busy}",
        )
        for sentence in summary_sentences(what, summary):
            _say(console, sentence)
        console.print()


def _count(num_steps: int) -> str:
    return "1 step" if num_steps == 1 else f"{num_steps} steps"


def _where(part: Part) -> str:
    receiver = part.worker_id or "master"
    return f"{part.sender or 'master'} to {receiver}" if part.kind.value == "link" else receiver


# --- for machines ------------------------------------------------------------------------------------


def as_json_object(found: Examination) -> dict[str, Any]:
    """For `doctor --json`: seconds, bytes/s, operations/s; a layer range's `end` is exclusive."""
    figures, achieved = found.figures, found.achieved
    probed = {probe.worker_id for probe in found.probes}
    return {
        "model": found.model.costs.name,
        "dtype": found.model.dtype,
        "num_layers": found.model.costs.num_layers,
        "workload": {
            "num_sequences": figures.workload.num_sequences,
            "prompt_tokens": figures.workload.prompt_tokens,
            "new_tokens": figures.workload.new_tokens,
            "context": figures.workload.context,
        },
        "workers": [_worker_json(found, each, is_probed=each.worker.worker_id in probed) for each in found.workers],
        "silent": [{"worker": entry.username, "problem": str(error)} for entry, error in found.silent],
        "links": [
            {
                "sender": link.sender or None,
                "receiver": link.receiver or None,
                "round_trip_s": link.measures.round_trip_s,
                "transfers": [{"bytes": size, "seconds": seconds} for size, seconds in link.measures.transfers],
                "bytes_per_s": link.speed.bytes_per_s,
            }
            for link in found.links
        ],
        "stages": _stages_json(found.cut),
        "is_calibrated": bool(found.probes),
        "predicted": figures_json(figures),
        "achieved": None
        if achieved is None
        else {
            "decode_one_tokens_per_s": achieved.one_tokens_per_s,
            "decode_tokens_per_s": achieved.many_tokens_per_s,
            "prefill_tokens_per_s": achieved.prompt_tokens_per_s,
            "time_to_first_token_s": achieved.time_to_first_token_s,
        },
        "sentences": list(found.sentences),
        "changes": [_change_json(change) for change in found.best_changes],
    }


def _worker_json(found: Examination, each: MeasuredWorker, *, is_probed: bool) -> dict[str, Any]:
    speed = found.cluster.workers[each.worker.worker_id]
    return {
        "worker": speed.worker_id,
        "address": each.worker.entry.address,
        "host_id": speed.host_id,
        "device": speed.device,
        "num_threads": each.measures.num_threads,
        "dtype": each.measures.dtype,
        "read_bandwidth": each.measures.read_bandwidth,
        "matrix_rate": each.measures.matrix_rate,
        "disk_bandwidth": each.measures.disk_bandwidth,
        "slowdown": speed.slowdown,
        "prompt_rate": speed.prompt_rate if is_probed else None,
        "layer_overheads": [
            {"num_sequences": count, "seconds": seconds}
            for count, seconds in (speed.layer_overheads if is_probed else ())
        ],
        "hand_over_s": speed.hand_over_s if is_probed else None,
    }


def figures_json(figures: Figures) -> dict[str, Any]:
    """Rates and parts of what is predicted."""
    return {
        "decode_one_tokens_per_s": figures.one.tokens_per_s,
        "decode_tokens_per_s": figures.many.tokens_per_s,
        "steps_in_flight": figures.many.steps_in_flight,
        "prefill_tokens_per_s": figures.prompt.tokens_per_s,
        "time_to_first_token_s": figures.prompt.time_to_first_token_s,
        "new_tokens_per_s": figures.new_tokens_per_s,
        "decode_one_parts": parts_json(figures.one.parts),
        "decode_parts": parts_json(figures.many.parts),
        "prefill_parts": parts_json(figures.prompt.chunks[0].parts),
    }


def parts_json(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """One step's parts in their order."""
    return [
        {
            "kind": part.kind.value,
            "worker": _id(part.worker_id),
            **({"sender": _id(part.sender)} if part.kind.value == "link" else {}),
            "seconds": part.seconds,
        }
        for part in parts
    ]


def _stages_json(cut: Cut) -> list[dict[str, Any]]:
    return [
        {
            "worker": stage.worker_id,
            "start": stage.start,
            "end": stage.end,
            "offloaded_bytes": stage.offloaded_bytes,
        }
        for stage in cut
    ]


def _id(worker_id: WorkerId) -> str | None:
    return None if worker_id == MASTER else worker_id


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "kind": change.kind.value,
        "workers": [_id(worker_id) for worker_id in change.workers],
        "sentence": change.sentence,
        "gain": change.gain,
        "stages": _stages_json(change.cut),
        "predicted": figures_json(change.figures),
    }


def summary_as_json(view: ClusterView, found: Mapping[str, StepsSummary | None]) -> dict[str, Any]:
    """For `doctor --url --json`."""
    return {
        "model": view.model_name,
        "num_layers": view.num_layers,
        "epoch": view.snapshot.epoch,
        **{
            what.lower(): None
            if summary is None
            else {
                "num_steps": summary.num_steps,
                "sequences_per_step": summary.sequences_per_step,
                "tokens_per_step": summary.tokens_per_step,
                "tokens_per_s": summary.tokens_per_s,
                "steps_in_flight": summary.steps_in_flight,
                "trip_s": summary.trip_s,
                "parts": parts_json(summary.parts),
                "busy": [{"worker": worker_id, "ratio": share} for worker_id, share in summary.busy],
                "sentences": summary_sentences(what, summary),
            }
            for what, summary in found.items()
        },
    }
