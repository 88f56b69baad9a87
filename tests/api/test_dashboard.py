"""The dashboard's files as they are served: what they are, what they may do, and that they hold nothing of others."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import httpx
import pytest
from fake_text_engine import FakeTextEngine

import shardwright
from shardwright.api.keys import new_key

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "shardwright" / "api" / "dashboard"
FILES = sorted(path.name for path in FOLDER.iterdir())
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


async def test_the_page_and_all_its_files_are_served_with_their_types_and_a_strict_policy(start, http):
    server = await start()
    types = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
    for path in ["/", *(f"/dashboard/{name}" for name in FILES if name != "index.html")]:
        answer = await http.get(server.url + path)
        name = path.rpartition("/")[2] or "index.html"
        assert (answer.status_code, answer.content) == (200, (FOLDER / name).read_bytes())
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert POLICY.items() <= policy.items()
        assert "unsafe" not in answer.headers["content-security-policy"]


async def test_a_browser_that_has_a_file_gets_it_again_only_when_it_changed(start, http):
    server = await start()
    first = await http.get(f"{server.url}/dashboard/main.js")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = await http.get(f"{server.url}/dashboard/main.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    other = await http.get(f"{server.url}/dashboard/main.js", headers={"If-None-Match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2Fapp.py", "__init__.py", "%2e%2e/app.py", "a/b"])
async def test_what_is_no_file_of_the_dashboard_is_not_found(start, http, name):
    server = await start()
    answer = await http.get(f"{server.url}/dashboard/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


async def test_a_head_request_tells_the_same_without_the_content(start, http):
    server = await start()
    whole, head = await http.get(server.url + "/"), await http.head(server.url + "/")
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["etag"], head.headers["content-length"]) == (
        whole.headers["etag"],
        whole.headers["content-length"],
    )


async def test_the_page_is_open_where_keys_are_needed_and_says_so(start, http, tmp_path):
    secret, entry = new_key("alice")
    (tmp_path / "keys.toml").write_text(entry.to_toml())
    server = await start(api_key_file=tmp_path / "keys.toml")
    assert (await http.get(server.url + "/")).status_code == 200
    assert "server.json" not in FILES  # it is made from the server's settings
    facts = (await http.get(f"{server.url}/dashboard/server.json")).json()
    assert facts == {
        "version": shardwright.__version__,
        "needs_key": True,
        "has_chat_template": True,
        "has_tokenizer": True,
    }
    assert (await http.get(f"{server.url}/api/state")).status_code == 401
    known = {"Authorization": f"Bearer {secret}"}
    assert (await http.get(f"{server.url}/api/state", headers=known)).status_code == 200


async def test_the_page_knows_how_the_model_is_talked_to(start, http):
    server = await start(FakeTextEngine(chat_template="", has_tokenizer=False))
    facts = (await http.get(f"{server.url}/dashboard/server.json")).json()
    assert [facts[name] for name in ("needs_key", "has_chat_template", "has_tokenizer")] == [False, False, False]


def test_the_page_asks_nobody_else_and_holds_no_inline_code():
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert named
    assert all(re.fullmatch(r"dashboard/[a-z.]+", each) for each in named)
    assert {each.removeprefix("dashboard/") for each in named} <= set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".css"))])
def test_no_script_or_style_names_another_host_or_turns_text_into_markup(name):
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]", text)
    assert not re.search(r"@import|url\(", text)
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc"
    assert not re.search(forbidden, text)
    imported = re.findall(r'from "\./([^"]+)"', text)
    assert set(imported) <= set(FILES)


def test_every_script_is_used():
    page = (FOLDER / "index.html").read_text()
    scripts = {name: (FOLDER / name).read_text() for name in FILES if name.endswith(".js")}
    used = set(re.findall(r"dashboard/(\w+\.js)", page))
    for text in scripts.values():
        used |= set(re.findall(r'from "\./([^"]+)"', text))
    assert used == set(scripts)


def test_every_element_that_a_script_asks_for_stands_in_the_page():
    page = (FOLDER / "index.html").read_text()
    there = re.findall(r'\bid="([^"]+)"', page)
    assert len(there) == len(set(there))
    asked = {name for script in FOLDER.glob("*.js") for name in re.findall(r'byId\("([^"]+)"\)', script.read_text())}
    assert asked <= set(there)


def test_the_wheel_takes_the_dashboard_along():
    """The build backend packs all files of the package but those that git ignores."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert target == {"packages": ["src/shardwright"]}
    paths = [str(FOLDER / name) for name in FILES]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


NODE_TESTS = Path(__file__).parent / "dashboard"


@pytest.mark.parametrize("script", sorted(path.name for path in NODE_TESTS.glob("*.test.mjs")))
def test_the_scripts_count_and_tell_right(script, tmp_path):
    """What needs no page is tested with Node's own test runner."""
    if shutil.which("node") is None:
        assert not os.environ.get("CI"), "node is not installed"
        pytest.skip("node is not installed")
    modules = shutil.copytree(FOLDER, tmp_path / "dashboard")
    (modules / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        ["node", "--test", NODE_TESTS / script], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "DASHBOARD": str(modules), "TZ": "UTC"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
