"""What the tests of our own kernel share: a folder that it was built in, once for all of them, and the kernel."""

import pytest
import torch

from shardwright.model.product import find_product


@pytest.fixture(scope="package")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="package")
def product(kernels):
    found = find_product(kernels)
    if found is None:
        pytest.skip("no kernel can be built on this machine")
    return found


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request, product):
    """Each dtype that the kernel computes in on this CPU."""
    if not product.can_multiply(request.param):
        pytest.skip("this CPU can't widen it")
    return request.param
