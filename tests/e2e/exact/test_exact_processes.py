"""The command as anyone can run it to check us: real processes, real sockets, one JSON object a prompt."""

import json
import os
import subprocess
import sys
import time
import uuid

import psutil
import pytest
from tiny_models import greedy_answer

KEYS = ["prompt_ids", "token_ids", "text", "finish_reason", "stages", "prefill_s", "decode_s"]
PROMPTS = [[5, 17, 3], [99], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
MARK = "SHARDWRIGHT_TEST_MARK"


def marked_processes(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
def test_three_worker_processes_print_transformers_tokens_and_leave_nothing_behind(make_whole, tmp_path):
    whole = make_whole("gemma2")
    mark = uuid.uuid4().hex
    command = [
        *(sys.executable, "-m", "shardwright", "generate", "--model", str(whole.folder), "--local-workers", "3"),
        *("--dtype", "float32", "--max-new-tokens", "16", "--json", "--ignore-eos", "--token-budget", "8"),
        *("--cache-dir", str(tmp_path / "cache")),
        *(part for prompt in PROMPTS for part in ("--prompt-ids", ",".join(map(str, prompt)))),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 5.0
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []

    lines = done.stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer) == KEYS
        assert answer["prompt_ids"] == prompt
        assert answer["token_ids"] == greedy_answer(whole.model, prompt, 16)
        assert answer["text"] == ""  # the model comes without a tokenizer
        assert answer["finish_reason"] == "length"
        assert [list(stage) for stage in answer["stages"]] == [["worker", "start", "end"]] * 3
        assert [stage["start"] for stage in answer["stages"]] == [0, *(s["end"] for s in answer["stages"][:2])]
        assert answer["stages"][-1]["end"] == whole.model.config.num_hidden_layers
        assert len({stage["worker"] for stage in answer["stages"]}) == 3
        assert answer["prefill_s"] > 0.0
        assert answer["decode_s"] > 0.0
