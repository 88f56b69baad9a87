"""The page in a real browser, in front of a server whose engine and cluster are fakes that do what a test needs."""

import contextlib
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from browser import axe_script, chromium, until, violations, visit
from fake_observatory import example_worker
from fake_text_engine import FakeTextEngine
from moving_observatory import MovingObservatory
from page_server import server_in_thread
from playwright.sync_api import expect

from shardwright.api.keys import new_key

MARKUP = '<img src="x" onerror="window.ran=1"><script>window.ran=2</script><b>bold</b>'
AXE_CACHE = Path.home() / ".cache" / "shardwright" / "tests"
PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}

pytestmark = pytest.mark.timeout(120)
expect.set_options(timeout=15_000)  # a second or two on a quiet machine


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def shown(browser):
    """Opens the page on a server of its own; afterwards nothing must have gone wrong in it, unless that is expected."""
    with contextlib.ExitStack() as stack:
        visits = []

        def show(engine=None, *, expected="(?!)", settings=None, **options):
            engine = engine or FakeTextEngine(observatory=MovingObservatory())
            server = stack.enter_context(server_in_thread(lambda: engine, **(settings or {})))
            visited = stack.enter_context(visit(browser, server.url, **options))
            visits.append((visited, server, expected))
            visited.page.set_default_timeout(15_000)
            return server, visited.page

        yield show
        for visited, server, expected in visits:
            assert [each for each in visited.complaints if not re.search(expected, each)] == []
            assert visited.refused() == []
            assert visited.hosts() == {f"127.0.0.1:{server.port}"}


def test_a_lost_worker_is_seen_with_its_reason_as_text(shown):
    observatory = MovingObservatory()
    server, page = shown(FakeTextEngine(observatory=observatory))
    stages = page.locator("#stages .stage")
    expect(stages).to_have_count(4)
    expect(stages.nth(2)).to_contain_text("Stage 1: layers 10\u201319")
    expect(page.locator("#layer-map")).to_have_attribute("aria-label", re.compile("desk holds layers 10\u201319"))
    server.call(lambda: observatory.lose("desk", MARKUP))
    expect(page.locator("#ready")).to_have_text("failed")
    lost = page.locator('#stages .stage[data-status="lost"]')
    expect(lost).to_have_count(1)
    expect(lost).to_contain_text("held 10\u201319")  # where it was, though the pipeline is gone
    expect(lost.locator(".failure")).to_have_text(f"Lost: {MARKUP}")
    expect(page.locator("#failure")).to_contain_text(MARKUP)
    entry = page.locator('#log-list li[data-level="bad"]').filter(
        has=page.get_by_text(f"worker desk is lost: {MARKUP}", exact=True)
    )
    expect(entry).to_have_count(1)
    expect(entry.locator("time")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
    assert page.evaluate("window.ran") is None


def test_the_ranks_of_a_worker_are_counted_and_told_one_by_one(shown):
    observatory = MovingObservatory()
    desk = next(worker for worker in observatory.cluster.workers if worker.worker_id == "desk")
    first, second = example_worker("desk", 1).ranks
    observatory.change_worker("desk", num_ranks=2, ranks=(first, replace(second, device_name=MARKUP)))
    server, page = shown(FakeTextEngine(observatory=observatory), **PHONE)
    card = page.get_by_role("article", name="Worker desk")
    expect(card.locator(".num-ranks")).to_have_text("\u00d7 2 ranks")
    expect(page.get_by_role("article", name="Worker rack-1").locator(".num-ranks")).to_be_hidden()
    expect(page.get_by_role("article", name="Worker rack-1").get_by_text("Ranks")).to_be_hidden()
    card.get_by_text("Ranks: what each device does").click()
    lines = card.get_by_role("listitem").filter(has_text="Rank")
    expect(lines).to_have_count(2)
    expect(lines.nth(0)).to_contain_text("Rank 0 on cuda:0 \u00b7 NVIDIA L4: GPU 64")
    expect(lines.nth(1)).to_contain_text(f"Rank 1 on cuda:1 \u00b7 {MARKUP}: GPU 60")
    expect(lines.nth(1)).to_contain_text("process 1.37")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    server.call(lambda: observatory.change_worker("desk", num_ranks=1, ranks=desk.ranks[:0]))
    expect(card.locator(".num-ranks")).to_be_hidden()
    assert page.evaluate("window.ran") is None


def test_a_recovery_is_told_with_its_cause(shown):
    observatory = MovingObservatory()
    server, page = shown(FakeTextEngine(observatory=observatory))
    expect(page.locator("#failure")).to_be_hidden()
    cause = f"worker desk was lost: {MARKUP}"
    snapshot = replace(observatory.view().snapshot, recovering_from=cause)
    server.call(lambda: observatory.change_view(is_ready=False, snapshot=snapshot))
    expect(page.locator("#failure")).to_have_text(
        re.compile(f"Recovering: {re.escape(cause)}; requests that wait: \\d+$")
    )
    expect(page.locator("#ready")).to_have_text("recovering")


def test_a_new_epoch_and_a_worker_outside_the_pipeline_are_seen(shown):
    observatory = MovingObservatory()
    server, page = shown(FakeTextEngine(observatory=observatory))
    expect(page.locator("#stages .stage")).to_have_count(4)
    view = observatory.cluster
    spare = replace(
        view.workers[0], worker_id="spare", status="joining", stage_index=None, first_layer=None, end_layer=None
    )
    server.call(
        lambda: observatory.change_view(snapshot=replace(view.snapshot, epoch=4), workers=(*view.workers, spare))
    )
    expect(page.locator("#log-list")).to_contain_text(
        "epoch 4 begins: rack-1 0\u20139, desk 10\u201319, closet 20\u201329"
    )
    expect(page.locator("#log-list")).to_contain_text("worker spare joined: joining")
    expect(page.locator("#other-workers .stage")).to_have_count(1)
    expect(page.locator("#facts")).to_contain_text("4")


def test_the_connection_comes_back_by_itself_and_a_banner_tells_meanwhile(browser):
    with contextlib.ExitStack() as stack:
        with server_in_thread(lambda: FakeTextEngine(observatory=MovingObservatory())) as server:
            page = stack.enter_context(visit(browser, server.url)).page
            expect(page.locator("#link-state")).to_have_text("live")
            expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#banner")).to_be_visible(timeout=10_000)
        expect(page.locator("#banner")).to_contain_text("No connection to the server")
        expect(page.locator("#ready")).to_have_text("unknown")
        expect(page.locator("#link-state")).to_contain_text("next try in")
        stack.enter_context(server_in_thread(lambda: FakeTextEngine(observatory=MovingObservatory()), port=server.port))
        expect(page.locator("#link-state")).to_have_text("live", timeout=30_000)
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#log-list")).to_contain_text("connected to the server again")


def test_a_key_is_asked_for_until_it_is_right_and_kept_for_the_session_alone(shown, tmp_path):
    secret, entry = new_key("alice")
    (tmp_path / "keys.toml").write_text(entry.to_toml())
    _, page = shown(settings={"api_key_file": tmp_path / "keys.toml"}, expected="status of 401")
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    page.fill("#key-input", "sw-wrong")
    page.press("#key-input", "Enter")
    expect(page.locator("#key-error")).to_be_visible()
    page.evaluate("document.getElementById('key-dialog').close()")  # as browsers do at a second Escape
    expect(page.locator("#banner")).to_contain_text("asks for an API key")
    page.click("#banner-retry")
    expect(dialog).to_be_visible()
    page.fill("#key-input", secret)
    page.press("#key-input", "Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#link-state")).to_have_text("live")
    stored = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert secret in stored[0]
    assert secret not in stored[1] + stored[2] + page.url
    page.reload()
    expect(page.locator("#link-state")).to_have_text("live")
    expect(dialog).to_be_hidden()
    page.click("#forget-key")
    expect(dialog).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_what_the_model_writes_stays_text(shown):
    _, page = shown(FakeTextEngine(reply=lambda *_: MARKUP, chunk=7, observatory=MovingObservatory()))
    expect(page.locator("#link-state")).to_have_text("live")
    page.fill("#chat-input", MARKUP)
    page.press("#chat-input", "Enter")
    expect(page.locator(".message.assistant .message-text")).to_have_text(MARKUP)
    expect(page.locator(".message.user .message-text")).to_have_text(MARKUP)
    expect(page.locator("#chat-status")).to_contain_text(f"{len(MARKUP)} tokens")
    expect(page.locator("#chat-status")).to_contain_text("to the first token")
    assert page.locator("#chat-log img, #chat-log script, #chat-log b").count() == 0
    assert page.evaluate("window.ran") is None


def test_a_conversation_goes_on_with_its_parameters_until_it_is_begun_anew(shown):
    engine = FakeTextEngine(observatory=MovingObservatory())
    _, page = shown(engine)
    expect(page.locator("#link-state")).to_have_text("live")
    page.click("#chat .parameters summary")
    for field, value in {"#p-temperature": "0.5", "#p-top-p": "0.9", "#p-max-tokens": "40", "#p-seed": "7"}.items():
        page.fill(field, value)
    page.fill("#p-system", "be brief")
    for number, text in enumerate(("one", "two"), start=1):
        page.fill("#chat-input", text)
        page.click("#chat-send")
        expect(page.locator(".message.assistant .message-text")).to_have_count(number)
        expect(page.locator(".message.assistant .message-text").nth(number - 1)).to_have_text(f"You said: {text}")
        expect(page.locator("#chat-send")).to_be_enabled()
    request = engine.requests[-1]
    assert engine.codec.decode(request.prompt).split("\n") == [
        "system: be brief", "user: one", "assistant: You said: one", "user: two", "assistant: ",
    ]  # fmt: skip
    assert (request.sampling.temperature, request.sampling.top_p, request.max_new_tokens) == (0.5, 0.9, 40)
    page.fill("#p-temperature", "3")
    page.fill("#chat-input", "three")
    page.click("#chat-send")
    expect(page.locator("#chat-status")).to_contain_text("temperature must lie between 0 and 2")
    assert len(engine.requests) == 2
    page.click("#chat-new")
    expect(page.locator(".message")).to_have_count(0)


def test_the_stop_button_ends_the_answer_on_the_server_too(shown):
    engine = FakeTextEngine(reply=lambda *_: "word " * 2000, delay_s=0.02, observatory=MovingObservatory())
    _, page = shown(engine)
    expect(page.locator("#link-state")).to_have_text("live")
    page.fill("#chat-input", "go on")
    page.press("#chat-input", "Enter")
    expect(page.locator(".message.assistant .message-text")).to_contain_text("word word")
    page.click("#chat-stop")
    expect(page.locator("#chat-status")).to_contain_text("stopped")
    expect(page.locator(".message.assistant")).to_contain_text("Stopped.")
    deadline = time.monotonic() + 5
    while engine.num_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (engine.num_running, engine.num_aborted) == (0, 1)


def test_what_the_server_refuses_is_told_and_the_text_is_not_lost(shown):
    engine = FakeTextEngine(queue_is_full=True, observatory=MovingObservatory())
    _, page = shown(engine, expected="status of 429")
    expect(page.locator("#link-state")).to_have_text("live")
    page.fill("#chat-input", "precious")
    page.press("#chat-input", "Enter")
    expect(page.locator("#chat-status")).to_have_text("8 requests wait already")
    expect(page.locator("#chat-input")).to_have_value("precious")


def test_a_model_without_a_chat_template_goes_on_from_the_text(shown):
    engine = FakeTextEngine(chat_template="", reply=lambda *_: " blue", observatory=MovingObservatory())
    _, page = shown(engine)
    expect(page.locator("#chat-note")).to_contain_text("no chat template")
    expect(page.locator("#link-state")).to_have_text("live")
    page.fill("#chat-input", "The sky is")
    page.press("#chat-input", "Enter")
    expect(page.locator(".message.assistant .message-text")).to_have_text(" blue")
    assert engine.codec.decode(engine.requests[-1].prompt) == "The sky is"


def test_the_timeline_is_read_with_the_keyboard_and_as_a_table(shown):
    _, page = shown()
    gantt = page.locator("#gantt")
    expect(gantt).to_have_attribute("aria-label", re.compile(r"stage 2 on closet computed [1-9]\d*\u202f% of the time"))
    page.click("#step-table-box summary")
    expect(page.locator("#step-table tbody tr").first).to_contain_text("ms")
    gantt.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")  # what moves can't be read
    readout = page.locator("#gantt-readout")
    expect(readout).to_contain_text("Stage 0: rack-1")
    first = readout.inner_text()
    assert {"Wire", "Queue", "Serialise", "Compute", "Send", "In", "Out", "Trip"} <= set(re.findall(r"[A-Z]\w+", first))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    expect(readout).to_contain_text("Stage 1: desk")
    assert step_of(readout.inner_text()) == step_of(first) - 1
    page.keyboard.press(" ")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "false")


def step_of(readout):
    return int(re.search(r"Step ([\d\u202f]+)", readout)[1].replace("\u202f", ""))


def test_a_step_is_read_with_the_pointer(shown):
    _, page = shown()
    expect(page.locator("#gantt")).to_have_attribute("aria-label", re.compile("stage 1 on desk computed [1-9]"))
    page.click("#pause")
    box = page.locator("#gantt").bounding_box()
    tip = page.locator("#gantt-tip")
    for part in range(5, 95, 3):  # somewhere in the middle lane a bar is hit
        page.mouse.move(box["x"] + box["width"] * part / 100, box["y"] + 130)
        if tip.is_visible():
            break
    expect(tip).to_contain_text("Compute")
    expect(tip).to_contain_text("1: desk")


def test_a_requests_waterfall_sums_up_to_its_time(shown):
    _, page = shown()
    row = page.locator("#request-table tbody tr", has_text="done").nth(2)
    row.locator("button").click()
    expect(page.locator("#waterfall h3")).to_contain_text("done")
    expect(page.locator("#waterfall .spans-table tbody tr").nth(3)).to_be_visible()
    text = page.locator("#waterfall").inner_text()
    assert "prefill, step" in text
    assert "decode, step" in text
    assert "Means of a decode step, by stage" in text
    parts = [float(each) for each in re.findall(r", ([\d.]+)\u202f%", page.locator("#waterfall .totals").inner_text())]
    assert sum(parts) == pytest.approx(100, abs=len(parts) * 0.6)
    page.click("#waterfall-close")
    expect(page.locator("#waterfall")).to_be_hidden()


def test_stages_that_are_told_late_are_added_to_a_requests_waterfall(shown):
    """As from a busy worker: the step itself was known before, from the master."""
    observatory = MovingObservatory(told_late_s=3600)
    server, page = shown(FakeTextEngine(observatory=observatory))
    page.locator("#request-table tbody tr", has_text="done").first.locator("button").click()
    waterfall = page.locator("#waterfall")
    expect(waterfall.locator(".spans-table tbody tr").nth(3)).to_be_visible()
    expect(waterfall.locator("h3")).to_contain_text("done")
    expect(waterfall).not_to_contain_text("by stage")
    expect(waterfall.locator(".totals")).to_contain_text("not known")
    server.call(lambda: setattr(observatory, "told_late_s", 1))
    expect(waterfall).to_contain_text("Means of a decode step, by stage")
    expect(waterfall.locator(".totals")).to_contain_text("queue")
    expect(waterfall.locator(".totals")).not_to_contain_text("not known")


def test_charts_are_read_with_the_keyboard_and_told_in_words(shown):
    _, page = shown()
    chart = page.locator("#chart-ttft")
    expect(chart.locator(".unseen")).to_contain_text(re.compile(r"p95: lately [\d.]+\u202fms, mean"))
    plot = chart.locator(".plot")
    plot.focus()
    page.keyboard.press("Home")
    first = plot.get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    assert re.match(r"\d\d:\d\d:\d\d: p50 [\d.]+\u202fms, p95 [\d.]+\u202fms", first)
    assert plot.get_attribute("aria-valuetext") != first
    assert plot.get_attribute("aria-valuenow") == "1"


COUNT_DRAWS = """
window.draws = 0;
const clear = CanvasRenderingContext2D.prototype.clearRect;
CanvasRenderingContext2D.prototype.clearRect = function (...box) { window.draws += 1; return clear.apply(this, box); };
null;  // what is evaluated to a function would be called
"""
HIDE = """(isHidden) => {
  Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.mark.parametrize(("motion", "least", "most"), [("no-preference", 4, 25), ("reduce", 0.4, 2)])
def test_drawing_is_throttled_and_stops_in_a_hidden_tab(shown, motion, least, most):
    _, page = shown(reduced_motion=motion)
    expect(page.locator("#gantt")).to_have_attribute("aria-label", re.compile("stage 1 on desk computed [1-9]"))
    page.evaluate(COUNT_DRAWS)
    page.wait_for_timeout(2500)
    assert least <= page.evaluate("window.draws") / 2.5 <= most
    page.evaluate(HIDE, True)
    page.wait_for_timeout(100)
    page.evaluate("window.draws = 0")
    page.wait_for_timeout(1200)
    assert page.evaluate("window.draws") == 0
    page.evaluate(HIDE, False)
    until(page, "window.draws > 0")


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_sticks_out(shown, options):
    script = axe_script(AXE_CACHE)
    observatory = MovingObservatory()
    engine = FakeTextEngine(observatory=observatory)
    server, page = shown(engine, bypass_csp=True, **options)
    page.click("#step-table-box summary")
    page.click("#chat .parameters summary")
    expect(page.locator("#link-state")).to_have_text("live")  # before, the page knows no model to ask
    page.fill("#chat-input", "hello")
    page.press("#chat-input", "Enter")
    page.locator("#request-table tbody button").nth(3).click()
    expect(page.locator("#waterfall .totals")).to_be_visible()
    expect(page.locator("#chat-status")).to_contain_text("complete")
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    assert violations(page, script) == []
    server.call(lambda: observatory.lose("desk", "its stream broke"))
    expect(page.locator("#ready")).to_have_text("failed")
    assert violations(page, script) == []


def test_axe_finds_nothing_serious_in_the_question_for_the_key(shown, tmp_path):
    script = axe_script(AXE_CACHE)
    _, entry = new_key("alice")
    (tmp_path / "keys.toml").write_text(entry.to_toml())
    _, page = shown(settings={"api_key_file": tmp_path / "keys.toml"}, bypass_csp=True)
    expect(page.locator("#key-dialog")).to_be_visible()
    assert violations(page, script) == []


def test_the_theme_follows_the_system_until_it_is_chosen(shown):
    _, page = shown(color_scheme="dark")
    theme = page.locator("html")
    expect(theme).to_have_attribute("data-theme", "dark")
    page.click("#theme")
    expect(theme).to_have_attribute("data-theme", "light")
    page.reload()
    expect(theme).to_have_attribute("data-theme", "light")
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    expect(theme).to_have_attribute("data-theme", "light")  # the system's own theme was chosen again: it is followed


SHIFTS = """() => new Promise((resolve) => {
  let sum = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => resolve(sum), 3000);
})"""


def test_the_page_does_not_jump_while_it_fills(shown):
    _, page = shown()
    assert page.evaluate(SHIFTS) < 0.1
