"""All families that are said to work do, with small configs made by one rule for all of them."""

from __future__ import annotations

import pytest
import split_models as lab
from every_family import small_model
from tiny_models import prompt_of

from shardwright.model.supported import SPLITTABLE_FAMILIES

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", SPLITTABLE_FAMILIES)
def test_greedy_tokens_are_the_whole_models(family, tmp_path):
    """In one and in three stages."""
    model = small_model(family)
    model.save_pretrained(tmp_path)
    requests = [lab.Asked(prompt=prompt_of(n, n), max_new_tokens=6, joins_at=n % 3) for n in (17, 1, 9)]
    expected = lab.whole_answers(model, requests)
    for num_stages in (1, 3):
        assert lab.serve(lab.SplitModel(tmp_path, num_stages), requests) == expected, f"{num_stages} stages"
