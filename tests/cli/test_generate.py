"""`generate` from the shell's side: what comes out where, and with which exit code."""

import io
import json
import sys

import pytest

from shardwright.cli.answers import Answer, TextPrinter
from shardwright.cli.prompts import Prompt
from shardwright.types import SamplingParams

from .conftest import FakeSession, FakeStart


def lines(outcome):
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_an_answer_goes_to_standard_output_and_nothing_else_does(run_cli, fake_start):
    outcome = run_cli("generate", "hello", "--summary")
    assert (outcome.code, outcome.out) == (0, "HELLO\n")
    assert "worker1" in outcome.err
    assert fake_start.closed


def test_one_json_object_a_prompt_has_exactly_the_promised_fields(run_cli, fake_start):
    outcome = run_cli("generate", "--prompt-ids", "104,105", "--prompt-ids", "97", "--max-new-tokens", "2", "--json")
    assert outcome.code == 0
    first, second = lines(outcome)
    assert list(first) == ["prompt_ids", "token_ids", "text", "finish_reason", "stages", "prefill_s", "decode_s"]
    assert first["prompt_ids"] == [104, 105]
    assert first["token_ids"] == [72, 73]
    assert (first["text"], first["finish_reason"]) == ("HI", "length")
    assert first["stages"] == [
        {"worker": "worker0", "start": 0, "end": 2},
        {"worker": "worker1", "start": 2, "end": 5},
    ]
    assert first["prefill_s"] > 0
    assert first["decode_s"] > 0
    assert (second["text"], second["finish_reason"], second["decode_s"]) == ("A", "stop", 0.0)
    assert outcome.err == ""


def test_json_needs_no_tokenizer(run_cli, fake_start):
    fake_start.session = FakeSession(tokenizer=False)
    outcome = run_cli("generate", "--prompt-ids", "104", "--json")
    assert lines(outcome)[0]["text"] == ""
    assert lines(outcome)[0]["token_ids"] == [72]


def test_without_a_tokenizer_the_ids_are_the_answer_for_people(run_cli, fake_start):
    fake_start.session = FakeSession(tokenizer=False)
    assert run_cli("generate", "--prompt-ids", "104,105").out == "72,73\n"


def test_several_prompts_are_answered_under_their_headings_in_order(run_cli, fake_start, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a long first one\nb\nc\n"))
    outcome = run_cli("generate")
    assert outcome.out == "--- 1 of 3: a long first one\nA LONG FIRST ONE\n--- 2 of 3: b\nB\n--- 3 of 3: c\nC\n"


def test_several_prompts_run_together_as_one_batch(run_cli, fake_start, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    outcome = run_cli("generate", "--file", "p.txt", "--json")
    assert [line["text"] for line in lines(outcome)] == ["ONE", "TWO", "THREE"]
    assert len(fake_start.session.submitted) == 3


def test_a_character_in_two_tokens_comes_out_whole(run_cli, fake_start):
    assert run_cli("generate", "a\N{SNOWMAN}b").out == "A\N{SNOWMAN}B\n"
    assert run_cli("generate", "a\N{SNOWMAN}").out == "A\N{SNOWMAN}\n"


@pytest.mark.parametrize(("flag", "prompt"), [("--chat", "<hi>"), ("--raw", "hi")])
def test_the_chat_template_is_applied_or_not_as_told(run_cli, fake_start, flag, prompt):
    run_cli("generate", "hi", flag)
    assert fake_start.session.submitted[0][0] == tuple(map(ord, prompt))


def test_sampling_and_limits_reach_the_engine(run_cli, fake_start):
    run_cli(
        "generate", "hi", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--seed", "5", "--max-new-tokens",
        "7", "--ignore-eos",
    )  # fmt: skip
    assert fake_start.session.submitted[0][1] == SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=5)
    assert fake_start.session.stops[0].max_new_tokens == 7
    assert fake_start.session.stops[0].stop_token_ids == frozenset()


def test_a_maximal_length_counts_the_prompt_too(run_cli, fake_start):
    run_cli("generate", "--prompt-ids", "1,2,3", "--max-length", "10")
    assert fake_start.session.stops[0].max_new_tokens == 7


def test_a_prompt_that_fills_the_maximal_length_is_refused(run_cli, fake_start):
    outcome = run_cli("generate", "--prompt-ids", "1,2,3", "--max-length", "3")
    assert outcome.code == 2
    assert "error: the prompt has 3 tokens; with a maximal length of 3 tokens" in outcome.err


def test_a_seed_is_drawn_and_told_when_sampling_without_one(run_cli, fake_start):
    outcome = run_cli("generate", "hi", "--temperature", "1", "--summary")
    seed = fake_start.session.submitted[0][1].seed
    assert f"seed {seed}" in outcome.err
    run_cli("generate", "hi", "--temperature", "1")
    assert fake_start.session.submitted[1][1].seed != seed


def test_filters_without_a_temperature_get_a_warning(run_cli, fake_start):
    assert "have no effect at temperature 0" in run_cli("generate", "hi", "--top-p", "0.5").err


def test_flags_become_settings_and_worker_options(run_cli, fake_start, tmp_path):
    run_cli(
        "generate", "hi", "--model", "m", "--dtype", "float32", "--local-workers", "3", "--threads", "1", "--device",
        "cpu", "--kv-tokens", "512", "--block-size", "4", "--token-budget", "64", "--steps-in-flight", "2",
        "--cache-dir", tmp_path,
    )  # fmt: skip
    config = fake_start.config
    assert (config.model, config.dtype, config.kv_tokens, config.block_size) == ("m", "float32", 512, 4)
    assert (config.token_budget, config.steps_in_flight, config.cache_dir) == (64, 2, tmp_path)
    assert fake_start.local_workers == 3
    assert fake_start.options == ("--device", "cpu", "--threads", "1", "--cache-dir", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--temperature", "-1"), "temperature is -1.0; it must lie between"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--max-new-tokens", "0"), "--max-new-tokens is 0; it must be at least 1"),
        (("--max-new-tokens", "5", "--max-length", "9"), "choose one"),
        (("--dtype", "int8"), "dtype is 'int8'; choose one of auto, float32"),
        (("--block-size", "0"), "block_size is 0; it must be between 1 and 1024"),
        (("--device", "cuda"), "--device is for --local-workers"),
        (("--threads", "2"), "--threads is for --local-workers"),
        (("--prompt-ids", "3"), "a prompt and --prompt-ids were given"),
    ],
)
def test_a_bad_parameter_ends_before_anything_starts(run_cli, fake_start, argv, says):
    outcome = run_cli("generate", "hi", *argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {says}" in outcome.err or says in outcome.err
    assert fake_start.config is None


def test_a_refused_prompt_is_told_and_the_others_are_answered(run_cli, fake_start, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n!too long\nthree\n"))
    outcome = run_cli("generate")
    assert outcome.code == 2
    assert outcome.out == "--- 1 of 3: one\nONE\n--- 2 of 3: !too long\n--- 3 of 3: three\nTHREE\n"
    assert outcome.err == "error: prompt 2: the prompt is longer than the context\n"


def test_a_refused_prompt_in_json_is_an_object_with_an_error(run_cli, fake_start):
    outcome = run_cli("generate", "!too long", "--json")
    assert outcome.code == 2
    (line,) = lines(outcome)
    assert line["finish_reason"] == "error"
    assert line["error"] == "the prompt is longer than the context"
    assert line["token_ids"] == []


def test_a_worker_lost_in_the_middle_is_a_cluster_error(run_cli, fake_start):
    outcome = run_cli("generate", "~abc", "--json")
    assert outcome.code == 3
    assert lines(outcome)[0]["error"] == "worker1 is gone"
    assert lines(outcome)[0]["text"] == "~A"
    assert "error: prompt 1: worker1 is gone" in outcome.err


def test_a_stream_that_breaks_off_is_never_taken_for_an_answer(run_cli, fake_start):
    outcome = run_cli("generate", "#abc")
    assert outcome.code == 3
    assert "error: the cluster was closed before the answer's end" in outcome.err


def test_no_registry_and_no_local_workers_says_what_to_do(run_cli):
    outcome = run_cli("generate", "hi")
    assert outcome.code == 2
    assert outcome.err == (
        "error: workers.json lists no worker; add one (shardwright register --ip ADDRESS --username NAME), "
        "or use this machine alone (--local-workers 2)\n"
    )


def test_a_model_may_not_steer_the_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        printer = TextPrinter([Answer(prompt=Prompt(text="x"))], out)
        printer.piece(0, "a\x1b[2Jb\tc\n\x9b")
    assert terminal.getvalue() == "a\N{REPLACEMENT CHARACTER}[2Jb\tc\n\N{REPLACEMENT CHARACTER}"
    assert pipe.getvalue() == "a\x1b[2Jb\tc\n\x9b"


def test_the_fake_start_is_used_as_session_for_is():
    """The fake takes what the real one takes."""
    import inspect

    from shardwright.cli.start import session_for

    real = set(inspect.signature(session_for).parameters)
    assert real == set(inspect.signature(FakeStart.__call__).parameters) - {"self"}
