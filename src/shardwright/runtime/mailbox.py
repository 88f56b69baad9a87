"""Events on their way to one reader of the same event loop: no task, no lock, nobody waits to put one in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Items in order, then an end. Its writer sees to it that only so many are ever put in."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an item; nothing is kept behind the end."""
        if not self.is_closed:
            self._items.append(item)
            self._wake()

    def close(self) -> None:
        """Nothing more comes; what is here can still be read."""
        self.is_closed = True
        self._wake()

    def discard(self) -> None:
        """Close, and forget what was not read."""
        self._items.clear()
        self.close()

    async def get(self) -> Item | None:
        """The next item, None at the end. For one reader at a time."""
        while not self._items:
            if self.is_closed:
                return None
            assert self._waiting is None, "a mailbox has one reader"
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._items.popleft()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class MailReader(AsyncIterator[Item]):
    """Reads a mailbox to its end. Whoever stops before that gives up what the items are about.

    `give_up` is called once on the event loop: by `aclose`, also before the first item; when the reading task is
    cancelled where it waits; and when the reader is dropped unfinished, as a loop does that is left by `break`.
    """

    def __init__(self, mailbox: Mailbox[Item], give_up: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._is_over = False

    async def __anext__(self) -> Item:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._mailbox.get()
        except asyncio.CancelledError:
            self._end()
            raise
        if item is None:
            self._is_over = True
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Read no more. Does not wait; may be called twice, and after the end."""
        self._end()

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        was_closed = self._mailbox.is_closed
        self._mailbox.discard()  # a task that still waits for an item gets the end
        if not was_closed:
            self._give_up()

    def __del__(self) -> None:
        if not self._is_over and not self._mailbox.is_closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_up)
