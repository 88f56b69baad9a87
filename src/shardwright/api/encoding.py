"""What can be seen of the cluster as JSON: dataclasses by their field names, enums by value, floats finite or null."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema, to_json

from shardwright.engine import TextEngine
from shardwright.observation import ClusterView, HistoryPoint, RequestTrace, StepPassage, WorkerView
from shardwright.types import WorkerSnapshot

_AT_ONCE = 256  # steps or rows: about a millisecond's work
_Reporter = TypeVar("_Reporter", WorkerView, WorkerSnapshot)

OBSERVED: Final = (ClusterView, StepPassage, RequestTrace, HistoryPoint)
"""What the endpoints give; the OpenAPI document has a schema for each."""


def encode(value: object) -> bytes:
    """Compact JSON of plain values and dataclasses, in UTF-8 without line breaks; NaN and infinity become null."""
    return to_json(value, inf_nan_mode="null")


async def encode_list(values: Sequence[object]) -> bytes:
    """A long list as one, with turns for everybody else in between: tokens are handed out on the same event loop."""
    pieces = []
    for start in range(0, len(values), _AT_ONCE):
        pieces.append(encode(values[start : start + _AT_ONCE])[1:-1])
        await asyncio.sleep(0)
    return b"[" + b",".join(pieces) + b"]"


def as_served(engine: TextEngine) -> ClusterView:
    """The engine's view as clients may see it.

    The model has the name that it is served under: its own may be a path on the master's disk. The traces of workers'
    reports are left empty: they are many, and steps tell the same.
    """
    view = engine.observatory.view()
    return replace(
        view,
        model_name=engine.model.name,
        snapshot=replace(view.snapshot, workers=tuple(_light(worker) for worker in view.snapshot.workers)),
        workers=tuple(_light(worker) for worker in view.workers),
    )


def _light(worker: _Reporter) -> _Reporter:
    if worker.report is None or not worker.report.traces:
        return worker
    return replace(worker, report=replace(worker.report, traces=()))


class _ObservedSchema(GenerateJsonSchema):
    """Says of every float that it may be null: that is what `encode` makes of one that is not finite."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:  # noqa: ARG002  pydantic calls it so
        return {"type": ["number", "null"]}


def observed_schemas(ref_template: str) -> dict[str, Any]:
    """JSON schemas of `OBSERVED` and all that they hold, by name."""
    adapters: list[tuple[str, Any, TypeAdapter[Any]]] = [
        (kind.__name__, "serialization", TypeAdapter(kind)) for kind in OBSERVED
    ]
    _, found = TypeAdapter.json_schemas(adapters, ref_template=ref_template, schema_generator=_ObservedSchema)
    definitions: dict[str, Any] = found["$defs"]
    return definitions
