"""The built pages in Chromium: how soon a player is ready, how soon it reacts, how heavy a chapter is."""

import gzip
import statistics

from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS, SITE

RUNS = 5
READY = "() => document.querySelector('.mmu-player').dataset.mounted === 'yes'"
REACTION = """() => new Promise((done) => {
  const player = document.querySelector(".mmu-player");
  const state = player.querySelector("[aria-live]"), before = state.textContent;
  const start = performance.now();
  player.querySelector("button").click();
  const look = () => state.textContent === before
    ? requestAnimationFrame(look) : requestAnimationFrame(() => done(performance.now() - start));
  look();
})"""


def row(name, ours, unit, limit, what):
    return {
        "name": name, "ours": ours, "peer": what, "peer_value": limit, "unit": unit, "ratio": ours / limit,
        "target": f"at most {limit} {unit}", "met": ours <= limit,
    }  # fmt: skip


def rows():
    """The slowest chapter decides each row."""
    chapters = [path for path in sorted((SITE / "book").glob("[0-9]*.html"))]
    if not CHROMIUM:
        missing = dict.fromkeys(("ours", "peer_value", "ratio", "met"))
        return [{"name": "pages", "peer": "Chromium is not installed", "unit": "", "target": "", **missing}]
    ready, reaction = {}, {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for chapter in chapters:
            times = []
            for _ in range(RUNS):
                page = browser.new_page(viewport={"width": 1200, "height": 900})
                page.goto(chapter.as_uri(), wait_until="load")
                page.locator(".mmu-player").first.scroll_into_view_if_needed()
                page.wait_for_function(READY)
                loaded = "performance.now() - performance.getEntriesByType('navigation')[0].loadEventStart"
                times.append((page.evaluate(loaded), page.evaluate(REACTION)))
                page.close()
            ready[chapter.stem], reaction[chapter.stem] = (
                statistics.median(column) for column in zip(*times, strict=True)
            )
        browser.close()
    weight = {chapter.stem: len(gzip.compress(chapter.read_bytes(), 6)) / 1000 for chapter in chapters}
    worst = [(max(table, key=table.get), max(table.values())) for table in (ready, reaction, weight)]
    return [
        row(f"first player ready after load (slowest: {worst[0][0]})", worst[0][1], "ms", 1000, "limit"),
        row(f"player reacts to a click (slowest: {worst[1][0]})", worst[1][1], "ms", 50, "limit"),
        row(f"chapter page gzipped (heaviest: {worst[2][0]})", worst[2][1], "kB", 300, "limit"),
    ]
