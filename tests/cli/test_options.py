"""Options that stand in a dataclass are a command's own, in its help, its calls and its errors."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from shardwright.cli.console import run_app
from shardwright.cli.generate import generate
from shardwright.cli.options import ModelFlags, expand
from shardwright.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Flags:
    size: Annotated[int, typer.Option("--size", help="How large.")] = 3
    name: Annotated[str, typer.Option("--name", help="What it is called.")] = "x"


def test_the_fields_become_options_in_the_parameters_place(capsys):
    seen = []

    @expand
    def command(*, first: Annotated[int, typer.Option("--first")] = 0, flags: Flags, last: bool = False) -> None:
        seen.append((first, flags, last))

    assert list(inspect.signature(command).parameters) == ["first", "size", "name", "last"]
    app = typer.Typer()
    app.command()(command)
    assert run_app(app, ["--size", "7", "--last"], prog_name="x") == 0
    assert seen == [(0, Flags(size=7), True)]
    assert run_app(app, ["--size", "many"], prog_name="x") == 2
    assert "--size" in capsys.readouterr().err
    command(first=1, name="y", last=False)
    assert seen[1] == (1, Flags(name="y"), False)


def test_generate_takes_every_flag_of_a_model():
    assert set(inspect.signature(ModelFlags).parameters) <= set(inspect.signature(generate).parameters)


def test_worker_flags_become_the_local_workers_command_line(tmp_path):
    flags = ModelFlags(local_workers=2, device="cpu", threads=0, cache_dir=tmp_path)
    assert flags.worker_options() == ["--device", "cpu", "--threads", "0", "--cache-dir", str(tmp_path)]
    flags = ModelFlags(local_workers=1, offload="nvme", memory_gib=0.5)
    assert flags.worker_options() == ["--memory-gib", "0.5", "--offload", "nvme"]
    with pytest.raises(ConfigError, match=r"--offload is for --local-workers; .*: shardwright worker --offload nvme"):
        ModelFlags(offload="nvme").worker_options()
    with pytest.raises(ConfigError, match=r"--threads is for --local-workers; .*: shardwright worker --threads 2"):
        ModelFlags(threads=2).worker_options()
