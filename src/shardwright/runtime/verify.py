"""Runs a model split and whole in one process and says whether the answers are the same.

The split goes through everything that a real cluster does, wire codec included, over the memory transport. The
whole model is `transformers`' own `generate`. Both are greedy, in the same dtype.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwright.config import MasterConfig
from shardwright.engine import FinishEvent, TokenEvent
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
"""Two logits closer than this many roundings of their size may change places when sums are done in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the two answers part."""

    index: int  # of the new token
    split_token: TokenId | None  # None: the answer had ended
    whole_token: TokenId | None
    margin: float  # between the whole model's two best logits there
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
    difference: Difference | None

    @property
    def passed(self) -> bool:
        """Identical, or different only by rounding in a dtype that rounds."""
        return self.difference is None or self.difference.within_rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeAnswer:
    """What the whole model says: its tokens, and for each how far the best logit was from the second."""

    tokens: tuple[TokenId, ...]
    margins: tuple[float, ...]
    best: tuple[float, ...]  # the best logit itself


async def verify(
    config: MasterConfig,
    *,
    num_stages: int,
    max_new_tokens: int,
    listener: SessionListener,
    prompts: Sequence[str] = (),
) -> tuple[OpenModel, list[Verdict]]:
    """Compare the split with the whole model on a few prompts.

    Needs memory for the model twice. Raises what `open_session` raises; a difference is in the verdicts.
    """
    import torch

    model = await open_model(config, listener)
    num_stages = min(num_stages, model.costs.num_layers)
    async with local_session(config, num_stages=num_stages, listener=listener, model=model) as session:
        ids = [session.encode(text, chat=None) for text in prompts or PROMPTS] if session.tokenizer else []
        if not ids:
            generator = torch.Generator().manual_seed(PROMPT_SEED)
            size = model.files.vocab_size
            ids = [tuple(torch.randint(size, (length,), generator=generator).tolist()) for length in (1, 7, 20, 40)]
        stop = session.stop_conditions(max_new_tokens=max_new_tokens, ignore_eos=False)
        answers = await asyncio.gather(*(_answer(session, prompt, stop) for prompt in ids))
    whole = await asyncio.to_thread(whole_answers, model, ids, stop)
    eps = torch.finfo(getattr(torch, model.dtype)).eps
    verdicts = [
        Verdict(prompt=p, split_tokens=s, whole_tokens=w.tokens, difference=first_difference(s, w, eps))
        for p, s, w in zip(ids, answers, whole, strict=True)
    ]
    return model, verdicts


def first_difference(split: tuple[TokenId, ...], whole: WholeAnswer, eps: float) -> Difference | None:
    """Where two answers first differ, with the whole model's margin there; `eps` is the dtype's relative rounding."""
    for index in range(max(len(split), len(whole.tokens))):
        ours = split[index] if index < len(split) else None
        theirs = whole.tokens[index] if index < len(whole.tokens) else None
        if ours != theirs:
            at = min(index, len(whole.margins) - 1)
            return Difference(
                index=index,
                split_token=ours,
                whole_token=theirs,
                margin=whole.margins[at],
                rounding=ROUNDING_STEPS * eps * abs(whole.best[at]),
            )
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
    return tuple(tokens)


def load_whole(model: OpenModel) -> torch.nn.Module:
    """The whole model as `transformers` loads it from the same files, on the CPU in the same dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from shardwright.model.construction import CONSTRUCTION

    weights = model.files.weights[0]
    options = {"gguf_file": weights.name} if model.checkpoint.format == "gguf" else {}
    with CONSTRUCTION:
        whole = AutoModelForCausalLM.from_pretrained(
            str(weights.parent), dtype=getattr(torch, model.dtype), local_files_only=True, **options
        )
    whole.eval()
    return whole  # type: ignore[no-any-return]


def whole_answers(model: OpenModel, prompts: Sequence[tuple[TokenId, ...]], stop: StopConditions) -> list[WholeAnswer]:
    """The whole model's greedy answers to these prompts, one after the other."""
    import torch

    whole = load_whole(model)
    ends = sorted(stop.stop_token_ids) or None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = whole.generate(  # type: ignore[operator]
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
        best = [row[0].float().topk(2).values.tolist() for row in output.logits]
        answers.append(
            WholeAnswer(
                tokens=tuple(output.sequences[0, len(prompt) :].tolist()),
                margins=tuple(first - second for first, second in best),
                best=tuple(first for first, _ in best),
            )
        )
    return answers


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
