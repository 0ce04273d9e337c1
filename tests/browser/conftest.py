"""A real Chromium over the built pages, cut off from every other host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

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
    """A tab, and what went wrong on the page in it: requests to other hosts, failed ones, and console errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.name = ""
        self.foreign: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._asks)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: self.errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))

    def _asks(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1")):
            self.foreign.append(request.url)

    def resize(self, width: int) -> None:
        """Give the window this width, and a phone's height if it is one."""
        self.page.set_viewport_size({"width": width, "height": 844 if width < 600 else 900})

    def open(self, name: str, width: int = 1200) -> Page:
        """Open a built page by its path below the site, in light, and wait until its players are mounted."""
        self.name = name
        self.foreign.clear()
        self.errors.clear()
        self.resize(width)
        self.page.emulate_media(color_scheme="light")
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


@pytest.fixture(scope="session")
def tab(chromium):
    """One tab, in which the tests open one page after another: a new tab costs as much as two pages."""
    context = chromium.new_context()
    context.set_default_timeout(30_000)  # a busy core is no failure
    yield Visit(context.new_page())
    context.close()


@pytest.fixture(scope="module")
def kept(tab):
    """``kept(name, width)``: a page, opened anew only if another is open; a test first resets the player it plays."""
    tab.name = ""  # another file's tests may have changed the page

    def page(name: str, width: int = 1200) -> Page:
        if tab.name != name or "#" in tab.page.url:
            return tab.open(name, width)
        tab.resize(width)
        return tab.page

    return page


SAID = """root => root.querySelector(".mmu-state").textContent"""  # for played: what a player says
PLAY = """async (root, [moves, read]) => {
  const said = eval(read), heard = [];
  for (const move of moves) {
    if (Array.isArray(move)) {
      const target = root.querySelectorAll(move[0])[move[1]];
      target.focus();
      target.click();
    } else {
      const event = { key: move, bubbles: true, cancelable: true };
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", event));
    }
    await null; // what waits for the end of the event happens
    heard.push(said(root));
  }
  return heard;
}"""


def played(root: Locator, moves: list, read: str, done: set | None = None) -> list:
    """Play a player: what ``read``, a function of its root in JavaScript, gives after each of the moves.

    A move is a key as Playwright names it, or the n-th of what a selector finds, to be clicked: ``(selector, n)``. Each
    kind of move comes once from the keyboard or the mouse. Its repeats are events made in the page: between them no
    picture is drawn, which is most of what a key costs. ``done`` holds the kinds that came already, on this page.
    """
    done = set() if done is None else done
    kinds = [move if isinstance(move, str) else move[0] for move in moves]
    heard: list = []
    while (at := len(heard)) < len(moves):
        known = next((place for place in range(at, len(moves)) if kinds[place] not in done), len(moves))
        if known > at:
            heard += root.evaluate(PLAY, [moves[at:known], read])
            continue
        done.add(kinds[at])
        if isinstance(moves[at], str):
            root.page.keyboard.press(moves[at])
        else:
            root.locator(kinds[at]).nth(moves[at][1]).click()
        heard.append(root.evaluate(read))
    return heard
