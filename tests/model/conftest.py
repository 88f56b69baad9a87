"""What the tests of our own kernel share: a folder that it was built in, once for all of them, and the kernel."""

import pytest

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
