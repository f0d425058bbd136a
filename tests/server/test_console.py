"""The console in a real browser: headless Chromium against a scripted engine on a real socket."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from rorqual.engine.request import Request
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.console import PUBLIC_PATHS, console_routes
from rorqual.server.run import listen, server_for, url_of
from rorqual.testing.scripted_engine import Script, ScriptedEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def answer_by_prompt(tokenizer: Tokenizer, held: Script) -> Any:
    def script(request: Request) -> str | Script:
        prompt = tokenizer.decode(request.prompt_ids)
        if "sunny" in prompt:
            return "It is sunny in Paris."
        if "What is the weather in Paris?" in prompt:
            return CALL
        if "wait for me" in prompt:
            return held
        if prompt.endswith("<think>"):
            return "Let me see.</think>A thought-out answer."
        return "A plain answer with `code` and <b>no markup</b>."

    return script


@contextmanager
def serving(
    engine: ScriptedEngine, tokenizer: Tokenizer, card: ModelCard, port: int
) -> Iterator[str]:
    server = server_for(create_app(engine, tokenizer, card))
    listener = listen("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    page.set_default_timeout(15_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_a_conversation_streams_stops_switches_mode_and_survives_a_restart(
    page: Any, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    held = Script(text="one two three four five six", hold_after=3)
    engine = ScriptedEngine(tokenizer, answer_by_prompt(tokenizer, held))
    with serving(engine, tokenizer, nano_card, 0) as url:
        port = int(url.rsplit(":", 1)[1])
        page.goto(url)
        page.wait_for_selector("#health.up")
        ask(page, "hello")
        page.wait_for_selector("text=A plain answer")
        assert page.inner_text(".assistant .text code") == "code"
        assert "<b>no markup</b>" in page.inner_text(".assistant .text")
        page.wait_for_selector(".counts:has-text('prompt'):has-text('$')")

        page.check("input[value=think]", force=True)
        ask(page, "and now with thought")
        page.wait_for_selector("text=A thought-out answer.")
        page.click("details.reasoning:visible summary")
        assert page.is_visible("text=Let me see.")

        page.check("input[value=non-think]", force=True)
        ask(page, "wait for me")
        page.wait_for_selector("text=one two")
        page.press("body", "Escape")
        page.wait_for_selector(".counts:has-text('stopped')")
        assert engine.handles[-1].finished.wait(10)
        assert engine.handles[-1].cancelled.is_set()
    page.wait_for_selector("#health.down")
    ask(page, "anyone there?")
    page.wait_for_selector(".problem:has-text('cannot be reached')")
    again = ScriptedEngine(tokenizer, "Back again.")
    with serving(again, tokenizer, nano_card, port):
        page.wait_for_selector("#health.up")
        page.click("text=Try again")
        page.wait_for_selector("text=Back again.")
        page.reload()
        page.wait_for_selector("text=Back again.")
        assert page.is_visible("text=A plain answer")


def test_a_tool_call_is_a_card_whose_result_goes_back(
    page: Any, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, answer_by_prompt(tokenizer, Script(text="")))
    with serving(engine, tokenizer, nano_card, 0) as url:
        page.goto(url)
        page.wait_for_selector("#health.up")
        page.click("#try-tool")
        page.click("#send")
        page.wait_for_selector(".call h3:has-text('get_weather()')")
        assert '"city": "Paris"' in page.inner_text(".call pre")
        page.fill(".call input", '{"condition": "sunny"}')
        page.press(".call input", "Enter")
        page.wait_for_selector("text=It is sunny in Paris.")


def test_dropped_documents_go_before_the_question_and_other_files_are_refused(
    page: Any, tokenizer: Tokenizer, nano_card: ModelCard, tmp_path: Path
) -> None:
    engine = ScriptedEngine(tokenizer, "Read.")
    (tmp_path / "facts.txt").write_text("The gate was opened in 1990.")
    (tmp_path / "photo.bin").write_bytes(b"\xff\xfe\x00\x81")
    with serving(engine, tokenizer, nano_card, 0) as url:
        page.goto(url)
        page.wait_for_selector("#health.up")
        page.set_input_files("#files", [tmp_path / "facts.txt", tmp_path / "photo.bin"])
        page.wait_for_selector("#notice:has-text('photo.bin')")
        ask(page, "When?")
        page.wait_for_selector("text=Read.")
    prompt = tokenizer.decode(engine.requests[0].prompt_ids)
    assert "The gate was opened in 1990.\n\nWhen?" in prompt


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_readable_in_both_themes_and_on_a_phone(
    browser: Any, tokenizer: Tokenizer, nano_card: ModelCard, theme: str
) -> None:
    engine = ScriptedEngine(tokenizer, "Fine.")
    with serving(engine, tokenizer, nano_card, 0) as url:
        page = browser.new_page(viewport={"width": 390, "height": 780}, color_scheme=theme)
        page.goto(url)
        page.wait_for_selector("#health.up")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for selector in ("body", "#send", ".quiet", "#modes input:checked + span"):
            assert contrast(page, selector) >= 4.5, selector
        page.close()


def contrast(page: Any, selector: str) -> float:
    """WCAG contrast of an element's text on the first opaque ground behind it."""
    ink, ground = page.evaluate(
        """(selector) => {
            let node = document.querySelector(selector);
            const ink = getComputedStyle(node).color;
            while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") {
                node = node.parentElement;
            }
            return [ink, getComputedStyle(node).backgroundColor];
        }""",
        selector,
    )
    bright, dark = sorted(map(_luminance, (ink, ground)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(css: str) -> float:
    channels = [int(v) / 255 for v in css[css.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_is_whole_and_closed_to_the_outside(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, "")
    app = create_app(engine, tokenizer, nano_card)
    paths = {route.path for route in console_routes(engine, example="") if isinstance(route, Route)}
    assert paths >= PUBLIC_PATHS
    with TestClient(app) as client:
        for path in PUBLIC_PATHS:
            response = client.get(path)
            assert response.status_code == 200, path
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "http://" not in response.text.replace("http://www.w3.org/", "")
            assert "https://" not in response.text
        assert client.get("/console/stats").json()["num_running"] == 0
