"""Makes the tokenizer files that a master can read with little memory, once for each model, and keeps them.

`transformers.AutoTokenizer` knows how to read every kind of tokenizer, but it takes up to a gigabyte and tens of
seconds for a vocabulary of a quarter of a million. So it runs in a process of its own, the first time only
(`tokenizer_convert`), and leaves a folder that the `tokenizers` library reads alone: the tokenizer, and beside it what
`transformers` adds to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shardwright.errors import ModelError
from shardwright.model.vocabulary import VERSION as VOCABULARY_VERSION
from shardwright.runtime.stoppable import StoppedError

FACTS_FILE = "shardwright.json"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocabulary.bin"

_FORMAT = 3  # of the folders; another number makes them anew
_READ_SUFFIXES = frozenset({".json", ".jinja", ".model", ".tiktoken", ".txt"})
_TEMPLATE_FOLDER = "additional_chat_templates"
_TIMEOUT_S = 600.0
_POLL_S = 0.05


def tokenizer_folder(gguf: Path, *, header_bytes: int, cache_dir: Path) -> Path | None:
    """A folder with the tokenizer of a GGUF file whose first `header_bytes` hold its metadata.

    None where `transformers` can't make one, or where the cache can't be written: then whoever loads the tokenizer
    from the GGUF itself learns why.
    """
    with gguf.open("rb") as stream:
        digest = hashlib.sha256(stream.read(header_bytes)).hexdigest()
    with contextlib.suppress(OSError, ModelError):
        return _kept(gguf, digest, cache_dir, stop=None)
    return None


@contextlib.contextmanager
def converted(source: Path, *, cache_dir: Path, stop: threading.Event | None = None) -> Iterator[Path]:
    """A folder that `tokenizer_convert` made of a model's folder or GGUF file; of such a folder, itself.

    It is kept in the cache, if that can be written. Raises `ModelError` for a tokenizer that can't be read, and
    `StoppedError` soon after `stop` is set.
    """
    if (source / FACTS_FILE).is_file():
        yield source
        return
    try:
        ready = None if source.is_file() else _kept(source, _folder_digest(source), cache_dir, stop=stop)
    except OSError:
        ready = None
    if ready is not None:
        yield ready
        return
    with tempfile.TemporaryDirectory(prefix="shardwright-tokenizer-") as work:
        made = Path(work) / "tokenizer"
        _convert(source, made, stop)
        yield made


def _kept(source: Path, digest: str, cache_dir: Path, *, stop: threading.Event | None) -> Path:
    """The converted folder in the cache, made if it isn't there. Raises `OSError` where it can't be written."""
    version = importlib.metadata.version("transformers")
    kept = cache_dir / "tokenizers" / f"{digest[:32]}-{version}-{_FORMAT}-{VOCABULARY_VERSION}"
    if (kept / FACTS_FILE).is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make-", dir=kept.parent) as work:
        made = Path(work) / "tokenizer"
        _convert(source, made, stop)
        with contextlib.suppress(OSError):  # another process may have been quicker
            made.rename(kept)
    if not (kept / FACTS_FILE).is_file():
        raise FileNotFoundError(kept)
    return kept


def _folder_digest(folder: Path) -> str:
    """A hash of all small files that a tokenizer may be read from. The index of the weights is none of them."""
    digest = hashlib.sha256()
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATE_FOLDER}/*")]):
        if path.suffix in _READ_SUFFIXES and not path.name.endswith(".index.json") and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\n{len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _convert(source: Path, target: Path, stop: threading.Event | None) -> None:
    """Run `tokenizer_convert`. Raises `ModelError` with its reason when it fails."""
    module = "shardwright.runtime.tokenizer_convert"
    command = [sys.executable, "-m", module, str(source.absolute()), str(target)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,  # noqa: S603  a fixed command
    ):
        try:
            _wait(process, stop)
        finally:
            process.kill()
        if process.returncode == 0:
            return
        log.seek(0)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    raise ModelError(
        f"{source}: the tokenizer can't be read ({lines[-1] if lines else 'it gave no reason'}); "
        "give token ids with --prompt-ids, or add the model's tokenizer files"
    )


def _wait(process: subprocess.Popen[bytes], stop: threading.Event | None) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        if stop is not None and stop.is_set():
            raise StoppedError
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL_S)
            return
    raise ModelError(f"the tokenizer could not be converted within {_TIMEOUT_S / 60:.0f} minutes")
