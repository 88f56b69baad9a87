"""The dashboard in a real browser, on a real master with two real workers; the last test kills one.

Its screenshots are written to `build/screenshots`.
"""

import contextlib
import re
from pathlib import Path

import httpx
import pytest
import torch
from browser import axe_script, chromium, until, violations, visit
from playwright.sync_api import expect
from real_processes import ROOT, Processes, processes_in
from tiny_models import save_whole
from tiny_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

AXE_CACHE = Path.home() / ".cache" / "shardwright" / "tests"
SHOTS = ROOT / "build" / "screenshots"
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
QUESTION = "Don't they jump over the lazy dog?"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
expect.set_options(timeout=20_000)


class Served:
    """`shardwright serve` on two local workers, as a process."""

    def __init__(self, processes: Processes, model: Path) -> None:
        self.run = processes.run(
            "serve", "--model", model, "--port", 0, "--cache-dir", processes.folder / "cache", "--dtype", "float32",
            "--local-workers", 2, "--threads", 1, "--served-model-name", "tiny",
        )  # fmt: skip
        self.url = self.run.wait_for(r"^Serving .* on (http://127\.0\.0\.1:\d+) - try: ")[1]

    def ask(self, path: str):
        return httpx.get(f"{self.url}/{path}", timeout=30).raise_for_status().json()

    def answer(self, text: str, **fields) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        return answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    byte_level(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = save_whole(
        "llama", folder / "model", vocab_size=len(tokenizer), max_position_embeddings=4096, rope_parameters=None
    ).model
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # never the likeliest: answers end at their limit
    model.save_pretrained(folder / "model")
    with processes_in(folder) as processes:
        yield Served(processes, folder / "model")


@pytest.fixture
def shown(browser, served):
    """Opens the page; afterwards nothing must have gone wrong in it, and nobody else been asked for anything."""
    with contextlib.ExitStack() as stack:
        opened = []

        def show(**options):
            visited = stack.enter_context(visit(browser, served.url, **options))
            opened.append(visited)
            expect(visited.page.locator("#link-state")).to_have_text("live")
            return visited.page

        yield show
        for visited in opened:
            assert (visited.complaints, visited.refused()) == ([], [])
            assert visited.hosts() == {served.url.removeprefix("http://")}


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def chat(page, text, *, max_tokens):
    if not page.locator("#p-max-tokens").is_visible():
        page.click("#chat .parameters summary")
    page.fill("#p-temperature", "0")
    page.fill("#p-max-tokens", str(max_tokens))
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")


def test_the_pipeline_is_shown_with_the_layers_that_the_workers_hold(served, shown):
    page = shown()
    workers = served.ask("api/state")["workers"]
    assert [worker["stage_index"] for worker in workers] == [0, 1]
    stages = page.locator("#stages .stage:not(.master)")
    expect(stages).to_have_count(2)
    for number, worker in enumerate(workers):
        first, last = worker["first_layer"], worker["end_layer"] - 1
        layers = str(first) if first == last else f"{first}\u2013{last}"
        expect(stages.nth(number).locator("h3")).to_have_text(worker["worker_id"])
        expect(stages.nth(number).locator(".strong")).to_have_text(f"Stage {number}: layers {layers}")
        expect(stages.nth(number)).to_contain_text(worker["address"])
        expect(stages.nth(number)).to_contain_text(
            re.compile(r"weights [\d.]+\u202f[KM]iB, KV [\d.\u202f]+[KMG]iB, free")
        )
        expect(stages.nth(number).locator(".link:not(.back)")).to_contain_text("round trip")
    assert workers[0]["first_layer"] == 0
    assert workers[1]["end_layer"] == 5
    expect(page.locator("#ready")).to_have_text("ready")
    expect(page.locator("#layer-map .layer-part")).to_have_count(2)


def test_a_chat_is_answered_and_its_time_shown_stage_by_stage(served, shown):
    page = shown()
    chat(page, QUESTION, max_tokens=40)
    expect(page.locator("#chat-status")).to_contain_text("complete")
    expected = served.answer(QUESTION, max_tokens=40)
    assert page.locator(".message.assistant .message-text").text_content() == expected
    newest = served.ask("api/requests")["requests"][1]  # the newest one is this test's own
    assert newest["num_output_tokens"] == 40
    page.locator(f'[data-request="{newest["seq_id"]}"] button').click()
    expect(page.locator("#waterfall h3")).to_contain_text("limit reached")
    # Both workers have told of all its steps: nothing of its time is unknown but what clocks differ by.
    decode = page.locator("#waterfall table", has_text="Means of a decode step").locator("tbody tr")
    expect(decode).to_have_count(2)
    expect(decode.nth(0).locator("td").first).to_have_text("39")
    expect(decode.nth(1).locator("td").first).to_have_text("39")
    expect(page.locator("#waterfall .spans-table tbody tr", has_text="prefill")).to_have_count(1)
    expect(page.locator("#waterfall .spans-table tbody tr", has_text="decode")).to_have_count(6)
    expect(page.locator("#waterfall")).to_contain_text("33 more decode steps")
    shares = dict(re.findall(r"(\w[\w ]*)\n[^,\n]*, ([\d.]+)\u202f%", page.locator("#waterfall .totals").inner_text()))
    assert {"compute", "wire", "queue", "send"} <= set(shares)
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=5)


INK = """() => {
  const canvas = document.getElementById("gantt");
  const probe = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height })
    .getContext("2d", { willReadFrequently: true });
  probe.drawImage(canvas, 0, 0);
  const data = probe.getImageData(0, 0, canvas.width, canvas.height).data;
  probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--kind-decode").trim();
  probe.fillRect(0, 0, 1, 1);
  const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
  const columns = new Set();
  for (let at = 0; at < data.length; at += 4) {
    if (data[at] === r && data[at + 1] === g && data[at + 2] === b) columns.add((at / 4) % canvas.width);
  }
  return [...columns].sort((a, b) => a - b);
}"""


def test_the_timeline_moves_while_a_request_is_computed_and_holds_still_when_paused(served, shown):
    page = shown()
    chat(page, QUESTION, max_tokens=3900)
    until(page, f"({INK})().length > 5")
    before = page.evaluate(INK)
    until(page, f"(before) => JSON.stringify(({INK})()) !== JSON.stringify(before)", before)
    expect(page.locator("#gantt")).to_have_attribute("aria-label", re.compile(r"stage 1 on \S+ computed [1-9]"))
    page.click("#pause")
    page.wait_for_timeout(200)
    still = page.evaluate(INK)
    page.wait_for_timeout(1200)
    assert page.evaluate(INK) == still
    page.click("#chat-stop")
    expect(page.locator("#chat-status")).to_contain_text("stopped")
    expect(page.locator("#request-table tbody tr").first).to_contain_text("given up")


def test_steps_from_before_the_page_was_opened_are_fetched(served, shown):
    served.answer(QUESTION, max_tokens=8)
    newest = served.ask("api/requests")["requests"][0]
    page = shown()
    page.locator(f'[data-request="{newest["seq_id"]}"] button').click()
    expect(page.locator("#waterfall .spans-table tbody tr", has_text="decode")).to_have_count(6)
    expect(page.locator("#waterfall")).to_contain_text("in 8 steps.")


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_screenshots_are_kept(served, shown, options, request):
    script = axe_script(AXE_CACHE)
    page = shown(bypass_csp=True, **options)
    chat(page, QUESTION, max_tokens=60)
    expect(page.locator("#chat-status")).to_contain_text("complete")
    page.locator("#request-table tbody button").first.click()
    expect(page.locator("#waterfall .spans-table")).to_be_visible()
    expect(page.locator("#chart-throughput .unseen")).to_contain_text("output: lately")
    shot(page, request.node.callspec.id)
    assert violations(page, script) == []
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]


def test_a_killed_worker_the_recovery_and_the_new_epoch_are_seen_as_they_happen(served, browser):
    """An answer that is under way goes on, and the worker is a spare when it was started again."""
    expected = served.answer(QUESTION, max_tokens=600)
    with visit(browser, served.url) as visited:
        page = visited.page
        expect(page.locator("#ready")).to_have_text("ready")
        before = served.ask("api/state")
        victim = before["workers"][1]
        port = int(victim["address"].rpartition(":")[2])
        (process,) = [
            each
            for each in served.run.descendants()
            if any(link.status == "LISTEN" and link.laddr.port == port for link in each.net_connections("tcp"))
        ]
        chat(page, QUESTION, max_tokens=600)
        expect(page.locator(".message.assistant .message-text")).not_to_be_empty()
        process.kill()
        lost = page.locator('[data-status="lost"]')
        expect(lost).to_have_count(1)
        expect(lost.locator("h3")).to_have_text(victim["worker_id"])
        expect(lost.locator(".failure")).to_contain_text(re.compile("Lost: .{10,}"))
        shot(page, "lost")
        log = page.locator("#log-list")
        expect(log).to_contain_text(f"worker {victim['worker_id']} is lost")
        expect(log).to_contain_text(re.compile(rf"epoch {before['snapshot']['epoch'] + 1} begins"))
        expect(log).to_contain_text("recovered: the new pipeline takes steps")
        expect(page.locator("#ready")).to_have_text("ready")
        expect(page.locator("#layer-map .layer-part")).to_have_count(1)
        expect(page.locator("#chat-status")).to_contain_text("complete")
        assert page.locator(".message.assistant .message-text").text_content() == expected
        expect(log).to_contain_text(f"worker {victim['worker_id']} is joining")
        shot(page, "recovered")
        assert served.answer(QUESTION, max_tokens=600) == expected
        assert (visited.complaints, visited.refused()) == ([], [])
