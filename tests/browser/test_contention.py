"""The contention player on the built page: whatever is pressed, it says what mmu.cost.price gave for that setting."""

from __future__ import annotations

import random

from playwright.sync_api import expect

from mmu.widgets import ContentionPlayer

from .conftest import played

PAGE = "book/11-does-it-pay.html"


def test_contention_player(kept):
    """After any keys the player shows the package's sentence, the sliders stand where they should, undo goes back."""
    data = ContentionPlayer().data
    sizes = [len(slider["values"]) for slider in data["sliders"]]
    page = kept(PAGE)
    player = page.locator('.mmu-player[data-player="contention"]')
    player.get_by_role("button", name="Reset").click()
    player.locator("button").last.focus()
    start = [size // 2 for size in sizes]
    place, past = list(start), []
    moves = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (2, 1), "ArrowDown": (2, -1)}
    keys = random.Random(2012).choices([*moves, "w", "u", "r"], weights=[3, 4, 3, 3, 4, 2, 1], k=60)
    told = []
    for key in keys:
        before = list(place)
        if key in moves:
            which, by = moves[key]
            place[which] = min(max(place[which] + by, 0), sizes[which] - 1)
        elif key == "w":
            place[1] = (place[1] + 1) % sizes[1]
        elif key == "u":
            place = past.pop() if past else place
        else:
            place, past = list(start), []
        if key not in "ur" and place != before:
            past.append(before)
        here = data["states"][(place[0] * sizes[1] + place[1]) * sizes[2] + place[2]]
        told.append([here["said"], list(place), [f"{here[kind]:.1f} M/s" for kind in ("lock", "fast")]])
    read = """root => [
      root.querySelector(".mmu-state").textContent,
      [...root.querySelectorAll("input")].map(input => Number(input.value)),
      [...root.querySelectorAll(".mmu-bar-number")].map(bar => bar.textContent),
    ]"""
    for key, heard, expected in zip(keys, played(player, keys, read), told, strict=True):
        assert heard == expected, key


def test_sliders_by_keyboard_and_undo(kept):
    """A slider that has the focus is moved by its own arrow keys, and u takes the move back."""
    page = kept(PAGE, 390)
    player = page.locator('.mmu-player[data-player="contention"]')
    player.get_by_role("button", name="Reset").click()
    said = player.locator(".mmu-state").text_content()
    writes = player.get_by_role("slider", name="writes")
    writes.focus()
    page.keyboard.press("ArrowRight")
    expect(writes).to_have_attribute("aria-valuetext", "50 %")
    expect(player.locator(".mmu-state")).to_contain_text("16 vCPUs, 50 % writes")
    page.keyboard.press("u")
    expect(player.locator(".mmu-state")).to_have_text(said)
