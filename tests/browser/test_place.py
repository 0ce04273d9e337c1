"""The placing player on its page, by keyboard and by click: what it says is what the package computes."""

from __future__ import annotations

import random

from playwright.sync_api import expect

from mmu.board import board
from mmu.placing import ALL, LOOKS, NOWHERE, PLACES, Placing

from .conftest import played
from .test_pages import PAGES

PAGE = "book/05-walk-and-free.html"
ROWS = ("begin", "end", "barrier after begin", "reclaimer looks", "reclaimer's barrier")
HAVE = [NOWHERE, *PLACES]


def said(placing):
    """The verdicts in words, and the shortest way to OOPS that is shown."""
    games = {memory: board(placing.program(), memory) for memory in ("SC", "TSO")}
    parts = []
    for memory, game in games.items():
        verdict = "safe" if game.safe else f"OOPS in {game.left[0]} moves"
        parts.append(f"{memory}: {verdict} ({len(game.states)} states)")
    broken = next((game for game in games.values() if not game.safe), None)
    return "; ".join(parts) + ".", [move.text for move in broken.shortest()] if broken else []


def pushed(placing, row, option):
    """The placing after one choice: begin and end come and go together, and push one another along."""
    begin, end, reader_mb, looks, reclaimer_mb = (
        HAVE.index(placing.begin), HAVE.index(placing.end), placing.reader_mb, LOOKS.index(placing.looks),
        placing.reclaimer_mb,
    )  # fmt: skip
    if row == 0:
        begin, end = option, 0 if option == 0 else max(end or 3, option)
    elif row == 1:
        begin, end = 0 if option == 0 else min(begin or 1, option), option
    elif row == 2:
        reader_mb = bool(option)
    elif row == 3:
        looks = option
    else:
        reclaimer_mb = bool(option)
    return Placing(HAVE[begin], HAVE[end], reader_mb, LOOKS[looks], reclaimer_mb)


def chosen(placing, row):
    """Which option of a row a placing has."""
    places = HAVE.index(placing.begin), HAVE.index(placing.end), int(placing.reader_mb), LOOKS.index(placing.looks)
    return (*places, int(placing.reclaimer_mb))[row]


def test_the_page_is_built():
    """The chapter is among the pages that every page's test looks at."""
    assert PAGE in PAGES


def test_any_keys_show_the_packages_verdict(kept):
    """After any keys and clicks the player shows the steps, both verdicts and the shortest bad schedule."""
    page = kept(PAGE, 390)
    el = page.locator('.mmu-player[data-player="place"]')
    el.locator(".mmu-place").focus()
    state, row, past = ALL[0], 0, []
    sizes = (4, 4, 2, 3, 2)
    rng = random.Random(5)
    moves, told = [], []
    for move in rng.choices(
        ["ArrowRight"] * 4 + ["ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp", "u", "click", "r"], k=110
    ):
        new = state
        if move == "click":
            row = rng.randrange(5)
            option = rng.randrange(sizes[row])
            move = (".mmu-place-row button", sum(sizes[:row]) + option)
            new = pushed(state, row, option)
        elif move in ("ArrowLeft", "ArrowRight"):
            option = chosen(state, row) + (1 if move == "ArrowRight" else -1)
            new = pushed(state, row, min(max(option, 0), sizes[row] - 1))
        elif move in ("ArrowUp", "ArrowDown"):
            row = (row + (1 if move == "ArrowDown" else -1)) % 5
        elif move == "u":
            state = new = past.pop() if past else state
        else:
            state, new, row, past = ALL[0], ALL[0], 0, []
        if new != state:
            past.append(state)
            state = new
        moves.append(move)
        words, way = said(state)
        steps = state.walk() + [step.replace("[r]", "") for step in state.free()]
        told.append([words, "oops" if way else "safe", way, steps, [chosen(state, each) for each in range(5)]])
    read = """root => {
      const state = root.querySelector(".mmu-state"), all = selector => [...root.querySelectorAll(selector)];
      const pressed = row => [...row.querySelectorAll("button")].findIndex(button => button.ariaPressed === "true");
      return [state.textContent, state.dataset.ended,
        all(".mmu-lanes .mmu-told").map(line => line.lastChild.textContent),
        all(".mmu-place-code code").map(code => code.textContent), all(".mmu-place-row").map(pressed)];
    }"""
    for move, heard, expected in zip(moves, played(el, moves, read), told, strict=True):
        assert expected[0] in heard[0], move
        assert heard[1:] == expected[1:], move


def test_the_right_placing_by_keyboard(kept):
    """Nine keys lead from nothing to the one placing that no order breaks."""
    page = kept(PAGE)
    el = page.locator('.mmu-player[data-player="place"]')
    el.get_by_role("button", name="Reset").click()
    el.locator(".mmu-place").focus()
    keys = ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"]
    for key in [*keys, "ArrowRight"]:
        page.keyboard.press(key)
    expect(el.locator(".mmu-state")).to_contain_text("✓ SC: safe")
    expect(el.locator(".mmu-state")).to_contain_text("No order is bad.")
    expect(el.locator(".mmu-lanes")).to_be_hidden()
