"""A real Chromium over the built pages, cut off from every other host."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build/html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    # Every request that leaves this machine meets a proxy that is not there; only our own server needs none.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=127.0.0.1",
]
WHY_SKIPPED = "no Chromium on this machine; on Debian: apt-get install chromium"


def pytest_collection_modifyitems(items):
    """Mark the tests here, and skip them where there is no browser; never where CI is set."""
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker("browser")
            if not CHROMIUM and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason=WHY_SKIPPED))


def pytest_terminal_summary(terminalreporter):
    """End with a line that says so when the browser tests were skipped."""
    if any(WHY_SKIPPED in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(f"The browser tests were skipped: {WHY_SKIPPED}.", yellow=True)


@pytest.fixture(scope="session")
def chromium():
    """One browser for the whole run."""
    assert CHROMIUM, WHY_SKIPPED
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """An opened page with what went wrong on it: requests to other hosts, failed ones, and console errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.foreign: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._asks)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: self.errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))

    def _asks(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1")):
            self.foreign.append(request.url)

    def open(self, name: str) -> Page:
        """Open a built page by its path below the site and wait until its players are mounted."""
        self.page.goto((SITE / name).as_uri(), wait_until="load")
        self.mount()
        return self.page

    def mount(self) -> None:
        """Bring every player near the screen, as a reader who scrolls does, and wait for it."""
        self.page.evaluate("""async () => {
          const last = performance.now() + 30000;
          for (const player of document.querySelectorAll(".mmu-player")) {
            player.scrollIntoView({ block: "nearest" });
            while (!["yes", "failed"].includes(player.dataset.mounted) && performance.now() < last)
              await new Promise(requestAnimationFrame);
          }
        }""")


@contextmanager
def visiting(chromium, width: int = 1200):
    """A tab of its own in a window of this width, closed at the end."""
    context = chromium.new_context(
        viewport={"width": width, "height": 844 if width < 600 else 900}, color_scheme="light"
    )
    context.set_default_timeout(30_000)  # a busy core is no failure
    try:
        yield Visit(context.new_page())
    finally:
        context.close()


@pytest.fixture(scope="module")
def kept(chromium):
    """Pages opened once for all tests of a file: ``kept(name, width)``; a test first resets the player it plays."""
    pages = {}
    with ExitStack() as stack:

        def page(name: str, width: int = 1200) -> Page:
            if (name, width) not in pages:
                pages[name, width] = stack.enter_context(visiting(chromium, width)).open(name)
            return pages[name, width]

        yield page
