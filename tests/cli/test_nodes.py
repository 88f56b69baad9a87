"""The two scripts in the root run with whatever `python3` there is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = [sys.executable, "-I", "-S"]  # an interpreter that has none of the dependencies


@pytest.mark.parametrize("script", ["worker_node.py", "master_node.py"])
def test_the_scripts_show_their_help_from_any_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"Usage: {script}" in done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A checkout without an environment of its own."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    for script in ("worker_node.py", "master_node.py"):
        (tmp_path / script).write_text((ROOT / script).read_text())
    return tmp_path


def run_bare(checkout, script="worker_node.py", *argv):
    return subprocess.run([*BARE, checkout / script, *argv], capture_output=True, text=True, check=False)


def test_without_dependencies_or_environment_it_says_what_to_do(checkout):
    done = run_bare(checkout)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch, transformers")
    assert f"run `make venv` in {checkout} first" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["worker_node.py", "master_node.py"])
def test_without_dependencies_the_environment_beside_the_script_is_used(checkout, script):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "in the environment: $*"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = run_bare(checkout, script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"in the environment: {checkout / script} --help")
    assert f"Usage: {script}" in done.stdout


def test_an_incomplete_environment_does_not_start_itself_for_ever(checkout):
    """The environment's own interpreter lacks torch too: one sentence, not a loop."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*BARE, checkout / "worker_node.py"], capture_output=True, text=True, check=False, timeout=60, env=clean
    )
    assert done.returncode == 2
    assert "run `make venv`" in done.stderr


@pytest.mark.parametrize("path", ["worker_node.py", "master_node.py", "src/shardwright/cli/bootstrap.py"])
def test_an_old_python_can_read_the_scripts(path):
    """So that it gets as far as the sentence about Python 3.11."""
    ast.parse((ROOT / path).read_text(), feature_version=(3, 7))


def test_only_the_standard_library_is_imported_before_the_check():
    tree = ast.parse((ROOT / "src/shardwright/cli/bootstrap.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= set(sys.stdlib_module_names)
