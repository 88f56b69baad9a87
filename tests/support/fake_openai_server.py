"""A small OpenAI-compatible server for the tests of its clients: answers as it is told, also wrongly."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What a request gets: events of a stream, or one body."""

    events: Sequence[Any] = ()  # each an object, or text as it stands
    status: int = 200
    body: bytes | None = None  # instead of events
    headers: dict[str, str] = field(default_factory=dict)
    newline: str = "\n"
    cut_every: int = 1 << 20  # bytes of a piece on the wire
    done: bool = True
    hold_after: int | None = None  # wait for `release` before the event with this number
    delay_s: float = 0.0  # between events
    ascii: bool = False  # whether other characters are escaped in the JSON
    lose: bool = False  # close the connection in the middle of the body


def delta(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a streamed chat completion."""
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": {**content, **more}, "finish_reason": finish}]}


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, Any]:
    """The last event of a stream whose tokens are counted."""
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


def said(*pieces: str, finish: str = "stop", **how: Any) -> Answer:
    """An answer in these pieces, with a count of one token a piece."""
    events = [delta("", role="assistant"), *(delta(piece) for piece in pieces), delta(finish=finish)]
    return Answer([*events, usage(7, len(pieces))], **how)


def always(answer: Answer) -> Callable[[str, dict[str, Any]], Answer]:
    """Every request gets this."""
    return lambda _path, _body: answer


def in_turn(answers: Sequence[Answer]) -> Callable[[str, dict[str, Any]], Answer]:
    """One request after the other gets one of these."""
    left = iter(answers)
    return lambda _path, _body: next(left)


class FakeServer:
    """Runs until `close`. `answer` is asked for each request's answer with its path and body."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.models: Answer | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self.held = threading.Event()  # an answer waits for `release`
        self.broken = threading.Event()  # a client went away
        self.most_at_once = 0
        self.num_connections = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


def _handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            server.num_connections += 1
            super().setup()

        def log_message(self, *args: Any) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            default = Answer(body=json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]}).encode())
            self._send(server.models or default)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            with server.counted():
                self._send(server.answer(self.path, body))

        def _send(self, answer: Answer) -> None:
            try:
                self._write(answer)
            except OSError:
                server.broken.set()
                self.close_connection = True

        def _write(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.body is not None:
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                return
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for index, event in enumerate([*answer.events, *(["[DONE]"] if answer.done else [])]):
                if index == answer.hold_after:
                    self._wait()
                data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=answer.ascii)
                self._pieces(
                    f"data: {data}{answer.newline}{answer.newline}".encode(errors="surrogatepass"), answer.cut_every
                )
                if answer.delay_s:
                    threading.Event().wait(answer.delay_s)
            if answer.lose:
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")

        def _pieces(self, data: bytes, size: int) -> None:
            for at in range(0, len(data), size):
                piece = data[at : at + size]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()

        def _wait(self) -> None:
            """Until the test says so, or the client is gone: comments find that out."""
            server.held.set()
            while not server.release.wait(0.02):
                self._pieces(b": wait\n", 100)

    return Handler


@contextlib.contextmanager
def fake_openai(answer: Callable[[str, dict[str, Any]], Answer]) -> Iterator[FakeServer]:
    """A server on a free port for as long as the block lasts."""
    server = FakeServer(answer)
    try:
        yield server
    finally:
        server.close()
