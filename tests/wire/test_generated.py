"""What is generated and committed is what the sources give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize("script", ["generate_proto.py", "generate_protocol_doc.py"])
def test_committed_output_is_up_to_date(script):
    result = subprocess.run(
        [sys.executable, TOOLS / script, "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_a_change_of_the_proto_is_noticed(tmp_path):
    """The check compares, rather than always agreeing."""
    root = Path(__file__).resolve().parents[2]
    copy = tmp_path / "src" / "shardwright" / "wire"
    copy.mkdir(parents=True)
    for name in ("inference.proto", "inference_pb2.py", "inference_pb2.pyi"):
        (copy / name).write_text((root / "src/shardwright/wire" / name).read_text())
    (copy / "inference.proto").write_text((copy / "inference.proto").read_text() + "message Another {}\n")
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "generate_proto.py"
    script.write_text((TOOLS / "generate_proto.py").read_text())
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert "out of date: shardwright/wire/inference_pb2.py, shardwright/wire/inference_pb2.pyi" in result.stderr
