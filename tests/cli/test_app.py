"""The entry: help that is quick, a version, usage errors that exit with 2."""

import json
import subprocess
import sys

import pytest

import shardwright

COMMANDS = ("worker", "register", "workers", "plan", "generate", "verify", "cache")


def test_help_names_every_command_and_shows_examples(run_cli):
    outcome = run_cli("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.out
    assert "shardwright register --ip 192.168.1.101 --username worker1" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run_cli, command):
    outcome = run_cli(command, "--help")
    assert outcome.code == 0
    assert f"Usage: shardwright {command}" in outcome.out


def test_the_version_is_the_packages(run_cli):
    outcome = run_cli("--version")
    assert (outcome.code, outcome.out) == (0, f"shardwright {shardwright.__version__}\n")


@pytest.mark.parametrize("argv", [("--help",), ("generate", "--help"), ("workers",)])
def test_nothing_heavy_is_imported_before_it_is_needed(argv, tmp_path):
    """Help must come at once; torch alone takes seconds to import."""
    code = (
        "import json, sys\n"
        "from shardwright.cli.app import main\n"
        f"code = main({list(argv)!r})\n"
        "heavy = sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'grpc', 'numpy', 'huggingface_hub', 'safetensors'})\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


@pytest.mark.parametrize(
    "argv", [("generat",), ("generate", "--no-such-option"), ("register",), ("worker", "--port", "x")]
)
def test_a_usage_error_exits_with_2_and_no_traceback(run_cli, argv):
    outcome = run_cli(*argv)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_the_module_runs_like_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "shardwright", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"shardwright {shardwright.__version__}\n"


def test_a_settings_file_with_an_unknown_key_is_refused_by_name(run_cli, tmp_path):
    (tmp_path / "shardwright.toml").write_text("[master]\nregistri = 'x'\n")
    outcome = run_cli("workers")
    assert outcome.code == 2
    assert "[master] has no setting 'registri'; known: block_size" in outcome.err


def test_the_environment_and_the_settings_file_are_read(run_cli, tmp_path, monkeypatch):
    (tmp_path / "shardwright.toml").write_text("[master]\nregistry = 'from-file.json'\n")
    assert "from-file.json lists no worker" in run_cli("workers").err
    monkeypatch.setenv("SHARDWRIGHT_REGISTRY", "from-environment.json")
    assert "from-environment.json lists no worker" in run_cli("workers").err
    assert "flag.json lists no worker" in run_cli("workers", "--registry", "flag.json").err
