"""Our own kernel computes products as exactly as float32 sums allow, each row by itself, or is not used at all."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwright.model import linear as linear_module
from shardwright.model import product as product_module
from shardwright.model.linear import KernelLinear, Linears, choose_linears, pack_linear
from shardwright.model.product import built_product, find_product

CPU = Path("/proc/cpuinfo")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # what one rounding may change, relative


def random(*shape, dtype, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(product, x, weight, bias=None):
    """One rounding of a float32 sum: never further from the exact product than torch's bound for one."""
    result = product.linear(x, weight, bias)
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = UNIT[x.dtype] * exact.abs() * 1.01 + 1e-6 * magnitude + 1e-7
    assert result.dtype == x.dtype
    assert result.shape == exact.shape
    assert bool(((result.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (3, 31), (5, 32), (97, 33), (100, 1024), (24, 1025), (193, 2080), (7, 5000), (200, 300)]
)
def test_products_are_one_rounding_from_exact_for_any_number_of_rows(product, dtype, n, k):
    weight, bias = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=4)
    for rows in (*range(1, 41), 129):
        check(product, random(rows, k, dtype=dtype, seed=rows), weight, bias if rows % 2 else None)


@pytest.mark.skipif(
    not CPU.exists() or "avx512_bf16" not in CPU.read_text(),
    reason="this CPU does not multiply bfloat16: it widens it anyway",
)
def test_where_the_cpu_does_not_multiply_bfloat16_it_is_widened(product, tmp_path, monkeypatch):
    """And where it does, pairs of products are added up in one instruction, for other last bits of the float32 sums."""
    monkeypatch.setattr(product_module, "FLAGS", (*product_module.FLAGS, "-mno-avx512bf16"))
    widening = find_product(tmp_path / "kernels")
    assert widening is not None
    weight = random(97, 1100, dtype=torch.bfloat16)
    for rows in (1, 4, 8, 40):
        check(widening, random(rows, 1100, dtype=torch.bfloat16, seed=rows), weight)
    subnormal = torch.full((1, 64), 1e-39, dtype=torch.bfloat16)
    large = torch.full((1, 64), 1e30, dtype=torch.bfloat16)
    assert widening.linear(subnormal, large, None).item() > 0.0
    assert product.linear(subnormal, large, None).item() == 0.0


def test_many_rows_take_many_blocks(product, dtype):
    check(product, random(512, 1200, dtype=dtype), random(210, 1200, dtype=dtype))


@pytest.mark.parametrize(("n", "k"), [(100, 77), (300, 2500)])
def test_a_row_is_the_same_whatever_it_comes_with(product, dtype, n, k):
    weight, x = random(n, k, dtype=dtype), random(300, k, dtype=dtype)
    whole = product.linear(x, weight, None)
    for rows in (*range(1, 41), 127, 128, 200):
        assert torch.equal(product.linear(x[7 : 7 + rows], weight, None), whole[7 : 7 + rows])


def test_a_row_is_the_same_with_any_number_of_threads(product, dtype):
    weight, x = random(500, 900, dtype=dtype), random(33, 900, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((product.linear(x[:2], weight, None), product.linear(x, weight, None)))
    finally:
        torch.set_num_threads(before)
    for few, many in results[1:]:
        assert torch.equal(few, results[0][0])
        assert torch.equal(many, results[0][1])


def test_rows_may_have_any_strides_and_dimensions(product, dtype):
    wide, weight = random(10, 200, dtype=dtype), random(40, 96, dtype=dtype)
    for x in (
        wide[::2, 50:146],
        wide[:, ::2][:, :96],
        wide[:, :192].view(2, 5, 2, 96),
        wide[0, :96],
        random(96, 9, dtype=dtype).T,
    ):
        expected = product.linear(x.clone(memory_format=torch.contiguous_format), weight, None)
        assert torch.equal(product.linear(x, weight, None), expected)
        check(product, x, weight)


def test_no_rows_give_no_rows(product, dtype):
    weight = random(40, 96, dtype=dtype)
    assert product.linear(torch.empty((2, 0, 96), dtype=dtype), weight, None).shape == (2, 0, 40)


def test_infinities_and_what_is_no_number_stay_in_their_rows(product, dtype):
    weight, x = random(50, 70, dtype=dtype).abs(), random(6, 70, dtype=dtype)
    x[1, 3], x[4, 69] = float("inf"), float("nan")
    result = product.linear(x, weight, None)
    assert torch.isinf(result[1]).all()
    assert torch.isnan(result[4]).all()
    assert torch.isfinite(result[[0, 2, 3, 5]]).all()


def test_a_layer_keeps_its_weight_where_it_is(product):
    """Also one that the embedding shares; and a weight that is filled anew is the one that counts."""
    tied = nn.Embedding(72, 96, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    model = nn.ModuleDict({"embedding": tied, "head": nn.Linear(96, 72, bias=False, dtype=torch.bfloat16)})
    model["head"].weight = tied.weight
    assert pack_linear(model, "head", Linears(dtype=torch.bfloat16, product=product, product_rows=100))
    assert isinstance(model["head"], KernelLinear)
    assert model["head"].weight is tied.weight
    assert len(list(model.parameters())) == 1
    x = random(3, 96, dtype=torch.bfloat16)
    before = model["head"](x)
    tied.weight.mul_(2)
    assert torch.equal(model["head"](x), 2 * before)


def test_more_rows_than_pay_and_other_dtypes_go_to_torch(product):
    plain = nn.Linear(96, 72, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    model = nn.ModuleDict({"up": plain})
    assert pack_linear(model, "up", Linears(dtype=torch.bfloat16, product=product, product_rows=4))
    x = random(5, 96, dtype=torch.bfloat16)
    assert torch.equal(model["up"](x), nn.functional.linear(x, plain.weight, plain.bias))
    assert torch.equal(model["up"](x[:4]), product.linear(x[:4], plain.weight, plain.bias))
    with pytest.raises(RuntimeError, match="dtype"):
        model["up"](x.float())


def test_the_fastest_form_is_measured_once(product, kernels, monkeypatch, caplog):
    linear_module._choose.cache_clear()
    monkeypatch.setattr(linear_module, "_TRIED_SHAPE", (64, 64))
    times = {"plain": 3.0, "own kernel": 1.0, "packed": 2.0}
    asked = []

    def time(forms, x):
        asked.append(len(x))
        return {form: times[form] for form in forms}

    monkeypatch.setattr(linear_module, "_time", time)
    with caplog.at_level("INFO"):
        chosen = choose_linears(torch.bfloat16, torch.device("cpu"), kernels)
    assert chosen.product is product
    assert chosen.product_rows == sys.maxsize
    assert "own kernel is the fastest" in caplog.text
    assert choose_linears(torch.bfloat16, torch.device("cpu"), kernels) is chosen
    assert asked == [1, 8, 256]
    linear_module._choose.cache_clear()
    times["own kernel"] = 9.0
    assert choose_linears(torch.bfloat16, torch.device("cpu"), kernels).product is None
    linear_module._choose.cache_clear()


def compute_for(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_form_that_stood_in_line_while_it_was_timed_is_not_thought_slow():
    def short_but_interrupted(_):
        compute_for(0.002)
        time.sleep(0.05)

    forms = {"interrupted": short_but_interrupted, "slower": lambda _: compute_for(0.01)}
    seconds = linear_module._time(forms, torch.ones(1))
    assert 0.002 <= seconds["interrupted"] < seconds["slower"]


def test_what_a_form_computes_on_other_threads_counts():
    def with_a_helper(_):
        helper = threading.Thread(target=compute_for, args=(0.02,))
        helper.start()
        helper.join()

    seconds = linear_module._time({"helped": with_a_helper}, torch.ones(1))
    assert seconds["helped"] >= 0.02 / torch.get_num_threads()


def test_our_kernel_is_taken_where_it_is_hardly_slower(product, kernels, monkeypatch):
    """With it a layer needs fewer calls, too."""
    monkeypatch.setattr(linear_module, "_TRIED_SHAPE", (64, 64))
    for own, expected in ((1.09, product), (1.11, None)):
        times = {"plain": 1.0, "own kernel": own, "packed": 2.0}
        monkeypatch.setattr(linear_module, "_time", lambda forms, _, times=times: {form: times[form] for form in forms})
        linear_module._choose.cache_clear()
        assert choose_linears(torch.bfloat16, torch.device("cpu"), kernels).product is expected
    linear_module._choose.cache_clear()


def test_float32_stays_with_torch(kernels):
    assert choose_linears(torch.float32, torch.device("cpu"), kernels) == Linears(dtype=torch.float32)


# --- building ----------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_no_kernel_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(product_module, "COMPILERS", ("no-such-compiler",))
    assert find_product(tmp_path) is None
    assert len(caplog.records) == 1
    assert "no C++ compiler is installed" in caplog.text
    assert choose_linears(torch.bfloat16, torch.device("cpu"), tmp_path).product is None


def compiler_that(tmp_path, script):
    """A compiler that can say its version and does something else than to compile."""
    path = tmp_path / "fake-compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o700)
    return (str(path),)


def test_a_build_that_fails_leaves_nothing_and_one_line_says_what_failed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(product_module, "COMPILERS", compiler_that(tmp_path, "echo 'x.cpp: error: so sad' >&2; exit 3"))
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    (folder / "build-of-one-that-was-killed").mkdir()
    assert find_product(folder) is None
    assert len(caplog.records) == 1
    assert "failed with exit code 3: x.cpp: error: so sad" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_build_that_takes_too_long_is_given_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(product_module, "COMPILERS", compiler_that(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(product_module, "BUILD_TIMEOUT_S", 0.2)
    assert find_product(tmp_path / "kernels") is None
    assert "took longer" in caplog.text


def test_a_library_that_can_not_be_loaded_is_not_used(tmp_path, monkeypatch, caplog):
    script = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setattr(product_module, "COMPILERS", compiler_that(tmp_path, script))
    assert find_product(tmp_path / "kernels") is None
    assert len(caplog.records) == 1


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, caplog):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    assert find_product(folder) is None
    assert any(word in caplog.text for word in ("can be written by others", "no C++ compiler"))


def test_what_was_built_is_found_again(product, kernels, monkeypatch):
    def build(*_):
        raise AssertionError("built twice")

    monkeypatch.setattr(product_module, "_build", build)
    find_product.cache_clear()
    assert find_product(kernels) is not None
    assert len(list(kernels.glob("product-*.so"))) == 1


def test_asking_for_what_was_built_builds_nothing(product, kernels, tmp_path, caplog):
    assert built_product(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    assert built_product(kernels) is find_product(kernels)
    assert not caplog.records


def test_of_workers_that_start_at_once_one_builds(tmp_path, monkeypatch):
    """Each run of the compiler leaves a mark. The lock is on an open file, so threads stand for processes here."""
    runs = tmp_path / "runs"
    script = f'echo run >> {runs}; sleep 0.3; while [ "$1" != -o ]; do shift; done; echo code > "$2"'
    monkeypatch.setattr(product_module, "COMPILERS", compiler_that(tmp_path, script))
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(product_module._built, [tmp_path / "kernels"] * 4))
    assert len(set(built)) == 1
    assert built[0].read_text() == "code\n"
    assert runs.read_text().split() == ["run"]


def test_a_dtype_that_the_cpu_can_not_widen_is_told_and_not_taken_for_want_of_memory(product, monkeypatch):
    monkeypatch.setattr(product, "_multiply", lambda *_: 2)
    assert not product.can_multiply(torch.float16)
    with pytest.raises(ValueError, match=r"does not know torch\.float16 on this CPU"):
        product.linear(random(2, 32, dtype=torch.float16), random(3, 32, dtype=torch.float16), None)
    monkeypatch.setattr(product, "_multiply", lambda *_: 1)
    with pytest.raises(MemoryError, match="no memory for 2 rows of 32 values"):
        product.linear(random(2, 32, dtype=torch.float16), random(3, 32, dtype=torch.float16), None)
