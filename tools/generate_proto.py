# ruff: noqa: INP001  # a script, not a package
"""Generates `src/shardwright/wire/inference_pb2.py` and `.pyi` from `inference.proto`, which are committed.

python tools/generate_proto.py           writes them
python tools/generate_proto.py --check   writes nothing; exits with 1 and names them if they are out of date
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent.parent / "src"
PROTO = "shardwright/wire/inference.proto"
GENERATED = ("shardwright/wire/inference_pb2.py", "shardwright/wire/inference_pb2.pyi")


def generate(folder: Path) -> dict[str, str]:
    """Run protoc into `folder` and return the text of each generated file by its path under `src`."""
    status = protoc.main(["protoc", f"-I{SOURCES}", f"--python_out={folder}", f"--pyi_out={folder}", PROTO])
    if status != 0:
        sys.exit(f"protoc failed with status {status} on {PROTO}")
    return {name: (folder / name).read_text() for name in GENERATED}


def main() -> None:
    """Generate, then write or compare."""
    parser = argparse.ArgumentParser(description="Generate the protobuf code of the wire.")
    parser.add_argument("--check", action="store_true", help="only say whether the committed code is up to date")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = generate(Path(folder))
    if not arguments.check:
        for name, text in texts.items():
            (SOURCES / name).write_text(text)
        return
    stale = [name for name, text in texts.items() if _committed(name) != text]
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `python tools/generate_proto.py`")


def _committed(name: str) -> str | None:
    file = SOURCES / name
    return file.read_text() if file.exists() else None


if __name__ == "__main__":
    main()
