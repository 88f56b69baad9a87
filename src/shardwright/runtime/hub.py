"""Gets a model's config, tokenizer and safetensors from the Hugging Face hub, through its own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import tqdm

from shardwright.errors import CheckpointError, GatedModelError, HubUnavailableError, ModelError, ModelNotFoundError

_TIMEOUT_S = 10
_CONFIG = "config.json"
_PATTERNS = [
    "*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "model.safetensors",
    "model-*.safetensors",
]
_SUBFOLDERS = ["*/*"]  # other formats and older copies of the same weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A hub repository's files on disk, at one commit."""

    folder: Path
    repo: str
    revision: str


def fetch_snapshot(
    repo: str, *, check_config: Callable[[str], None], progress: Callable[[str, int, int], None]
) -> Snapshot:
    """The repository's files, downloaded unless the hub's cache has them; without a network, the cache alone.

    `check_config` sees the config before any weights are downloaded. Raises `HubUnavailableError`, `GatedModelError`,
    `ModelNotFoundError`, or `CheckpointError` for a repository with pickled weights only.
    """
    cached = _ask_hub(repo)
    if cached is not None:
        return cached
    with _translated(repo):
        config = Path(hf_hub_download(repo, _CONFIG, etag_timeout=_TIMEOUT_S))
    check_config(config.read_text(encoding="utf-8"))
    with _translated(repo):
        folder = snapshot_download(
            repo,
            etag_timeout=_TIMEOUT_S,
            allow_patterns=_PATTERNS,
            ignore_patterns=_SUBFOLDERS,
            tqdm_class=_reporting_bar(repo, progress),
        )
    return _snapshot(repo, folder)


def _ask_hub(repo: str) -> Snapshot | None:
    """See what the hub has, once and without retries. Where it can't say, the cached snapshot if it is complete."""
    try:
        with _translated(repo):
            info = HfApi().model_info(repo, timeout=_TIMEOUT_S)
    except ModelError:
        try:
            folder = snapshot_download(
                repo, local_files_only=True, allow_patterns=_PATTERNS, ignore_patterns=_SUBFOLDERS
            )
        except (OSError, ValueError):
            folder = ""
        if not any(Path(folder).glob("*.safetensors")) or not folder:
            raise
        return _snapshot(repo, folder)
    _check_files(repo, [sibling.rfilename for sibling in info.siblings or ()])
    return None


def _snapshot(repo: str, folder: str) -> Snapshot:
    return Snapshot(folder=Path(folder), repo=repo, revision=Path(folder).name)


def _check_files(repo: str, names: list[str]) -> None:
    """Refuse a repository that has no usable weights before anything is downloaded."""
    if any(name.endswith(".safetensors") for name in names):
        if _CONFIG not in names:
            raise ModelNotFoundError(f"{repo}: this repository has no config.json; it is not a transformers model")
        return
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        raise CheckpointError(
            f"{repo}: its weights are pickled (.bin), which can run code when loaded; use a model with safetensors,"
            " or convert it"
        )
    if any(name.endswith(".gguf") for name in names):
        raise ModelNotFoundError(f"{repo}: it has GGUF files; download one and give its path")
    raise ModelNotFoundError(f"{repo}: this repository has no safetensors")


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """One sentence of ours for each way in which the hub can fail."""
    try:
        yield
    except GatedRepoError as exc:
        raise GatedModelError(
            f"{repo}: the hub gives this model only to those who accepted its terms; accept them at"
            f" {constants.ENDPOINT}/{repo}, then set HF_TOKEN to your access token (or run `hf auth login`)"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise ModelNotFoundError(
            f"{repo}: the hub has no such model, or it is private; check the name, and set HF_TOKEN for a private model"
        ) from exc
    except HFValidationError as exc:
        raise ModelNotFoundError(f"{repo}: not a hub id (organisation/name)") from exc
    except (httpx2.HTTPError, OSError) as exc:  # with all of the hub library's own
        raise _failure(repo, exc) from exc


def _failure(repo: str, error: Exception) -> ModelError:
    """Tell a refused token from a hub that can't be reached."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is not None and cause.response.status_code in (401, 403):
        return GatedModelError(
            f"{repo}: the hub refused the access token (HTTP {cause.response.status_code}); check HF_TOKEN"
        )
    reason = f"it answered HTTP {cause.response.status_code}" if cause is not None else _root(error)
    return HubUnavailableError(
        f"{repo}: the hub at {constants.ENDPOINT} can't be reached ({reason}) and the model is not in the local cache;"
        " check the network, or give a folder, a GGUF file, or a bundled name"
    )


def _root(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reporting_bar(repo: str, progress: Callable[[str, int, int], None]) -> type[Any]:
    """A progress bar for the hub library that draws nothing and tells the bytes written."""

    class ReportingBar(tqdm):  # type: ignore[misc]  # the library is untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes:
                self._done += int(n or 0)
                progress(repo, self._done, int(self.total or 0))

    return ReportingBar
