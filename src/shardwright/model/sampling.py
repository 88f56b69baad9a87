"""Picks tokens from logits. Knows rows, parameters, positions and what a row's sequence remembers; nothing of steps.

The batch has no influence on any row's choice: what is computed over rows together is exact whatever stands beside
a row (maxima, selections, element-wise arithmetic), and sums run over one row alone.

Each copy from a GPU makes the host wait for it. What is picked greedily takes one, however many rows there are; what is
drawn takes a few more, of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from shardwright.model.devices import to_device
from shardwright.model.sampler_state import SequenceState
from shardwright.types import SamplingParams, TokenId

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_CANDIDATES = 1024  # how many of the largest logits are sorted first,
_MORE_CANDIDATES = 16384  # how many where these are too few, before the whole row is
_SPARE = 16  # sorted beyond those asked for: equal ones at the border are cut in the order of their ids
_CHUNK = 1024  # summed first, so that a drawn token is looked for in one chunk's sums alone
_LEAST_TEMPERATURE = 1e-6  # below it float32 can't divide; it is greedy long before
_PIECE = 1 << 20  # logits whose exponentials are summed at once
_LEAST_EXPONENT = -80.0  # of those: float32 underflows at -87
_ROWS_AT_ONCE = 32  # of prompt scores: bounds the memory beside the logits

Doubles: TypeAlias = NDArray[np.float64]
Ranked: TypeAlias = tuple[tuple[TokenId, float], ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """A chosen token and the natural log of its probability under the unmodified logits.

    `top` are the likeliest tokens under these with theirs, falling, the lower id first among equals.
    """

    token_id: int
    logprob: float
    top: Ranked = ()


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


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    states: Sequence[SequenceState | None] = (),
) -> list[Pick]:
    """Pick one token for each row of `logits` [rows, vocabulary]; `positions` are those that the new tokens get.

    Each row's logits take, in this order and as `transformers` and OpenAI define them: the bias, the repetition penalty
    over prompt and output, presence and frequency penalties over the output, the grammar, the least length. Greedy rows
    then take the largest, the lowest id among equals. Other rows invert the distribution that temperature, top-k, top-p
    and min-p leave at `uniform(seed, position)`. `states` say what rows with penalties or rules remember; they are
    read, and the caller adds the picked tokens.
    """
    assert logits.shape[0] == len(params) == len(positions)
    assert not states or len(states) == len(params)
    logits = logits.float()
    num_top = [p.num_top_logprobs for p in params]
    ruled = [row for row, state in enumerate(states) if state is not None]
    drawn = [row for row, p in enumerate(params) if p.temperature > 0.0]
    changed = _changed(logits, ruled, params, states) if ruled else None
    if not drawn:
        return _picks(logits, _greedy(logits, ruled, changed), num_top)
    us = [uniform(params[row].seed, positions[row]) for row in drawn]
    tokens = _on(_draw(_rows(logits, drawn, ruled, changed), [params[row] for row in drawn], us), logits)
    if len(drawn) == len(params):
        return _picks(logits, tokens, num_top)
    return _picks(logits, _replaced(_greedy(logits, ruled, changed), drawn, tokens), num_top)


def score(logits: torch.Tensor, tokens: Sequence[TokenId], num_top: Sequence[int]) -> list[Pick]:
    """How likely each row of `logits` [rows, vocabulary] makes its token, and `num_top` likeliest beside it."""
    picks: list[Pick] = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        piece = slice(start, start + _ROWS_AT_ONCE)
        picks += _picks(logits[piece].float(), _on(tokens[piece], logits), num_top[piece])
    return picks


def _picks(logits: torch.Tensor, chosen: torch.Tensor, num_top: Sequence[int]) -> list[Pick]:
    # piece by piece: what fits into caches takes a fifth of the time
    count = max(_PIECE // logits.shape[1], 1)
    totals = torch.cat([_log_sums(part) for part in torch.split(logits, count)])
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - totals
    tokens, scores, sums = _together(chosen, logprobs, totals)
    tops = _tops(logits, sums.view(np.float32), num_top) if any(num_top) else {}
    pairs = zip(tokens.tolist(), scores.view(np.float32).tolist(), strict=True)
    return [Pick(token, logprob, tops.get(row, ())) for row, (token, logprob) in enumerate(pairs)]


def _log_sums(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary] -> [rows]: the logarithm of the sum of the exponentials of each row.

    As `logsumexp`, but terms below e^-80 of the largest count as that: of a million of them the sum still takes no
    notice, and libraries compute exponentials that underflow ten times slower than others.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    sums = (logits - largest).clamp_(min=_LEAST_EXPONENT).exp_().sum(dim=-1)
    return largest[:, 0] + sums.log_()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary] -> [rows]: where each row's largest value first stands."""
    if logits.device.type == "cpu":  # numpy takes half the time
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _together(*tensors: torch.Tensor) -> NDArray[np.int32]:
    """Equal-sized float32 (as their bits) and token ids, copied from their device at once."""
    return torch.stack([t.view(torch.int32) if t.is_floating_point() else t.int() for t in tensors]).cpu().numpy()


def _tops(logits: torch.Tensor, totals: NDArray[np.float32], num_top: Sequence[int]) -> dict[int, Ranked]:
    """The likeliest tokens of the rows that want some."""
    rows = [row for row, count in enumerate(num_top) if count]
    leaders = _Leaders(select_rows(logits, rows), max(num_top) + _SPARE)
    tops: dict[int, Ranked] = {}
    for place, row in enumerate(rows):
        values, ids = leaders.first(place, min(num_top[row], leaders.vocabulary))
        tops[row] = tuple(zip(ids.tolist(), (values - totals[row]).tolist(), strict=True))
    return tops


def _greedy(logits: torch.Tensor, ruled: list[int], changed: torch.Tensor | None) -> torch.Tensor:
    chosen = _argmax(logits)
    return chosen if changed is None else _replaced(chosen, ruled, _argmax(changed))


def _replaced(chosen: torch.Tensor, rows: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """`chosen` with other tokens in some rows."""
    return tokens if len(rows) == len(chosen) else chosen.index_copy(0, _on(rows, chosen), tokens)


def _rows(logits: torch.Tensor, rows: list[int], ruled: list[int], changed: torch.Tensor | None) -> torch.Tensor:
    """Some rows of the logits, those with rules as these changed them."""
    if changed is None:
        return select_rows(logits, rows)
    if rows == ruled:
        return changed
    places = {row: place for place, row in enumerate(ruled)}
    return torch.stack([changed[places[row]] if row in places else logits[row] for row in rows])


def _changed(
    logits: torch.Tensor, ruled: list[int], params: Sequence[SamplingParams], states: Sequence[SequenceState | None]
) -> torch.Tensor:
    """The rows that have penalties or rules, after these."""
    held = [state for state in states if state is not None]
    changed = logits.clone() if len(ruled) == len(logits) else select_rows(logits, ruled)
    _add_biases(changed, held)
    _take_penalties(changed, [params[row] for row in ruled], held)
    _limit(changed, held)
    return changed


def _add_biases(logits: torch.Tensor, states: list[SequenceState]) -> None:
    biased = [(row, state) for row, state in enumerate(states) if len(state.bias_ids)]
    if not biased:
        return
    index = np.concatenate([state.bias_ids + row * logits.shape[1] for row, state in biased])
    values = np.concatenate([state.bias_values for _, state in biased])
    logits.view(-1).index_add_(0, _to(index, logits), _to(values, logits))


def _take_penalties(logits: torch.Tensor, params: list[SamplingParams], states: list[SequenceState]) -> None:
    """All rows' penalties at once, on the logits of the tokens that they have met.

    Repetition: Keskar and others, CTRL (arXiv 1909.05858), as `transformers` has it for negative logits too. Presence
    and frequency: OpenAI's API reference.
    """
    places: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float32]] = []
    losses: list[NDArray[np.float32]] = []
    for row, (p, state) in enumerate(zip(params, states, strict=True)):
        if not p.has_penalties or state.counts is None:
            continue
        ids, counts = state.counts.ids, state.counts.counts
        places.append(ids + row * logits.shape[1])
        factors.append(np.full(len(ids), p.repetition_penalty, np.float32))
        present = (counts > 0).astype(np.float32)
        losses.append(counts * np.float32(p.frequency_penalty) + present * np.float32(p.presence_penalty))
    if not places:
        return
    index = _to(np.concatenate(places), logits)
    factor, loss = _to(np.concatenate(factors), logits), _to(np.concatenate(losses), logits)
    flat = logits.view(-1)
    values = flat[index]
    flat[index] = torch.where(values < 0, values * factor, values / factor) - loss


def _limit(logits: torch.Tensor, states: list[SequenceState]) -> None:
    """Take out the tokens that grammars don't allow, and stop tokens before the least length. Some token is left."""
    guided = [(row, state) for row, state in enumerate(states) if state.has_grammar]
    if guided:
        bits = np.empty((len(guided), guided[0][1].num_words), np.uint32)
        for place, (_, state) in enumerate(guided):
            state.allow(bits[place])
        banned = ~_spread(bits, logits)
        for place, (row, _) in enumerate(guided):
            logits[row].masked_fill_(banned[place], -torch.inf)
    for row, state in enumerate(states):
        # A grammar's set has no stop tokens before the least length, unless it has nothing else.
        if not state.has_grammar and not state.may_stop and 0 < len(state.stop_ids) < logits.shape[1]:
            logits[row, _to(state.stop_ids, logits)] = -torch.inf


def _spread(bits: NDArray[np.uint32], logits: torch.Tensor) -> torch.Tensor:
    """Sets of tokens as booleans [rows, vocabulary]; rows of the head beyond the tokenizer's tokens are in none."""
    vocabulary = logits.shape[1]
    if logits.device.type == "cpu":
        octets = bits.astype("<u4", copy=False).view(np.uint8)
        allowed = torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")).view(torch.bool)
    else:
        allowed = _shift_out(_to(bits.view(np.int32), logits))
    if allowed.shape[1] >= vocabulary:
        return allowed[:, :vocabulary]
    return torch.nn.functional.pad(allowed, (0, vocabulary - allowed.shape[1]))


def _shift_out(words: torch.Tensor) -> torch.Tensor:
    """The bits of int32 words [rows, words] as booleans [rows, 32 * words], the lowest first; where the words lie."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> shifts).bitwise_and_(1).flatten(1).bool()


def _to(values: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.from_numpy(values), like.device)


def _on(values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), like.device)


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], us: Sequence[float]) -> list[TokenId]:
    """Invert each row's distribution at its u."""
    tokens = [0] * len(params)
    ranked = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0 or p.min_p > 0.0]
    plain = [row for row in range(len(params)) if row not in set(ranked)]
    # A nucleus is a part of the whole row, unless top-k has cut it first.
    summed = sorted(plain + [row for row in ranked if not params[row].top_k and params[row].top_p < 1.0])
    sums = _sum_rows(logits, summed, params) if summed else {}
    for row, token in zip(plain, _invert([sums[row] for row in plain], [us[row] for row in plain]), strict=True):
        tokens[row] = token
    short = [row for row in ranked if 0 < params[row].top_k <= _CANDIDATES]  # top-k says how few have to be sorted
    for rows in (short, [row for row in ranked if row not in set(short)]):
        if not rows:
            continue
        count = max(params[row].top_k for row in rows) + _SPARE if rows is short else _CANDIDATES
        leaders = _Leaders(select_rows(logits, rows), count)
        for place, row in enumerate(rows):
            total = sums[row].total if row in sums else None
            tokens[row] = _draw_ranked(leaders, place, params[row], total, us[row])
    return tokens


def _draw_ranked(leaders: _Leaders, row: int, params: SamplingParams, total: float | None, u: float) -> TokenId:
    """Invert what top-k, top-p and min-p leave of one row, its tokens in falling order, the lower id first."""
    temperature = max(params.temperature, _LEAST_TEMPERATURE)
    limit = min(params.top_k or leaders.vocabulary, leaders.vocabulary)
    for count in (limit,) if params.top_k else (leaders.sure(row), _MORE_CANDIDATES, limit):
        if not 0 < count <= limit:
            continue
        values, ids = leaders.first(row, count)
        weights = np.exp((values.astype(np.float64) - float(values[0])) / temperature)  # 1 for the likeliest
        cumulated = np.cumsum(weights)
        kept = count
        if params.top_p < 1.0:
            kept = int((cumulated < params.top_p * (cumulated[-1] if total is None else total)).sum()) + 1
        if params.min_p > 0.0:
            kept = min(kept, max(int((weights >= params.min_p).sum()), 1))
        if kept < count or count == limit:  # else more tokens may belong to it than were sorted
            break
    inside = cumulated[:kept]
    return int(ids[_find(inside, u * inside[-1])])


def _find(cumulated: Doubles, target: float) -> int:
    """The first index whose cumulated weight exceeds the target; where rounding hides it, the last with a weight."""
    index = int(np.searchsorted(cumulated, target, side="right"))
    return min(index, int(np.searchsorted(cumulated, cumulated[-1], side="left")))


@dataclass(frozen=True, slots=True)
class _RowSums:
    """One row's weights, the likeliest token's being 1, and their sums chunk by chunk."""

    weights: torch.Tensor  # [chunks, chunk], zeros behind the vocabulary
    cumulated: Doubles  # [chunks]

    @property
    def total(self) -> float:
        return float(self.cumulated[-1])


def _invert(sums: list[_RowSums], us: list[float]) -> list[TokenId]:
    """For each row the first token, by id, whose cumulated weight exceeds u of the whole."""
    if not sums:
        return []
    chunks = [_find(row.cumulated, u * row.total) for row, u in zip(sums, us, strict=True)]
    held = torch.stack([row.weights[chunk] for row, chunk in zip(sums, chunks, strict=True)]).cpu().numpy()
    tokens: list[TokenId] = []
    for place, (row, chunk) in enumerate(zip(sums, chunks, strict=True)):
        before = float(row.cumulated[chunk - 1]) if chunk else 0.0
        inside = np.cumsum(held[place], dtype=np.float64)
        tokens.append(chunk * _CHUNK + _find(inside, us[place] * row.total - before))
    return tokens


def _sum_rows(logits: torch.Tensor, rows: list[int], params: Sequence[SamplingParams]) -> dict[int, _RowSums]:
    """The weights of some rows. They are float32, their sums float64: one in float32 would be off by more than u.

    Row by row: so much fits into caches, and what is freed is used again.
    """
    vocabulary = logits.shape[1]
    held: list[torch.Tensor] = []
    for row in rows:
        weights = logits.new_zeros(-(-vocabulary // _CHUNK) * _CHUNK)
        inside = weights[:vocabulary]
        torch.sub(logits[row], logits[row].max(), out=inside)
        inside.div_(max(params[row].temperature, _LEAST_TEMPERATURE)).exp_()
        held.append(weights.view(-1, _CHUNK))
    sums = torch.stack([weights.sum(dim=-1, dtype=torch.float64) for weights in held]).cpu().numpy()
    return {row: _RowSums(held[place], np.cumsum(sums[place])) for place, row in enumerate(rows)}


class _Leaders:
    """The largest values of each row of `logits` [rows, vocabulary] in falling order, equal ones by rising id."""

    def __init__(self, logits: torch.Tensor, count: int) -> None:
        self.vocabulary = logits.shape[1]
        self._logits = logits
        values, ids = logits.topk(min(count, self.vocabulary), dim=-1)
        together = _together(values, ids)
        self._values, self._ids = together[0].view(np.float32), together[1].astype(np.int64)
        for row in np.flatnonzero((self._values[:, 1:] == self._values[:, :-1]).any(axis=1)):
            self._ids[row] = self._ids[row][np.lexsort((self._ids[row], -self._values[row]))]  # topk orders them anyhow

    def sure(self, row: int) -> int:
        """How many are known: beside the last ones sorted there may be others that are equal to them."""
        values = self._values[row]
        return self.vocabulary if len(values) == self.vocabulary else int((values > values[-1]).sum())

    def first(self, row: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `count` largest values of one row and their ids."""
        if count > self.sure(row):
            return _largest(self._logits[row], count)
        return self._values[row, :count], self._ids[row, :count]


def _largest(values: torch.Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` largest values in falling order with their ids; equal ones by rising id, also at the border."""
    ids = (values >= values.topk(count).values[-1]).nonzero()[:, 0] if count < len(values) else None
    if ids is None or len(ids) < count:  # not a number is no border
        ids = torch.arange(len(values), device=values.device)
    ids = ids[values[ids].sort(descending=True, stable=True).indices[:count]]
    return values[ids].cpu().numpy(), ids.cpu().numpy()


def select_rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, in rising order; not a copy where they are all."""
    return logits if len(rows) == len(logits) else logits.index_select(0, _on(rows, logits))
