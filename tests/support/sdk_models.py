"""Checks values against the classes of Grafana's SDK, which are generated from Grafana's own schema."""

import enum
import json
import sys
import types
import typing

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.variants import Dataquery

register_default_plugins()  # so that panels and queries become classes of their kinds, not plain dictionaries

_OPEN = (object, typing.Any, Dataquery)  # where the class of what stands there says what may be in it
_PLAIN = {int: int, float: (int, float), str: str, bool: bool, type(None): type(None)}


def complaints(value, hint, where="it"):
    """Where a value, or anything in it, is not of the type that the schema gives its place."""
    if hint in _OPEN:
        hint = type(value)
    if isinstance(value, dict) and hasattr(hint, "from_json"):  # the SDK leaves some objects as it found them
        read = hint.from_json(value)
        if (again := json.loads(json.dumps(read, cls=JSONEncoder))) != value:
            return [f"{where}: {value} has fields that {hint.__name__} does not have, which is {again}"]
        value = read
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [part for part in parts if not _outside(value, part, where)] or parts
        return min((complaints(value, part, where) for part in fitting), key=len)
    if found := _outside(value, hint, where):
        return found
    if origin is list:
        return [each for at, item in enumerate(value) for each in complaints(item, parts[0], f"{where}[{at}]")]
    if origin is dict:
        return [each for key, item in value.items() for each in complaints(item, parts[1], f"{where}.{key}")]
    fields = {}
    if getattr(hint, "__module__", "").startswith("grafana_foundation_sdk.models") and not _is_enum(hint):
        fields = typing.get_type_hints(hint, vars(sys.modules[hint.__module__]))
    return [each for name, part in fields.items() for each in complaints(getattr(value, name), part, f"{where}.{name}")]


def _outside(value, hint, where):
    """The same of the value's own type, whatever is in it."""
    if isinstance(value, dict) and hasattr(hint, "from_json"):
        return []
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _OPEN or origin in (typing.Union, types.UnionType):
        return []
    if origin is typing.Literal:
        fits = value in parts
    elif _is_enum(hint):
        fits = value in [member.value for member in hint]
    else:
        fits = isinstance(value, _PLAIN.get(hint, origin or hint))
        fits = fits and (hint is bool or not isinstance(value, bool))
    return [] if fits else [f"{where}: {value!r} is no {hint}"]


def _is_enum(hint):
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
