"""The report page in a real browser: whole, legible and quiet at the widths of a phone and of a desk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anydepth.report.page import write_report
from browsers import chromium, cut_or_overlapping
from report_documents import every_kind

pytestmark = pytest.mark.browser

WIDTHS = {"phone": 375, "desktop": 1280}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(every_kind(), tmp_path_factory.mktemp("page") / "report.html")[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", list(WIDTHS))
def test_nothing_is_cut_nothing_overlaps(browser: Any, page_file: Path, device: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": WIDTHS[device], "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert cut_or_overlapping(page, WIDTHS[device]) == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 500)")
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (_light(paper), _light(ink)) == ((True, False) if scheme == "light" else (False, True))
    if folder := os.environ.get("ANYDEPTH_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"report-{device}-{scheme}.png"), full_page=True)
    context.close()


def _light(colour: str) -> bool:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) > 384
