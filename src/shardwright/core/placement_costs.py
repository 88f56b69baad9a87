"""What a stage weighs: bytes held, bytes read for a token, bytes of KV. Knows nothing of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from shardwright.types import OFFLOAD_BUFFERS, ModelCosts

_MIB = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What a placement must leave room for."""

    block_size: int = 16
    max_kv_tokens: int = 65536  # most KV positions, whatever memory there is
    min_kv_tokens: int = 1024  # KV headroom: a placement with room for fewer positions is refused
    workspace_bytes: int = 128 * _MIB  # kept free on each worker for activations
    # The request that stages are balanced for; by default one decode step of one sequence.
    prompt_tokens: float = 0.0
    new_tokens: float = 1.0
    num_sequences: int = 1  # that a decode step carries

    def __post_init__(self) -> None:
        assert self.block_size >= 1, f"block_size is {self.block_size}"
        assert 1 <= self.min_kv_tokens <= self.max_kv_tokens, f"{self.min_kv_tokens=} {self.max_kv_tokens=}"
        assert self.workspace_bytes >= 0, f"workspace_bytes is {self.workspace_bytes}"
        assert self.prompt_tokens >= 0, f"prompt_tokens is {self.prompt_tokens}"
        assert self.new_tokens > 0, f"new_tokens is {self.new_tokens}"
        assert self.num_sequences >= 1, f"num_sequences is {self.num_sequences}"

    @property
    def min_blocks(self) -> int:
        """Blocks that `min_kv_tokens` positions take."""
        return -(-self.min_kv_tokens // self.block_size)

    @property
    def max_blocks(self) -> int:
        """Blocks that `max_kv_tokens` positions fill, and never fewer than `min_blocks`."""
        return max(self.max_kv_tokens // self.block_size, self.min_blocks)


def seconds_per_byte(
    *, read_bandwidth: float, matrix_rate: float, element_bytes: int, num_tokens: float = 1.0
) -> float:
    """Time of a step for each byte of weights: read once, two operations for each weight and token.

    Memory and arithmetic go on at the same time, so the slower of the two counts: the roofline model (Williams,
    Waterman, Patterson: Roofline, CACM 52(4), 2009) with the weights as the only traffic.
    """
    return max(1 / read_bandwidth, 2 * num_tokens / element_bytes / matrix_rate)


def request_seconds_per_byte(
    settings: PlacementSettings, *, read_bandwidth: float, matrix_rate: float, element_bytes: int
) -> tuple[float, float]:
    """Time that the settings' request takes a stage for each byte of its layers, and of the head.

    All of its tokens go through the layers, its prompt's together. Of the prompt only the last token needs the head,
    which one of the decode steps stands for here. Of a decode step's time the request has its part.
    """

    def step_s(num_tokens: float) -> float:
        return seconds_per_byte(
            read_bandwidth=read_bandwidth, matrix_rate=matrix_rate, element_bytes=element_bytes, num_tokens=num_tokens
        )

    decode_s = settings.new_tokens / settings.num_sequences * step_s(settings.num_sequences)
    prefill_s = step_s(settings.prompt_tokens) if settings.prompt_tokens else 0.0
    return prefill_s + decode_s, decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """What of a stage is not kept in its device's memory."""

    start: int  # the stage's first layer
    count: int  # its layers
    number: int  # of them that are offloaded
    num_bytes: int  # of these
    buffers: int  # bytes of the buffers that they are read into

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are offloaded, rising."""
        return tuple(self.start + index for index in _spread(self.number, self.count))

    @property
    def saved(self) -> int:
        """Bytes of memory that the stage needs less."""
        return self.num_bytes - self.buffers


_NOTHING = Offload(start=0, count=1, number=0, num_bytes=0, buffers=0)


def _spread(number: int, count: int) -> Iterator[int]:
    """So many of `count` indices, at even distances."""
    return (index for index in range(count) if (index + 1) * number // count > index * number // count)


class StageWeights:
    """Bytes of any stage [start, end) in constant time, from running sums over the layers."""

    def __init__(self, costs: ModelCosts, settings: PlacementSettings) -> None:
        assert len(costs.layer_kv_bytes_per_token) == costs.num_layers, "one KV size for each layer"
        self.costs = costs
        self.settings = settings
        self.num_layers = costs.num_layers
        self._layer_sum = [0, *accumulate(costs.layer_bytes)]
        self._kv_sum = [0, *accumulate(n * settings.block_size for n in costs.layer_kv_bytes_per_token)]

    def held(self, start: int, end: int) -> int:
        """Weights that the stage keeps in memory."""
        layers = self._layer_sum[end] - self._layer_sum[start]
        costs = self.costs
        is_last = end == self.num_layers
        if start == 0 and is_last and costs.tied_embedding:
            return layers + max(costs.embedding_bytes, costs.head_bytes)
        return layers + (costs.embedding_bytes if start == 0 else 0) + (costs.head_bytes if is_last else 0)

    def of_layers(self, start: int, end: int) -> int:
        """Weights of the layers alone."""
        return self._layer_sum[end] - self._layer_sum[start]

    def streamed(self, start: int, end: int) -> int:
        """Weights that one decode step reads: all but the embedding."""
        return self.of_layers(start, end) + (self.costs.head_bytes if end == self.num_layers else 0)

    def kv_per_block(self, start: int, end: int) -> int:
        """Bytes of one block in all of the stage's layers."""
        return self._kv_sum[end] - self._kv_sum[start]

    def needed(self, start: int, end: int) -> int:
        """The least memory with which a worker can hold the stage."""
        kv = self.kv_per_block(start, end) * self.settings.min_blocks
        return self.held(start, end) + kv + self.settings.workspace_bytes

    def offload(self, start: int, end: int, *, memory_bytes: int, limit_bytes: int) -> Offload | None:
        """What of the stage has to be kept elsewhere for the rest to fit in the memory; None if it can't fit so.

        `limit_bytes` is what can be kept there. Layers that are offloaded need buffers for `OFFLOAD_BUFFERS` of the
        stage's largest layers. They are spread evenly over the stage, so that each is read while others compute; as
        few as are enough.
        """
        excess = self.needed(start, end) - memory_bytes
        if excess <= 0:
            return _NOTHING
        sizes = self.costs.layer_bytes[start:end]
        count, largest = len(sizes), max(sizes)
        buffers = OFFLOAD_BUFFERS * largest
        excess += buffers
        if excess > min(self.of_layers(start, end), limit_bytes):
            return None
        for number in range(-(-excess // largest), count + 1):
            layers = _spread(number, count)
            num_bytes = number * largest if min(sizes) == largest else sum(sizes[index] for index in layers)
            if num_bytes >= excess:
                fits = num_bytes <= limit_bytes
                return (
                    Offload(start=start, count=count, number=number, num_bytes=num_bytes, buffers=buffers)
                    if fits
                    else None
                )
        raise AssertionError("all layers together are enough")

    @property
    def smallest_need(self) -> int:
        """The least memory with which a worker is of any use."""
        return min(self.needed(i, i + 1) for i in range(self.num_layers))
