# ruff: noqa: INP001  # a script, not a package
"""Fills the tables of `docs/protocol.md` from `inference.proto`, `limits.py` and the transport's settings.

python tools/generate_protocol_doc.py           writes them
python tools/generate_protocol_doc.py --check   writes nothing; exits with 1 if they are out of date
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

from shardwright.transport import carried_errors, grpc_options
from shardwright.types import PROTOCOL_VERSION
from shardwright.wire import limits
from shardwright.wire.frames import FRAME_MAGIC, FRAME_VERSION, ITEM_BYTES

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
DOCUMENT = ROOT / "docs" / "protocol.md"
PROTO = "shardwright/wire/inference.proto"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Generate, then write or compare."""
    parser = argparse.ArgumentParser(description="Fill the tables of docs/protocol.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the committed tables are up to date")
    arguments = parser.parse_args()
    old = DOCUMENT.read_text()
    new = fill(old)
    if not arguments.check:
        DOCUMENT.write_text(new)
    elif new != old:
        sys.exit("docs/protocol.md is out of date; run `python tools/generate_protocol_doc.py`")


def fill(text: str) -> str:
    """The document with every generated block made anew."""
    proto = Comments(read_proto())
    blocks = {
        "methods": lambda: methods(proto),
        "messages": lambda: messages(proto),
        "limits": limit_rows,
        "constants": constants,
        "errors": error_kinds,
    }
    found = {match[2] for match in BLOCK.finditer(text)}
    if found != set(blocks):
        sys.exit(f"docs/protocol.md has the blocks {sorted(found)}; expected {sorted(blocks)}")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(blocks[match[2]]()) + f"\n\n{match[3]}", text)


def read_proto() -> FileDescriptorProto:
    """The proto with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "descriptors"
        status = protoc.main(
            ["protoc", f"-I{SOURCES}", f"--descriptor_set_out={output}", "--include_source_info", PROTO]
        )
        if status != 0:
            sys.exit(f"protoc failed with status {status} on {PROTO}")
        return FileDescriptorSet.FromString(output.read_bytes()).file[0]


class Comments:
    """A proto file, and the comment of each of its parts by path (see `SourceCodeInfo` in descriptor.proto)."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self._by_path = {
            tuple(location.path): " ".join((location.leading_comments or location.trailing_comments).split())
            for location in file.source_code_info.location
        }

    def of(self, *path: int) -> str:
        """The comment above or behind the part, empty if there is none."""
        return self._by_path.get(path, "").replace("|", "\\|")


def methods(proto: Comments) -> Iterator[str]:
    """A row for each method of the service."""
    yield "| Method | In | Out | Meaning |"
    yield "|---|---|---|---|"
    for number, method in enumerate(proto.file.service[0].method):
        taken = _kind(method.input_type, stream=method.client_streaming)
        given = _kind(method.output_type, stream=method.server_streaming)
        yield f"| `{method.name}` | {taken} | {given} | {proto.of(6, 0, 2, number)} |"


def messages(proto: Comments) -> Iterator[str]:
    """A table for each message, then one for each enum."""
    for number, message in enumerate(proto.file.message_type):
        yield from _message(proto, number, message)
    for number, enum in enumerate(proto.file.enum_type):
        yield from _enum(proto, number, enum)


def _message(proto: Comments, number: int, message: DescriptorProto) -> Iterator[str]:
    yield f"#### {message.name}"
    yield ""
    if comment := proto.of(4, number):
        yield comment
        yield ""
    if not message.field:
        yield "No fields."
        yield ""
        return
    yield "| No. | Field | Type | |"
    yield "|---|---|---|---|"
    for index, field in enumerate(message.field):
        yield f"| {field.number} | `{field.name}` | {_type(field, message)} | {proto.of(4, number, 2, index)} |"
    yield ""


def _enum(proto: Comments, number: int, enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"#### {enum.name}"
    yield ""
    if comment := proto.of(5, number):
        yield comment
        yield ""
    yield ", ".join(f"`{value.name}` = {value.number}" for value in enum.value) + "."
    yield ""


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    name = field.type_name.rpartition(".")[2] or FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of {message.oneof_decl[field.oneof_index].name}"
    return name


def _kind(type_name: str, *, stream: bool) -> str:
    return f"{'stream of ' if stream else ''}`{type_name.rpartition('.')[2]}`"


def limit_rows() -> Iterator[str]:
    """A row for each constant of `limits.py`, with the sentence below it."""
    yield "| Limit | Value | Meaning |"
    yield "|---|---|---|"
    body = ast.parse(Path(limits.__file__).read_text()).body
    for statement, below in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                yield f"| `{name}` | {_size(getattr(limits, name))} | {' '.join(str(below.value.value).split())} |"


def _size(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def constants() -> Iterator[str]:
    """Version, frame layout and link settings."""
    yield "| | |"
    yield "|---|---|"
    yield f"| Protocol version | {PROTOCOL_VERSION}, in the metadata `{grpc_options.PROTOCOL_KEY}` of every call |"
    yield f"| Frame magic | `{FRAME_MAGIC:#010x}` |"
    yield f"| Frame version | {FRAME_VERSION} |"
    yield f"| Element sizes | {', '.join(f'{name} {size}' for name, size in ITEM_BYTES.items())} bytes |"
    yield f"| Keepalive | a ping after {grpc_options.KEEPALIVE_S} s, {grpc_options.KEEPALIVE_TIMEOUT_S} s to answer |"
    yield f"| Longest error message | {carried_errors.MAX_HEADER_BYTES} bytes, percent-encoded |"


def error_kinds() -> Iterator[str]:
    """A row for each kind that may stand in `shardwright-error`."""
    yield "| Kind | Meaning |"
    yield "|---|---|"
    for name, kind in carried_errors.KINDS.items():
        yield f"| `{name}` | {(kind.__doc__ or '').splitlines()[0]} |"


if __name__ == "__main__":
    main()
