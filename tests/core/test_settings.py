"""Settings that can't work are refused by name."""

import pytest

from shardwright.core.settings import CoreSettings
from shardwright.errors import ConfigError


def test_the_defaults_are_valid():
    assert CoreSettings().block_size == 16


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("block_size", 0, "at least 1"),
        ("token_budget", -3, "at least 1"),
        ("max_model_len", 0, "at least 1"),
        ("max_steps_in_flight", 0, "at least 1"),
        ("max_waiting", 0, "at least 1"),
        ("prompt_logprob_tokens", 0, "at least 1"),
        ("probe_interval_s", 0.0, "above 0 seconds"),
        ("gather_s", -0.1, "from 0 \\(no waiting\\) to 10 seconds"),
        ("gather_s", float("inf"), "from 0 \\(no waiting\\) to 10 seconds"),
        ("first_epoch", 0, "at least 1"),
        ("max_redeploys", -1, "at least 0"),
        ("heartbeat_timeout_s", 0.0, "above 0 seconds"),
        ("load_timeout_s", -1.0, "above 0 seconds"),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, bound):
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be {bound}"):
        CoreSettings(**{name: value})
