"""Starts again what was not started as it needs to be: with a Python that has the dependencies, with variables set.

Standard library only, and no syntax newer than Python 3.7: whatever `python3` is must get as far as a clear sentence.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

NEEDED = (
    "torch", "transformers", "tokenizers", "safetensors", "gguf", "grpc", "typer", "rich", "psutil", "fastapi",
    "uvicorn", "pydantic", "prometheus_client", "llguidance", "httpx", "prompt_toolkit",
)  # fmt: skip
OLDEST = (3, 11)


def use_project_python(root: Path, script: str) -> None:
    """Return if this interpreter can run Shardwright; else run the script again with `.venv`'s, or say what to do.

    Puts `src` on the path of this process and of its children, so that the checkout's own code runs.
    """
    missing = _missing()
    if not missing:
        source = str(root / "src")
        inherited = os.environ.get("PYTHONPATH", "")
        if source not in inherited.split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (source, inherited) if part)
        return
    prepared = root / ".venv" / "bin" / "python"
    # `.venv`'s own interpreter must not start itself again and again when the environment is incomplete.
    if prepared.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        os.execv(str(prepared), [str(prepared), str(root / script), *sys.argv[1:]])  # noqa: S606
    sys.stderr.write(f"error: {missing} is missing; run `make venv` in {root} first, then try again\n")
    sys.exit(2)


def start_with(environ: Mapping[str, str]) -> None:
    """Return if this process was started with these variables, or with other values that the user gave them; else start
    it again with them: the C library and OpenMP read them once, before any line of ours.

    The process id, the standard streams and the arguments stay.
    """
    missing = {name: value for name, value in environ.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})  # noqa: S606


def _missing() -> str:
    """What this interpreter lacks, or an empty string."""
    if sys.version_info < OLDEST:
        return "Python 3.11 or newer"
    return ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)
