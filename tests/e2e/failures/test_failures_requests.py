"""What can't be done as asked: each time one sentence, an exit code of 2 or above, and nothing left running."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import greedy_answer, prompt_of

PROMPT = prompt_of(9, seed=1)
IDS = ",".join(map(str, PROMPT))


def ids_of(length):
    return ",".join(map(str, prompt_of(length, seed=2)))


@pytest.fixture
def generate(master, cluster, tiny):
    """`generate` on the registered workers with the tiny model; options come after and win."""

    def run(*options):
        return master("generate", "--registry", cluster.registry, "--model", tiny.folder, "--json", *options)

    return run


@pytest.fixture
def serves(generate, tiny):
    """Whether the workers still give the whole model's answer."""

    def check():
        good = generate("--prompt-ids", IDS, "--max-new-tokens", 6, "--ignore-eos")
        assert good.code == 0, good.err
        assert json.loads(good.out)["token_ids"] == greedy_answer(tiny.model, PROMPT, 6)

    return check


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(generate, error_of, prompt):
    outcome = generate(prompt)
    assert (outcome.code, error_of(outcome)) == (2, "the prompt is empty; give it some text")


def test_prompts_that_can_never_be_served_are_refused_and_the_others_answered(generate, error_of, serves):
    """Longer than all KV blocks, and outside the vocabulary; the prompt between them gets its answer."""
    outcome = generate(
        *("--kv-tokens", 512, "--max-new-tokens", 3, "--ignore-eos"),
        *("--prompt-ids", ids_of(600), "--prompt-ids", IDS, "--prompt-ids", "5,151"),
    )
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    too_long, good, unknown = map(json.loads, outcome.out.splitlines())
    assert too_long["finish_reason"] == unknown["finish_reason"] == "error"
    assert "600" in too_long["error"]
    assert "512" in too_long["error"]
    assert unknown["error"] == "token id 151 is outside the model's vocabulary of 151"
    assert len(good["token_ids"]) == 3
    serves()


def test_a_prompt_longer_than_the_context_is_refused(generate, error_of):
    outcome = generate("--prompt-ids", ids_of(32769))
    assert outcome.code == 2
    assert "32768" in error_of(outcome)
    assert "32769" in error_of(outcome)


def test_an_unknown_device_of_local_workers_is_refused(master, tiny, error_of):
    outcome = master("generate", "--model", tiny.folder, "--local-workers", 1, "--device", "tpu", "--prompt-ids", IDS)
    assert outcome.code >= 2
    assert "device is 'tpu'; choose auto, cpu, cuda" in error_of(outcome)


def test_a_worker_refuses_an_unknown_device(master, error_of):
    outcome = master("worker", "--port", 0, "--device", "tpu")
    assert outcome.code == 2
    assert "device is 'tpu'" in error_of(outcome)


def test_a_missing_model_is_named(master, cluster, error_of):
    outcome = master("generate", "--registry", cluster.registry, "--model", "./nowhere", "--prompt-ids", IDS)
    assert outcome.code == 2
    assert "./nowhere" in error_of(outcome)


def test_an_unsupported_family_is_named_with_those_that_work(master, cluster, error_of, tmp_path):
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}', encoding="utf-8")
    save_file({"backbone.embeddings.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    outcome = master("generate", "--registry", cluster.registry, "--model", folder, "--prompt-ids", IDS)
    assert outcome.code == 2
    assert "mamba" in error_of(outcome)
    assert "llama" in error_of(outcome)


def test_a_truncated_checkpoint_is_named(master, cluster, tiny, error_of, tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    whole = (tiny.folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    outcome = master("generate", "--registry", cluster.registry, "--model", folder, "--prompt-ids", IDS)
    assert outcome.code == 2
    assert "model.safetensors" in error_of(outcome)
    assert "1000" in error_of(outcome)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(generate, tiny, error_of, tmp_path, serves):
    folder = tmp_path / "incomplete"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    tensors = load_file(tiny.folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    outcome = generate("--prompt-ids", IDS, "--model", folder)
    assert outcome.code == 2
    assert "model.layers.3.mlp.up_proj.weight" in error_of(outcome)
    serves()


def test_a_registry_that_is_not_json_is_named(master, tiny, error_of, tmp_path):
    registry = tmp_path / "workers.json"
    registry.write_text("worker1 = 10.0.0.1\n", encoding="utf-8")
    outcome = master("generate", "--model", tiny.folder, "--prompt-ids", IDS)
    assert outcome.code == 2
    assert "workers.json: line 1, column 1: not JSON" in error_of(outcome)
    assert registry.read_text(encoding="utf-8") == "worker1 = 10.0.0.1\n"


def test_a_hub_that_cannot_be_reached_is_named(processes, error_of, tmp_path):
    """The default model with a hub at a port where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environ = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        run = processes.run(
            "generate", "--model", "google/gemma-2b", "--local-workers", 1, "--cache-dir", tmp_path / "cache",
            "--prompt-ids", IDS, **environ,
        )  # fmt: skip
        code = run.wait()
    assert code == 2
    assert "google/gemma-2b" in error_of(run)
    assert not run.descendants()


def test_a_model_that_fits_nowhere_is_refused_before_anything_is_sent(processes, master, tiny, error_of, tmp_path):
    """The message has what is needed and what there is."""
    [(_, port)] = processes.workers(1, "--memory-gib", 0.0001, "--cache-dir", tmp_path / "cache")
    registry = tmp_path / "workers.json"
    registry.write_text(json.dumps([{"username": "small", "ip": "127.0.0.1", "port": port}]), encoding="utf-8")
    outcome = master("generate", "--model", tiny.folder, "--prompt-ids", IDS)
    assert outcome.code == 2
    assert "needs" in error_of(outcome)
    assert "the largest (small) offers 0.01 GiB, the 1 worker together 0.01 GiB" in error_of(outcome)


def test_an_unreachable_worker_is_named(master, tiny, error_of, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        registry = tmp_path / "workers.json"
        registry.write_text(json.dumps([{"username": "away", "ip": "127.0.0.1", "port": port}]), encoding="utf-8")
        outcome = master("generate", "--model", tiny.folder, "--prompt-ids", IDS)
    assert outcome.code == 3
    assert f"127.0.0.1:{port}" in error_of(outcome)


def test_nothing_is_written_where_nothing_was_done(master, tiny, tmp_path):
    """A command that failed leaves no metrics and no registry behind."""
    assert master("generate", "--model", tiny.folder, "--prompt-ids", IDS).code == 2
    assert list(tmp_path.glob("*.json")) == []
