"""A headless Chromium for tests, and pages that remember what went wrong in them.

Where the browser or a package is missing a test is skipped, with the reason; under CI it fails instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

PROGRAMS = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE_VERSION = "4.14.1"
SERIOUS = {"serious", "critical"}

# Run before any script of the page: what the policy refuses is written down.
_WATCH_POLICY = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.refused.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`);
});
"""


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it under CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; under CI that is an error", pytrace=False)
    pytest.skip(what)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine, without a window, until the block ends."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        missing("Chromium is not installed (on Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page of a browser of its own, with all that it asked for and complained about."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.complaints: list[str] = []  # the console's errors and what no script caught
        self.asked: list[str] = []  # every address, data and blob included
        context.add_init_script(_WATCH_POLICY)
        context.on("request", lambda request: self.asked.append(request.url))
        self.page: Page = context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))

    def _on_console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(f"{message.type}: {message.text} ({message.location})")

    def refused(self) -> list[str]:
        """What the content security policy has refused."""
        return self.page.evaluate("window.refused")

    def hosts(self) -> set[str]:
        """Everybody who was asked for something, by host and port."""
        return {urlsplit(url).netloc for url in self.asked if urlsplit(url).scheme not in {"data", "blob"}}


@contextlib.contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A page at `url`; `options` are those of Playwright's `new_context` (theme, size, ...)."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}} | options)
    try:
        visited = Visit(context)
        visited.page.goto(url)
        yield visited
    finally:
        context.close()


def until(page: Page, script: str, argument: object = None, *, timeout_s: float = 20.0) -> None:
    """Evaluate until it is true. Playwright's own `wait_for_function` needs a policy that allows `eval`."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(script, argument):
        assert time.monotonic() < deadline, f"not true in {timeout_s} s: {script}"
        page.wait_for_timeout(50)


def axe_script(folder: Path) -> str:
    """The source of axe-core, from its npm package, which is kept in `folder`."""
    kept = folder / f"axe-core-{AXE_VERSION}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    if shutil.which("npm") is None:
        missing("npm is not installed; axe-core comes from there")
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own: tests in another process may be fetching it too.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"axe-core@{AXE_VERSION}"], cwd=own, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        if packed.returncode:
            missing(f"npm can't fetch axe-core@{AXE_VERSION}: {packed.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(Path(own) / packed.stdout.split()[-1]) as archive:
            script = archive.extractfile("package/axe.min.js")
            assert script is not None, "axe-core's package holds its script"
            fetched = Path(own) / kept.name
            fetched.write_bytes(script.read())
        fetched.replace(kept)
    return kept.read_text(encoding="utf-8")


def violations(page: Page, script: str) -> list[str]:
    """What axe-core finds that is serious or critical. The page's context must bypass its policy to let it in."""
    page.evaluate(script)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for each in found["violations"]
        if each["impact"] in SERIOUS
        for node in each["nodes"]
    ]
