"""Every built page: it loads from a folder, asks no other host, fits a phone, and passes an accessibility check."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

from .conftest import SITE, Visit

PAGES = sorted(path.relative_to(SITE).as_posix() for path in (SITE / "book").glob("*.html"))

OURS = {"exclude": [["dl.py dt"]]}  # signatures are Sphinx's own: ten thousand nodes
COLOUR_RULES = ["color-contrast", "link-in-text-block"]  # all that a colour scheme can change
FORMS = {"resultTypes": ["violations"], "rules": {rule: {"enabled": False} for rule in COLOUR_RULES}}
COLOURS = {"resultTypes": ["violations"], "runOnly": COLOUR_RULES}
# Two nodes of three are tokens of highlighted code. Of each kind, by the classes of all that it stands in, one is left;
# the others become the plain text of what they stand in.
ONE_TOKEN_OF_A_KIND = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll("article pre span")) {
    let kind = "";
    for (let up = token; up.tagName !== "ARTICLE"; up = up.parentElement) kind += `>${up.tagName}.${up.className}`;
    if (seen.has(kind)) token.replaceWith(...token.childNodes);
    seen.add(kind);
  }
  for (const signature of document.querySelectorAll("dl.py dt")) signature.textContent = signature.textContent;
}"""
# Contrast costs most, and is the same wherever colour, size and all that shines through are: of texts alike in these,
# on all pages, one is judged. What is taken out of the flow may cover something, so its classes count too.
ONE_TEXT_OF_A_KIND = """seen => {
  const kinds = new Set(seen), behind = new Map();
  const look = (element) => {
    const { backgroundColor, backgroundImage, opacity, filter, position } = getComputedStyle(element);
    const flows = ["static", "relative"].includes(position);
    return [backgroundColor, backgroundImage, opacity, filter, flows ? "" : element.className].join();
  };
  const backdrop = (element) => {
    if (!element) return "";
    if (!behind.has(element)) {
      const below = backdrop(element.parentElement), own = look(element);
      behind.set(element, own === "rgba(0, 0, 0, 0),none,1,none," ? below : below + "|" + own);
    }
    return behind.get(element);
  };
  for (const judged of document.querySelectorAll("[data-judged]")) delete judged.dataset.judged;
  for (const element of document.querySelectorAll("article *")) {
    if (![...element.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.data.trim())) continue;
    const { color, fontSize, fontWeight, textShadow } = getComputedStyle(element);
    const link = element.closest("a"), around = link && getComputedStyle(link.parentElement).color;
    const line = link && getComputedStyle(link).textDecorationLine;
    const kind = [backdrop(element), color, fontSize, fontWeight, textShadow, around, line].join();
    if (!kinds.has(kind) && element.checkVisibility({ visibilityProperty: true })) {
      element.dataset.judged = "";
      kinds.add(kind);
    }
  }
  return [...kinds];
}"""
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


@pytest.fixture(scope="module", params=PAGES)
def wide(request, tab):
    """A page opened in a wide window, for all that is asked of it there."""
    tab.open(request.param)
    return tab


@pytest.fixture(scope="module", params=PAGES)
def phone(request, tab):
    """A page opened on a phone, for all that is asked of it there."""
    tab.open(request.param, width=390)
    return tab


def pictures(seen: Visit) -> list[tuple[str, int, int]]:
    """Of each picture that a cell of the page drew: the file shown, its width on the screen and its own."""
    return seen.page.locator("article .cell_output img").evaluate_all("""async images => {
      const found = [];
      for (const image of images) {
        image.scrollIntoView();
        await image.decode();
        found.push([image.currentSrc, image.getBoundingClientRect().width, image.naturalWidth]);
      }
      return found;
    }""")


def test_the_book_has_its_pages():
    """Each page that the table of contents names was built."""
    named = re.findall(r"(?:root|file): (\S+)", (SITE.parents[1] / "_toc.yml").read_text())
    assert {f"{name}.html" for name in named} <= set(PAGES)


def test_opens_from_a_folder(wide):
    """A page opened from file:// mounts and styles every player, logs nothing and asks no other host for anything."""
    players = wide.page.locator(".mmu-player")
    states = players.evaluate_all("players => players.map(player => player.dataset.mounted)")
    assert states == ["yes"] * len(states)
    frames = wide.page.locator(".mmu-player > div:not(:empty)")
    assert set(frames.evaluate_all("boxes => boxes.map(box => getComputedStyle(box).borderTopStyle)")) <= {"solid"}
    assert wide.foreign == []
    assert wide.errors == []


def test_a_desk_gets_wide_pictures(wide):
    """Above 600 pixels no picture is its narrow drawing."""
    assert [shown for shown in pictures(wide) if shown[0].endswith("-narrow.png")] == []


@pytest.fixture(scope="module")
def judged():
    """Kinds of text whose contrast was judged, on whatever page."""
    return []


def test_accessible(wide, judged):
    """axe-core finds no violation in a page's content, in light and in dark."""
    page = wide.page

    def violations(options, include="article"):
        context = {**OURS, "include": [[include]]}
        found = page.evaluate("([context, options]) => axe.run(context, options)", [context, options])["violations"]
        return [(violation["id"], [node["html"] for node in violation["nodes"]][:3]) for violation in found]

    page.evaluate(ONE_TOKEN_OF_A_KIND)
    page.evaluate(Axe().axe_script)
    assert violations(FORMS) == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        kinds = page.evaluate(ONE_TEXT_OF_A_KIND, judged)
        if len(kinds) > len(judged):
            assert (scheme, violations(COLOURS, "[data-judged]")) == (scheme, [])
        judged[:] = kinds


def test_fits_a_phone(phone):
    """Nothing on a page sticks out of a screen 390 pixels wide."""
    assert phone.page.evaluate(OVERFLOW) == {"page": 0, "wide": []}


def test_a_phone_gets_narrow_pictures(phone):
    """Below 600 pixels each picture is its narrow drawing at nearly its own size."""
    for source, shown, drawn in pictures(phone):
        assert source.endswith("-narrow.png") and drawn == 720 and shown > 320, (source, shown, drawn)


def test_pictures_state_their_finding(phone):
    """Each picture's alternative text is a sentence with a number in it, not a path."""
    for text in phone.page.locator("article img").evaluate_all("all => all.map(image => image.getAttribute('alt'))"):
        assert text and re.search(r"\d", text) and len(text.split()) > 4 and "/" not in text.split()[0], text
