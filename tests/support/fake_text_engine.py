"""A text engine without a model: characters are tokens, and a script says what is answered.

It keeps the interface's promises (order, one end for each choice, nothing after `aclose`) and lets a test hold it,
slow it down, fill its queue or break it.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from fake_observatory import FakeObservatory

from shardwright.engine import ChoiceEnd, PromptScored, ScoredToken, ServedModel, TextDelta
from shardwright.errors import ClusterError, InvalidRequestError, PromptTooLongError, QueueFullError
from shardwright.types import ClusterSnapshot, FinishReason, GrammarKind

MODEL = "fake/characters-1"
BOS = 1  # a control character that no test writes
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}...{% if tools %}<tool_call>{% endif %}{% endfor %}"


class CharacterCodec:
    """Text to code points and back. Chats are written as lines `role: text`."""

    def encode(self, text):
        return (BOS, *map(ord, text))

    def encode_chat(self, messages, *, tools=(), options=None, continue_last=False):
        if any(message["content"] == "unrenderable" for message in messages):
            raise InvalidRequestError("the chat template refuses the conversation")
        lines = [f"tools: {json.dumps(list(tools))}"] if tools else []
        lines += [f"options: {json.dumps(options)}"] if options else []
        for message in messages:
            calls = message.get("tool_calls")
            lines.append(f"{message['role']}: {message['content']}{json.dumps(calls) if calls else ''}")
        return self.encode("\n".join(lines) + ("" if continue_last else "\nassistant: "))

    def decode(self, tokens):
        return "".join(chr(token) for token in tokens if token != BOS)

    def token_bytes(self, token_id):
        return chr(token_id).encode()


def last_user_text(prompt):
    """What the last line of the user says, in a prompt that `encode_chat` made; else the whole prompt."""
    lines = [line for line in prompt.split("\n") if line.startswith("user: ")]
    return lines[-1].removeprefix("user: ") if lines else prompt


@dataclass(eq=False)
class FakeTextEngine:
    """Answers `reply(prompt text, choice)`, a character at a time."""

    reply: Callable[[str, int], str] = lambda prompt, choice: f"You said: {last_user_text(prompt)}" + "!" * choice
    delay_s: float = 0.0  # before each token
    hold: asyncio.Event | None = None  # nothing is generated before it is set
    hold_after: int = 0  # tokens that come in spite of it
    chunk: int = 1  # tokens in one delta
    ends_with: FinishReason | None = None  # instead of a stop
    breaks_after: int = 0  # tokens before that end
    queue_is_full: bool = False
    is_down: bool = False
    context_length: int = 4096
    chat_template: str = CHAT_TEMPLATE
    has_tokenizer: bool = True
    num_cached: int = 0
    ready: bool = True
    requests: list = field(default_factory=list)
    num_running: int = 0
    num_aborted: int = 0
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    snapshot_changes: dict = field(default_factory=dict)
    observatory: FakeObservatory = field(default_factory=FakeObservatory)

    @property
    def model(self):
        return ServedModel(
            name=MODEL,
            created=1_700_000_000,
            context_length=self.context_length,
            vocab_size=0x110000,
            has_chat_template=bool(self.chat_template),
            has_tokenizer=self.has_tokenizer,
            chat_template=self.chat_template,
        )

    @property
    def codec(self):
        if not self.has_tokenizer:
            raise InvalidRequestError("the model has no tokenizer")
        return CharacterCodec()

    def check_grammar(self, grammar):
        from llguidance import LLMatcher

        make = {
            GrammarKind.JSON_OBJECT: lambda _: LLMatcher.grammar_from_json_schema('{"type":"object"}'),
            GrammarKind.JSON_SCHEMA: LLMatcher.grammar_from_json_schema,
            GrammarKind.REGEX: LLMatcher.grammar_from_regex,
            GrammarKind.LARK: LLMatcher.grammar_from_lark,
        }[grammar.kind]
        try:
            error = LLMatcher.validate_grammar(make(grammar.source))
        except ValueError as exc:
            error = str(exc)
        if error:
            raise InvalidRequestError(f"the grammar can't be followed: {error[:200]}")

    async def generate(self, request):
        self.requests.append(request)
        if self.is_down:
            raise ClusterError("no pipeline: worker w1 is lost")
        if self.queue_is_full:
            raise QueueFullError("8 requests wait already", retry_after_s=1.2)
        if len(request.prompt) >= self.context_length:
            raise PromptTooLongError("the prompt is too long")
        return self._events(request)

    async def _events(self, request):
        self.num_running += 1
        done = False
        try:
            deadline = asyncio.get_running_loop().time() + (request.timeout_s or 1e9)
            if request.num_prompt_logprobs is not None:
                yield PromptScored(tokens=tuple(self._scored(request.prompt, request.num_prompt_logprobs, scored=True)))
            prompt = self.codec.decode(request.prompt) if self.has_tokenizer else ""
            answers = [self._answer(request, prompt, choice) for choice in range(request.num_choices)]
            counts = [0] * request.num_choices
            for index in range(0, max(len(text) for text, _, _ in answers) or 1, self.chunk):
                for choice, (text, _, _) in enumerate(answers):
                    piece = text[index : index + self.chunk]
                    if not piece:
                        continue
                    if self.hold is not None and index >= self.hold_after:
                        try:
                            async with asyncio.timeout_at(deadline):
                                await self.hold.wait()
                        except TimeoutError:
                            pass
                    if self.delay_s:
                        await asyncio.sleep(self.delay_s)
                    else:
                        await asyncio.sleep(0)
                    late = asyncio.get_running_loop().time() >= deadline  # uvloop has whole milliseconds
                    if late or (self.ends_with is not None and index >= self.breaks_after):
                        reason = FinishReason.DEADLINE if late else self.ends_with
                        yield ChoiceEnd(choice=choice, reason=reason, message="it ended early")
                        done = True
                        return
                    counts[choice] += len(piece)
                    tokens = tuple(self._scored(tuple(map(ord, piece)), request.sampling.num_top_logprobs))
                    yield TextDelta(choice=choice, text=piece, tokens=tokens)
            for choice, (_, reason, matched) in enumerate(answers):
                yield ChoiceEnd(
                    choice=choice,
                    reason=reason,
                    matched_stop=matched,
                    num_output_tokens=counts[choice],
                    num_cached_tokens=self.num_cached,
                )
            done = True
        finally:
            self.num_running -= 1
            if not done:
                self.num_aborted += 1
                self.aborted.set()

    def _answer(self, request, prompt, choice):
        text, reason, matched = self.reply(prompt, choice), FinishReason.STOP, None
        found = [(text.find(stop), stop) for stop in request.stop_strings if stop in text]
        if found:
            at, matched = min(found)
            text = text[: at + len(matched) * request.include_stop]
        limit = request.max_new_tokens
        if limit is not None and len(text) > limit:
            text, reason, matched = text[:limit], FinishReason.LENGTH, None
        return text, reason, matched

    def _scored(self, tokens, num_top, *, scored=False):
        for position, token in enumerate(tokens):
            is_first = scored and position == 0
            top = tuple((token + k, chr(token + k).encode(), -0.5 - k) for k in range(num_top))
            yield ScoredToken(
                token_id=token,
                data=chr(token).encode(),
                logprob=None if is_first else -0.5,
                top=() if is_first else top,
            )

    def snapshot(self):
        values = {
            "epoch": 3,
            "ready": self.ready,
            "stages": (),
            "workers": (),
            "num_blocks": 100,
            "num_free_blocks": 60,
            "num_waiting": 2,
            "num_running": self.num_running,
            "num_steps_in_flight": 1,
            "max_steps_in_flight": 2,
            "total_prompt_tokens": 1000,
            "total_cached_tokens": 250,
            "total_output_tokens": 77,
            "total_preemptions": 4,
            "max_waiting": 8,
            "num_cached_blocks": 5,
            "finished": ((FinishReason.STOP, 9), (FinishReason.ABORT, 1)),
        }
        return ClusterSnapshot(**values | self.snapshot_changes)

    def is_ready(self):
        return self.ready
