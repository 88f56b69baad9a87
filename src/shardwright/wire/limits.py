"""The most that a peer may send of anything; what is over is refused before it is stored. Known to codec and docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1024 * 1024

MAX_MESSAGE_BYTES: Final = 4 * MIB - 64 * 1024
"""Largest message of a stream: gRPC's default limit of 4 MiB, with room to spare."""
MAX_INLINE_BYTES: Final = MIB
"""Most tensor bytes that travel in one message with their step; more follow it in fragments."""
FRAGMENT_BYTES: Final = 256 * 1024
"""Size of the fragments that a sender cuts (a receiver takes any that fit in a message)."""
MAX_WEIGHT_CHUNK_BYTES: Final = MIB
"""Largest `WeightChunk.data`."""
MAX_SLICES: Final = 1 << 16
"""Most sequences in one step."""
MAX_STEP_TOKENS: Final = 1 << 20
"""Most new tokens in one step."""
MAX_STEP_BYTES: Final = 64 * MIB
"""Largest step without its tensors' data, and largest result of one; over `MAX_MESSAGE_BYTES` they travel in pieces."""
MAX_SETUP_TOKENS: Final = 1 << 23
"""Most tokens in all the setups of one step."""
MAX_STOP_TOKENS: Final = 1 << 20
"""Most stop tokens of one sequence."""
MAX_DROPPED: Final = 1 << 16
"""Most sequences that one step names as dropped."""
MAX_BLOCK_TABLE: Final = 1 << 20
"""Most blocks of one sequence."""
MAX_POSITION: Final = 1 << 31
"""Above every position, block id and token id."""
MAX_STEP_TENSORS: Final = 64
"""Most tensors that travel with one step."""
MAX_TENSORS: Final = 1 << 16
"""Most checkpoint tensors of one stage."""
MAX_RANK: Final = 8
"""Most dimensions of a tensor."""
MAX_DIMENSION: Final = 1 << 40
"""Largest extent of one dimension."""
MAX_TENSOR_BYTES: Final = 1 << 40
"""Largest tensor of a checkpoint."""
MAX_FILE_HINTS: Final = 4096
"""Most checkpoint files of one model."""
MAX_STEPS_IN_FLIGHT: Final = 1 << 10
MAX_LAYERS: Final = 1 << 16
"""Most decoder layers, and most stages."""
MAX_BLOCK_SIZE: Final = 1 << 16
"""Most KV positions in one block."""
MAX_NAME_CHARS: Final = 1024
"""Longest name, address, device or version."""
MAX_PATH_CHARS: Final = 4096
"""Longest path of a file."""
MAX_CONFIG_CHARS: Final = MIB
"""Longest model config."""
MAX_REASON_CHARS: Final = 8192
"""Longest explanation; a sender cuts what is longer."""
MAX_RANKS: Final = 64
"""Most devices of one worker."""
MAX_TIMINGS: Final = 4096
"""Most step shapes in one heartbeat report."""
MAX_TRACES: Final = 4096
"""Most steps that one heartbeat report tells the passage of: under half a MiB."""
MAX_NAMED_COUNTS: Final = 64
"""Most kinds of errors in one heartbeat report."""
MAX_PING_BYTES: Final = 16 * MIB
"""Most data that a ping carries, each way: a prompt's activation of some thousand tokens."""
MAX_TRANSFER_SIZES: Final = 16
"""Most sizes that one `MeasureLink` times."""

DEFAULT_MAX_FRAME_BYTES: Final = 256 * MIB
"""Most tensor bytes of one step, unless configured (`max_frame_bytes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """The limits that are configured; the others are constants of the protocol."""

    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES  # all tensors of one step together

    @property
    def max_unary_bytes(self) -> int:
        """Largest message of the unary `ProcessLayer`, which is not cut into parts."""
        return self.max_frame_bytes + MAX_MESSAGE_BYTES

    @property
    def max_received_bytes(self) -> int:
        """Largest message of all."""
        return max(self.max_unary_bytes, MAX_PING_BYTES + MAX_MESSAGE_BYTES)
