"""How a compute process waits and where its memory comes from: the environment that it must have been started with."""

from __future__ import annotations


def short_waiting() -> dict[str, str]:
    """Environment that makes OpenMP threads spin for a moment between parallel regions, then sleep.

    Several stages on one machine share its cores: a thread that spins takes one away. Long enough for the gap between
    two operations of a layer, short enough to be over when another stage's turn comes. It must be set before torch is
    imported, since the OpenMP library reads it once when it is loaded. Measured in
    `docs/decisions/0004-threads-and-waiting.md`.
    """
    return {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}


def large_pages() -> dict[str, str]:
    """Environment that makes glibc ask for huge pages (2 MiB) for what it allocates: the weights, above all.

    A decode step reads every weight once; with pages of 4 KiB a good part of that time goes into finding them. glibc
    reads it before `main`, so a process that was started without it has to start itself again. Other C libraries
    ignore it. Measured in `docs/decisions/0008-huge-pages.md`.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def worker_environment() -> dict[str, str]:
    """All that a worker's process should have been started with, unless the user chose otherwise."""
    return {**short_waiting(), **large_pages()}
