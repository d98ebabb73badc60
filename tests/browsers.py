"""Chromium, for tests that look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

OVERLAPS = """() => {
  const parts = [...document.querySelectorAll('h1, h2, main > p, figure, .scroll, .tokens, form, dl, #output')]
    .filter(part => part.getClientRects().length);
  const boxes = parts.map(part => part.getBoundingClientRect());
  return boxes.filter((box, i) => i && box.top < boxes[i - 1].bottom - 1).map((_, i) => 'overlap ' + i);
}"""
TEXTS = "h1, h2, p, figcaption, label, button, dd, .tokens, .scroll, figure, #output"
CUT = f"""() => [...document.querySelectorAll('{TEXTS}')]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => 'cut: ' + e.textContent.slice(0, 40))"""


def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium; set CHROMIUM to its path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def cut_or_overlapping(page: Any, width: int) -> list[str]:
    """What of a page does not fit."""
    found = [*page.evaluate(OVERLAPS), *page.evaluate(CUT)]
    scrolls = page.evaluate("document.scrollingElement.scrollWidth")
    return found if scrolls <= width else [f"{scrolls} pixels wide", *found]
