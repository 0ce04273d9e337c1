"""The player of dirty-log rounds on the built page, by keyboard: what it says is what the simulated guest does."""

from __future__ import annotations

import random
from functools import cache

import pytest
from playwright.sync_api import expect

from mmu import rounds
from mmu.widgets.rounds import EDITS, INTERVALS, MACHINES, SHARES, SHOWN, asked, told

from .conftest import played

PAGE = "book/04-why-w-goes.html"
SIZES = (len(INTERVALS), len(SHARES), len(EDITS))
START = (1, 1, 0)
ran = cache(rounds.run)  # both widths ask for the same runs


def moved(at, key):
    """The setting after a key that changes one choice: the interval stops at its ends, the others go round."""
    interval, share, edits = at
    if key == "w":
        return interval, (share + 1) % SIZES[1], edits
    if key == "e":
        return interval, share, (edits + 1) % SIZES[2]
    step = 1 if key == "ArrowRight" else -1
    return min(max(interval + step, 0), SIZES[0] - 1), share, edits


@pytest.mark.parametrize("width", [1200, 390])
def test_rounds_player(kept, width):
    """After any keys the player tells and draws the run of the simulated guest with that setting."""
    page = kept(PAGE, width)
    player = page.locator('.mmu-player[data-player="rounds"]')
    player.get_by_role("button", name="Reset").click()
    player.locator("button").first.focus()
    at, past, told_after = START, [], []
    keys = random.Random(4).choices(["ArrowRight", "ArrowLeft", "w", "e", "u", "r"], [4, 4, 3, 3, 3, 1], k=14)
    for key in keys:
        if key == "u":
            at = past.pop() if past else at
        elif key == "r":
            at, past = START, []
        elif moved(at, key) != at:
            past.append(at)
            at = moved(at, key)
        interval, share, edits = INTERVALS[at[0]], SHARES[at[1]], EDITS[at[2]]
        results = [ran(name, interval, share, edits=edits, rounds=SHOWN) for name in MACHINES]
        sentences = [told(name, result) for name, result in zip(MACHINES, results, strict=True)]
        tables = [[result.table().sum(axis=1).tolist(), result.dirty.tolist()] for result in results]
        pressed = [str(interval), f"{share:.0%}", str(edits)]
        told_after.append([" ".join([asked(interval, share, edits), *sentences]), tables, pressed])
    read = """root => {
      const texts = (all, selector) => [...all.querySelectorAll(selector)].map(each => each.textContent);
      const numbers = (table, selector) => texts(table, selector).map(Number);
      const tables = [...root.querySelectorAll("table")].map(table =>
        [numbers(table, ".mmu-total"), numbers(table, "td:nth-child(3)")]);
      return [texts(root, ".mmu-state")[0].trim(), tables, texts(root, '.mmu-tabs button[aria-pressed="true"]')];
    }"""
    for key, heard, expected in zip(keys, played(player, keys, read), told_after, strict=True):
        assert heard == expected, key


def test_rounds_player_by_mouse(kept):
    """A click on a value chooses it, and Undo takes it back."""
    page = kept(PAGE)
    player = page.locator('.mmu-player[data-player="rounds"]')
    player.get_by_role("button", name="Reset").click()
    player.get_by_role("button", name="2048").click()
    expect(player.locator(".mmu-state")).to_contain_text("every 2048 accesses")
    player.get_by_role("button", name="Undo").click()
    expect(player.locator(".mmu-state")).to_contain_text(f"every {INTERVALS[START[0]]} accesses")


def test_a_player_opens_at_the_printed_run(kept):
    """Chapter 2's player opens at the setting whose run its page prints, and returns there on reset."""
    page = kept("book/02-pfec.html")
    player = page.locator('.mmu-player[data-player="rounds"]')
    expect(player.locator(".mmu-state")).to_contain_text(asked(256, 0.5, 4))
    expect(player.locator(".mmu-state")).to_contain_text("NPT: 499 faults in 6 rounds")
    expect(page.locator("article")).to_contain_text("NPT: 498 of 499 candidates")
    player.get_by_role("button", name="1024").click()
    player.get_by_role("button", name="Reset").click()
    expect(player.locator(".mmu-state")).to_contain_text(asked(256, 0.5, 4))
