"""Writes plain values as YAML. Knows just enough of it: blocks of mappings and lists, every string quoted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

_HIDDEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # which JSON leaves as they are, and YAML forbids


def to_yaml(value: Mapping[str, object]) -> str:
    """The mapping as a YAML document.

    A quoted string of JSON is one of YAML too, so that nothing in a query or a sentence needs care.
    """
    return "".join(f"{line}\n" for line in _lines(value))


def _lines(value: object) -> Iterator[str]:
    match value:
        case Mapping() if value:
            for key, item in value.items():
                yield from _entry(f"{key}:", item)
        case list() | tuple() if value:
            for item in value:
                first, *rest = _lines(item)
                yield f"- {first}"
                yield from (f"  {line}" for line in rest)
        case _:
            yield _scalar(value)


def _entry(head: str, item: object) -> Iterator[str]:
    if item and isinstance(item, Mapping | Sequence) and not isinstance(item, str):
        yield head
        yield from (f"  {line}" for line in _lines(item))
    else:
        yield f"{head} {_scalar(item)}"


def _scalar(value: object) -> str:
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
