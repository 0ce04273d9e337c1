"""Every built page: it loads from a folder, asks no other host, fits a phone, and passes an accessibility check."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

from .conftest import SITE

PAGES = sorted(path.relative_to(SITE).as_posix() for path in (SITE / "book").glob("*.html"))

OURS = {"include": [["article"]], "exclude": [["dl.py"]]}  # signatures are Sphinx's own: ten thousand nodes
AXE = {"resultTypes": ["violations"]}  # the rest is not looked at, and costs most of the time
OVERFLOW = """() => {
  const wide = [];
  for (const element of document.querySelectorAll("article *")) {
    const box = element.getBoundingClientRect();
    let scrolls = false;
    for (let up = element; up && up !== document.body; up = up.parentElement)
      scrolls ||= getComputedStyle(up).overflowX !== "visible";
    if (!scrolls && box.width && box.right > innerWidth + 1) wide.push(element.tagName + "." + element.className);
  }
  return { page: document.documentElement.scrollWidth - innerWidth, wide };
}"""


def test_the_book_has_its_pages():
    """Each page that the table of contents names was built."""
    named = re.findall(r"(?:root|file): (\S+)", (SITE.parents[1] / "_toc.yml").read_text())
    assert {f"{name}.html" for name in named} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_opens_from_a_folder(visit, name):
    """A page opened from file:// mounts and styles every player, logs nothing and asks no other host for anything."""
    seen = visit()
    page = seen.open(name)
    states = page.locator(".mmu-player").evaluate_all("players => players.map(player => player.dataset.mounted)")
    assert states == ["yes"] * len(states)
    frames = page.locator(".mmu-player > div:not(:empty)")
    assert set(frames.evaluate_all("boxes => boxes.map(box => getComputedStyle(box).borderTopStyle)")) <= {"solid"}
    assert seen.foreign == []
    assert seen.errors == []


@pytest.mark.parametrize("name", PAGES)
def test_fits_a_phone(visit, name):
    """Nothing on a page sticks out of a screen 390 pixels wide."""
    page = visit(width=390).open(name)
    assert page.evaluate(OVERFLOW) == {"page": 0, "wide": []}


@pytest.mark.parametrize("name", PAGES)
def test_accessible(visit, name):
    """axe-core finds no violation in a page's content, in light and in dark."""
    page = visit("light").open(name)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        found = Axe().run(page, context=OURS, options=AXE).response["violations"]
        assert [(scheme, v["id"], [node["html"] for node in v["nodes"]][:3]) for v in found] == []


@pytest.mark.parametrize("name", PAGES)
def test_pictures_state_their_finding(name):
    """Each picture's alternative text is a sentence with a number in it, not a path."""
    article = BeautifulSoup((SITE / name).read_text(encoding="utf-8"), "html.parser").article
    for image in article.find_all("img"):
        text = image.get("alt", "")
        assert re.search(r"\d", text) and len(text.split()) > 4 and "/" not in text.split()[0], text


@pytest.mark.parametrize("name", [name for name in PAGES if re.search(r"/\d\d-", name)])
def test_a_phone_gets_narrow_pictures(visit, name):
    """Below 600 pixels each picture of a chapter is its narrow drawing at nearly its own size, above none is."""
    for width, narrow in ((390, True), (1200, False)):
        page = visit(width=width).open(name)
        found = page.locator("article .cell_output img")
        for number in range(found.count()):
            found.nth(number).scroll_into_view_if_needed()
            found.nth(number).evaluate("image => image.decode()")
            source, shown, drawn = found.nth(number).evaluate(
                "image => [image.currentSrc, image.getBoundingClientRect().width, image.naturalWidth]"
            )
            assert source.endswith("-narrow.png") == narrow, source
            assert not narrow or (drawn == 720 and shown > 320), (source, shown, drawn)
