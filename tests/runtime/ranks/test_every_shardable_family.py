"""All families that are said to be cut over ranks are, exactly; the others are refused by name."""

from __future__ import annotations

import pytest
import split_models as lab
from every_family import small_config, small_model
from ranked_models import RankedModel
from tiny_models import prompt_of

from shardwright.errors import UnsupportedModelError
from shardwright.model.families import plan_family
from shardwright.model.rank_plan import plan_ranks
from shardwright.model.shardable import SHARDABLE_FAMILIES
from shardwright.model.supported import SPLITTABLE_FAMILIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", SHARDABLE_FAMILIES)
def test_two_ranks_of_two_stages_give_the_whole_models_tokens(ranks, family, tmp_path):
    model = small_model(family)
    model.save_pretrained(tmp_path)
    requests = [lab.Asked(prompt=prompt_of(n, n), max_new_tokens=6, joins_at=n % 3) for n in (17, 1, 9)]
    expected = lab.whole_answers(model, requests)
    split = RankedModel(ranks, tmp_path, 2)
    try:
        assert lab.serve(split, requests) == expected
    finally:
        split.close()


@pytest.mark.parametrize("family", sorted(set(SPLITTABLE_FAMILIES) - set(SHARDABLE_FAMILIES)))
def test_any_other_family_is_refused_by_name(family):
    config = small_config(family)
    plan = plan_family(config)
    with pytest.raises(UnsupportedModelError, match=rf"family '{plan.model_type}' can't be cut over several devices"):
        plan_ranks(config, plan, rank=0, num_ranks=2)
