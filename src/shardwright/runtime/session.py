"""A running model for as long as a command needs it: files, workers, placement, pipeline, tokenizer.

`open_session` goes through these in order and takes everything down again in the reverse order; nothing is sent to
any worker before the model, the workers' versions and the placement are known to be good.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shardwright.config import MasterConfig
from shardwright.core.master import MasterState
from shardwright.core.placement import PlacementSettings, place
from shardwright.core.settings import CoreSettings
from shardwright.engine import RequestEvent, ServedModel
from shardwright.errors import (
    ClusterError,
    InvalidRequestError,
    PlacementError,
    ShardwrightError,
    VersionMismatchError,
    WorkerUnreachableError,
)
from shardwright.model.checkpoint import Checkpoint
from shardwright.observation import ClusterView
from shardwright.runtime.grammar_check import GrammarCheck
from shardwright.runtime.lasting_imports import import_for_good
from shardwright.runtime.master import MasterEngine
from shardwright.runtime.metrics import MetricsWriter
from shardwright.runtime.metrics_log import MetricsLog
from shardwright.runtime.model_files import ModelFiles, resolve_model
from shardwright.runtime.raw_source import BlobsBeside, blob_spec
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.stoppable import StoppedError, in_thread
from shardwright.runtime.tensor_hashes import hash_tensors
from shardwright.runtime.text_engine import SessionTextEngine
from shardwright.runtime.tokenizer import Tokenizer
from shardwright.runtime.tracing import MasterTracing, master_tracing
from shardwright.runtime.weight_sender import Progress, send_stage
from shardwright.transport.base import Transport, WorkerClient
from shardwright.types import (
    PROTOCOL_VERSION,
    VOCABULARY_TENSOR,
    Epoch,
    FileHint,
    ModelCosts,
    SamplingParams,
    SeqId,
    StageAssignment,
    StageLoad,
    StopConditions,
    TensorSpec,
    TokenId,
    WorkerCapacity,
    WorkerDescription,
    WorkerId,
)
from shardwright.wire.messages import LoadDone, LoadProgress

if TYPE_CHECKING:
    from shardwright.model.families import FamilyPlan

log = logging.getLogger(__name__)


class SessionListener(Protocol):
    """Hears how far a session's start is; all calls come on the event loop's thread or a helper thread of it."""

    def downloading(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Model files come from the hub or a package."""
        ...

    def hashing(self, done_bytes: int, total_bytes: int) -> None:
        """The master learns the content hashes of the model's tensors (the first start only)."""
        ...

    def loading(self, worker: WorkerId, done_bytes: int, total_bytes: int, phase: str) -> None:
        """A worker's stage is `receive`d or `build`t."""
        ...

    def ready(self, stages: Sequence[StageRow]) -> None:
        """A real token has gone through the whole pipeline."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model's files, with what its headers and config tell; no weights are in memory."""

    files: ModelFiles
    checkpoint: Checkpoint
    config_json: str
    dtype: str
    plan: FamilyPlan
    costs: ModelCosts
    tokenizer: Tokenizer | None  # None for a model that comes without one, or where it wasn't wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownWorker:
    """A worker that answered: how to reach it and what it said."""

    worker_id: WorkerId
    entry: WorkerEntry
    client: WorkerClient
    description: WorkerDescription

    @property
    def capacity(self) -> WorkerCapacity:
        """What placement needs to know of it."""
        return self.description.capacity(self.worker_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One line of the summary table."""

    stage: int
    worker: WorkerId
    device: str
    start: int
    end: int  # exclusive
    weights_bytes: int
    kv_blocks: int
    busy_ratio: float | None  # of the time since the stage was loaded; None before a heartbeat


async def open_model(config: MasterConfig, listener: SessionListener, *, with_tokenizer: bool = True) -> OpenModel:
    """Find the model's files (downloading them if need be) and read their headers, and the tokenizer if it is wanted.

    Raises a `ModelError` for whatever is wrong with the model, before anything was started.
    """
    return await in_thread(functools.partial(_open_model, config, listener, with_tokenizer=with_tokenizer))


def _open_model(
    config: MasterConfig, listener: SessionListener, stop: threading.Event, *, with_tokenizer: bool
) -> OpenModel:
    import_for_good("shardwright.model.family_config")
    from shardwright.model.family_config import read_config

    def downloading(what: str, done_bytes: int, total_bytes: int) -> None:
        if stop.is_set():
            raise StoppedError  # ends the download and what it started
        listener.downloading(what, done_bytes, total_bytes)

    files = resolve_model(config.model, cache_dir=config.cache_dir, progress=downloading)
    # Reading a tokenizer takes twice what it leaves, so it is read before the model classes are in memory.
    tokenizer = _load_tokenizer(files, config.cache_dir, stop) if with_tokenizer else None
    import_for_good("shardwright.model.families")
    from shardwright.model.families import model_costs, plan_family

    checkpoint = Checkpoint.open(files.weights)
    config_json = files.config_json
    dtype = choose_dtype(config.dtype, config_json, checkpoint.format)
    plan = plan_family(read_config(config_json))
    costs = model_costs(config_json, name=files.name, dtype=dtype, plan=plan)
    return OpenModel(
        files=files,
        checkpoint=checkpoint,
        config_json=config_json,
        dtype=dtype,
        plan=plan,
        costs=costs,
        tokenizer=tokenizer,
    )


def choose_dtype(wanted: str, config_json: str, checkpoint_format: str) -> str:
    """The compute dtype: as asked, else the one the checkpoint was saved in, else bfloat16 (quantised GGUF)."""
    if wanted != "auto":
        return wanted
    if checkpoint_format == "gguf":
        return "bfloat16"
    config = json.loads(config_json)
    saved = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(saved).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "bfloat16"


def name_workers(entries: Sequence[WorkerEntry]) -> list[WorkerId]:
    """A worker's user name where that is unique, else user name and address."""
    count = Counter(entry.username for entry in entries)
    return [e.username if count[e.username] == 1 else f"{e.username}@{e.address}" for e in entries]


async def meet_workers(
    transport: Transport, entries: Sequence[WorkerEntry], *, timeout_s: float
) -> tuple[list[KnownWorker], list[tuple[WorkerEntry, ShardwrightError]]]:
    """Ask every worker who it is, all at once; give those that answered and those that did not, with the error."""
    clients = [transport.connect(entry.address) for entry in entries]
    answers = await asyncio.gather(*(c.describe(timeout_s=timeout_s) for c in clients), return_exceptions=True)
    known: list[KnownWorker] = []
    silent: list[tuple[WorkerEntry, ShardwrightError]] = []
    for worker_id, entry, client, answer in zip(name_workers(entries), entries, clients, answers, strict=True):
        if isinstance(answer, WorkerDescription):
            known.append(KnownWorker(worker_id=worker_id, entry=entry, client=client, description=answer))
            continue
        await client.close()
        if not isinstance(answer, ShardwrightError):
            raise answer
        silent.append((entry, answer))
    return known, silent


def check_versions(workers: Sequence[KnownWorker]) -> None:
    """Raises `VersionMismatchError` for a worker whose protocol or package differs in a way that matters."""
    for worker in workers:
        check_version(worker.worker_id, worker.entry.address, worker.description)


def check_version(worker_id: WorkerId, address: str, description: WorkerDescription) -> None:
    """Raises `VersionMismatchError` for a worker that speaks another protocol."""
    theirs = description.protocol_version
    if theirs != PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"worker {worker_id} at {address} speaks protocol {theirs} "
            f"(shardwright {description.package_version}), this master speaks {PROTOCOL_VERSION}: "
            "install the same version of shardwright on both"
        )


def fit_ranks(model: OpenModel, workers: Sequence[KnownWorker]) -> OpenModel:
    """The model as workers with several ranks hold it; how many the most have counts for all.

    Raises `UnsupportedModelError` for a model that can't be cut over the ranks of a worker. Blocks for a moment.
    """
    counts = {worker.description.num_ranks for worker in workers if worker.description.num_ranks > 1}
    if not counts:
        return model
    from shardwright.model.family_config import read_config
    from shardwright.model.rank_plan import plan_ranks

    for count in sorted(counts):
        plan_ranks(read_config(model.config_json), model.plan, rank=0, num_ranks=count)
    return replace(model, costs=model.costs.for_ranks(max(counts)))


def check_free(workers: Sequence[KnownWorker]) -> None:
    """Raises `ClusterError` when another master is using a worker."""
    for worker in workers:
        if worker.description.in_use:
            raise ClusterError(
                f"worker {worker.worker_id} at {worker.entry.address} is serving another master; "
                "wait until that ends, or use other workers"
            )


def placement_settings(config: MasterConfig, costs: ModelCosts) -> PlacementSettings:
    """What the planner may spend, from the master's settings."""
    return PlacementSettings(
        block_size=config.block_size,
        max_kv_tokens=config.kv_tokens,
        min_kv_tokens=min_kv_tokens(config, costs),
        prompt_tokens=config.typical_prompt_tokens,
        new_tokens=config.typical_new_tokens,
        num_sequences=TYPICAL_NUM_SEQUENCES,
    )


def min_kv_tokens(config: MasterConfig, costs: ModelCosts) -> int:
    """KV positions that a placement must leave room for."""
    return min(config.kv_tokens, costs.max_context, MIN_KV_TOKENS)


TYPICAL_NUM_SEQUENCES = 8
"""Sequences of a decode step that stages are balanced for."""

MIN_KV_TOKENS = 512
"""KV positions that a placement must leave room for; below that a model can hardly answer anything."""


class Session:
    """A model that answers, and what a command wants to know about it."""

    def __init__(
        self,
        engine: MasterEngine,
        model: OpenModel,
        workers: Sequence[KnownWorker],
        tracing: MasterTracing | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.workers = tuple(workers)
        self.tracing = tracing  # None: no traces are made
        self._ready_at = int(datetime.now(tz=UTC).timestamp())

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None for a model that comes without one."""
        return self.model.tokenizer

    def encode(self, prompt: str, *, chat: bool | None) -> tuple[TokenId, ...]:
        """Token ids of a prompt; `chat` None means: through the chat template if the model has one.

        Raises `InvalidRequestError` for a model without a tokenizer, and for an empty prompt.
        """
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(f"{self.model.files.name} has no tokenizer; give token ids with --prompt-ids")
        if not prompt.strip():
            raise InvalidRequestError("the prompt is empty; write something to continue or to answer")
        if chat is None:
            chat = tokenizer.has_chat_template
        if chat:
            return tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return tokenizer.encode(prompt)

    def stop_conditions(self, *, max_new_tokens: int, ignore_eos: bool) -> StopConditions:
        """When a sequence of this model ends."""
        ends = frozenset() if ignore_eos else self.end_ids
        return StopConditions(max_new_tokens=max_new_tokens, stop_token_ids=ends)

    async def submit(
        self, prompt: tuple[TokenId, ...], sampling: SamplingParams, stop: StopConditions
    ) -> tuple[SeqId, AsyncIterator[RequestEvent]]:
        """Queue a prompt of token ids, checked against the vocabulary. Raises `InvalidRequestError`."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty: it has no tokens")
        vocabulary = self.vocab_size
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise InvalidRequestError(f"token id {token} is outside the model's vocabulary of {vocabulary}")
        return await self.engine.submit(prompt, sampling, stop)

    @property
    def end_ids(self) -> frozenset[TokenId]:
        """The ids that end an answer."""
        return end_token_ids(self.model)

    @property
    def vocab_size(self) -> int:
        """Token ids lie below this."""
        return self.model.files.vocab_size

    @functools.cached_property
    def text_engine(self) -> SessionTextEngine:
        """The model as the API serves it: text in and out, grammars, choices."""
        return self.serve_as(self.model.files.name)

    def serve_as(self, name: str) -> SessionTextEngine:
        """The same under a name that clients know."""
        tokenizer = self.model.tokenizer
        return SessionTextEngine(
            self.engine,
            model=ServedModel(
                name=name,
                created=self._ready_at,
                context_length=self.context_length,
                vocab_size=self.vocab_size,
                has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
                has_tokenizer=tokenizer is not None,
                chat_template=tokenizer.chat_template if tokenizer is not None else "",
            ),
            codec=tokenizer,
            end_ids=self.end_ids,
            grammar_check=GrammarCheck(tokenizer.vocabulary, vocab_size=self.vocab_size) if tokenizer else None,
        )

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer: what the model was made for, or what the KV blocks hold."""
        stages = self.engine.snapshot().stages
        capacity = self.engine.snapshot().num_blocks * stages[0].block_size if stages else self.model.costs.max_context
        return min(self.model.costs.max_context, capacity)

    async def refresh(self) -> None:
        """Ask every worker for its state now, so that the table is up to date."""
        await self.engine.refresh()

    @property
    def stages(self) -> list[StageRow]:
        """The pipeline as it stands, for a table."""
        snapshot = self.engine.snapshot()
        reports = {worker.worker_id: worker.report for worker in snapshot.workers}
        rows = []
        for stage in snapshot.stages:
            report = reports.get(stage.worker_id)
            busy = report.busy_s / report.uptime_s if report is not None and report.uptime_s > 0 else None
            done = self.engine.loaded.get(stage.worker_id)
            rows.append(
                StageRow(
                    stage=stage.stage_index,
                    worker=stage.worker_id,
                    device=self.engine.observatory.device(stage.worker_id),
                    start=stage.layers.start,
                    end=stage.layers.end,
                    weights_bytes=done.weight_bytes if done is not None else 0,
                    kv_blocks=stage.num_blocks,
                    busy_ratio=busy,
                )
            )
        return rows


def end_token_ids(model: OpenModel) -> frozenset[TokenId]:
    """The ids that end an answer: the generation config's, else the model config's, else the tokenizer's."""
    for source in (model.files.generation_config, json.loads(model.config_json)):
        ends = source.get("eos_token_id")
        if isinstance(ends, int):
            return frozenset([ends])
        if ends:
            return frozenset(int(end) for end in ends)
    return model.tokenizer.end_ids if model.tokenizer is not None else frozenset()


@contextlib.asynccontextmanager
async def open_session(
    config: MasterConfig,
    entries: Sequence[WorkerEntry],
    *,
    listener: SessionListener,
    transport: Transport,
    model: OpenModel | None = None,
    write_metrics: bool = True,
) -> AsyncIterator[Session]:
    """Bring a model up on these workers and keep it until the block ends.

    Raises `ModelError`, `PlacementError` or `ClusterError` kinds; then nothing is left running.
    """
    if not entries:
        raise PlacementError("no worker is registered; register one (`shardwright register`) or use --local-workers N")
    if model is None:
        model = await open_model(config, listener)
    async with contextlib.AsyncExitStack() as stack:
        tracing = await stack.enter_async_context(
            master_tracing(config.otlp_endpoint, model=_plain_name(model.files.name))
        )
        known, silent = await meet_workers(transport, entries, timeout_s=config.connect_timeout_s)
        for worker in known:
            stack.push_async_callback(worker.client.close)
        for _, error in silent:
            if isinstance(error, VersionMismatchError):
                raise error
        if not known:
            raise WorkerUnreachableError("; ".join(str(error) for _, error in silent))
        for entry, error in silent:
            log.warning("going on without worker %s: %s", entry.username, error)
        check_versions(known)
        model = await asyncio.to_thread(fit_ranks, model, known)
        capacities = tuple(worker.capacity for worker in known)
        place(model.costs, capacities, placement_settings(config, model.costs))  # raises before anything starts
        check_free(known)
        clients = {worker.worker_id: worker.client for worker in known}
        # A stage is told the address that was registered, whatever way the master itself takes to that worker.
        addresses = {worker_id: entry.address for worker_id, entry in zip(name_workers(entries), entries, strict=True)}
        if config.recover:  # who does not answer now may later
            for worker_id, address in addresses.items():
                if worker_id not in clients:
                    clients[worker_id] = transport.connect(address)
                    stack.push_async_callback(clients[worker_id].close)
        first_epoch = 1 + max(worker.description.last_epoch for worker in known)
        sender = _StageSender(model, addresses, config.cache_dir, listener)
        engine = MasterEngine(
            MasterState(core_settings(config, model.costs, first_epoch), model.costs),
            clients,
            sender if tracing is None else tracing.loader(sender),
            heartbeat_interval_s=config.heartbeat_interval_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            history_interval_s=config.metrics_interval_s,
            history_s=config.metrics_history_s,
            introduce=functools.partial(_introduce, timeout_s=config.connect_timeout_s) if config.recover else None,
        )
        for worker in known:
            engine.observatory.worker_described(worker.worker_id, worker.description, worker.entry.address)
        if tracing is not None:
            tracing.watch(engine.observatory, lambda: engine.snapshot().stages)
        await stack.enter_async_context(engine)
        await engine.deploy(capacities)
        session = Session(engine, model, known, tracing)
        listener.ready(session.stages)
        if write_metrics:
            files = _MetricsFiles(engine, config)
            task = asyncio.create_task(files.keep(), name="metrics")
            stack.push_async_callback(files.end, task)
        yield session


async def _introduce(worker_id: WorkerId, client: WorkerClient, *, timeout_s: float) -> WorkerDescription:
    """Who a worker is that may have been started again, checked as at the start."""
    description = await client.describe(timeout_s=timeout_s)
    check_version(worker_id, client.address, description)
    if description.in_use:
        raise ClusterError(f"worker {worker_id} at {client.address} is serving another master")
    return description


def core_settings(config: MasterConfig, costs: ModelCosts, first_epoch: Epoch) -> CoreSettings:
    """The core's settings, from the master's."""
    return CoreSettings(
        block_size=config.block_size,
        max_kv_tokens=config.kv_tokens,
        min_kv_tokens=min_kv_tokens(config, costs),
        typical_prompt_tokens=config.typical_prompt_tokens,
        typical_new_tokens=config.typical_new_tokens,
        typical_num_sequences=TYPICAL_NUM_SEQUENCES,
        token_budget=config.token_budget,
        max_running=config.max_running,
        max_waiting=config.max_waiting or None,
        prefix_cache=config.prefix_cache,
        max_steps_in_flight=config.steps_in_flight or None,
        heartbeat_timeout_s=config.heartbeat_timeout_s,
        probe_interval_s=config.probe_interval_s or None,
        gather_s=config.gather_s,
        recover=config.recover,
        first_epoch=first_epoch,
    )


def _load_tokenizer(files: ModelFiles, cache_dir: Path, stop: threading.Event) -> Tokenizer | None:
    if files.tokenizer is None:
        return None
    is_gguf = files.tokenizer.suffix == ".gguf"
    return Tokenizer.load(
        folder=None if is_gguf else files.tokenizer,
        gguf=files.tokenizer if is_gguf else None,
        cache_dir=cache_dir,
        stop=stop,
    )


def _plain_name(model: str) -> str:
    """What a model is called where others read it: of a path the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


class _MetricsFiles:
    """Keeps `metrics.json` and, beside it, the rows of the last hour up to date while a session lasts."""

    def __init__(self, engine: MasterEngine, config: MasterConfig) -> None:
        self._observatory = engine.observatory
        self._interval_s = config.metrics_interval_s
        self._writer = MetricsWriter(config.metrics)
        self._log = MetricsLog(config.metrics_log, kept_s=config.metrics_history_s) if config.write_history else None
        self._written = 0.0  # timestamp of the last row in the file
        self._stopping = asyncio.Event()

    async def keep(self) -> None:
        """Write once in each interval, until `end`."""
        if self._log is not None:
            earlier = await asyncio.to_thread(self._log.read, now=self._observatory.view().at)
            self._observatory.remember(earlier)
            self._written = max((float(row["timestamp"]) for row in earlier), default=0.0)
        while not self._stopping.is_set():
            await self._write()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._interval_s)

    async def end(self, task: asyncio.Task[None]) -> None:
        """Stop, and leave the last state in the files: a command may be over before the first interval is."""
        self._stopping.set()
        await task  # not cancelled: a thread that writes would go on beside the last one
        self._observatory.look()
        await self._write()

    async def _write(self) -> None:
        view = self._observatory.view()
        self._written = min(self._written, view.at)  # the system's clock may have been set back
        rows = self._observatory.metrics_rows(since=self._written)
        if rows:
            self._written = max(self._written, *(float(str(row["timestamp"])) for row in rows))
        await asyncio.to_thread(self._write_files, view, rows)

    def _write_files(self, view: ClusterView, rows: list[dict[str, object]]) -> None:
        self._writer.write(view)
        if self._log is not None:
            self._log.append(rows, now=view.at)


class _StageSender:
    """Sends a stage to its worker: which tensors it needs, their hashes, and their bytes where it lacks them.

    The last stage gets the tokens' bytes as one more tensor, unless the model has no tokenizer, or one without them.
    """

    def __init__(
        self,
        model: OpenModel,
        addresses: Mapping[WorkerId, str],
        cache_dir: Path,
        listener: SessionListener,
    ) -> None:
        self._model = model
        self._addresses = addresses
        self._cache_dir = cache_dir
        self._listener = listener
        self._master_id = secrets.token_hex(8)
        self._blobs: dict[str, bytes] = {}  # in memory, by the name of the tensor that each travels as

    async def __call__(self, assignment: StageAssignment, client: WorkerClient) -> LoadDone:
        load = await in_thread(functools.partial(self._stage_load, assignment))  # one given up stops hashing

        def progress(message: Progress) -> None:
            if isinstance(message, LoadProgress):
                self._listener.loading(assignment.worker_id, message.done_bytes, message.total_bytes, message.phase)

        return await send_stage(client, load, BlobsBeside(self._model.checkpoint, self._blobs), progress)

    def _stage_load(self, assignment: StageAssignment, stop: threading.Event) -> StageLoad:
        from shardwright.model.families import slice_model
        from shardwright.model.family_config import read_config
        from shardwright.model.weights import stage_tensor_names

        model = self._model
        config = read_config(model.config_json)
        sliced = slice_model(
            config, assignment.layers, is_first=assignment.is_first, is_last=assignment.is_last, plan=model.plan
        )
        names = stage_tensor_names(sliced, config, model.checkpoint.tensors, model.checkpoint.format)
        specs = hash_tensors(
            model.checkpoint, names, cache_dir=self._cache_dir, progress=self._listener.hashing, stop=stop
        )
        if assignment.is_last:
            specs += self._vocabulary_specs()
        next_id = assignment.next_worker_id
        return StageLoad(
            assignment=assignment,
            model_config=model.config_json,
            dtype=model.dtype,
            tensors=specs,
            file_hints=self._hints(),
            next_address="" if next_id is None else self._addresses[next_id],
            master_id=self._master_id,
        )

    def _vocabulary_specs(self) -> tuple[TensorSpec, ...]:
        """The vocabulary as a tensor, if there is one. Made once: every new pipeline's last stage gets the same."""
        tokenizer = self._model.tokenizer
        if tokenizer is not None and VOCABULARY_TENSOR not in self._blobs:
            self._blobs[VOCABULARY_TENSOR] = tokenizer.vocabulary()
        blob = self._blobs.get(VOCABULARY_TENSOR, b"")
        return (blob_spec(VOCABULARY_TENSOR, blob),) if blob else ()

    def _hints(self) -> tuple[FileHint, ...]:
        files = self._model.files
        return tuple(
            FileHint(
                path=str(path.resolve()),
                num_bytes=path.stat().st_size,
                hub_repo=files.hub_repo,
                hub_revision=files.hub_revision,
                hub_filename=path.name if files.hub_repo else "",
            )
            for path in files.weights
        )
