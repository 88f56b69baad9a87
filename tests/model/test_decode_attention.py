"""Our own kernel attends sequences with one new token where their blocks lie, as exactly as one rounding allows."""

import sys

import pytest
import split_models as lab
import torch
from tiny_models import prompt_of, save_whole

from shardwright.model import stage as stage_module
from shardwright.model.attention import MAX_KERNEL_PROMPT_TOKENS, AttentionCall, BatchCell, PagedLayer, StepBatch
from shardwright.model.kv_cache import KvShape, make_layer_cache
from shardwright.model.linear import Linears
from shardwright.types import SequenceSlice

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LENGTHS = [1, 2, 15, 16, 17, 31, 255, 256, 257, 300, 513, 1100]
CALL = AttentionCall(scaling=0.2, window=None, softcap=None, sinks=None)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, product):
    if not product.can_attend(request.param, 64, 64):
        pytest.skip("this CPU can't widen it")
    return request.param


class Decodes:
    """Sequences of random K and V in scattered blocks of one cache, whatever else lies in it, each with a query."""

    def __init__(self, lengths, dtype, *, kv_heads=2, shared=3, key_dim=64, value_dim=64, seed=5, blocks=400):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.lengths, self.dtype, self.shared = lengths, dtype, shared
        shape = KvShape(heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
        self.cache = make_layer_cache(shape, num_blocks=blocks, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
        self.cache.keys.fill_(float("nan"))  # what nobody may read
        self.cache.values.fill_(float("nan"))
        free = torch.randperm(blocks, generator=generator).tolist()
        self.tables = []
        for length in lengths:
            table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
            self.tables.append(tuple(table))
            slots = self.slots(table, 0, length)
            self.cache.keys[slots] = random(length, kv_heads, key_dim)
            self.cache.values[slots] = random(length, kv_heads, value_dim)
        self.queries = random(len(lengths), kv_heads * shared, key_dim)

    @staticmethod
    def slots(table, start, end):
        return torch.tensor([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, end)])

    def first(self, index, window):
        return 0 if window is None else max(0, self.lengths[index] - window)

    def exact(self, window=None, scaling=0.2):
        rows = []
        for index, length in enumerate(self.lengths):
            slots = self.slots(self.tables[index], self.first(index, window), length)
            keys, values = (
                side[slots].double().repeat_interleave(self.shared, dim=1)
                for side in (self.cache.keys, self.cache.values)
            )
            scores = torch.einsum("hd,khd->hk", self.queries[index].double(), keys) * scaling
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(dim=-1), values))
        return torch.stack(rows)

    def attend(self, product, which=None, *, window=None, scaling=0.2, queries=None):
        which = list(range(len(self.lengths))) if which is None else which
        table, place = [], 4 * len(which)
        for row, index in enumerate(which):
            table += [row, self.first(index, window), self.lengths[index], place]
            place += len(self.tables[index])
        table += [block for index in which for block in self.tables[index]]
        q = self.queries[which] if queries is None else queries
        out = torch.full((len(which), q.shape[1], self.cache.values.shape[2]), 7.0, dtype=self.dtype)
        product.attend(
            q, self.cache.keys, self.cache.values, torch.tensor(table), out,
            num_rows=len(which), block_size=BLOCK_SIZE, scaling=scaling,
        )  # fmt: skip
        return out

    def check(self, product, **how):
        given, expected = self.attend(product, **how).double(), self.exact(**how)
        step = torch.finfo(self.dtype).eps
        # Scores are summed in float32, of which large ones lose what small weights then gain.
        rest = 2e-5 + 1e-5 * how.get("scaling", 0.2)
        assert bool(((given - expected).abs() <= 0.51 * step * expected.abs() + rest).all())


@pytest.mark.parametrize(("kv_heads", "shared"), [(1, 8), (1, 1), (2, 2), (3, 3), (2, 5), (8, 1), (1, 7)])
def test_every_length_is_one_rounding_from_exact(product, dtype, kv_heads, shared):
    Decodes(LENGTHS, dtype, kv_heads=kv_heads, shared=shared).check(product)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(32, 32), (80, 64), (96, 128), (128, 128), (256, 256), (576, 512), (40, 32)]
)
def test_heads_of_many_sizes(product, dtype, key_dim, value_dim):
    assert product.can_attend(dtype, key_dim, value_dim)
    Decodes([1, 16, 40, 300], dtype, key_dim=key_dim, value_dim=value_dim).check(product, scaling=key_dim**-0.5)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 256, 300, 5000])
def test_positions_before_the_window_are_not_seen(product, dtype, window):
    Decodes(LENGTHS, dtype).check(product, window=window)


def test_a_row_is_the_same_whatever_it_comes_with_and_however_many_threads_compute(product, dtype):
    decodes = Decodes(LENGTHS, dtype)
    whole = decodes.attend(product)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(decodes.attend(product), whole)
            for index in range(len(LENGTHS)):
                assert torch.equal(decodes.attend(product, [index])[0], whole[index])
    finally:
        torch.set_num_threads(threads)
    turned = list(reversed(range(len(LENGTHS))))
    assert torch.equal(decodes.attend(product, turned), whole.flip(0))


def test_queries_may_lie_head_by_head(product, dtype):
    decodes = Decodes(LENGTHS, dtype)
    apart = decodes.queries.transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    assert torch.equal(decodes.attend(product, queries=apart), decodes.attend(product))


@pytest.mark.parametrize("scaling", [1e-6, 30.0, 1e3])
def test_scores_of_any_size_neither_overflow_nor_vanish(product, dtype, scaling):
    Decodes(LENGTHS, dtype).check(product, scaling=scaling)


def test_shapes_that_the_kernel_does_not_know_are_refused(product):
    assert not product.can_attend(torch.bfloat16, 64, 20)
    assert not product.can_attend(torch.bfloat16, 2048, 64)
    assert not product.can_attend(torch.float32, 64, 64)
    with pytest.raises(ValueError, match="does not attend heads of 64 and 20"):
        Decodes([3], torch.bfloat16, value_dim=20).attend(product)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("prompt", [5, 18, MAX_KERNEL_PROMPT_TOKENS])
def test_a_step_of_prompts_and_decodes_is_what_it_is_without_the_kernel(product, dtype, window, prompt):
    """Each row goes to its place, in whatever order they come, be it that torch attends the prompts or the kernel."""
    shape = KvShape(heads=2, key_dim=32, value_dim=32)
    generator = torch.Generator().manual_seed(1)
    tables = ((3, 4), (9, 1, 5, 8, 6), (7,), (0, 2, 11))
    spans = [(17, 18), (30, 30 + prompt), (0, 6), (40, 41)]
    slices = [
        SequenceSlice(seq_id=n, start_position=start, token_ids=(1,) * (end - start), block_table=table, sampling=None)
        for n, ((start, end), table) in enumerate(zip(spans, tables, strict=True))
    ]
    num_tokens = sum(end - start for start, end in spans)
    filled = torch.randn((12 * BLOCK_SIZE, 2, 32), generator=generator).to(dtype)
    q, k, v = (torch.randn((1, heads, num_tokens, 32), generator=generator).to(dtype) for heads in (4, 2, 2))
    results = []
    for kernel in (None, product):
        cell = BatchCell()
        cache = make_layer_cache(shape, num_blocks=12, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
        cache.keys.copy_(filled)
        cache.values.copy_(filled.flip(0))
        cell.batch = StepBatch(slices, windows=[window], block_size=BLOCK_SIZE, dtype=dtype, device=CPU, kernel=kernel)
        assert cell.batch.is_for_kernel == (kernel is not None and prompt + 6 <= MAX_KERNEL_PROMPT_TOKENS)
        results.append(PagedLayer(cache, cell, window).attend(q, k, v, None, CALL))
    assert results[0].shape == results[1].shape == (1, num_tokens, 4, 32)
    torch.testing.assert_close(*results, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    ("family", "uses"), [("llama", True), ("gemma", True), ("mistral", True), ("qwen3", True), ("gemma2", False)]
)
def test_stages_with_the_kernel_give_the_whole_models_tokens_or_others_within_rounding(
    kernels, tmp_path, family, uses, num_stages
):
    """Ragged batches with chunks. gemma2 caps its scores: its stages leave attention to torch."""
    whole = save_whole(family, tmp_path, dtype=torch.bfloat16, head_dim=32)
    split = lab.SplitModel(whole.folder, num_stages, dtype="bfloat16", kernel_dir=kernels)
    assert [stage._kernel is not None for stage in split.stages] == [uses] * num_stages
    answers = lab.serve(split, lab.RAGGED)
    assert lab.are_within_rounding(whole.model, lab.RAGGED, answers)


def test_what_a_sequence_gets_does_not_depend_on_who_is_in_its_step(product, monkeypatch, tmp_path):
    """In bfloat16 too: once its prompt is computed, its tokens and their probabilities are the same to the last bit.

    With our own products, whichever this machine would choose: oneDNN's may sum in another order for other rows.
    """
    own = Linears(dtype=torch.bfloat16, product=product, product_rows=sys.maxsize, kernel=product)
    monkeypatch.setattr(stage_module, "choose_linears", lambda *_: own)
    whole = save_whole("llama", tmp_path, dtype=torch.bfloat16, head_dim=32)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((9, 3, 12, 5))]

    def tokens_of(together):
        split = lab.SplitModel(whole.folder, 2, dtype="bfloat16")
        answers = {index: list(prompts[index]) for index in range(len(prompts))}
        logprobs = {index: [] for index in answers}
        for index, known in answers.items():  # each prompt alone
            (token,) = split.step(part(index, known, 0))
            known.append(token.token_id)
        for group in together:
            for _ in range(6):
                told = split.step(*(part(index, answers[index][-1:], len(answers[index]) - 1) for index in group))
                for index, token in zip(group, told, strict=True):
                    answers[index].append(token.token_id)
                    logprobs[index].append(token.logprob)
        return answers, logprobs

    def part(index, tokens, start):
        table = tuple(range(8 * index, 8 * index + 8))
        return SequenceSlice(
            seq_id=index, start_position=start, token_ids=tuple(tokens), block_table=table, sampling=lab.GREEDY
        )

    assert tokens_of([(0, 1, 2, 3)]) == tokens_of([(0,), (1,), (2,), (3,)]) == tokens_of([(3, 1), (2, 0)])
