"""What the master's core may be told: limits and choices, frozen, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.core.pacing import MAX_GAP_RATIO
from shardwright.errors import ConfigError
from shardwright.types import Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Settings of one master's core. Raises `ConfigError` for a value that can't work."""

    block_size: int = 16  # KV positions in a block
    token_budget: int = 512  # most tokens that one step computes
    max_running: int = 64  # most sequences that hold KV blocks
    max_waiting: int | None = None  # most requests that wait for their first place; None: any number
    prompt_logprob_tokens: int = 64  # most rows of one step whose logits score a prompt: each is a whole vocabulary
    max_model_len: int | None = None  # most tokens of a sequence; None: the model's own context
    max_kv_tokens: int = 65536  # most KV positions, whatever memory there is
    min_kv_tokens: int = 1024  # a placement that leaves room for fewer is refused (where max_kv_tokens allows as many)
    workspace_bytes: int = 128 * 1024**2  # kept free on each worker for activations
    # The request that stages are balanced for; by default one decode step of one sequence.
    typical_prompt_tokens: int = 0
    typical_new_tokens: int = 1
    typical_num_sequences: int = 1  # that a decode step carries
    prefix_cache: bool = True  # reuse the KV blocks of equal prefixes
    max_steps_in_flight: int | None = None  # None: chosen from measured step times and link delays
    heartbeat_timeout_s: float = 10.0  # a worker that was heard once and is silent for longer is lost
    load_timeout_s: float = 3600.0  # from the assignments to the first token through the pipeline
    probe_interval_s: float | None = None  # an idle pipeline is tried with a token of the master's own; None: never
    gather_s: float = 0.0  # an idle pipeline waits so long for requests that come together; 0: it does not
    max_gap_ratio: float = MAX_GAP_RATIO  # most that prompts may stretch a sequence's gap between tokens, about
    recover: bool = False  # on a lost worker: place again over what is left; else end every request with an error
    max_redeploys: int = 3  # recoveries in a row without one finished step before the master gives up
    retry_after_s: float = 5.0  # with `recover`: what was given up is tried again so long after, doubled each time
    first_epoch: Epoch = 1  # above every epoch that the workers may have seen from an earlier master

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "token_budget",
            "max_running",
            "max_waiting",
            "prompt_logprob_tokens",
            "max_model_len",
            "max_kv_tokens",
            "min_kv_tokens",
            "max_steps_in_flight",
            "typical_new_tokens",
            "typical_num_sequences",
            "first_epoch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("heartbeat_timeout_s", "load_timeout_s", "probe_interval_s", "retry_after_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0 seconds")
        if not 0 <= self.gather_s <= 10:
            raise ConfigError(f"gather_s is {self.gather_s}; it must be from 0 (no waiting) to 10 seconds")
        if not self.max_gap_ratio > 1:
            raise ConfigError(f"max_gap_ratio is {self.max_gap_ratio}; it must be above 1")
        for name in ("max_redeploys", "workspace_bytes", "typical_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
