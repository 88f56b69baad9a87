"""What the documents, the Makefile and CI promise is there."""

import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shardwright.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if path.is_file()
)
PACKAGE = ROOT / "src" / "shardwright"


def run_make(*arguments, cwd=ROOT, check=True, **variables):
    """Make as a person calls it, also where these tests run under `make test`."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "DEMO_"))}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, check=check, env={**outer, **variables}
    )


def code_of(document):
    """Everything in backticks or fenced blocks, one piece a line."""
    text = (ROOT / document).read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in fenced for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", rest)


def makefile_targets():
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def commands():
    """Each command's name and the options that it takes."""
    import typer

    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        subcommands = getattr(command, "commands", {})
        for path, each in [(name, command)] + [(f"{name} {sub}", c) for sub, c in subcommands.items()]:
            found[path] = {option for p in each.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_between_documents_leads_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / document).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    """In backticks, with a folder: from the root, from the package, or beside the document."""
    named = [code for code in code_of(document) if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|md|proto|toml)", code)]
    places = (ROOT, PACKAGE, (ROOT / document).parent)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_is_named_exists(document):
    named = {match[1] for code in code_of(document) if (match := re.match(r"make ([a-z-]+)", code))}
    assert named <= makefile_targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_that_is_named_exists(document):
    known = commands()
    wrong = []
    for code in code_of(document):
        words = shlex.split(code) if code.startswith("shardwright ") else []
        if len(words) < 2 or words[1].isupper():
            continue
        name = " ".join(words[1:3]) if " ".join(words[1:3]) in known else words[1]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if name not in known or not options <= known[name]:
            wrong.append(code)
    assert wrong == []


def test_the_readme_lists_every_command():
    rows = set(re.findall(r"^\| `shardwright ([\w-]+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert rows == {name for name in commands() if " " not in name}


def test_the_makefile_runs_only_what_exists():
    scripts = re.findall(r"\$\(BIN\)/python ([\w/.]+\.py)", (ROOT / "Makefile").read_text())
    assert len(scripts) >= 3
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_make_help_lists_every_target():
    done = run_make()
    assert {line.split()[1] for line in done.stdout.splitlines()} == makefile_targets()


@pytest.fixture
def prepared(tmp_path):
    """A checkout whose environment is made and whose Python only shows what it was given."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor argument; do printf "[%s]\\n" "$argument"; done\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".made-from-pyproject").touch()
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    return tmp_path


@pytest.mark.parametrize(
    "prompt", ["Why is the sky blue?", """it's "quoted" `date` $HOME $(shell date) \\ ; & | > #""", "--not-an-option"]
)
def test_make_demo_hands_the_prompt_over_as_it_was_typed(prepared, prompt):
    done = run_make(
        "-s", "demo", f"PROMPT={prompt}", "WORKERS=3", "MODEL=some dir/x.gguf", cwd=prepared, PROMPT="a shell's own"
    )
    arguments = [line[1:-1] for line in done.stdout.splitlines()]
    assert arguments[:3] == ["-m", "shardwright", "generate"]
    assert arguments[arguments.index("--model") + 1] == "some dir/x.gguf"
    assert arguments[arguments.index("--local-workers") + 1] == "3"
    assert arguments[-2:] == ["--", prompt]


def test_make_demo_asks_the_promised_question_by_default(prepared):
    done = run_make("-s", "demo", cwd=prepared, PROMPT="a shell's own")
    assert "[Explain quantum computing in simple terms]" in done.stdout
    assert "[smollm2-135m]\n[--local-workers]\n[2]" in done.stdout


def test_make_serve_hands_model_workers_and_port_over(prepared):
    done = run_make("-s", "serve", "MODEL=some dir/x.gguf", "WORKERS=3", "PORT=9000", cwd=prepared)
    assert [line[1:-1] for line in done.stdout.splitlines()] == [
        "-m", "shardwright", "serve", "--model", "some dir/x.gguf", "--local-workers", "3", "--tensor-parallel", "1",
        "--port", "9000",
    ]  # fmt: skip
    done = run_make("-s", "serve", cwd=prepared, PORT="a shell's own")
    assert "[smollm2-135m]\n[--local-workers]\n[2]\n[--tensor-parallel]\n[1]\n[--port]\n[8000]" in done.stdout


def test_make_venv_says_what_is_missing_where_python_is_too_old(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "make", "awk"):
        path = subprocess.run(["/bin/sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (tools / name).symlink_to(path.stdout.strip())
    old = tools / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = run_make("venv", cwd=tmp_path, check=False, PATH=str(tools))
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; Python 3.9.2 was found" in done.stderr
    assert "make venv PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_is_executable_and_runs_the_readmes_test_command():
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & stat.S_IXUSR
    assert "run make test\n" in ci.read_text()
    assert "\nmake test\n" in (ROOT / "README.md").read_text()
    subprocess.run(["bash", "-n", ci], check=True)


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = {f"shardwright[{name}]" for name in extras}  # an extra that another one brings along
    wanted = [*project["dependencies"], *(each for extra in extras.values() for each in extra if each not in own)]
    assert [each for each in wanted if not re.fullmatch(r"[A-Za-z0-9_.-]+==([0-9]+!)?[0-9][0-9.]*(; .+)?", each)] == []


def test_the_version_stands_in_the_changelog_or_is_not_released_yet():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_python_here_is_one_that_the_project_takes():
    assert sys.version_info >= (3, 11)
