"""Finds a Python that has Shardwright's dependencies, for the scripts in the repository's root.

Standard library only, and no syntax newer than Python 3.7: whatever `python3` is must get as far as a clear sentence.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "grpc", "typer", "rich", "psutil")
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


def _missing() -> str:
    """What this interpreter lacks, or an empty string."""
    if sys.version_info < OLDEST:
        return "Python 3.11 or newer"
    return ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)
