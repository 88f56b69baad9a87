"""The families whose models were cut and compared with the whole model; for error messages and documentation."""

from __future__ import annotations

SPLITTABLE_FAMILIES: tuple[str, ...] = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
