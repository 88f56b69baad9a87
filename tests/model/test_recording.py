"""Whole layers are computed in one call only where that gives the bits that their modules give."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import split_models as lab
import torch
from tiny_models import prompt_of, save_whole

from shardwright.model import recording
from shardwright.model import stage as stage_module
from shardwright.model.attention import MAX_KERNEL_PROMPT_TOKENS
from shardwright.model.layer_plan import MAX_ROWS
from shardwright.model.linear import Linears
from shardwright.model.product import Product
from shardwright.model.recording import LayerRecorder, Recorder
from shardwright.types import SequenceSlice, StepInput

RECORDED = ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "granite")
LEFT = {"gemma2": "caps", "phi3": "another rotary embedding", "olmo2": "the same in float32", "mixtral": "experts"}


@pytest.fixture
def build(product, dtype, monkeypatch, tmp_path):
    """Makes a family's model in two stages with our own products, whichever this machine would choose."""
    own = Linears(dtype=dtype, product=product, product_rows=sys.maxsize, kernel=product)
    monkeypatch.setattr(stage_module, "choose_linears", lambda *_: own)

    @functools.cache
    def whole_of(family, **changes):
        folder = tmp_path / "-".join([family, *map(str, changes.values())])
        folder.mkdir()
        return save_whole(family, folder, dtype=dtype, head_dim=32, **changes)

    def make(family, *, records=True, num_blocks=64, num_stages=2, **changes):
        whole = whole_of(family, **changes)
        with monkeypatch.context() as patched:
            if not records:
                patched.setattr(LayerRecorder, "finish", lambda _: None)
            split = lab.SplitModel(
                whole.folder, num_stages, dtype=str(dtype).removeprefix("torch."), num_blocks=num_blocks
            )
        return whole, split

    return make


@pytest.fixture
def layers_computed(monkeypatch):
    """How many rows each layer had that was computed in one call."""
    rows: list[int] = []
    compute = Product.layers

    def layers(self, *args, **kwargs):
        _, count, _ = args
        rows.extend([kwargs["rows"]] * count)
        compute(self, *args, **kwargs)

    monkeypatch.setattr(Product, "layers", layers)
    return rows


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layers_of(split):
    return [
        stage._model.get_submodule(f"{stage._plan.layers}.{index}")
        for stage in split.stages
        for index in range(stage.layers.start, stage.layers.end)
    ]


def num_recorded(split):
    return sum(hasattr(layer, "shardwright_recorded") for layer in layers_of(split))


def step_of(contexts, *, block_size=4):
    """One new token behind each of so many, in blocks of their own and in an order of their own."""
    slices, used = [], 0
    for index, length in enumerate(contexts):
        count = length // block_size + 1
        table = tuple(reversed(range(used, used + count)))
        used += count
        token = (7 * index + length) % 90 + 1
        slices.append(
            SequenceSlice(
                seq_id=index, start_position=length, token_ids=(token,), block_table=table, sampling=lab.GREEDY
            )
        )
    return slices, used


def outputs_of(split, slices):
    """What each stage gives to a step, all K and V being the same noise before it."""
    outputs, tensors = [], {}
    for stage in split.stages:
        for number, cache in enumerate(stage._caches):
            noise = torch.randn(cache.keys.shape, generator=torch.Generator().manual_seed(number))
            cache.keys.copy_(noise)
            cache.values.copy_(noise.flip(0))
        output = stage.forward(StepInput(epoch=1, step=1, slices=tuple(slices)), tensors)
        tensors = output.tensors
        outputs.append((output, [(cache.keys.clone(), cache.values.clone()) for cache in stage._caches]))
    return outputs


def assert_same_bits(given, expected):
    """Of what the stages gave, and of all K and V behind it."""
    for (mine, my_caches), (its, its_caches) in zip(given, expected, strict=True):
        assert mine.tokens == its.tokens
        assert mine.tensors.keys() == its.tensors.keys()
        assert all(torch.equal(mine.tensors[name], its.tensors[name]) for name in its.tensors)
        for my_cache, its_cache in zip(my_caches, its_caches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(my_cache, its_cache, strict=True))


@pytest.mark.parametrize("family", RECORDED)
def test_every_layer_of_these_families_is_recorded(build, family):
    _, split = build(family)
    assert num_recorded(split) == len(layers_of(split))


@pytest.mark.parametrize("family", LEFT)
def test_a_family_that_asks_for_something_else_runs_through_its_modules(build, family, layers_computed):
    whole, split = build(family)
    assert num_recorded(split) == 0, LEFT[family]
    assert lab.are_within_rounding(whole.model, lab.RAGGED, lab.serve(split, lab.RAGGED))
    assert not layers_computed


@pytest.mark.parametrize("family", RECORDED)
def test_a_step_gives_the_bits_that_the_modules_give(build, family, layers_computed):
    """Any number of sequences, with contexts that are attended in one piece and in several."""
    steps = [
        step_of(contexts) for contexts in ((0,), (2,), (5, 1, 30), (8, 300, 2, 511, 7, 260, 0, 15, 16), (9,) * MAX_ROWS)
    ]
    num_blocks = max(used for _, used in steps)
    _, plain = build(family, records=False, num_blocks=num_blocks)
    _, split = build(family, num_blocks=num_blocks)
    layers_computed.clear()
    for number, (slices, _) in enumerate(steps):
        with threads(1 + number % 2):
            assert_same_bits(outputs_of(split, slices), outputs_of(plain, slices))
    assert layers_computed == [len(slices) for slices, _ in steps for _ in layers_of(split)]


def test_what_a_layer_computes_for_a_row_does_not_depend_on_the_others(build):
    slices, used = step_of((40, 3, 300, 17, 8))
    _, split = build("llama", num_blocks=used)
    together = [output.tensors["hidden"] for output, _ in outputs_of(split, slices)[:-1]]
    for row, part in enumerate(slices):
        alone = [output.tensors["hidden"] for output, _ in outputs_of(split, [part])[:-1]]
        for mine, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(mine[0], all_of_them[row])


def test_answers_are_the_same_with_and_without_recordings(build, layers_computed):
    """Ragged batches that join and leave, with prompts beside decodes."""
    whole, split = build("qwen3")
    _, plain = build("qwen3", records=False)
    layers_computed.clear()
    answers = lab.serve(split, lab.RAGGED)
    assert layers_computed
    layers_computed.clear()
    assert lab.serve(plain, lab.RAGGED) == answers
    assert not layers_computed
    assert lab.are_within_rounding(whole.model, lab.RAGGED, answers)


def prompt_behind(start, length, seq_id, tables):
    tokens = tuple(prompt_of(length, seq_id))
    return SequenceSlice(seq_id=seq_id, start_position=start, token_ids=tokens, block_table=tables, sampling=lab.GREEDY)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_a_step_with_few_tokens_of_prompts_gives_the_bits_that_the_modules_give(build, family, layers_computed):
    """Two prompts, of which one goes on behind what is there, between two decodes."""
    decodes, used = step_of((9, 31))
    tables = [tuple(range(used + 16 * index, used + 16 * index + 16)) for index in range(2)]
    slices = [
        decodes[0],
        prompt_behind(0, 12, 2, tables[0]),
        prompt_behind(41, MAX_KERNEL_PROMPT_TOKENS - 12, 3, tables[1]),
        decodes[1],
    ]
    _, plain = build(family, records=False, num_blocks=used + 32)
    _, split = build(family, num_blocks=used + 32)
    layers_computed.clear()
    assert_same_bits(outputs_of(split, slices), outputs_of(plain, slices))
    assert layers_computed == [MAX_KERNEL_PROMPT_TOKENS + 2] * len(layers_of(split))


def test_steps_with_long_prompts_or_very_many_sequences_run_through_the_modules(build, layers_computed):
    many, used = step_of((3,) * (MAX_ROWS + 1))
    _, split = build("llama", num_blocks=used)
    layers_computed.clear()
    outputs_of(split, many)
    prompt = prompt_behind(0, MAX_KERNEL_PROMPT_TOKENS + 1, 1, tuple(range(9)))
    outputs_of(split, [prompt])
    outputs_of(split, [*step_of((5,))[0], prompt])
    assert not layers_computed


def test_a_recording_that_gives_another_bit_is_not_used(build, monkeypatch):
    compute = recording.RecordedRun.result

    def wrong(self, *args):
        result = compute(self, *args)
        result[0, -1, -1] += 1
        return result

    monkeypatch.setattr(recording.RecordedRun, "result", wrong)
    _, split = build("llama")
    assert num_recorded(split) == 0


# --- layers one after the other ----------------------------------------------------------------------


@pytest.fixture
def runs_computed(monkeypatch):
    """How many layers each call computed."""
    counts: list[int] = []
    compute = Product.layers

    def layers(self, *args, **kwargs):
        counts.append(args[1])
        compute(self, *args, **kwargs)

    monkeypatch.setattr(Product, "layers", layers)
    return counts


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_the_layers_of_a_stage_are_computed_in_one_call(build, family, runs_computed):
    _, split = build(family)
    runs_computed.clear()
    outputs_of(split, step_of([3, 9])[0])
    assert runs_computed == [len(stage.layers) for stage in split.stages]


def test_layers_with_other_windows_are_computed_in_calls_of_their_own(build, runs_computed):
    _, split = build("gemma3_text")
    windows = [window for stage in split.stages for window in stage._windows]
    assert len(set(windows)) > 1
    runs_computed.clear()
    outputs_of(split, step_of([3, 9])[0])
    assert len(runs_computed) > len(split.stages)
    assert sum(runs_computed) == len(layers_of(split))


def stand_before_the_second_layer(monkeypatch, hook):
    """Somebody hooks himself there before a stage is ready."""
    shorten = stage_module.shorten_loop

    def hooked(model_layers, layers, *args, **kwargs):
        layers[1].register_forward_pre_hook(hook)
        return shorten(model_layers, layers, *args, **kwargs)

    monkeypatch.setattr(stage_module, "shorten_loop", hooked)


def test_a_layer_that_is_given_something_else_than_the_one_before_gave_is_computed_anew(
    build, monkeypatch, runs_computed
):
    """What was computed of those behind it was in vain, and is not computed again."""
    slices, _ = step_of([3, 9])
    expected = outputs_of(build("llama", num_stages=1, records=False)[1], slices)
    stand_before_the_second_layer(monkeypatch, lambda _, args: (args[0].clone(), *args[1:]))
    _, split = build("llama", num_stages=1)
    count = len(layers_of(split))
    runs_computed.clear()
    assert_same_bits(outputs_of(split, slices), expected)
    assert runs_computed == [count, count - 1]
    runs_computed.clear()
    assert_same_bits(outputs_of(split, slices), expected)
    assert runs_computed == [1, count - 1]


def is_short(split):
    """Whether each stage's model passes its layers in two calls."""
    lists = [stage._model.get_submodule(stage._plan.layers) for stage in split.stages]
    return [hasattr(layers, "shardwright_short_loop") for layers in lists]


@contextmanager
def calls_of(layers) -> Iterator[list[int]]:
    """Which layers are called, in their order."""
    called: list[int] = []
    families = [type(layer) for layer in layers]
    for index, layer in enumerate(layers):

        def call(self, *args, index=index, **kwargs):
            called.append(index)
            return super(type(self), self).__call__(*args, **kwargs)

        layer.__class__ = type("Called", (type(layer),), {"__call__": call})
    try:
        yield called
    finally:
        for layer, family in zip(layers, families, strict=True):
            layer.__class__ = family


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_models_loop_goes_over_the_first_and_the_last_layer_of_a_run(build, num_stages):
    _, split = build("llama", num_stages=num_stages, num_hidden_layers=8)
    assert is_short(split) == [True] * num_stages
    ends = [index for stage in split.stages for index in (stage.layers.start, stage.layers.end - 1)]
    with calls_of(layers_of(split)) as called:
        outputs_of(split, step_of([3, 9])[0])
        assert called == ends
        called.clear()
        outputs_of(split, [prompt_behind(0, MAX_KERNEL_PROMPT_TOKENS + 1, 0, tuple(range(9)))])
        assert called == list(range(8))


def test_the_loop_over_layers_of_several_runs_stays_as_it_is(build):
    _, split = build("gemma3_text", num_stages=1)
    assert is_short(split) == [False]


def test_a_loop_that_computes_something_else_when_it_is_shortened_is_left(build, monkeypatch):
    ready = recording.RecordedRun.ready
    monkeypatch.setattr(recording.RecordedRun, "ready", lambda self, index: ready(self, index) + 1)
    _, split = build("llama")
    assert is_short(split) == [False, False]


def test_a_loop_that_can_not_do_with_fewer_layers_is_left(build, monkeypatch):
    def fail(self, *args, **kwargs):
        raise IndexError("this family's loop counts them")

    monkeypatch.setattr(recording._RunLead, "forward", fail)
    whole, split = build("llama")
    assert is_short(split) == [False, False]
    assert lab.are_within_rounding(whole.model, lab.RAGGED, lab.serve(split, lab.RAGGED))


def test_a_loop_over_layers_that_somebody_listens_to_stays_as_it_is(build, monkeypatch):
    stand_before_the_second_layer(monkeypatch, lambda *_: None)
    _, split = build("llama", num_stages=1)
    assert is_short(split) == [False]


# --- lives ----------------------------------------------------------------------------------------


def test_layers_do_not_live_longer_for_their_recordings(build):
    _, split = build("llama")
    layers = [weakref.ref(layer) for layer in layers_of(split)]
    for stage in split.stages:
        stage.close()
    assert [layer() for layer in layers] == [None] * len(layers)


def test_what_another_thread_computes_is_not_noted(product, dtype):
    recorder = Recorder()
    x, weight = torch.ones((1, 32), dtype=dtype), torch.ones((3, 32), dtype=dtype)
    product.tape = recorder
    try:
        other = threading.Thread(target=product.linear, args=(x, weight, None))
        other.start()
        other.join()
        assert not recorder.notes
        product.linear(x, weight, None)
        assert [note.kind for note in recorder.notes] == ["linear"]
    finally:
        product.tape = None
