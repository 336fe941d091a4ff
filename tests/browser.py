"""A real browser for tests: the system's own, driven by Playwright; where there is none, tests skip and say so."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
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
LAPTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@contextmanager
def launched() -> Iterator:
    """The browser, with a profile of its own that is thrown away."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is on the path")
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[test]'")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page in a context of its own; what went wrong and what was asked for stand in its lists."""

    def __init__(self, browser, path: Path, viewport=LAPTOP, scheme="light", **options) -> None:
        touch = viewport is PHONE
        self.context = browser.new_context(
            viewport=viewport, color_scheme=scheme, has_touch=touch, is_mobile=touch,
            permissions=["clipboard-read", "clipboard-write"], **options,
        )  # fmt: skip
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.address = path.resolve().as_uri()
        self.page.goto(self.address)

    def text(self, selector: str) -> str:
        """What a reader sees there, spaces of all kinds as plain ones."""
        return " ".join(self.page.locator(selector).first.inner_text().split())

    def texts(self, selector: str) -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator(selector).all_inner_texts()]

    def place(self, row: int) -> tuple[float, float]:
        """Where a candidate is drawn, in the window's pixels."""
        self.page.locator("#plot").scroll_into_view_if_needed()
        x, y, left, top = self.page.evaluate(
            "row => { const box = plot.root.getBoundingClientRect();"
            " return [plot.x[row], plot.y[row], box.left, box.top]; }",
            row,
        )
        return left + x, top + y
