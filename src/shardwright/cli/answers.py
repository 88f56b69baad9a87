"""One prompt's way through an engine, and how its answer is printed: as text while it comes, or as a line of JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO, assert_never

from shardwright.cli.console import harmless, one_sentence, say
from shardwright.cli.prompts import Prompt
from shardwright.engine import FinishEvent, PromptScoresEvent, RequestEvent, TokenEvent
from shardwright.errors import ClusterError, InvalidRequestError, UserError
from shardwright.types import FinishReason, SamplingParams, TokenId

if TYPE_CHECKING:
    from shardwright.runtime.session import Session, StageRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How every prompt of a command is answered."""

    sampling: SamplingParams
    max_new_tokens: int
    max_length: int | None = None  # most tokens of prompt and answer together; overrides max_new_tokens
    ignore_eos: bool = False
    chat: bool | None = None  # None: as the model was made for


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back for one prompt. Times are seconds on the clock that it was run with."""

    prompt: Prompt
    prompt_ids: tuple[TokenId, ...] = ()
    token_ids: list[TokenId] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str = ""
    exit_code: int = 0
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_cached_tokens: int = 0

    @property
    def prefill_s(self) -> float:
        """From the submission to the first token."""
        return 0.0 if self.first_token_s is None else self.first_token_s - self.submitted_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        if self.first_token_s is None or self.last_token_s is None:
            return 0.0
        return self.last_token_s - self.first_token_s

    def fail(self, message: str, exit_code: int) -> None:
        """End the answer with an error."""
        self.finish_reason = FinishReason.ERROR
        self.error = message
        self.exit_code = exit_code


class Printer(Protocol):
    """Shows answers as they come."""

    def piece(self, index: int, text: str) -> None:
        """More text of the prompt with this number (from 0)."""
        ...

    def finished(self, index: int) -> None:
        """The prompt with this number has all it will get."""
        ...


async def answer_all(
    session: Session,
    answers: Sequence[Answer],
    wish: Wish,
    printer: Printer,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Submit every prompt in order, then follow them all at once.

    A prompt that can't be served ends with an error of its own and holds up no other.
    """
    async with asyncio.TaskGroup() as group:
        for index, answer in enumerate(answers):
            try:
                events = await _submit(session, answer, wish, clock)
            except (UserError, ClusterError) as exc:
                answer.fail(one_sentence(exc), exc.exit_code)
                printer.finished(index)
                continue
            group.create_task(_follow(session, answer, events, index, printer, clock))


async def _submit(
    session: Session, answer: Answer, wish: Wish, clock: Callable[[], float]
) -> AsyncIterator[RequestEvent]:
    ids = answer.prompt.token_ids
    answer.prompt_ids = session.encode(answer.prompt.text, chat=wish.chat) if ids is None else ids
    max_new_tokens = wish.max_new_tokens
    if wish.max_length is not None:
        max_new_tokens = wish.max_length - len(answer.prompt_ids)
        if max_new_tokens < 1:
            raise InvalidRequestError(
                f"the prompt has {len(answer.prompt_ids)} tokens; with a maximal length of {wish.max_length} tokens "
                "for prompt and answer together there is no room for an answer"
            )
    stop = session.stop_conditions(max_new_tokens=max_new_tokens, ignore_eos=wish.ignore_eos)
    answer.submitted_s = clock()
    _, events = await session.submit(answer.prompt_ids, wish.sampling, stop)
    return events


async def _follow(
    session: Session,
    answer: Answer,
    events: AsyncIterator[RequestEvent],
    index: int,
    printer: Printer,
    clock: Callable[[], float],
) -> None:
    stream = session.tokenizer.stream() if session.tokenizer is not None else None

    def show(text: str) -> None:
        answer.text += text
        if text:
            printer.piece(index, text)

    async for event in events:
        match event:
            case TokenEvent():
                answer.last_token_s = clock()
                if answer.first_token_s is None:
                    answer.first_token_s = answer.last_token_s
                answer.token_ids.append(event.token_id)
                if stream is not None:
                    show(stream.push(event.token_id))
            case FinishEvent():
                answer.finish_reason = event.reason
                answer.num_cached_tokens = event.num_cached_tokens
                if event.reason is FinishReason.ERROR:
                    # Before its first token a request is refused for what it is; later the cluster failed under it.
                    kind = ClusterError if answer.token_ids else UserError
                    answer.fail(event.message or "the request failed", kind.exit_code)
            case PromptScoresEvent():
                pass  # not asked for here
            case _:
                assert_never(event)
    if answer.finish_reason is None:
        answer.fail("the cluster was closed before the answer's end", ClusterError.exit_code)
    if stream is not None:
        show(stream.flush())
    printer.finished(index)


class TextPrinter:
    """Streams answers in the order of their prompts: the first that is not over live, those behind it when it is."""

    def __init__(self, answers: Sequence[Answer], out: TextIO) -> None:
        self._answers = answers
        self._out = out
        self._pieces: list[list[str]] = [[] for _ in answers]
        self._finished = [False] * len(answers)
        self._current = -1
        self._next()

    def piece(self, index: int, text: str) -> None:
        """Print it if its prompt's turn has come, else keep it."""
        if index == self._current:
            self._write(text)
        else:
            self._pieces[index].append(text)

    def finished(self, index: int) -> None:
        """Go on to the prompts behind, as far as they are over too."""
        self._finished[index] = True
        while self._current < len(self._answers) and self._finished[self._current]:
            self._end(self._answers[self._current])
            self._next()

    def _next(self) -> None:
        self._current += 1
        if self._current == len(self._answers):
            return
        if len(self._answers) > 1:
            number, title = self._current + 1, self._answers[self._current].prompt.title
            self._write(f"--- {number} of {len(self._answers)}: {title}\n")
        self._write("".join(self._pieces[self._current]))

    def _end(self, answer: Answer) -> None:
        if answer.error:
            if answer.text:
                self._write("\n")
            which = f"prompt {self._current + 1}: " if len(self._answers) > 1 else ""
            say(f"error: {which}{answer.error}")
        else:
            # Without a tokenizer the ids are the answer.
            self._write("\n" if answer.text or not answer.token_ids else ",".join(map(str, answer.token_ids)) + "\n")

    def _write(self, text: str) -> None:
        if self._out.isatty():
            text = harmless(text)
        self._out.write(text)
        self._out.flush()


class JsonPrinter:
    """Prints one JSON object a line and prompt, in the order of the prompts, each when it and those before are over."""

    def __init__(self, answers: Sequence[Answer], stages: Sequence[StageRow], out: TextIO) -> None:
        self._answers = answers
        self._stages = [{"worker": stage.worker, "start": stage.start, "end": stage.end} for stage in stages]
        self._out = out
        self._finished = [False] * len(answers)
        self._current = 0

    def piece(self, index: int, text: str) -> None:
        """Nothing is printed before the end."""

    def finished(self, index: int) -> None:
        """Print what is over, in order."""
        self._finished[index] = True
        while self._current < len(self._answers) and self._finished[self._current]:
            answer = self._answers[self._current]
            self._out.write(json.dumps(self._object(answer)) + "\n")
            self._out.flush()
            if answer.error:
                say(f"error: prompt {self._current + 1}: {answer.error}")
            self._current += 1

    def _object(self, answer: Answer) -> dict[str, object]:
        assert answer.finish_reason is not None, "only what is over is printed"
        fields: dict[str, object] = {
            "prompt_ids": list(answer.prompt_ids),
            "token_ids": answer.token_ids,
            "text": answer.text,
            "finish_reason": answer.finish_reason.value,
            "stages": self._stages,
            "prefill_s": round(answer.prefill_s, 6),
            "decode_s": round(answer.decode_s, 6),
        }
        return fields | {"error": answer.error} if answer.error else fields
