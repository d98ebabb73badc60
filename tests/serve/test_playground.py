"""The playground in a real browser, on a real server: it writes, colours, compares, and runs nothing of others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from browsers import chromium, cut_or_overlapping
from serving import end, start, tiny_router

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
WIDTHS = {"phone": 375, "desktop": 1280}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, address = start(tiny_router(tmp_path_factory.mktemp("served")))
    yield address
    end(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", list(WIDTHS))
def test_it_generates_and_shows_the_depth_of_every_token(browser: Any, address: str, device: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": WIDTHS[device], "height": 900}, color_scheme=scheme)
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/")
    page.get_by_text("6 layers; attached: layer_router").wait_for()
    page.get_by_label("Prompt").fill("the sea is <b>wide</b>")
    page.get_by_label("New tokens").fill("24")
    page.get_by_label("Depth budget").fill("40")
    page.get_by_role("button", name="Write").click()
    page.get_by_text(re.compile(r"24 tokens, [\d.]+ per second")).wait_for(timeout=60_000)
    spans = page.locator("#output span")
    assert 3 < spans.count() <= 24
    depth = float(page.locator("#depth").inner_text())
    assert 2 <= depth < 6
    assert float(page.locator("#ratio").inner_text().rstrip("×")) > 0
    page.locator("#output").focus()
    page.keyboard.press("ArrowRight")
    assert "of 6 layers" in page.locator("#layers").inner_text()
    assert cut_or_overlapping(page, WIDTHS[device]) == []
    assert complaints == [] and all(url.startswith(address) for url in asked)
    if folder := os.environ.get("ANYDEPTH_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"playground-{device}-{scheme}.png"), full_page=True)
    page.get_by_label("Lossless").check()
    page.get_by_role("button", name="Write").click()
    page.get_by_text("tokens per verification").wait_for()
    assert float(page.locator("#depth").inner_text()) == 6
    context.close()


def test_full_depth_is_not_compared_with_itself(browser: Any, address: str) -> None:
    """C20: a budget of 100%, and a model with nothing attached, have no speed-up."""
    page = browser.new_page()
    page.goto(f"{address}/")
    page.get_by_text("6 layers; attached: layer_router").wait_for()
    page.get_by_label("New tokens").fill("8")
    page.get_by_label("Depth budget").fill("100")
    page.get_by_label("Depth budget").dispatch_event("input")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("this is full depth").wait_for(timeout=60_000)
    assert page.locator("#ratio").inner_text() == page.locator("#full-speed").inner_text() == "–"
    own = {
        "num_layers": 6,
        "attached": "nothing that skips",
        "skips": False,
        "depth_budget": False,
        "max_risk": False,
        "lossless": False,
    }
    card = {"id": "tiny", "object": "model", "created": 0, "owned_by": "anydepth", "anydepth": own}
    page.route("**/v1/models", lambda route: route.fulfill(body=json.dumps({"object": "list", "data": [card]})))
    page.goto(f"{address}/")
    page.get_by_text("attached: nothing that skips").wait_for()
    assert not page.get_by_label("Time full depth first").is_visible()
    page.get_by_label("New tokens").fill("8")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("this is full depth").wait_for(timeout=60_000)
    assert page.locator("#ratio").inner_text() == "–"
    page.close()


def test_it_shows_errors_and_can_be_used_again(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/")
    page.get_by_text("6 layers").wait_for()
    page.get_by_label("Prompt").fill("a" * 500)
    page.get_by_role("button", name="Write").click()
    page.get_by_text("the prompt has 500 tokens").wait_for()
    assert "the prompt has 500 tokens" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Write").is_enabled()
    assert page.get_by_role("button", name="Stop").is_disabled()
    page.close()


def test_the_page_runs_nothing_but_itself(address: str) -> None:
    policy = httpx.get(f"{address}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    source = files("anydepth.serve").joinpath("playground.html").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", source)
    assert not re.search(r"\son\w+=", source)


EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b>&lt;&amp;'


def test_text_of_the_model_is_text(browser: Any, tmp_path: Path) -> None:
    """Markup in the model's name, in its text, and in what an error says: shown letter for letter, none of it run."""
    process, address = start(tiny_router(tmp_path), "--name", EVIL)
    page = browser.new_page()
    try:
        page.goto(f"{address}/")
        page.get_by_text(f"{EVIL}: 6 layers").wait_for()
        own = {"depths": [6], "layers": ["222222"]}
        choice = {"index": 0, "text": EVIL, "finish_reason": "length", "logprobs": None, "anydepth": own}
        usage = {"completion_tokens": 1, "anydepth": {"tokens_per_second": 1.0}}
        events = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
        page.get_by_role("button", name="Write").click()
        page.locator("#output span").wait_for()
        assert page.locator("#output").inner_text() == EVIL
        page.locator("#output span").hover()
        assert "<img" in page.locator("#layers").inner_text()
        page.unroute("**/v1/completions")
        refusal = json.dumps({"error": {"message": EVIL, "type": "", "param": None, "code": None}})
        page.route("**/v1/completions", lambda route: route.fulfill(status=400, body=refusal))
        page.get_by_role("button", name="Write").click()
        page.get_by_role("alert").filter(has_text="<img").wait_for()
        assert page.locator("img, b, main script").count() == 0
        assert page.evaluate("window.hacked") is None
    finally:
        page.close()
        end(process)
