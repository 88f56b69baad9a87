"""The families whose layers can be cut over several devices of one worker; `tests/runtime/ranks` tries each of them.

A family is missing here because it has mixtures of experts, which DeepSpeed's AutoTP does not cut; because it hands K
and V from layer to layer; or because nothing says how its layers are cut.
"""

from typing import Final

SHARDABLE_FAMILIES: Final = (
    "apertus",
    "arcee",
    "biogpt",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "gpt_neox",
    "granite",
    "granite_swa",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "llama",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
)
