"""Loading a stage: protobuf <-> plain values. What comes from a peer is checked here, once.

`LoadBegin` may name more tensors than fit in one message; then they go on in `MoreTensors` parts, and the decoder
gives the `LoadBegin` when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

from shardwright.errors import ProtocolError
from shardwright.types import FileHint, LayerRange, StageAssignment, StageLoad, TensorSpec
from shardwright.wire import checks, frames
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import (
    MAX_BLOCK_SIZE,
    MAX_CONFIG_CHARS,
    MAX_FILE_HINTS,
    MAX_LAYERS,
    MAX_PATH_CHARS,
    MAX_POSITION,
    MAX_REASON_CHARS,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    MAX_WEIGHT_CHUNK_BYTES,
)
from shardwright.wire.messages import (
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadProgress,
    LoadRefused,
    LoadReply,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

LOAD_END: Final[bytes] = pb.LoadPart(end=pb.StreamEnd()).SerializeToString()
"""The last part of a load whose sender has said all."""
COMPUTE_DTYPES: Final = ("float32", "bfloat16", "float16")

_TENSORS_PER_PART: Final = 2048  # at most 2 KiB each: under 4 MiB
_PHASES: Final[dict[str, pb.LoadPhase]] = {
    "receive": pb.LOAD_PHASE_RECEIVE,
    "build": pb.LOAD_PHASE_BUILD,
    "warm-up": pb.LOAD_PHASE_WARM_UP,
}
_PHASE_NAMES: Final[dict[int, str]] = {int(number): name for name, number in _PHASES.items()}


# --- master to worker ----------------------------------------------------------------------------------------


def load_parts(message: LoadMessage) -> Iterator[bytes]:
    """The message as parts of the call: one, or several for a stage of very many tensors."""
    match message:
        case LoadBegin():
            yield from _begin_parts(message.load)
        case WeightChunk():
            data = frames.bytes_of(message.data)
            checks.between("WeightChunk.data, in bytes", len(data), 1, MAX_WEIGHT_CHUNK_BYTES)
            chunk = pb.WeightChunk(sha256=bytes.fromhex(message.sha256), offset=message.offset, data=bytes(data))
            yield pb.LoadPart(chunk=chunk).SerializeToString()
        case _:
            assert_never(message)


def _begin_parts(load: StageLoad) -> Iterator[bytes]:
    specs = [_write_spec(spec) for spec in load.tensors]
    begin = pb.LoadBegin(
        assignment=_write_assignment(load.assignment),
        model_config=load.model_config,
        dtype=checks.DTYPE_TAGS[load.dtype],
        num_tensors=len(specs),
        file_hints=[
            pb.FileHint(
                path=hint.path,
                num_bytes=hint.num_bytes,
                hub_repo=hint.hub_repo,
                hub_revision=hint.hub_revision,
                hub_filename=hint.hub_filename,
            )
            for hint in load.file_hints
        ],
        next_address=load.next_address,
        master_id=load.master_id,
    )
    few = len(specs) <= _TENSORS_PER_PART // 2  # then they fit beside config and hints
    if few:
        begin.tensors.extend(specs)
    yield checks.serialize(pb.LoadPart(begin=begin))
    for start in range(0, 0 if few else len(specs), _TENSORS_PER_PART):
        more = pb.MoreTensors(tensors=specs[start : start + _TENSORS_PER_PART])
        yield checks.serialize(pb.LoadPart(more_tensors=more))


class LoadDecoder:
    """Turns the parts of one `InitializeWorker` call into messages."""

    def __init__(self) -> None:
        self._begin: pb.LoadBegin | None = None
        self._tensors: list[TensorSpec] = []
        self._begun = False
        self.ended = False

    def feed(self, raw: bytes) -> LoadMessage | None:
        """The message that this part completes, if it does. Raises `ProtocolError`."""
        if self.ended:
            raise ProtocolError("a load goes on after its end")
        part = checks.parse(pb.LoadPart, raw)
        kind = part.WhichOneof("part")
        if self._begin is not None and kind != "more_tensors":
            missing = self._begin.num_tensors - len(self._tensors)
            raise ProtocolError(f"{kind or 'an empty part'} in a load; expected {missing} more tensors of it first")
        match kind:
            case "begin":
                return self._on_begin(part.begin)
            case "more_tensors":
                return self._on_tensors(part.more_tensors)
            case "chunk":
                return self._on_chunk(part.chunk)
            case "end":
                self.ended = True
                return None
            case _:
                raise ProtocolError("a part of a load that holds neither begin, tensors, chunk nor end")

    def _on_begin(self, source: pb.LoadBegin) -> LoadBegin | None:
        if self._begun:
            raise ProtocolError("a second LoadBegin in one call")
        checks.at_most("tensors of a stage", source.num_tensors, MAX_TENSORS)
        self._begun = True
        self._begin = source
        return self._take(list(source.tensors))

    def _on_tensors(self, source: pb.MoreTensors) -> LoadBegin | None:
        if self._begin is None:
            raise ProtocolError("MoreTensors without a LoadBegin that lacks some")
        if not source.tensors:
            raise ProtocolError("MoreTensors without tensors")
        return self._take(list(source.tensors))

    def _take(self, specs: list[pb.TensorSpec]) -> LoadBegin | None:
        """Add tensors; the whole LoadBegin when these were the last."""
        assert self._begin is not None, "called while a LoadBegin is open"
        wanted = self._begin.num_tensors
        checks.at_most("tensors of this stage", len(self._tensors) + len(specs), wanted)
        self._tensors += [_read_spec(spec) for spec in specs]
        if len(self._tensors) < wanted:
            return None
        begin, tensors = self._begin, tuple(self._tensors)
        self._begin, self._tensors = None, []
        return LoadBegin(load=_read_load(begin, tensors))

    def _on_chunk(self, source: pb.WeightChunk) -> WeightChunk:
        if not self._begun:
            raise ProtocolError("a WeightChunk before the LoadBegin")
        data = source.data
        checks.between("WeightChunk.data, in bytes", len(data), 1, MAX_WEIGHT_CHUNK_BYTES)
        checks.at_most("the end of a WeightChunk", source.offset + len(data), MAX_TENSOR_BYTES)
        return WeightChunk(sha256=checks.sha256("WeightChunk", source.sha256), offset=source.offset, data=data)


def _read_load(source: pb.LoadBegin, tensors: tuple[TensorSpec, ...]) -> StageLoad:
    checks.distinct("LoadBegin: tensor", [spec.name for spec in tensors])
    checks.at_most("LoadBegin.file_hints", len(source.file_hints), MAX_FILE_HINTS)
    dtype = checks.DTYPE_NAMES.get(source.dtype)
    if dtype not in COMPUTE_DTYPES:
        raise ProtocolError(
            f"LoadBegin.dtype is number {source.dtype}; a stage computes in {', '.join(COMPUTE_DTYPES)}"
        )
    return StageLoad(
        assignment=_read_assignment(source.assignment),
        model_config=checks.text("LoadBegin.model_config", source.model_config, limit=MAX_CONFIG_CHARS),
        dtype=dtype,
        tensors=tensors,
        file_hints=tuple(_read_hint(hint) for hint in source.file_hints),
        next_address=checks.text("LoadBegin.next_address", source.next_address, empty=True),
        master_id=checks.text("LoadBegin.master_id", source.master_id, empty=True),
    )


def _write_assignment(assignment: StageAssignment) -> pb.StageAssignment:
    return pb.StageAssignment(
        epoch=assignment.epoch,
        worker_id=assignment.worker_id,
        stage_index=assignment.stage_index,
        num_stages=assignment.num_stages,
        first_layer=assignment.layers.start,
        end_layer=assignment.layers.end,
        num_blocks=assignment.num_blocks,
        block_size=assignment.block_size,
        next_worker_id=assignment.next_worker_id,
        num_sharing=assignment.num_sharing,
        offloaded_layers=assignment.offloaded_layers,
    )


def _read_assignment(source: pb.StageAssignment) -> StageAssignment:
    stages = checks.between("StageAssignment.num_stages", source.num_stages, 1, MAX_LAYERS)
    index = checks.between("StageAssignment.stage_index", source.stage_index, 0, stages - 1)
    end = checks.between("StageAssignment.end_layer", source.end_layer, 1, MAX_LAYERS)
    first = checks.between("StageAssignment.first_layer", source.first_layer, 0, end - 1)
    offloaded = tuple(source.offloaded_layers)
    if any(not first <= layer < end for layer in offloaded) or list(offloaded) != sorted(set(offloaded)):
        raise ProtocolError(
            f"StageAssignment.offloaded_layers: {list(offloaded[:8])} are not some of the layers {first} to {end - 1}"
        )
    has_next = source.HasField("next_worker_id")
    if has_next and index == stages - 1:
        raise ProtocolError(f"StageAssignment: the last stage names a next worker, {source.next_worker_id[:64]!r}")
    return StageAssignment(
        epoch=source.epoch,
        worker_id=checks.text("StageAssignment.worker_id", source.worker_id),
        stage_index=index,
        num_stages=stages,
        layers=LayerRange(first, end),
        num_blocks=checks.between("StageAssignment.num_blocks", source.num_blocks, 1, MAX_POSITION),
        block_size=checks.between("StageAssignment.block_size", source.block_size, 1, MAX_BLOCK_SIZE),
        next_worker_id=checks.text("StageAssignment.next_worker_id", source.next_worker_id) if has_next else None,
        num_sharing=checks.between("StageAssignment.num_sharing", max(source.num_sharing, 1), 1, stages),  # absent: one
        offloaded_layers=offloaded,
    )


def _write_spec(spec: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        num_bytes=spec.num_bytes,
        sha256=bytes.fromhex(spec.sha256),
    )


def _read_spec(source: pb.TensorSpec) -> TensorSpec:
    name = checks.text("TensorSpec.name", source.name)
    where = f"tensor {name!r}"
    return TensorSpec(
        name=name,
        dtype=checks.text(f"{where}: dtype", source.dtype, limit=64),
        shape=checks.shape(where, source.shape),
        num_bytes=checks.at_most(f"{where}: bytes", source.num_bytes, MAX_TENSOR_BYTES),
        sha256=checks.sha256(where, source.sha256),
    )


def _read_hint(source: pb.FileHint) -> FileHint:
    return FileHint(
        path=checks.text("FileHint.path", source.path, limit=MAX_PATH_CHARS),
        num_bytes=checks.at_most("FileHint.num_bytes", source.num_bytes, 2 * MAX_TENSOR_BYTES),
        hub_repo=checks.text("FileHint.hub_repo", source.hub_repo, empty=True),
        hub_revision=checks.text("FileHint.hub_revision", source.hub_revision, empty=True),
        hub_filename=checks.text("FileHint.hub_filename", source.hub_filename, limit=MAX_PATH_CHARS, empty=True),
    )


# --- worker to master ----------------------------------------------------------------------------------------


def encode_load_reply(reply: LoadReply) -> bytes:
    """One answer of a load."""
    match reply:
        case WeightsNeeded():
            requests = [
                pb.WeightRequest(sha256=bytes.fromhex(request.sha256), offset=request.offset)
                for request in reply.requests
            ]
            needed = pb.WeightsNeeded(
                requests=requests, bytes_from_disk=reply.bytes_from_disk, bytes_from_cache=reply.bytes_from_cache
            )
            message = pb.LoadReply(needed=needed)
        case LoadProgress():
            if reply.phase not in _PHASES:
                raise ProtocolError(f"LoadProgress.phase is {reply.phase!r}; there are {', '.join(_PHASES)}")
            progress = pb.LoadProgress(
                phase=_PHASES[reply.phase], done_bytes=reply.done_bytes, total_bytes=reply.total_bytes
            )
            message = pb.LoadReply(progress=progress)
        case LoadDone():
            done = pb.LoadDone(weight_bytes=reply.weight_bytes, kv_bytes=reply.kv_bytes, load_s=reply.load_s)
            message = pb.LoadReply(done=done)
        case LoadRefused():
            message = pb.LoadReply(refused=pb.LoadRefused(reason=reply.reason[:MAX_REASON_CHARS]))
        case _:
            assert_never(reply)
    return checks.serialize(message)


def decode_load_reply(raw: bytes) -> LoadReply:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.LoadReply, raw)
    match source.WhichOneof("reply"):
        case "needed":
            return _read_needed(source.needed)
        case "progress":
            phase = _PHASE_NAMES.get(source.progress.phase)
            if phase is None:
                raise ProtocolError(f"LoadProgress.phase is number {source.progress.phase}; 1 to {len(_PHASES)} exist")
            return LoadProgress(
                phase=phase, done_bytes=source.progress.done_bytes, total_bytes=source.progress.total_bytes
            )
        case "done":
            return LoadDone(
                weight_bytes=source.done.weight_bytes,
                kv_bytes=source.done.kv_bytes,
                load_s=checks.number("LoadDone.load_s", source.done.load_s),
            )
        case "refused":
            reason = checks.text("LoadRefused.reason", source.refused.reason, limit=MAX_REASON_CHARS, empty=True)
            return LoadRefused(reason=reason)
        case _:
            raise ProtocolError("a LoadReply that holds neither needed, progress, done nor refused")


def _read_needed(source: pb.WeightsNeeded) -> WeightsNeeded:
    checks.at_most("WeightsNeeded.requests", len(source.requests), MAX_TENSORS)
    requests = tuple(
        WeightRequest(
            sha256=checks.sha256("WeightRequest", request.sha256),
            offset=checks.at_most("WeightRequest.offset", request.offset, MAX_TENSOR_BYTES),
        )
        for request in source.requests
    )
    checks.distinct("WeightsNeeded: tensor", [request.sha256 for request in requests])
    return WeightsNeeded(
        requests=requests, bytes_from_disk=source.bytes_from_disk, bytes_from_cache=source.bytes_from_cache
    )
