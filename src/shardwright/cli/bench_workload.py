"""What `bench serve` asks a server: requests with lengths, contents and arrival times that follow from a seed.

Pure. The same settings give the same requests, here and anywhere; a longer run begins with the requests of a shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shardwright.errors import ConfigError

# Words that most vocabularies have as one token, so that a prompt of n words has about n tokens.
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body
information back parent face others level office door health person art war history party result change morning
reason research girl guy moment air teacher force education foot boy age policy music market sense winter plan
road land report paper river list table field summer window stone green early large small young old high low
open long short hard soft warm cold clear bright dark quick slow
"""
WORDS = tuple(_WORD_LIST.split())

Prompt: TypeAlias = str | tuple[int, ...]

# What each stream of random numbers is for; part of its seed.
_LENGTHS, _OWN, _SHARED, _ARRIVALS, _WARM_UP = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Whole numbers spread evenly over mean - spread to mean + spread."""

    mean: int
    spread: int = 0

    def __post_init__(self) -> None:
        if self.spread < 0 or self.mean - self.spread < 1:
            raise ConfigError(
                f"a length of {self.mean},{self.spread} tokens goes from {self.mean - self.spread} to "
                f"{self.mean + self.spread}; it must be at least 1 everywhere"
            )

    @classmethod
    def parse(cls, text: str, *, name: str) -> Spread:
        """Read `mean` or `mean,spread`. Raises `ConfigError`."""
        try:
            mean, spread = (int(part) for part in (text if "," in text else f"{text},0").split(","))
        except ValueError:
            raise ConfigError(
                f"{name} is {text!r}; give tokens as MEAN or MEAN,SPREAD, such as 128 or 128,32"
            ) from None
        return cls(mean=mean, spread=spread)

    def draw(self, random: np.random.Generator) -> int:
        """One of them."""
        return int(random.integers(self.mean - self.spread, self.mean + self.spread, endpoint=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The settings that requests follow from."""

    num_requests: int
    input_tokens: Spread  # of a prompt's own part
    output_tokens: Spread
    seed: int = 0
    rate: float | None = None  # requests a second, as a Poisson process; None: each as soon as a place is free
    shared_prefix: int = 0  # tokens that stand before a prompt's own part
    num_prefixes: int = 1  # how many different ones there are
    token_range: tuple[int, int] | None = None  # prompts of token ids, from the first to below the second; None: words


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request: what it asks, and when, in seconds from the start."""

    at_s: float
    prompt: Prompt
    num_prompt_tokens: int  # exact for token ids, about so for words
    max_tokens: int


def plan_requests(workload: Workload) -> list[PlannedRequest]:
    """All requests, in the order of their arrival."""
    arrivals = _random(workload, _ARRIVALS)
    at_s = 0.0
    prefixes = [
        _contents(workload, _random(workload, _SHARED, number), workload.shared_prefix)
        for number in range(workload.num_prefixes)
    ]
    requests = []
    for index in range(workload.num_requests):
        if workload.rate is not None:
            at_s += float(arrivals.exponential(1.0 / workload.rate))
        lengths = _random(workload, _LENGTHS, index)
        num_input = workload.input_tokens.draw(lengths)
        max_tokens = workload.output_tokens.draw(lengths)
        prefix = prefixes[int(lengths.integers(workload.num_prefixes))]
        own = _contents(workload, _random(workload, _OWN, index), num_input)
        requests.append(_request(workload, at_s, [*prefix, *own], max_tokens))
    return requests


def warm_up_requests(workload: Workload, count: int) -> list[PlannedRequest]:
    """Requests like the others, but with contents of their own: they leave nothing in a cache that would be found."""
    requests = []
    for index in range(count):
        num_tokens = workload.shared_prefix + workload.input_tokens.mean
        contents = _contents(workload, _random(workload, _WARM_UP, index), num_tokens)
        requests.append(_request(workload, 0.0, contents, workload.output_tokens.mean))
    return requests


def _request(workload: Workload, at_s: float, contents: Sequence[int], max_tokens: int) -> PlannedRequest:
    prompt: Prompt = tuple(contents)
    if workload.token_range is None:
        prompt = " ".join(WORDS[number] for number in contents)
    return PlannedRequest(at_s=at_s, prompt=prompt, num_prompt_tokens=len(contents), max_tokens=max_tokens)


def _contents(workload: Workload, random: np.random.Generator, count: int) -> list[int]:
    low, high = (0, len(WORDS)) if workload.token_range is None else workload.token_range
    return [int(number) for number in random.integers(low, high, size=count)]


def _random(workload: Workload, purpose: int, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([workload.seed, purpose, index])
