"""Writes answers' parts as JSON text. What is the same in all chunks of a stream is made once for each choice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from json.encoder import encode_basestring as quote
from typing import Any

from shardwright.engine import ScoredToken


def token_text(data: bytes) -> str:
    """A token's text; of a token that is a part of a character its bytes in hex, as OpenAI writes them."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokens: Iterable[ScoredToken]) -> dict[str, Any]:
    """The logprobs object of a chat's choice."""
    content = []
    for token in tokens:
        entry = _chat_entry(token.data, token.logprob or 0.0)
        entry["top_logprobs"] = [_chat_entry(data, logprob) for _, data, logprob in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what can't be."""
    return max(logprob, -9999.0)


class CompletionLogprobs:
    """Makes the logprobs object of a completion's choice, piece by piece; counts the offsets."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0

    def take(self, text: str, tokens: Iterable[ScoredToken]) -> dict[str, Any]:
        """The object for the next piece of text and its tokens."""
        texts: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        position, data = 0, b""
        for token in tokens:
            offsets.append(self._offset + position)
            texts.append(token_text(token.data))
            logprobs.append(None if token.logprob is None else _finite(token.logprob))
            tops.append(self._top(token))
            data += token.data
            try:
                piece = data.decode("utf-8")
            except UnicodeDecodeError:
                continue  # the tokens of one character share its offset
            data = b""
            # Special tokens are not in the text, nor is the space that some tokenizers put before its first word.
            for shown in (piece, piece.lstrip()):
                if text.startswith(shown, position):
                    position += len(shown)
                    break
        self._offset += len(text)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top = {token_text(data): _finite(logprob) for _, data, logprob in token.top[: self._num_top]}
        # OpenAI's form: the token itself is always there.
        top.setdefault(token_text(token.data), _finite(token.logprob))
        return top


class ChunkWriter:
    """Writes the chunks of one stream."""

    def __init__(self, *, answer_id: str, kind: str, created: int, model: str, include_usage: bool) -> None:
        self._head = (
            f'data: {{"id":{quote(answer_id)},"object":{quote(kind)},"created":{created},"model":{quote(model)},'
            '"choices":['
        )
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._plain = f',"logprobs":null,"finish_reason":null}}{self._tail}'
        self._chat_heads: dict[int, str] = {}
        self._text_heads: dict[int, str] = {}

    def chat_text(self, index: int, text: str) -> bytes:
        """More text of a chat's choice: the chunk of nearly every token."""
        head = self._chat_heads.get(index)
        if head is None:
            head = self._chat_heads[index] = f'{self._head}{{"index":{index},"delta":{{"content":'
        return f"{head}{quote(text)}}}{self._plain}".encode()

    def chat(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None) -> bytes:
        """Any other chunk of a chat."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return f"{self._head}{_json(choice)}{self._tail}".encode()

    def text(self, index: int, text: str) -> bytes:
        """More text of a completion's choice."""
        head = self._text_heads.get(index)
        if head is None:
            head = self._text_heads[index] = f'{self._head}{{"index":{index},"text":'
        return f"{head}{quote(text)}{self._plain}".encode()

    def completion(self, index: int, text: str, *, logprobs: Any = None, finish: str | None = None) -> bytes:
        """Any other chunk of a completion."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return f"{self._head}{_json(choice)}{self._tail}".encode()

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream that tells its usage."""
        return f'{self._head}],"usage":{_json(usage)}}}\n\n'.encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
