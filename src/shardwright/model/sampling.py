"""Picks tokens from logits. Knows rows, parameters and positions; the batch has no influence on any row's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardwright.types import SamplingParams

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_CANDIDATES = 1024  # how many of the largest logits are sorted before the whole row is


@dataclass(frozen=True, slots=True)
class Pick:
    """A chosen token and the natural log of its probability under the unmodified logits."""

    token_id: int
    logprob: float


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, position): 53 bits, the same on every machine.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), used as a hash: the
    generator started at `hash(seed)` is asked for its `position`-th number.
    """
    mixed = _mix((_mix((seed + _GAMMA) & _MASK) + (position + 1) * _GAMMA) & _MASK)
    return (mixed >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[Pick]:
    """Pick one token for each row of `logits` [rows, vocabulary]; `positions` are those that the new tokens get.

    Greedy rows take the largest logit, the lowest id among equals. Other rows invert the distribution that is left
    after temperature, top-k and top-p (in this order, as `transformers` does) at `uniform(seed, position)`.
    """
    assert logits.shape[0] == len(params) == len(positions)
    logits = logits.float()
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0.0]
    if drawn:
        ids = chosen.tolist()
        for row in drawn:
            ids[row] = _draw(logits[row].cpu(), params[row], uniform(params[row].seed, positions[row]))
        chosen = torch.tensor(ids, dtype=torch.int64).to(logits.device)
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return [Pick(token, logprob) for token, logprob in zip(chosen.tolist(), logprobs.tolist(), strict=True)]


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """Invert one row's distribution at u. Works in float64: a float32 sum over a vocabulary is off by more than u."""
    scaled = logits.double() / params.temperature
    if params.top_k == 0 and params.top_p == 1.0:
        return _invert(torch.softmax(scaled, dim=-1), u)
    if params.top_k > 0:
        values, ids = _largest(scaled, min(params.top_k, len(scaled)))
        kept = _nucleus(values, values.logsumexp(dim=-1), params.top_p)
    else:
        total = scaled.logsumexp(dim=-1)
        values, ids = _largest(scaled, min(_CANDIDATES, len(scaled)))
        kept = _nucleus(values, total, params.top_p)
        if kept > len(values):  # a flat distribution: more tokens belong to it than are usually worth sorting
            values, ids = _largest(scaled, len(scaled))
            kept = _nucleus(values, total, params.top_p)
    return int(ids[_invert(torch.softmax(values[:kept], dim=-1), u)])


def _largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest values in falling order with their ids; equal ones by rising id, also at the border."""
    if count < len(values):
        border = values.topk(count).values[-1]
        ids = (values >= border).nonzero()[:, 0]
    else:
        ids = torch.arange(len(values))
    order = values[ids].sort(descending=True, stable=True).indices[:count]
    ids = ids[order]
    return values[ids], ids


def _nucleus(values: torch.Tensor, log_total: torch.Tensor, top_p: float) -> int:
    """How many of the largest values reach `top_p` of the whole; one more than there are if all of them don't."""
    reached = torch.cumsum((values - log_total).exp(), dim=0)
    return int((reached < top_p).sum()) + 1


def _invert(probabilities: torch.Tensor, u: float) -> int:
    """The first index whose cumulated probability exceeds u."""
    cumulated = torch.cumsum(probabilities, dim=0)
    index = int(torch.searchsorted(cumulated, u * float(cumulated[-1]), right=True))
    return min(index, len(probabilities) - 1)
