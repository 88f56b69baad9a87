"""Every error that Shardwright raises on purpose.

    ShardwrightError                 exit code 1
    ├── UserError                    2  what was asked for can't be done as asked
    │   ├── ConfigError                 a flag, environment variable or file is wrong; unknown device
    │   ├── RegistryError               workers.json can't be read or written
    │   ├── InvalidRequestError         a prompt or a parameter is out of range
    │   │   └── PromptTooLongError
    │   ├── QueueFullError              too many requests wait already; carries when to try again
    │   ├── ModelError                  the model as such
    │   │   ├── ModelNotFoundError      no such file, folder, bundled name or hub id
    │   │   ├── HubUnavailableError     the hub can't be reached
    │   │   ├── GatedModelError         the hub wants a token or an accepted licence
    │   │   ├── UnsupportedModelError   the family can't be split
    │   │   └── CheckpointError         a file is truncated, corrupt or incomplete
    │   └── PlacementError              the model fits nowhere, or there is no worker
    ├── ClusterError                 3  a worker or a link failed
    │   ├── WorkerUnreachableError
    │   ├── WorkerLostError
    │   ├── VersionMismatchError
    │   ├── StageLoadError
    │   ├── OffloadError                weights beside a worker's memory can't be written or read back
    │   ├── LinkLostError
    │   ├── AddressInUseError
    │   └── HttpServerError             an OpenAI-compatible server can't be reached, or refuses
    ├── ProtocolError                4  a peer broke the protocol
    │   ├── FrameError                  a frame lies about its dtype, shape or length
    │   └── StaleEpochError
    └── MismatchError                5  `verify` found a difference

The message says what is wrong, which one, the bound, and what to do. `exit_code` is what the command line
returns for it.
"""

from __future__ import annotations

from typing import ClassVar


class ShardwrightError(Exception):
    """Base of all errors here; the command line prints its message and exits with `exit_code`."""

    exit_code: ClassVar[int] = 1


class UserError(ShardwrightError):
    """What was asked for can't be done as asked; the message says what to change."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, an environment variable or a configuration file has a value that can't be used."""


class RegistryError(UserError):
    """The worker registry can't be read or written; it was left as it was."""


class InvalidRequestError(UserError):
    """A prompt or a parameter is out of range."""


class PromptTooLongError(InvalidRequestError):
    """A prompt can never be served: longer than the model's context or than all KV blocks."""


class QueueFullError(UserError):
    """Too many requests wait already; this one was not taken. `retry_after_s` says when there is likely to be room."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(UserError):
    """A model can't be used."""


class ModelNotFoundError(ModelError):
    """Nothing lies under the given name."""


class HubUnavailableError(ModelError):
    """The model hub can't be reached."""


class GatedModelError(ModelError):
    """The hub refuses the model without a token or an accepted licence."""


class UnsupportedModelError(ModelError):
    """The model's family can't be cut into stages."""


class CheckpointError(ModelError):
    """A weight file is truncated, corrupt or incomplete."""


class PlacementError(UserError):
    """No placement exists: no worker, or not enough memory."""


class ClusterError(ShardwrightError):
    """A worker or a link failed."""

    exit_code = 3


class WorkerUnreachableError(ClusterError):
    """No answer from a worker's address."""


class WorkerLostError(ClusterError):
    """A worker that was part of the pipeline is gone."""


class VersionMismatchError(ClusterError):
    """A worker speaks another version of the protocol."""


class StageLoadError(ClusterError):
    """A worker could not build its stage."""


class OffloadError(ClusterError):
    """Weights that a worker keeps beside its memory could not be written, or not be read back."""


class LinkLostError(ClusterError):
    """A stream between two processes broke."""


class AddressInUseError(ClusterError):
    """A port can't be listened on, because another process has it."""


class HttpServerError(ClusterError):
    """An OpenAI-compatible server, not ours to start, can't be reached, refuses, or answers what is no answer."""

    def __init__(self, message: str, *, kind: str = "no answer") -> None:
        """`kind` is the same for all errors of one kind, to count them by."""
        super().__init__(message)
        self.kind = kind


class ProtocolError(ShardwrightError):
    """A peer sent what it may not send now."""

    exit_code = 4


class FrameError(ProtocolError):
    """A tensor frame's magic, version, dtype, shape or length is wrong or over the limits."""


class StaleEpochError(ProtocolError):
    """A message names an epoch that is over."""


class MismatchError(ShardwrightError):
    """The split model's answer differs from the whole model's."""

    exit_code = 5
