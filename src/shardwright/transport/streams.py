"""What both transports do with the two halves of a stream: parts to messages, messages to parts, and a tidy end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

from shardwright.errors import LinkLostError

Received = TypeVar("Received")
Decoded_co = TypeVar("Decoded_co", covariant=True)
Sent = TypeVar("Sent")
Item = TypeVar("Item")


class PartDecoder(Protocol[Decoded_co]):
    """Turns the parts of one stream into messages."""

    ended: bool

    def feed(self, raw: bytes) -> Decoded_co | None:
        """The message that this part completes, if it does."""
        ...


class Incoming(Generic[Received]):
    """The messages of the stream's other side.

    Ends when the other side has said that it is done. Raises `LinkLostError` when it goes away before that, and
    `ProtocolError` when it breaks the protocol; the same error again each time after that.
    """

    def __init__(self, read: Callable[[], Awaitable[bytes | None]], decoder: PartDecoder[Received]) -> None:
        self._read = read  # None: nothing more comes
        self._decoder = decoder

    def __aiter__(self) -> AsyncIterator[Received]:
        return self

    async def __anext__(self) -> Received:
        while not self._decoder.ended:
            raw = await self._read()
            if raw is None:
                raise LinkLostError("the sender of this stream went away before it was done")
            message = self._decoder.feed(raw)
            if message is not None:
                return message
        raise StopAsyncIteration


def whole(encode: Callable[[Sent], bytes]) -> Callable[[Sent], tuple[bytes]]:
    """For messages that always travel in one part."""
    return lambda message: (encode(message),)


async def send_all(
    outgoing: AsyncIterator[Sent],
    to_parts: Callable[[Sent], Iterable[bytes]],
    write: Callable[[bytes], Awaitable[None]],
) -> None:
    """Write every message, one part after the other; each waits until the transport has room for it."""
    async with closing(outgoing):
        async for message in outgoing:
            for part in to_parts(message):
                await write(part)


@asynccontextmanager
async def closing(iterator: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """Close an iterator at the end, if it is one that can be closed (a generator)."""
    try:
        yield iterator
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()


def failure_of(task: asyncio.Task[None]) -> BaseException | None:
    """What a task died of, if it did."""
    return task.exception() if task.done() and not task.cancelled() else None


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is done; its failure counts as seen."""
    task.cancel()
    await asyncio.wait((task,))
    failure_of(task)
