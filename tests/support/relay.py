"""A TCP relay that makes of loopback a worse network: it delays, limits bandwidth, falls silent and cuts.

Tests and benchmarks put it between two processes where the kernel can't (`netem` is often missing, and needs root).
By hand, on a link to a worker, with commands (cut, silence, mend, counts) on its standard input:

    python tests/support/relay.py --to 127.0.0.1:50051 --delay-ms 20 --mbit-s 100

All connections through one relay share its line, one for each direction, as they would share a cable. What is delayed
is the data; a connection is accepted at once, since the kernel does that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

PIECE_BYTES = 16 * 1024  # with a limited bandwidth data arrives in pieces of this size, as it would in packets
BURST_BYTES = 64 * 1024
MOST_IN_TRANSIT = 16 * 1024 * 1024  # of one connection and direction; then its sender has to wait
LOOPBACK = "127.0.0.1"


class TokenBucket:
    """When bytes may leave: bandwidth on average, and up to `burst_bytes` at once after a pause.

    Instead of tokens it keeps the time at which the bucket would be full again; the two say the same.
    """

    def __init__(self, bytes_per_s: float | None, *, burst_bytes: int = BURST_BYTES) -> None:
        """None: no limit. Raises `ValueError` for a bandwidth or burst that lets nothing through."""
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}; it must be above 0, or None for no limit")
        if burst_bytes < 0:
            raise ValueError(f"burst_bytes is {burst_bytes}; it must be at least 0")
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._full_at = float("-inf")

    @property
    def is_limited(self) -> bool:
        """Whether it holds anything back."""
        return self._bytes_per_s is not None

    def leave(self, size: int, now: float) -> float:
        """Take so many bytes; gives the time at which the last of them leaves. Times only go up."""
        if self._bytes_per_s is None:
            return now
        self._full_at = max(self._full_at, now) + size / self._bytes_per_s
        return max(now, self._full_at - self._burst_bytes / self._bytes_per_s)


class _Sign(enum.Enum):
    """What travels in the line beside bytes, in its turn."""

    END = enum.auto()  # the sender will send no more
    CLOSED = enum.auto()
    RESET = enum.auto()


class _Line:
    """One direction, shared by all connections. Everything arrives in the order in which it was sent."""

    def __init__(self, delay_s: float, bucket: TokenBucket) -> None:
        self.delay_s = delay_s
        self.bucket = bucket
        self.num_bytes = 0  # that arrived
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, _End, _End, bytes | _Sign]] = deque()  # due, from, to, what
        self._last_due = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._is_silent = False

    def send(self, source: _End, target: _End, what: bytes | _Sign) -> None:
        now = self._loop.time()
        leaves = self.bucket.leave(len(what) if isinstance(what, bytes) else 0, now)
        self._last_due = max(leaves + self.delay_s, self._last_due)  # the delay may have been lowered
        self._queue.append((self._last_due, source, target, what))
        self._arm()

    def silence(self) -> None:
        self._is_silent = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def mend(self) -> None:
        self._is_silent = False
        self._arm()

    def clear(self) -> None:
        """Lose what is on its way."""
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None and self._queue and not self._is_silent:
            self._timer = self._loop.call_at(self._queue[0][0], self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._queue and self._queue[0][0] <= now:
            _, source, target, what = self._queue.popleft()
            if isinstance(what, bytes):
                self.num_bytes += len(what)
                source.in_transit -= len(what)
            target.arrive(what)
            source.let_send()
        self._arm()


class _End(asyncio.Protocol):
    """One of the two sockets of a connection: what comes in goes into its line, what arrives goes out."""

    def __init__(self, relay: Relay, line: _Line, peer: _End | None = None) -> None:
        self.in_transit = 0  # bytes from here that have not arrived yet
        self._relay = relay
        self._line = line
        self._peer = peer
        self._transport: asyncio.Transport | None = None
        self._is_full = False  # the socket takes no more for now
        self._has_ended = False  # its other side sends no more
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._relay._opened(self)
        if self._peer is None:
            transport.pause_reading()  # until there is somebody to send to
            self._relay._connect(self)
        else:
            self._peer.meet(self)

    def meet(self, peer: _End) -> None:
        """The other socket is connected."""
        self._peer = peer
        if self._is_over:
            peer.abort()
        self.let_send()

    def data_received(self, data: bytes) -> None:
        assert self._peer is not None, "reading waits for the other socket"
        self.in_transit += len(data)
        step = PIECE_BYTES if self._line.bucket.is_limited else len(data)
        for start in range(0, len(data), step):
            self._line.send(self, self._peer, data[start : start + step])
        self.let_send()

    def eof_received(self) -> bool:
        assert self._peer is not None, "reading waits for the other socket"
        self._has_ended = True
        self._line.send(self, self._peer, _Sign.END)
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._relay._closed(self)
        if self._peer is not None:
            self._line.send(self, self._peer, _Sign.CLOSED if exc is None else _Sign.RESET)

    def pause_writing(self) -> None:
        self._is_full = True
        if self._peer is not None:
            self._peer.let_send()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._peer is not None:
            self._peer.let_send()

    def let_send(self) -> None:
        """Read from the socket, or not, by how much is on its way."""
        if self._is_over or self._transport is None or self._peer is None:
            return
        if self.in_transit > MOST_IN_TRANSIT or self._peer._is_full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def arrive(self, what: bytes | _Sign) -> None:
        """Something has come to this end of the line."""
        if self._is_over or self._transport is None:
            return
        if isinstance(what, bytes):
            self._transport.write(what)
        elif what is _Sign.RESET:
            self.abort()
        elif what is _Sign.CLOSED or self._has_ended:
            self._transport.close()  # after what is still to be written
        else:
            self._transport.write_eof()

    def abort(self) -> None:
        """Reset the connection."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()


class Relay:
    """Listens on a free loopback port and passes everything on to `target` (host:port), and back. An async context.

    `delay_s` is one way, each way. `bytes_per_s` is each direction's bandwidth; None: no limit.
    """

    def __init__(
        self,
        target: str,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
        burst_bytes: int = BURST_BYTES,
        listen: str = f"{LOOPBACK}:0",
    ) -> None:
        """Raises `ValueError` for an address, delay or bandwidth that can't be."""
        if not delay_s >= 0:
            raise ValueError(f"delay_s is {delay_s}; it must be at least 0 seconds")
        self._target = _host_and_port(target)
        self._listen = _host_and_port(listen)
        self._delay_s = delay_s
        self._buckets = [TokenBucket(bytes_per_s, burst_bytes=burst_bytes) for _ in range(2)]
        self._is_cut = False
        self._ends: set[_End] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self.num_connections = 0  # that were accepted, all together

    async def __aenter__(self) -> Self:
        """Begin to listen. Raises `OSError` where the port is taken."""
        self._there, self._back = (_Line(self._delay_s, bucket) for bucket in self._buckets)
        host, port = self._listen
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self, self._there), host, port)
        self._port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """host:port to connect to."""
        return f"{self._listen[0]}:{self._port}"

    @property
    def delay_s(self) -> float:
        """One way; what is sent from now on is delayed by it, and never overtakes what was sent before."""
        return self._there.delay_s

    @delay_s.setter
    def delay_s(self, delay_s: float) -> None:
        self._there.delay_s = self._back.delay_s = delay_s

    @property
    def bytes_there(self) -> int:
        """Bytes that have arrived at the target."""
        return self._there.num_bytes

    @property
    def bytes_back(self) -> int:
        """Bytes that have arrived from it."""
        return self._back.num_bytes

    def cut(self) -> None:
        """Reset every connection, lose what is on its way, and reset new connections until `mend`."""
        self._is_cut = True
        for line in (self._there, self._back):
            line.clear()
        for end in tuple(self._ends):
            end.abort()

    def silence(self) -> None:
        """Let nothing arrive until `mend`, as behind a pulled cable: nobody is told, and what was sent waits."""
        for line in (self._there, self._back):
            line.silence()

    def mend(self) -> None:
        """End a cut or a silence. What waited arrives now."""
        self._is_cut = False
        for line in (self._there, self._back):
            line.mend()

    def _opened(self, end: _End) -> None:
        self._ends.add(end)

    def _closed(self, end: _End) -> None:
        self._ends.discard(end)

    def _connect(self, near: _End) -> None:
        if self._is_cut:
            near.abort()
            return
        self.num_connections += 1
        task = asyncio.get_running_loop().create_task(self._open(near))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open(self, near: _End) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: _End(self, self._back, near), *self._target)
        except OSError:
            near.abort()  # nobody is there: as good a sign as any


class AroundRelays:
    """A master's transport that reaches workers directly whose given address is a relay's.

    A stage is told the given address of the next stage's worker. So the relay is on the link between the workers, and
    on no link of the master's.
    """

    def __init__(self, inner: Any, workers: Mapping[str, str]) -> None:
        """`inner` is the real transport; `workers` has each worker's own address by its relay's."""
        self._inner = inner
        self._workers = dict(workers)

    def connect(self, address: str) -> Any:
        """A client of the worker behind this address."""
        return self._inner.connect(self._workers.get(address, address))

    async def serve(self, address: str, service: Any) -> Any:
        """As the real transport does."""
        return await self._inner.serve(address, service)


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address; give host:port")
    return host.strip("[]"), int(port)


# --- the command -------------------------------------------------------------------------------------


async def _run(arguments: argparse.Namespace) -> None:
    """Relay until standard input ends; it may say `cut`, `silence`, `mend`, `delay MILLISECONDS` and `counts`.

    `counts` answers with connections, bytes that went there, bytes that came back.
    """
    mbit_s = arguments.mbit_s
    relay = Relay(
        arguments.to,
        delay_s=arguments.delay_ms / 1e3,
        bytes_per_s=None if mbit_s is None else mbit_s * 1e6 / 8,
        listen=arguments.listen,
    )
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    async with relay:
        say(f"listening on {relay.address}")
        while line := await reader.readline():
            match line.decode().split():
                case ["cut"]:
                    relay.cut()
                case ["silence"]:
                    relay.silence()
                case ["mend"]:
                    relay.mend()
                case ["delay", milliseconds] if milliseconds.isdecimal():
                    relay.delay_s = int(milliseconds) / 1e3
                case ["counts"]:
                    say(f"{relay.num_connections} {relay.bytes_there} {relay.bytes_back}")
                case []:
                    pass
                case _:
                    sys.stderr.write("say cut, silence, mend, delay MILLISECONDS or counts\n")


def main() -> None:
    """Read the command line and relay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="where everything goes")
    parser.add_argument("--listen", default=f"{LOOPBACK}:0", metavar="HOST:PORT", help="default: a free port here")
    parser.add_argument("--delay-ms", type=float, default=0.0, metavar="MS", help="one way, each way")
    parser.add_argument("--mbit-s", type=float, default=None, metavar="N", help="bandwidth of each direction")
    arguments = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_run(arguments))
    except (ValueError, OSError) as exc:
        parser.error(str(exc))


if __name__ == "__main__":
    main()
