"""Reads a tokenizer with `transformers` and writes it so that the `tokenizers` library can read it alone.

Runs as a process of its own: `python -m shardwright.runtime.tokenizer_convert SOURCE TARGET`, see `tokenizer_files`.
TARGET is a folder with `tokenizer.json`, the other files of `save_pretrained`, `shardwright.json` (what `transformers`
does beside the `tokenizers` library, as data) and `vocabulary.bin` (the bytes of all tokens).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shardwright.runtime.tokenizer import Tokenizer, clean_up
from shardwright.runtime.tokenizer_files import FACTS_FILE, TOKENIZER_FILE, VOCABULARY_FILE

_OWN_METHODS = (
    *(
        "__call__",
        "encode",
        "_encode_plus",
        "_convert_encoding",
        "set_truncation_and_padding",
        "prepare_for_tokenization",
    ),
    *("decode", "_decode", "convert_tokens_to_string", "clean_up_tokenization"),
    *("apply_chat_template", "get_chat_template", "special_tokens_map"),
)  # where a family's class has its own, the tokenizer alone does not do what the class does
_PROBES = (
    "",
    "Hello, world!  Two  spaces,\ttabs\nand lines\r\n\r\n",
    " leading and trailing ",
    "don't , 've . ' quotes ' n't ? !",
    "안녕하세요 日本語 Ünïcödé Ελληνικά עברית ﬁ e\u0301 \u200d 👩‍👩‍👧 🏳️‍🌈 \U00010348 \x00\x7f",
    "def f(x):\n    return x ** 2  # 12345678",
)


def convert(source: Path, target: Path) -> None:
    """Write the tokenizer of a model's folder or GGUF file into the folder `target`.

    Raises what `transformers` raises for a tokenizer that it can't read.
    """
    from transformers import AutoTokenizer

    if source.is_dir():
        inner = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    else:
        inner = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    inner.save_pretrained(str(target))
    reason = _why_not_alone(inner)
    if not reason:
        _write_tokenizer(inner.backend_tokenizer, target / TOKENIZER_FILE)
        reason = _difference(inner, target / TOKENIZER_FILE)
    end = inner.eos_token_id
    facts = {
        "alone": not reason,
        "reason": reason,
        "chat_template": inner.chat_template,
        "special_tokens": inner.special_tokens_map,
        "end_id": None if end is None else int(end),
        "cleans_up": not reason and _cleans_up(inner),
        "splits_special_tokens": bool(inner.split_special_tokens),
    }
    (target / FACTS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    if not reason:
        made = Tokenizer.load(folder=target, gguf=None, cache_dir=target)
        (target / VOCABULARY_FILE).write_bytes(made.vocabulary())


def _why_not_alone(inner: Any) -> str:
    """Why the `tokenizers` library alone can't stand for this tokenizer; empty when it can."""
    from transformers import TokenizersBackend

    if not isinstance(inner, TokenizersBackend):
        return f"{type(inner).__name__} is written in Python"
    for name in _OWN_METHODS:
        if getattr(type(inner), name, None) is not getattr(TokenizersBackend, name, None):
            return f"{type(inner).__name__} has its own {name}"
    return ""


def _cleans_up(inner: Any) -> bool:
    """Whether decoding takes spaces before punctuation away."""
    if not inner.clean_up_tokenization_spaces:
        return False
    is_bpe = type(inner.backend_tokenizer.model).__name__ == "BPE"
    return not is_bpe or bool(inner.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)


def _write_tokenizer(backend: Any, path: Path) -> None:
    """Write the tokenizer so that it loads with little memory.

    Reading merges that are pairs takes twice the memory of the finished tokenizer; written as one string each, with a
    space between, they mean the same unless a token has a space in it.
    """
    backend.no_truncation()
    backend.no_padding()
    content = json.loads(backend.to_str())
    merges = content["model"].get("merges")
    if merges and all(isinstance(merge, list) and not any(" " in part for part in merge) for merge in merges):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _difference(inner: Any, path: Path) -> str:
    """How the written tokenizer differs from the one it was written from; empty when it doesn't."""
    from tokenizers import Tokenizer as Library

    written = Library.from_file(str(path))
    written.encode_special_tokens = inner.split_special_tokens
    names = " ".join(token.content for token in written.get_added_tokens_decoder().values() if token.special)[:2000]
    cleans_up = _cleans_up(inner)
    for probe in (*_PROBES, f"Hello {names} world"):
        for add_special in (True, False):
            ids = inner(probe, add_special_tokens=add_special)["input_ids"]
            if list(written.encode(probe, add_special_tokens=add_special).ids) != list(ids):
                return f"written out, it gives other tokens for {probe!r}"
            for skip in (True, False):
                text = written.decode(ids, skip_special_tokens=skip)
                if (clean_up(text) if cleans_up else text) != inner.decode(ids, skip_special_tokens=skip):
                    return f"written out, it gives another text for {ids}"
    return ""


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
