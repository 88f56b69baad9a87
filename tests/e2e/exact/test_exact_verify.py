"""`verify` finds nothing where there is nothing, finds what is there, and excuses roundings alone."""

import json
import math

import pytest
import torch
from live_sessions import Silence

from shardwright.cli.app import main
from shardwright.config import MasterConfig
from shardwright.model import stage as stage_module
from shardwright.runtime import verify as verify_module
from shardwright.runtime.verify import WholeAnswer, judge, verify
from shardwright.types import StopConditions


@pytest.fixture
def run_verify(_equal_machines, tensor_cache, tmp_path, monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *options):
        code = main(["verify", "--model", str(folder), "--cache-dir", str(tensor_cache), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def plant(monkeypatch):
    """Changes something about the stage that holds the given layer, right after it was built."""

    def plant_(layer, change):
        build = stage_module.build_stage

        def build_and_change(**about):
            stage = build(**about)
            if layer in about["layers"]:
                change(stage._model.get_submodule(f"model.layers.{layer}"))
            return stage

        monkeypatch.setattr(stage_module, "build_stage", build_and_change)

    return plant_


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_stages", ["1", "4"])
def test_a_good_model_is_found_identical(num_stages, dtype, make_whole, run_verify):
    whole = make_whole("llama")
    code, out, _ = run_verify(whole.folder, "--stages", num_stages, "--dtype", dtype, "--token-budget", "9")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith(f"{whole.folder} in {num_stages} stages, {dtype}: ")
    if dtype == "float32":
        assert all(": identical, " in line for line in lines[:4])
        assert lines[-1].endswith(": identical to the whole model")


def widen_scaling(layer):
    layer.self_attn.scaling *= 1.5


def bend_weight(layer):
    layer.mlp.down_proj.weight.mul_(1.2)


def shift_norm(layer):
    layer.input_layernorm.weight.add_(0.2)


@pytest.mark.usefixtures("_equal_machines")
@pytest.mark.parametrize("change", [widen_scaling, bend_weight, shift_norm])
async def test_a_planted_fault_in_one_stage_is_found_where_it_first_shows(change, make_whole, plant, tensor_cache):
    whole = make_whole("qwen2")
    plant(3, change)
    config = MasterConfig(model=str(whole.folder), dtype="float32", cache_dir=tensor_cache)
    _, verdicts = await verify(config, num_stages=3, max_new_tokens=24, listener=Silence())
    wrong = [verdict for verdict in verdicts if not verdict.passed]
    assert wrong
    for verdict in wrong:
        index = verdict.difference.index
        assert verdict.split_tokens[:index] == verdict.whole_tokens[:index]
        assert verdict.split_tokens[index] == verdict.difference.split_token
        assert verdict.whole_tokens[index] == verdict.difference.whole_token
        assert verdict.difference.split_token != verdict.difference.whole_token
        assert verdict.difference.margin > verdict.difference.rounding


def test_the_command_says_where_a_planted_fault_shows_and_exits_with_5(make_whole, plant, run_verify):
    whole = make_whole("qwen2")
    plant(1, widen_scaling)
    code, out, err = run_verify(whole.folder, "--dtype", "float32", "--max-new-tokens", "24")
    assert code == 5
    assert "first differs at new token " in out
    assert "more than rounding" in out
    assert "in 3 stages, float32: differs from the whole model on prompt " in err


def test_a_fault_in_bfloat16_is_no_rounding(make_whole, plant, run_verify):
    whole = make_whole("qwen2", dtype=torch.bfloat16)
    assert json.loads((whole.folder / "config.json").read_text())["dtype"] == "bfloat16"
    plant(2, widen_scaling)
    code, out, _ = run_verify(whole.folder, "--max-new-tokens", "24")
    assert code == 5
    assert "more than rounding" in out


class Oracle:
    """A whole model whose logits are told: for each text so far, two tokens and how far the second is behind."""

    eps = 2.0**-7

    def __init__(self, rows, end=9):
        self.rows = rows
        self.end = end

    def answer(self, prompt, stop):
        tokens, logits = [], []
        while len(tokens) < stop.max_new_tokens and self.end not in tokens[-1:]:
            best, second, behind = self.rows.get((*prompt, *tokens), (1, 2, 8.0))
            row = torch.full((10,), -12.0)
            row[best], row[second] = 16.0, 16.0 - behind
            tokens.append(best)
            logits.append(row)
        return WholeAnswer(tokens=tuple(tokens), logits=torch.stack(logits))


STOP = StopConditions(max_new_tokens=4, stop_token_ids=frozenset({9}))


def test_a_rounding_is_excused_and_the_rest_is_compared_from_there():
    """Behind the split's own token the whole model says something else than in its first answer."""
    oracle = Oracle({(5, 1): (3, 4, 0.125), (5, 1, 4): (7, 8, 8.0)})
    good = judge(oracle, (5,), (1, 4, 7, 1), STOP)
    assert good.passed
    assert good.whole_tokens == (1, 3, 1, 1)
    assert (good.difference.index, good.difference.split_token, good.difference.whole_token) == (1, 4, 3)
    assert good.difference.margin == 0.125
    bad = judge(oracle, (5,), (1, 4, 8, 1), STOP)
    assert not bad.passed
    assert (bad.difference.index, bad.difference.margin) == (2, 8.0)


def test_a_token_that_is_not_among_the_nearly_best_is_no_rounding():
    """However near the whole model's two best are to each other: the split took a third."""
    oracle = Oracle({(5,): (3, 4, 0.0)})
    assert judge(oracle, (5,), (4, 1, 1, 1), STOP).passed
    assert not judge(oracle, (5,), (6, 1, 1, 1), STOP).passed


@pytest.mark.parametrize("split", [(1, 1, 1), (1, 1, 1, 1, 1)])
def test_an_answer_of_another_length_is_never_a_rounding(split):
    verdict = judge(Oracle({(5, 1, 1): (1, 2, 0.0)}), (5,), split, STOP)
    assert not verdict.passed
    assert math.isinf(verdict.difference.margin)


def test_an_end_by_rounding_ends_the_comparison():
    oracle = Oracle({(5, 1): (3, 9, 0.125)})
    assert judge(oracle, (5,), (1, 9), STOP).passed
    assert not judge(oracle, (5,), (1, 9, 1), STOP).passed


def test_a_rounding_is_as_large_as_the_dtype_makes_it():
    """At 16 bfloat16 steps by 0.125: two steps pass, and four do not."""
    assert verify_module.ROUNDING_STEPS * Oracle.eps * 16.0 == 0.25
    assert judge(Oracle({(5,): (3, 4, 0.25)}), (5,), (4, 1, 1, 1), STOP).passed
    assert not judge(Oracle({(5,): (3, 4, 0.5)}), (5,), (4, 1, 1, 1), STOP).passed
