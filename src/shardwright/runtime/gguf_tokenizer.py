"""Turns the vocabulary inside a GGUF file into tokenizer files, once, and keeps them.

`transformers` reads a GGUF's tokenizer through an object for every metadata value: up to a gigabyte and tens of
seconds for a vocabulary of a quarter of a million. That happens in a process of its own and the first time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT_S = 600.0
_SCRIPT = """
import sys
from transformers import AutoTokenizer
folder, name, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
"""


def tokenizer_folder(gguf: Path, *, header_bytes: int, cache_dir: Path) -> Path | None:
    """A folder with the tokenizer of a GGUF file whose first `header_bytes` hold its metadata.

    None where `transformers` can't make one, or where the cache can't be written: then whoever loads the tokenizer
    from the GGUF itself learns why.
    """
    with gguf.open("rb") as stream:
        digest = hashlib.sha256(stream.read(header_bytes)).hexdigest()
    kept = cache_dir / "tokenizers" / f"{digest[:32]}-{importlib.metadata.version('transformers')}"
    if kept.is_dir():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".make-", dir=kept.parent) as work:
            made = Path(work) / "tokenizer"
            command = [sys.executable, "-c", _SCRIPT, str(gguf.absolute().parent), gguf.name, str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)  # noqa: S603  a fixed command
            with contextlib.suppress(OSError):  # another process may have been quicker
                made.rename(kept)
    except (OSError, subprocess.SubprocessError):
        return None
    return kept if kept.is_dir() else None
