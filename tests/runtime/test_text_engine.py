"""What a request for text gets: whole characters, ends where they belong, several choices, scores, clear refusals."""

import asyncio
import contextlib
import gc
from dataclasses import replace

import pytest
from byte_codec import END, MARK, VOCABULARY, ByteCodec
from fake_pipeline import COSTS, FakePipeline, fake_master

from shardwright.engine import ChoiceEnd, GenerationRequest, PromptScored, ServedModel, TextDelta
from shardwright.errors import ClusterError, InvalidRequestError, PromptTooLongError, QueueFullError
from shardwright.runtime.text_engine import SessionTextEngine, choice_seed
from shardwright.types import FinishReason, Grammar, GrammarKind, SamplingParams, TokenRules

MODEL = ServedModel(
    name="bytes",
    created=1,
    context_length=COSTS.max_context,
    vocab_size=VOCABULARY,
    has_chat_template=False,
    has_tokenizer=True,
)
ASK = GenerationRequest(prompt=(5, 6, 7), max_new_tokens=100)


def saying(text, *, end=END):
    """The answer of these bytes, then end tokens for ever."""
    tokens = list(text.encode()) if isinstance(text, str) else list(text)

    def answer(prompt, index):
        return tokens[index] if index < len(tokens) else end

    return answer


@contextlib.asynccontextmanager
async def serving(answer=None, *, codec=True, **settings):
    """A text engine over a fake pipeline, with both and the master's engine."""
    pipeline = FakePipeline() if answer is None else FakePipeline(answer=answer)
    grammar_check = settings.pop("grammar_check", None)
    async with fake_master(pipeline, **settings) as engine:
        texts = SessionTextEngine(
            engine,
            model=MODEL,
            codec=ByteCodec() if codec else None,
            end_ids=frozenset({END}),
            grammar_check=grammar_check,
        )
        yield texts, pipeline, engine


async def answer_to(texts, request=ASK):
    return [event async for event in await texts.generate(request)]


def text_of(events, choice=0):
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.choice == choice)


def tokens_of(events, choice=0):
    deltas = [event for event in events if isinstance(event, TextDelta) and event.choice == choice]
    return [token.token_id for delta in deltas for token in delta.tokens]


def end_of(events, choice=0):
    (end,) = [event for event in events if isinstance(event, ChoiceEnd) and event.choice == choice]
    return end


async def until(condition):
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110  a snapshot's figures announce themselves to nobody
            await asyncio.sleep(0.001)


def num_open(engine):
    snapshot = engine.snapshot()
    return snapshot.num_running + snapshot.num_waiting


def others():
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


# --- text and tokens ---------------------------------------------------------------------------------


async def test_text_comes_in_whole_characters_each_with_the_tokens_that_it_is_made_of():
    async with serving(saying("aé€😀")) as (texts, _, _):
        events = await answer_to(texts)
    *deltas, end = events
    assert [delta.text for delta in deltas] == ["a", "é", "€", "😀"]
    assert [b"".join(token.data for token in delta.tokens).decode() for delta in deltas] == ["a", "é", "€", "😀"]
    assert all(token.logprob == -1.0 for delta in deltas for token in delta.tokens)
    assert end == ChoiceEnd(choice=0, reason=FinishReason.STOP, num_output_tokens=11)


async def test_half_a_character_at_the_end_is_shown_as_a_replacement_character():
    async with serving(saying("a€")) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, max_new_tokens=3))
    assert text_of(events) == "a\N{REPLACEMENT CHARACTER}"
    assert tokens_of(events) == list("a€".encode())[:3]
    assert end_of(events) == ChoiceEnd(choice=0, reason=FinishReason.LENGTH, num_output_tokens=3)


async def test_an_end_token_is_counted_and_not_shown():
    async with serving(saying("ab")) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, keep_special=True))
    assert (text_of(events), tokens_of(events)) == ("ab", [97, 98])
    assert end_of(events).num_output_tokens == 3


async def test_an_answer_that_ends_with_a_stop_string_is_observed_as_one_that_stopped_and_not_as_aborted():
    async with serving(saying("abcdef")) as (texts, _, engine):
        await answer_to(texts, replace(ASK, stop_strings=("cd",)))
        assert [trace.reason for trace in engine.observatory.requests()] == [FinishReason.STOP]


async def test_with_end_tokens_ignored_the_answer_goes_on_to_its_limit():
    async with serving(saying("ab")) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, ignore_eos=True, max_new_tokens=6))
        shown = await answer_to(texts, replace(ASK, ignore_eos=True, max_new_tokens=6, keep_special=True))
    assert (text_of(events), tokens_of(events)) == ("ab", [97, 98, END, END, END, END])
    assert end_of(events).reason is FinishReason.LENGTH
    assert text_of(shown) == "ab<end><end><end><end>"


async def test_a_stop_token_of_the_clients_own_is_named_and_the_models_is_not():
    async with serving(saying([97, MARK, 98])) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, stop_token_ids=frozenset({MARK})))
        other = await answer_to(texts, replace(ASK, stop_token_ids=frozenset({99})))
    assert text_of(events) == "a"
    assert end_of(events) == ChoiceEnd(choice=0, reason=FinishReason.STOP, matched_stop=MARK, num_output_tokens=2)
    assert text_of(other) == "ab"
    assert end_of(other) == ChoiceEnd(choice=0, reason=FinishReason.STOP, num_output_tokens=4)


async def test_likeliest_tokens_come_with_their_bytes():
    async with serving(saying("a")) as (texts, _, _):
        first, *_ = await answer_to(texts, replace(ASK, sampling=SamplingParams(num_top_logprobs=2)))
    assert first.tokens[0].top == ((97, b"a", -1.0), (98, b"b", -2.0))


async def test_without_a_tokenizer_answers_are_ids():
    async with serving(saying("ab"), codec=False) as (texts, _, _):
        events = await answer_to(texts)
        assert (text_of(events), tokens_of(events)) == ("", [97, 98])
        with pytest.raises(InvalidRequestError, match="bytes has no tokenizer"):
            _ = texts.codec
        with pytest.raises(InvalidRequestError, match="stop strings"):
            await texts.generate(replace(ASK, stop_strings=("x",)))
        with pytest.raises(InvalidRequestError, match="grammar"):
            texts.check_grammar(Grammar(kind=GrammarKind.JSON_OBJECT))


# --- stop strings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_across_token_borders_ends_the_answer(include_stop):
    ask = replace(ASK, stop_strings=("###", "\n\n"), include_stop=include_stop)
    async with serving(saying("one\ntwo\n\nthree")) as (texts, _, _):
        events = await answer_to(texts, ask)
    assert text_of(events) == ("one\ntwo\n\n" if include_stop else "one\ntwo")
    assert bytes(tokens_of(events)).decode() == text_of(events)
    assert end_of(events) == ChoiceEnd(choice=0, reason=FinishReason.STOP, matched_stop="\n\n", num_output_tokens=9)
    assert [event.text for event in events[:-1]] == ["o", "n", "e", "\nt", "w", "o"] + ["\n\n"] * include_stop


async def test_what_only_began_like_a_stop_string_is_shown_at_the_end():
    async with serving(saying("ab##")) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, stop_strings=("###",)))
    assert (text_of(events), tokens_of(events)) == ("ab##", list(b"ab##"))
    assert end_of(events).matched_stop is None


async def test_a_stop_string_frees_its_sequence_at_once_also_when_nobody_reads():
    async with serving(saying("ab." + "x" * 200), max_steps_in_flight=1) as (texts, pipeline, engine):
        reader = await texts.generate(replace(ASK, max_new_tokens=200, stop_strings=(".",)))
        await until(lambda: engine.snapshot().num_running == 0)
        # the probe, the prompt with "a", "b", ".", and the step that was sent with the last one's tokens
        assert len(pipeline.steps) == 5
        events = [event async for event in reader]
    assert text_of(events) == "ab"
    assert end_of(events).num_output_tokens == 3


async def test_a_stop_string_counts_only_once_the_least_number_of_tokens_is_there():
    ask = replace(ASK, stop_strings=(".",), rules=TokenRules(min_new_tokens=4))
    async with serving(saying("a.b.c.d")) as (texts, _, _):
        events = await answer_to(texts, ask)
    assert text_of(events) == "a.b"
    assert end_of(events).num_output_tokens == 4


async def test_a_token_of_which_a_part_is_shown_belongs_to_the_answer():
    """The special mark's text has the stop string inside."""
    async with serving(saying([97, MARK, 98])) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, stop_strings=("ark",), keep_special=True))
    assert (text_of(events), tokens_of(events)) == ("a<m", [97, MARK])


# --- limits and refusals -----------------------------------------------------------------------------


async def test_without_a_limit_the_answer_fills_the_context():
    async with serving() as (texts, _, _):
        texts._end_ids = frozenset()
        events = await answer_to(texts, GenerationRequest(prompt=(1, 2, 3)))
    assert end_of(events).num_output_tokens == COSTS.max_context - 3
    assert end_of(events).reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, VOCABULARY)}, f"prompt: token id {VOCABULARY} is outside the model's vocabulary"),
        ({"prompt": (-1,)}, "prompt: token id -1"),
        ({"stop_token_ids": frozenset({999})}, "stop_token_ids: token id 999"),
        ({"rules": TokenRules(logit_bias=((999, 1.0),))}, "logit_bias: token id 999"),
        ({"num_choices": 0}, "0 choices"),
        ({"stop_strings": ("a", "")}, "a stop string is empty"),
        ({"num_prompt_logprobs": 21}, "21 alternatives"),
        ({"timeout_s": 0.0}, r"timeout_s is 0\.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"rules": TokenRules(min_new_tokens=101)}, "min_new_tokens is 101 and max_new_tokens 100"),
    ],
)
async def test_what_can_not_be_served_is_refused_before_anything_starts(changes, message):
    async with serving() as (texts, _, engine):
        with pytest.raises(InvalidRequestError, match=message):
            await texts.generate(replace(ASK, **changes))
        assert engine.snapshot().total_prompt_tokens == 0


@pytest.mark.parametrize(("settings", "limit"), [({}, COSTS.max_context), ({"max_kv_tokens": 64}, 64)])
async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(settings, limit):
    async with serving(**settings) as (texts, _, _):
        assert end_of(await answer_to(texts, GenerationRequest(prompt=(1,) * limit))).num_output_tokens == 1
        with pytest.raises(PromptTooLongError, match=rf"the prompt has {limit + 1} tokens.* {limit} here"):
            await texts.generate(GenerationRequest(prompt=(1,) * (limit + 1)))


async def test_a_grammar_is_checked_before_anything_starts_and_off_the_event_loop():
    import threading

    checked = []

    def check(grammar):
        checked.append((grammar, threading.current_thread() is threading.main_thread()))
        raise InvalidRequestError("no such rule")

    grammar = Grammar(kind=GrammarKind.LARK, source="x")
    async with serving(grammar_check=check) as (texts, _, engine):
        with pytest.raises(InvalidRequestError, match="no such rule"):
            await texts.generate(replace(ASK, rules=TokenRules(grammar=grammar)))
        assert engine.snapshot().total_prompt_tokens == 0
    assert checked == [(grammar, False)]


async def test_without_a_pipeline_a_request_is_refused():
    async with serving() as (texts, pipeline, engine):
        pipeline.break_link()
        await until(lambda: not engine.is_ready())
        assert not texts.is_ready()
        with pytest.raises(ClusterError, match="the link broke"):
            await texts.generate(ASK)


async def test_a_failing_pipeline_ends_the_answer_with_what_there_is_and_the_reason():
    async with serving(saying("ab" + "c" * 90), max_steps_in_flight=1) as (texts, pipeline, _):
        reader = await texts.generate(replace(ASK, num_choices=2))
        first = await anext(reader)
        pipeline.break_link()
        events = [first, *[event async for event in reader]]
    for choice in range(2):
        end = end_of(events, choice)
        assert end.reason is FinishReason.ERROR
        assert "the link broke" in end.message
        assert end.num_output_tokens == len(text_of(events, choice)) >= 1


async def test_a_fault_in_decoding_ends_the_one_request_that_has_it(caplog):
    class Faulty(ByteCodec):
        def token_bytes(self, token_id):
            if token_id == ord("!"):
                raise ZeroDivisionError("a bug")
            return super().token_bytes(token_id)

    def answer(prompt, index):
        return saying("ab!" if prompt[0] == 1 else "cd")(prompt, index)

    async with serving(answer) as (texts, _, engine):
        texts._codec = Faulty()
        bad, good = await asyncio.gather(
            answer_to(texts, replace(ASK, prompt=(1,), num_choices=2)), answer_to(texts, replace(ASK, prompt=(2,)))
        )
        await until(lambda: engine.snapshot().num_running == 0)
    assert text_of(good) == "cd"
    assert [end_of(bad, choice).reason for choice in range(2)] == [FinishReason.ERROR] * 2
    assert "a bug" in end_of(bad).message
    assert "ZeroDivisionError" in caplog.text


# --- choices -----------------------------------------------------------------------------------------


async def test_choices_have_seeds_of_their_own_and_the_first_the_requests():
    seeds = [choice_seed(7, choice) for choice in range(3)]
    assert seeds == [7, choice_seed(7, 1), 0x3E839419DA5EB9E3]
    assert len({*seeds, choice_seed(8, 1), choice_seed(8, 2)}) == 5
    async with serving(saying("ab")) as (texts, pipeline, _):
        events = await answer_to(texts, replace(ASK, num_choices=3, sampling=SamplingParams(temperature=1.0, seed=7)))
        sampled = {
            piece.sampling.seed for step in pipeline.steps[1:] for piece in step.slices if piece.sampling is not None
        }
    assert sampled == set(seeds)
    assert [text_of(events, choice) for choice in range(3)] == ["ab"] * 3
    assert [end_of(events, choice).reason for choice in range(3)] == [FinishReason.STOP] * 3


async def test_choices_run_together_and_end_each_by_itself():
    """One stops at its stop string while the others go on."""
    turn = iter(range(1000))

    def answer(prompt, index):
        return ord(".") if next(turn) == 4 else ord("x")

    async with serving(answer) as (texts, _, _):
        events = await answer_to(texts, replace(ASK, num_choices=3, stop_strings=(".",), max_new_tokens=5))
    ends = [end_of(events, choice) for choice in range(3)]
    assert sorted(end.reason.value for end in ends) == ["length", "length", "stop"]
    assert sorted(len(text_of(events, choice)) for choice in range(3)) in ([0, 5, 5], [1, 5, 5])


async def test_a_queue_that_has_no_room_for_all_choices_takes_none():
    async with serving(max_running=1, max_waiting=2) as (texts, pipeline, engine):
        pipeline.open_.clear()
        running = await texts.generate(ASK)
        with pytest.raises(QueueFullError) as refused:
            await texts.generate(replace(ASK, num_choices=3))
        assert refused.value.retry_after_s > 0
        assert (engine.snapshot().num_running, engine.snapshot().num_waiting) == (1, 0)
        two = await texts.generate(replace(ASK, num_choices=2))
        assert engine.snapshot().num_waiting == 2
        await two.aclose()
        await running.aclose()
        assert (engine.snapshot().num_running, engine.snapshot().num_waiting) == (0, 0)


async def test_a_request_whose_time_is_up_ends_with_what_there_is():
    async with serving(saying("ab" + "c" * 99), max_steps_in_flight=1) as (texts, pipeline, _):
        reader = await texts.generate(replace(ASK, timeout_s=0.2))
        events = [await anext(reader)]
        pipeline.open_.clear()
        events += [event async for event in reader]
    assert text_of(events).startswith("a")
    assert end_of(events).reason is FinishReason.DEADLINE
    assert end_of(events).message


# --- scored prompts ----------------------------------------------------------------------------------


OVERTAKEN = {"prefix_cache": False, "prompt_logprob_tokens": 1}  # the scored choice is slower than the others


@pytest.mark.parametrize(("num_choices", "settings"), [(1, {"token_budget": 3}), (3, {}), (3, OVERTAKEN)])
async def test_a_scored_prompt_comes_first_and_once(num_choices, settings):
    ask = GenerationRequest(prompt=(5, 6, 7, 8, 9), max_new_tokens=2, num_prompt_logprobs=0, num_choices=num_choices)
    async with serving(**settings) as (texts, _, _):
        events = await answer_to(texts, ask)
    scored = [event for event in events if isinstance(event, PromptScored)]
    assert events[0] is scored[0]
    assert len(scored) == 1
    tokens = [(token.token_id, token.data, token.logprob) for token in scored[0].tokens]
    assert tokens == [(5, b"\x05", None)] + [(i, bytes([i]), -float(i)) for i in (6, 7, 8, 9)]
    assert len([event for event in events if isinstance(event, ChoiceEnd)]) == num_choices


async def test_a_prompt_of_one_token_is_scored_too():
    async with serving() as (texts, _, _):
        first, *_ = await answer_to(texts, GenerationRequest(prompt=(5,), max_new_tokens=1, num_prompt_logprobs=3))
    assert [(token.token_id, token.logprob) for token in first.tokens] == [(5, None)]


# --- readers that go away ----------------------------------------------------------------------------


async def test_closing_before_the_first_token_aborts_every_choice():
    async with serving() as (texts, pipeline, engine):
        pipeline.open_.clear()
        reader = await texts.generate(replace(ASK, num_choices=3))
        assert num_open(engine) == 3
        await reader.aclose()
        assert num_open(engine) == 0
        assert [event async for event in reader] == []
        pipeline.open_.set()
        await until(lambda: engine.snapshot().num_free_blocks == engine.snapshot().num_blocks)


async def test_closing_in_the_middle_aborts_what_still_runs():
    async with serving(saying("x" * 200)) as (texts, _, engine):
        reader = await texts.generate(replace(ASK, num_choices=2))
        assert (await anext(reader)).text == "x"
        await reader.aclose()
        assert engine.snapshot().num_running == 0
        assert dict(engine.snapshot().finished) == {FinishReason.ABORT: 2}


async def test_cancelling_the_task_that_reads_aborts_what_still_runs():
    async with serving() as (texts, pipeline, engine):
        pipeline.open_.clear()
        task = asyncio.create_task(answer_to(texts))
        await until(lambda: engine.snapshot().num_running == 1)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert engine.snapshot().num_running == 0


async def test_a_dropped_reader_aborts_what_still_runs():
    async with serving() as (texts, pipeline, engine):
        pipeline.open_.clear()
        reader = await texts.generate(ASK)
        del reader
        gc.collect()
        await until(lambda: engine.snapshot().num_running == 0)


async def test_requests_have_no_tasks_and_leave_none():
    async with serving(saying("x" * 30)) as (texts, _, _):
        before = len(others())
        readers = [await texts.generate(replace(ASK, num_choices=2)) for _ in range(5)]
        assert len(others()) == before
        for number, reader in enumerate(readers):
            if number % 2:
                await anext(reader)
                await reader.aclose()
            else:
                assert text_of([event async for event in reader], 1) == "x" * 30
        assert len(others()) == before
    assert others() == []
