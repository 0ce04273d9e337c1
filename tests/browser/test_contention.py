"""The contention player on the built page: whatever is pressed, it says what mmu.cost.price gave for that setting."""

from __future__ import annotations

import random

from playwright.sync_api import expect

from mmu.widgets import ContentionPlayer

PAGE = "book/11-does-it-pay.html"


def test_contention_player(kept):
    """After any keys the player shows the package's sentence, the sliders stand where they should, undo goes back."""
    data = ContentionPlayer().data
    sizes = [len(slider["values"]) for slider in data["sliders"]]
    page = kept(PAGE)
    player = page.locator('.mmu-player[data-player="contention"]')
    player.locator("button").last.focus()
    start = [size // 2 for size in sizes]
    place, past = list(start), []
    moves = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (2, 1), "ArrowDown": (2, -1)}
    for key in random.Random(2012).choices([*moves, "w", "u", "r"], weights=[3, 4, 3, 3, 4, 2, 1], k=60):
        page.keyboard.press(key)
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
        expect(player.locator(".mmu-state")).to_have_text(here["said"])
        values = player.locator("input").evaluate_all("inputs => inputs.map(input => Number(input.value))")
        assert values == place
        shown = player.locator(".mmu-bar-number").all_text_contents()
        assert shown == [f"{here[kind]:.1f} M/s" for kind in ("lock", "fast")]


def test_sliders_by_keyboard_and_undo(kept):
    """A slider that has the focus is moved by its own arrow keys, and u takes the move back."""
    page = kept(PAGE, 390)
    player = page.locator('.mmu-player[data-player="contention"]')
    said = player.locator(".mmu-state").text_content()
    writes = player.get_by_role("slider", name="writes")
    writes.focus()
    page.keyboard.press("ArrowRight")
    expect(writes).to_have_attribute("aria-valuetext", "50 %")
    expect(player.locator(".mmu-state")).to_contain_text("16 vCPUs, 50 % writes")
    page.keyboard.press("u")
    expect(player.locator(".mmu-state")).to_have_text(said)
