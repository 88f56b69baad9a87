"""A stage takes steps that fit it, says what it weighs, and draws the same tokens wherever the model is cut."""

import pytest
import split_models as lab
import torch
from tiny_models import SMALL, fill_randomly, prompt_of
from transformers import AutoConfig, AutoModelForCausalLM

from shardwright.errors import ConfigError, FrameError
from shardwright.model.linear import PackedLinear, can_pack
from shardwright.model.stage import find_dtype
from shardwright.types import SamplingParams, SequenceSlice, StepInput

CPU = torch.device("cpu")


def one_slice(tokens, start=0, blocks=(0, 1, 2), sampling=None):
    return SequenceSlice(
        seq_id=4, start_position=start, token_ids=tuple(tokens), block_table=tuple(blocks), sampling=sampling
    )


def test_seeded_text_is_the_same_alone_in_a_batch_and_for_every_cut(make_whole):
    whole = make_whole("qwen3")
    requests = [
        lab.Asked(
            prompt=prompt_of(3 + 5 * i, i),
            max_new_tokens=10,
            joins_at=2 * i,
            sampling=SamplingParams(temperature=0.9, top_k=40 * (i % 2), top_p=0.9, seed=100 + i),
        )
        for i in range(4)
    ]
    together = lab.serve(lab.SplitModel(whole.folder, 3), requests)
    assert len({tuple(tokens) for tokens in together}) == 4
    assert lab.serve(lab.SplitModel(whole.folder, 1), requests, budget=64, seed=5) == together
    split = lab.SplitModel(whole.folder, 2)
    assert [lab.serve(split, [request], budget=3)[0] for request in requests] == together


def test_a_reused_prefix_gives_the_tokens_of_a_computed_one(make_whole):
    """Two sequences name the same two blocks; the second computes none of their tokens."""
    whole = make_whole("gemma3_text")
    split = lab.SplitModel(whole.folder, 2)
    prefix, a, b = prompt_of(8, 1), prompt_of(5, 2), prompt_of(3, 3)
    expected = lab.whole_answers(whole.model, [lab.Asked(prompt=[*prefix, *end], max_new_tokens=1) for end in (a, b)])
    first = split.step(one_slice([*prefix, *a], blocks=(9, 3, 7, 1), sampling=lab.GREEDY))
    second = split.step(one_slice(b, start=8, blocks=(9, 3, 5), sampling=lab.GREEDY))
    assert [[first[0].token_id], [second[0].token_id]] == expected


def test_a_preempted_sequence_goes_on_with_the_same_tokens(make_whole):
    """Recomputed from its tokens in other blocks, while its old ones hold something else."""
    whole = make_whole("gemma2")
    split = lab.SplitModel(whole.folder, 3)
    prompt = prompt_of(9, 1)
    (expected,) = lab.whole_answers(whole.model, [lab.Asked(prompt=prompt, max_new_tokens=4)])
    tokens = list(prompt)
    tokens.append(split.step(one_slice(tokens, sampling=lab.GREEDY))[0].token_id)
    tokens.append(split.step(one_slice(tokens[-1:], start=9, sampling=lab.GREEDY))[0].token_id)
    split.step(one_slice(prompt_of(12, 8), sampling=lab.GREEDY))
    tokens.append(split.step(one_slice(tokens, blocks=(20, 11, 30), sampling=lab.GREEDY))[0].token_id)
    tokens.append(split.step(one_slice(tokens[-1:], start=11, blocks=(20, 11, 30), sampling=lab.GREEDY))[0].token_id)
    assert tokens[len(prompt) :] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_tied_and_untied_embeddings_give_the_whole_models_tokens(make_whole, family, tied):
    whole = make_whole(family, tie_word_embeddings=tied)
    expected = lab.whole_answers(whole.model, lab.RAGGED[:3])
    for num_stages in (1, 2):
        assert lab.serve(lab.SplitModel(whole.folder, num_stages), lab.RAGGED[:3]) == expected


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "phi3"])
def test_bfloat16_differs_only_where_the_whole_models_best_logits_are_within_rounding(make_whole, family):
    """Each token is the whole model's best, or so near to it that bfloat16 can't tell them apart."""
    whole = make_whole(family, dtype=torch.bfloat16)
    requests = lab.RAGGED[:4]
    differing = 0
    for num_stages in (1, 3):
        answers = lab.serve(lab.SplitModel(whole.folder, num_stages, dtype="bfloat16"), requests)
        for request, answer in zip(requests, answers, strict=True):
            ids = torch.tensor([[*request.prompt, *answer]])
            with torch.no_grad():
                logits = whole.model(ids).logits[0, len(request.prompt) - 1 : -1].float()
            best = logits.max(dim=-1).values
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            # logits near 4 have steps of 1/64; a few roundings on the way to them add up
            assert bool((best - chosen <= 6 * 2.0**-8 * best.abs().clamp(min=1.0)).all())
            differing += int((best != chosen).sum())
    assert differing < 8


def test_bfloat16_weights_are_packed_and_weigh_what_the_costs_say(make_whole):
    whole = make_whole("llama", dtype=torch.bfloat16)
    split = lab.SplitModel(whole.folder, 3, dtype="bfloat16")
    packed = [m for s in split.stages for m in s._model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == (5 * 7 + 1 if can_pack(torch.bfloat16, CPU) else 0)
    parameters = sum(p.nbytes for p in whole.model.parameters())
    assert parameters <= sum(s.weight_bytes for s in split.stages) < parameters + 1024  # rotary frequencies
    assert split.stages[0].kv_bytes == 64 * 4 * (2 * 2 * 16 * 2) * len(split.stages[0].layers)


def test_float32_stays_with_the_kernel_that_transformers_uses():
    assert not can_pack(torch.float32, CPU)
    assert not can_pack(torch.bfloat16, torch.device("meta"))


def test_progress_counts_the_bytes_of_the_checkpoint(make_whole):
    whole = make_whole("llama")
    split = lab.SplitModel(whole.folder, 1)
    assert split.progress == sorted(split.progress)
    assert split.progress[-1] == sum(p.nbytes for p in whole.model.parameters())


def test_what_per_layer_inputs_and_shared_keys_need_travels_beside_the_hidden_states(tmp_path):
    """gemma4: each layer gets its own embedding of the tokens, and late layers read an earlier layer's K and V."""
    config = AutoConfig.for_model(
        "gemma4_text",
        **{**SMALL, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 151, "num_kv_shared_layers": 2},
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    )
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill_randomly(whole, seed=3)
    whole.save_pretrained(tmp_path)
    expected = lab.whole_answers(whole, lab.RAGGED)
    for num_stages in (2, 5):
        split = lab.SplitModel(tmp_path, num_stages)
        assert lab.serve(split, lab.RAGGED) == expected
        first = split.stages[0].forward(StepInput(epoch=1, step=1, slices=(one_slice([5, 6]),)), {})
        assert len(first.tensors) > 1
        assert all(len(tensor) == 2 for tensor in first.tensors.values())


@pytest.fixture
def middle(make_whole):
    return lab.SplitModel(make_whole("llama").folder, 3).stages[1]


def test_a_middle_stage_gives_what_it_takes_in_another_state(middle):
    step = StepInput(epoch=1, step=1, slices=(one_slice([5, 6, 7]),))
    hidden = torch.randn((3, 48))
    out = middle.forward(step, {"hidden": hidden})
    assert out.tokens == ()
    assert out.tensors["hidden"].shape == hidden.shape
    assert not torch.equal(out.tensors["hidden"], hidden)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "takes"),
        ({"hidden": torch.zeros((2, 48))}, "shape"),
        ({"hidden": torch.zeros((3, 47))}, "shape"),
        ({"hidden": torch.zeros((1, 3, 48))}, "shape"),
        ({"hidden": torch.zeros((3, 48)), "more": torch.zeros((3, 1))}, "more"),
        ({"hidden": torch.zeros((3, 48), dtype=torch.int64)}, "dtype"),
    ],
)
def test_tensors_that_do_not_fit_the_step_are_refused(middle, tensors, message):
    """And the stage goes on with the next step."""
    step = StepInput(epoch=1, step=1, slices=(one_slice([5, 6, 7]),))
    with pytest.raises(FrameError, match=message):
        middle.forward(step, tensors)
    assert middle.forward(step, {"hidden": torch.zeros((3, 48))}).tensors["hidden"].shape == (3, 48)


@pytest.mark.parametrize(
    ("tokens", "blocks", "message"),
    [((5, 151), (0, 1), "token"), ((5, 6), (64,), "block"), ((5, -1), (0,), "token"), ((1,) * 5, (3,), "block")],
)
def test_tokens_and_blocks_that_do_not_exist_are_refused(make_whole, tokens, blocks, message):
    """Before anything is written: a wrong index would read or write another sequence's memory."""
    first = lab.SplitModel(make_whole("llama").folder, 2).stages[0]
    with pytest.raises(FrameError, match=message):
        first.forward(StepInput(epoch=1, step=1, slices=(one_slice(tokens, blocks=blocks),)), {})


def test_a_closed_stage_holds_nothing(middle):
    middle.close()
    assert middle.kv_bytes == 0
    assert middle.weight_bytes == 0


def test_an_unknown_dtype_is_refused_by_name():
    assert find_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="'int8'"):
        find_dtype("int8")
