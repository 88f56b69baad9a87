"""Tells whether a model's output can be held to a grammar, before a request is queued. May be called in any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from shardwright.errors import InvalidRequestError
from shardwright.types import Grammar

if TYPE_CHECKING:
    from shardwright.model.grammar import GrammarCompiler


class GrammarCheck:
    """Compiles grammars as the last stage will, with the same vocabulary, which is read when the first one comes."""

    def __init__(self, read_vocabulary: Callable[[], bytes], *, vocab_size: int) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._is_read = False
        self._compiler: GrammarCompiler | None = None

    def __call__(self, grammar: Grammar) -> None:
        """Raises `InvalidRequestError` with the reason when the grammar can't be followed."""
        compiler = self._get_compiler()
        if compiler is None:
            raise InvalidRequestError(
                "this model's tokens don't stand for bytes of their own, so its output can't be held to a grammar"
            )
        compiler.check(grammar)

    def _get_compiler(self) -> GrammarCompiler | None:
        with self._lock:
            if not self._is_read:
                from shardwright.model.grammar import GrammarCompiler
                from shardwright.model.vocabulary import decode_vocabulary

                blob = self._read_vocabulary()
                self._is_read = True
                if blob:
                    self._compiler = GrammarCompiler(decode_vocabulary(blob).first(self._vocab_size))
            return self._compiler
