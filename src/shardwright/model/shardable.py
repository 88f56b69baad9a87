"""The families whose layers can be cut over several devices of one worker: `tests/model` tries each."""

from typing import Final

SHARDABLE_FAMILIES: Final[tuple[str, ...]] = (
    "gemma",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen3",
)
