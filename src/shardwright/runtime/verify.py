"""Runs a model split and whole in one process and says whether the answers are the same.

The split goes through everything that a real cluster does, wire codec included, over the memory transport. The
whole model is `transformers`' own `generate`, one prompt at a time. Both are greedy, with the same weights in the same
dtype; a GGUF file's quantised weights are dequantised for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardwright.config import MasterConfig
from shardwright.engine import FinishEvent, PromptScoresEvent, TokenEvent
from shardwright.errors import ClusterError
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.session import OpenModel, Session, SessionListener, open_model, open_session
from shardwright.transport.memory import MemoryTransport
from shardwright.types import FinishReason, SamplingParams, StopConditions, TokenId

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "The capital of France is",
    "Explain quantum computing in simple terms",
    "def fibonacci(n):",
    "Once upon a time, in a land far away, there lived a",
)
PROMPT_SEED = 20
ROUNDING_STEPS = 2
"""Two logits closer than this many roundings of the largest may change places when sums are done in another order.

Every logit is a sum of terms of about the same size, so the largest tells how far rounding moves any of them. Measured
in bfloat16 on SmolLM2, between decode and one prompt of the same text in the whole model itself: the distance of the
two best moves by 0.7 units in the last place on average and by up to 4. This bound lies at 2 to 4.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the two answers part."""

    index: int  # of the new token
    split_token: TokenId | None  # None: the answer had ended
    whole_token: TokenId | None
    margin: float  # from the split's token up to the whole model's best, in the whole model's logits; inf at an end
    rounding: float  # how far apart they may be and still change places

    @property
    def within_rounding(self) -> bool:
        """Whether the dtype's rounding explains it."""
        return self.margin <= self.rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One prompt's comparison."""

    prompt: tuple[TokenId, ...]
    split_tokens: tuple[TokenId, ...]
    whole_tokens: tuple[TokenId, ...]
    difference: Difference | None  # the first that rounding doesn't explain; else the first

    @property
    def passed(self) -> bool:
        """Identical, or different only by rounding in a dtype that rounds."""
        return self.difference is None or self.difference.within_rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeAnswer:
    """What the whole model says, and all logits that each of its tokens was picked from."""

    tokens: tuple[TokenId, ...]
    logits: torch.Tensor  # [tokens, vocabulary], float32


async def verify(
    config: MasterConfig,
    *,
    num_stages: int,
    max_new_tokens: int,
    listener: SessionListener,
    prompts: Sequence[str] = (),
    num_ranks: int = 1,
) -> tuple[OpenModel, list[Verdict]]:
    """Compare the split with the whole model on a few prompts.

    Needs memory for the model twice. With `num_ranks` over 1 the stages are workers' processes on this machine, each
    of so many ranks: a process has a place among the ranks of one worker only.

    Raises what `open_session` raises; a difference is in the verdicts.
    """
    model = await open_model(config, listener)
    num_stages = min(num_stages, model.costs.num_layers)
    opening = (
        local_session(config, num_stages=num_stages, listener=listener, model=model)
        if num_ranks == 1
        else process_session(config, num_stages=num_stages, num_ranks=num_ranks, listener=listener, model=model)
    )
    async with opening as session:
        ids = [session.encode(text, chat=None) for text in prompts or PROMPTS] if session.tokenizer else []
        if not ids:
            import torch

            generator = torch.Generator().manual_seed(PROMPT_SEED)
            size = model.files.vocab_size
            ids = [tuple(torch.randint(size, (length,), generator=generator).tolist()) for length in (1, 7, 20, 40)]
        stop = session.stop_conditions(max_new_tokens=max_new_tokens, ignore_eos=False)
        answers = await asyncio.gather(*(_answer(session, prompt, stop) for prompt in ids))
    verdicts = await asyncio.to_thread(_judge_all, model, ids, answers, stop)
    return model, verdicts


def _judge_all(
    model: OpenModel,
    prompts: Sequence[tuple[TokenId, ...]],
    answers: Sequence[tuple[TokenId, ...]],
    stop: StopConditions,
) -> list[Verdict]:
    whole = WholeModel(model)
    return [judge(whole, prompt, answer, stop) for prompt, answer in zip(prompts, answers, strict=True)]


def judge(whole: WholeModel, prompt: tuple[TokenId, ...], split: tuple[TokenId, ...], stop: StopConditions) -> Verdict:
    """Compare the split's answer with the whole model's, to the end.

    Behind a difference that rounding explains, the whole model goes on from the split's token, so that every token
    of the split's answer has been the whole model's choice, or as good as that.
    """
    answer = whole.answer(prompt, stop)
    whole_tokens = answer.tokens
    difference: Difference | None = None
    seen = 0
    while found := first_difference(split[seen:], answer, whole.eps):
        here = replace(found, index=seen + found.index)
        if difference is None or not here.within_rounding:
            difference = here
        seen = here.index + 1
        if not here.within_rounding:
            break
        if seen == stop.max_new_tokens or split[seen - 1] in stop.stop_token_ids:
            answer = replace(answer, tokens=())
        else:
            rest = replace(stop, max_new_tokens=stop.max_new_tokens - seen)
            answer = whole.answer(prompt + split[:seen], rest)
    return Verdict(prompt=prompt, split_tokens=split, whole_tokens=whole_tokens, difference=difference)


def first_difference(split: tuple[TokenId, ...], whole: WholeAnswer, eps: float) -> Difference | None:
    """Where two answers first differ, with the whole model's logits' distance there; `eps` is the dtype's rounding.

    An answer that ends where the other goes on is never within rounding: end tokens are compared like all others.
    """
    for index in range(max(len(split), len(whole.tokens))):
        ours = split[index] if index < len(split) else None
        theirs = whole.tokens[index] if index < len(whole.tokens) else None
        if ours == theirs:
            continue
        margin, rounding = math.inf, 0.0
        if ours is not None and theirs is not None:
            logits = whole.logits[index]
            margin = float(logits[theirs] - logits[ours])
            rounding = ROUNDING_STEPS * eps * float(logits.abs().max())
        return Difference(index=index, split_token=ours, whole_token=theirs, margin=margin, rounding=rounding)
    return None


async def _answer(session: Session, prompt: tuple[TokenId, ...], stop: StopConditions) -> tuple[TokenId, ...]:
    tokens: list[TokenId] = []
    _, events = await session.submit(prompt, SamplingParams(), stop)
    async for event in events:
        match event:
            case TokenEvent():
                tokens.append(event.token_id)
            case FinishEvent(reason=FinishReason.ERROR):
                raise ClusterError(event.message)
            case FinishEvent():
                break
            case PromptScoresEvent():
                pass  # not asked for here
    return tuple(tokens)


class WholeModel:
    """The whole model as `transformers` loads it from the same files, on the CPU in the same dtype."""

    def __init__(self, model: OpenModel) -> None:
        import torch

        from shardwright.model.construction import CONSTRUCTION
        from shardwright.model.reference import load_reference

        dtype = getattr(torch, model.dtype)
        with CONSTRUCTION:
            self._model = load_reference(model.files.weights, model.config_json, dtype)
        self.eps = float(torch.finfo(dtype).eps)

    def answer(self, prompt: tuple[TokenId, ...], stop: StopConditions) -> WholeAnswer:
        """The greedy answer to this prompt alone, whatever the model's generation config asks for."""
        import torch

        ends = sorted(stop.stop_token_ids) or None
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=stop.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=ends,
                pad_token_id=ends[0] if ends else None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return WholeAnswer(
            tokens=tuple(output.sequences[0, len(prompt) :].tolist()),
            logits=torch.cat(output.logits).float(),
        )


@contextlib.asynccontextmanager
async def local_session(
    config: MasterConfig, *, num_stages: int, listener: SessionListener, model: OpenModel | None = None
) -> AsyncIterator[Session]:
    """A session whose workers live in this process and speak over the memory transport."""
    from shardwright.config import WorkerConfig
    from shardwright.runtime.worker_process import open_worker

    transport = MemoryTransport()
    worker_config = WorkerConfig(host="verify", device="cpu", cache_dir=config.cache_dir)
    async with contextlib.AsyncExitStack() as stack:
        entries = []
        for index in range(num_stages):
            address = f"stage{index}:{index + 1}"
            await stack.enter_async_context(open_worker(worker_config, transport, address))
            entries.append(WorkerEntry(username=f"stage{index}", ip=f"stage{index}", port=index + 1))
        session = await stack.enter_async_context(
            open_session(config, entries, listener=listener, transport=transport, model=model, write_metrics=False)
        )
        yield session


@contextlib.asynccontextmanager
async def process_session(
    config: MasterConfig, *, num_stages: int, num_ranks: int, listener: SessionListener, model: OpenModel
) -> AsyncIterator[Session]:
    """A session whose workers are processes of this machine with several ranks each."""
    from shardwright.runtime.launcher import LocalWorkers
    from shardwright.transport.grpc import GrpcTransport

    options = ["--device", "cpu", "--cache-dir", str(config.cache_dir), "--tensor-parallel", str(num_ranks)]
    options += ["--all-reduce", "gloo"]  # several workers share the cores, and nothing here has to be fast
    async with (
        LocalWorkers(num_stages, options=options) as workers,
        open_session(
            config,
            workers.entries,
            listener=listener,
            transport=GrpcTransport(max_frame_bytes=config.max_frame_bytes),
            model=model,
            write_metrics=False,
        ) as session,
    ):
        yield session
