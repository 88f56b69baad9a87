"""`transformers` as its users run it: one process, `generate`, one prompt after the other.

A child process of the benchmark: reads one JSON request a line on standard input, writes one answer a line.
Request: {"prompts": [[ids]], "new_tokens": n}. Answer: {"total_s", "prefill_s" (mean to the first token), "decode_s"
(mean of the rest), "tokens"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from shardwright.model.checkpoint import Checkpoint
from shardwright.model.reference import load_reference


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come; the first call is the prompt itself."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """More tokens."""
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """No more tokens."""


def main() -> None:
    """Load, say so, serve requests until the input ends."""
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    if path.suffix == ".gguf":
        # from_pretrained would keep the quantised blocks and expand them in every product; plain weights are faster
        config_json = Checkpoint.open([path]).config_json
        model = load_reference([path], config_json, torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.bfloat16)
    model.eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        prefill_s, decode_s, count = 0.0, 0.0, 0
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            streamer = FirstToken()
            start = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=request["new_tokens"],
                    min_new_tokens=request["new_tokens"],
                    do_sample=False,
                    pad_token_id=0,
                    streamer=streamer,
                )
            prefill_s += streamer.times[1] - start
            decode_s += streamer.times[-1] - streamer.times[1]
            count += output.shape[1] - len(prompt)
        total_s = time.perf_counter() - began
        num = len(request["prompts"])
        answer = {"total_s": total_s, "prefill_s": prefill_s / num, "decode_s": decode_s / num, "tokens": count}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
