# ruff: noqa: INP001  # a script, not a package
"""Checks this version on a machine with GPUs and writes down what was found: `make gpu-check`.

Runs every test that is marked `gpu`, measures the speed of a stage against the GPU's own limits, and writes a report
in Markdown and in JSON. Without a GPU it says so, writes nothing and ends with 2; when something failed it ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_GPU_EXIT = 2
_TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    capability: str
    memory_bytes: int
    uuid: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the checks ran on."""

    system: str
    python: str
    torch: str
    cuda: str  # that torch was built for
    driver: str
    transformers: str
    shardwright: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one test: passed, failed or skipped, and why."""

    name: str
    outcome: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TestRun:
    """All tests, and what pytest itself said at its end."""

    outcomes: tuple[Outcome, ...]
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured speed beside what the device's own measurements allow."""

    what: str
    tokens_per_s: float
    limit_tokens_per_s: float
    bound_by: str

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.tokens_per_s / self.limit_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A stage's speed on one device, or why there is none."""

    device: str
    shape: str
    dtype: str
    read_bandwidth: float = 0.0  # bytes/s, measured
    matrix_rate: float = 0.0  # operations/s, measured
    figures: tuple[Figure, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run found."""

    started_at: str
    seconds: float
    machine: Machine
    tests: TestRun
    speeds: tuple[Speed, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Something was tested, and nothing went wrong."""
        return not self.problems


def find_problems(tests: TestRun, speeds: Sequence[Speed]) -> tuple[str, ...]:
    """Why this is no success, if it is none. A run in which nothing was tested is none either."""
    count = Counter(o.outcome for o in tests.outcomes)
    problems = []
    if count["failed"]:
        problems.append(f"{count['failed']} of {len(tests.outcomes)} tests failed")
    if not count["passed"]:
        problems.append("no test passed")
    if tests.exit_code not in {0, 1}:
        problems.append(f"pytest ended with {tests.exit_code} before all tests were through")
    elif tests.exit_code == 1 and not count["failed"]:
        problems.append("pytest failed, but no test did")
    problems += [f"the speed of {s.device} could not be measured: {s.error}" for s in speeds if s.error]
    return tuple(problems)


# --- what is measured --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model made up for measuring: Llama's architecture, random weights."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int  # behind which tokens are decoded
    prompt: int  # tokens of a prefill
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}, {self.vocabulary} tokens"


BILLION = Shape(
    hidden=2048,
    layers=16,
    intermediate=8192,
    heads=32,
    kv_heads=8,
    vocabulary=128_256,
    context=512,
    prompt=2048,
    batches=(1, 8, 32),
)
"""1.5 billion parameters: 3 GB, which no GPU's cache holds."""


def measure_stage(device: str, shape: Shape, *, repeats: int = 20) -> Speed:
    """Decode and prefill of a single stage that holds a whole model, in the device's two-byte dtype.

    Decode reads every weight but the embedding once a step, whatever the batch; prefill multiplies each of them with
    every token. What the device measured of itself gives the limits.
    """
    import torch  # noqa: PLC0415  takes seconds, and --help must not

    from shardwright.model.devices import half_dtype, resolve_device  # noqa: PLC0415
    from shardwright.runtime.measure import measure_speed, wait_for  # noqa: PLC0415

    found = resolve_device(device)
    dtype = half_dtype(found)
    measured = measure_speed(found, num_threads=torch.get_num_threads(), dtype=dtype)
    stage = _build(found, dtype, shape)
    body = stage.weight_bytes - shape.vocabulary * shape.hidden * 2  # without the embedding, of which rows are read
    figures = []
    for batch in shape.batches:
        step = _step(shape, [(shape.context, 1)] * batch)
        seconds = _best(lambda step=step: (stage.forward(step, {}), wait_for(found)), repeats)
        bound, by = _least(measured.read_bandwidth / body, batch, measured.matrix_rate / body)
        figures.append(
            Figure(what=f"decode of {batch}", tokens_per_s=batch / seconds, limit_tokens_per_s=bound, bound_by=by)
        )
    step = _step(shape, [(0, shape.prompt)])
    seconds = _best(lambda: (stage.forward(step, {}), wait_for(found)), max(repeats // 4, 2))
    multiplied = body - shape.vocabulary * shape.hidden * 2  # the head has one row to do
    bound, by = _least(measured.read_bandwidth / body, shape.prompt, measured.matrix_rate / multiplied)
    figures.append(
        Figure(
            what=f"prefill of {shape.prompt}",
            tokens_per_s=shape.prompt / seconds,
            limit_tokens_per_s=bound,
            bound_by=by,
        )
    )
    stage.close()
    return Speed(
        device=str(found),
        shape=str(shape),
        dtype=dtype,
        read_bandwidth=measured.read_bandwidth,
        matrix_rate=measured.matrix_rate,
        figures=tuple(figures),
    )


def _least(steps_per_s: float, rows: int, rows_per_s: float) -> tuple[float, str]:
    """Tokens/s at most. A step reads the weights once; a row takes two operations a weight, one for each byte of it."""
    by_reading = steps_per_s * rows
    return (by_reading, "reading weights") if by_reading < rows_per_s else (rows_per_s, "multiplying")


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some tries behind two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def _step(shape: Shape, parts: Sequence[tuple[int, int]]) -> Any:
    """One step of sequences with (positions before, new tokens), each in blocks of its own."""
    from shardwright.types import SamplingParams, SequenceSlice, StepInput  # noqa: PLC0415

    slices, used = [], 0
    for seq_id, (start, count) in enumerate(parts):
        blocks = -(-(start + count) // _BLOCK_SIZE)
        slices.append(
            SequenceSlice(
                seq_id=seq_id,
                start_position=start,
                token_ids=tuple(i % shape.vocabulary for i in range(count)),
                block_table=tuple(range(used, used + blocks)),
                sampling=SamplingParams(),
            )
        )
        used += blocks
    return StepInput(epoch=1, step=1, slices=tuple(slices))


_BLOCK_SIZE = 16


def _build(device: Any, dtype: str, shape: Shape) -> Any:
    """A stage with weights out of nothing."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig  # noqa: PLC0415

    from shardwright.model.families import plan_family, read_config, slice_model  # noqa: PLC0415
    from shardwright.model.stage import build_stage  # noqa: PLC0415
    from shardwright.types import LayerRange, TensorSpec  # noqa: PLC0415

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config_json = json.dumps({**config.to_dict(), "model_type": "llama"})
    whole = read_config(config_json)
    layers = LayerRange(0, shape.layers)
    model = slice_model(whole, layers, is_first=True, is_last=True, plan=plan_family(whole))

    class Made:
        specs = {  # noqa: RUF012  made here, and never changed
            name: TensorSpec(name=name, dtype="BF16", shape=tuple(t.shape), num_bytes=t.numel() * 2, sha256="")
            for name, t in model.state_dict().items()
        }

        def read(self, name: str) -> memoryview:
            values = torch.empty(self.specs[name].shape, dtype=torch.bfloat16)
            values.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
            return memoryview(values.view(-1).view(torch.uint8).numpy()).cast("B")

    most = max(max(shape.batches) * (shape.context + 1 + _BLOCK_SIZE), shape.prompt + _BLOCK_SIZE)
    return build_stage(
        config_json=config_json,
        layers=layers,
        is_first=True,
        is_last=True,
        dtype=dtype,
        device=str(device),
        num_blocks=most // _BLOCK_SIZE + 1,
        block_size=_BLOCK_SIZE,
        raw=Made(),
        progress=lambda _: None,
    )


# --- the machine and the tests -----------------------------------------------------------------------


def look_at_machine() -> Machine:
    """The versions and the GPUs; none where torch sees none."""
    import torch  # noqa: PLC0415

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(
            Gpu(
                name=facts.name,
                capability=f"{facts.major}.{facts.minor}",
                memory_bytes=facts.total_memory,
                uuid=str(getattr(facts, "uuid", "")),
            )
        )
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        driver=_driver() if gpus else "",
        transformers=version("transformers"),
        shardwright=version("shardwright"),
        gpus=tuple(gpus),
    )


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def run_tests(extra: Sequence[str] = ()) -> TestRun:
    """Every test marked `gpu`, in a process of its own: a fault on a GPU leaves nothing usable behind."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={found}"]
        environ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        try:
            code = subprocess.run(  # noqa: S603
                [*command, *extra], cwd=ROOT, env=environ, timeout=_TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        return TestRun(outcomes=read_outcomes(found), exit_code=code)


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """What pytest wrote as JUnit XML; nothing where it did not come to that."""
    if not path.exists():
        return ()
    outcomes = []
    for case in ET.parse(path).iter("testcase"):  # noqa: S314  pytest wrote it just now
        parts = {child.tag: child for child in case}
        outcome, reason = "passed", ""
        for tag, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if tag in parts:
                outcome, reason = word, (parts[tag].get("message") or "").strip()
                break
        module = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        outcomes.append(
            Outcome(
                name=f"{module}::{case.get('name', '')}",
                outcome=outcome,
                seconds=float(case.get("time", 0)),
                reason=reason,
            )
        )
    return tuple(outcomes)


# --- the report --------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """The report for programs."""
    fields: dict[str, Any] = {"passed": report.passed, **asdict(report)}
    for speed, made in zip(report.speeds, fields["speeds"], strict=True):
        for figure, plain in zip(speed.figures, made["figures"], strict=True):
            plain["share_of_limit"] = figure.share
    return json.dumps(fields, indent=2) + "\n"


def as_markdown(report: Report) -> str:
    """The report for people."""
    machine = report.machine
    count = Counter(o.outcome for o in report.tests.outcomes)
    lines = [
        "# GPU check",
        "",
        (
            f"**{'Passed' if report.passed else 'Failed'}**: {count['passed']} tests passed, {count['failed']} failed,"
            f" {count['skipped']} skipped. {report.started_at}, {report.seconds:.0f} s."
        ),
        "",
        *(f"- {problem}" for problem in report.problems),
        *([""] if report.problems else []),
        "## Machine",
        "",
        (
            f"{machine.system}, driver {machine.driver}, Python {machine.python}, torch {machine.torch} (CUDA"
            f" {machine.cuda}), transformers {machine.transformers}, shardwright {machine.shardwright}."
        ),
        "",
        "| GPU | Capability | Memory |",
        "|---|---|---|",
        *(f"| {_cell(g.name)} | {g.capability} | {g.memory_bytes / 1e9:.1f} GB |" for g in machine.gpus),
        "",
        "## Speed",
        "",
    ]
    for speed in report.speeds:
        if speed.error:
            lines += [f"{speed.device}: not measured, {_cell(speed.error)}", ""]
            continue
        lines += [
            (
                f"{speed.device}: one stage of {speed.shape} in {speed.dtype}. The device reads"
                f" {speed.read_bandwidth / 1e9:.0f} GB/s and multiplies at {speed.matrix_rate / 1e12:.1f} TFLOP/s."
            ),
            "",
            "| | Tokens/s | Limit | Share | Bound by |",
            "|---|---|---|---|---|",
            *(
                f"| {f.what} | {f.tokens_per_s:.0f} | {f.limit_tokens_per_s:.0f} | {f.share:.0%} | {f.bound_by} |"
                for f in speed.figures
            ),
            "",
        ]
    if not report.speeds:
        lines += ["Not measured.", ""]
    lines += ["## Tests", "", "| Test | Outcome | Seconds | Why |", "|---|---|---|---|"]
    order = {"failed": 0, "skipped": 1, "passed": 2}
    lines += [
        f"| {_cell(o.name)} | {o.outcome} | {o.seconds:.1f} | {_cell(o.reason)} |"
        for o in sorted(report.tests.outcomes, key=lambda o: (order[o.outcome], o.name))
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A table's cell: one line, nothing that ends the cell, not a page long."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 300 else line[:297] + "..."


def check(
    *,
    report_path: Path,
    machine: Machine,
    tests: Callable[[], TestRun],
    speed: Callable[[str], Speed] | None,
) -> int:
    """Run everything, write both reports, and give the exit code."""
    if not machine.gpus:
        print(  # noqa: T201
            f"torch {machine.torch} (built for CUDA: {machine.cuda}) finds no GPU here, so nothing was checked.",
            file=sys.stderr,
        )
        return NO_GPU_EXIT
    began, start = datetime.now(UTC), time.monotonic()
    run = tests()
    speeds = []
    for index in range(len(machine.gpus) if speed is not None else 0):
        try:
            speeds.append(speed(f"cuda:{index}"))
        except Exception as exc:  # noqa: BLE001  whatever went wrong belongs into the report
            error = f"{type(exc).__name__}: {exc}"
            speeds.append(Speed(device=f"cuda:{index}", shape="", dtype="", error=error))
    report = Report(
        started_at=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        machine=machine,
        tests=run,
        speeds=tuple(speeds),
        problems=find_problems(run, speeds),
    )
    report_path.parent.mkdir(parents=True, exist_ok=True)
    report_path.write_text(as_markdown(report), encoding="utf-8")
    json_path = report_path.with_suffix(".json")
    json_path.write_text(as_json(report), encoding="utf-8")
    for problem in report.problems:
        print(problem, file=sys.stderr)  # noqa: T201
    print(f"{'passed' if report.passed else 'failed'}; the report is in {report_path} and {json_path}")  # noqa: T201
    return 0 if report.passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options and check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, default=Path("gpu-report.md"), help="where the report goes")
    parser.add_argument("--no-speed", action="store_true", help="run the tests only")
    options = parser.parse_args(argv)
    if options.report.suffix != ".md":
        parser.error(f"--report is {options.report}; the name must end with .md (the JSON goes beside it)")
    return check(
        report_path=options.report,
        machine=look_at_machine(),
        tests=run_tests,
        speed=None if options.no_speed else lambda device: measure_stage(device, BILLION),
    )


if __name__ == "__main__":
    sys.exit(main())
