"""The player of recorded faults on the built page, by keyboard and by mouse: what it says is what the package tells."""

from __future__ import annotations

import json
import random

import pytest
from playwright.sync_api import expect

PAGE = "book/01-price.html"


def spoken(data, fault, at):
    """What the player says of one step."""
    steps = data["faults"][fault]["steps"]
    return f"Step {at + 1} of {len(steps)}, {steps[at]['lock']}. {steps[at]['spoken']}"


@pytest.mark.parametrize("width", [1200, 390])
def test_fault_player(kept, width):
    """After any keys the player shows that step's sentence, flags and line, and marks the step in its list."""
    page = kept(PAGE, width)
    player = page.locator('.mmu-player[data-player="fault"]')
    data = json.loads(player.locator("script").text_content())
    player.locator("button").first.focus()
    now, past = (0, 0), []
    keys = random.Random(1).choices(["ArrowRight", "ArrowLeft", "s", "f", "u", "r"], [14, 4, 1, 2, 3, 1], k=70)
    for key in keys:
        page.keyboard.press(key)
        before, (fault, at) = now, now
        if key == "u":
            now = past.pop() if past else now
        elif key == "r":
            now, past = (0, 0), []
        else:
            last = len(data["faults"][fault]["steps"]) - 1
            moved = {"ArrowRight": (fault, min(at + 1, last)), "ArrowLeft": (fault, max(at - 1, 0))}
            now = moved.get(key, ("sf".index(key) if key in "sf" else 0, 0))
            if now != before:
                past.append(before)
        step = data["faults"][now[0]]["steps"][now[1]]
        expect(player.locator(".mmu-state")).to_have_text(spoken(data, *now))
        marked = player.locator('.mmu-story:visible button[aria-current="step"]')
        expect(marked).to_have_count(1)
        assert marked.text_content()[1:] == step["label"]
        if step["quoted"]:
            expect(player.locator(".mmu-quoted code")).to_have_text(step["flags"] + step["quoted"])
        else:
            expect(player.locator(".mmu-quoted")).to_contain_text("No event")


def test_fault_player_by_mouse(kept):
    """A click on a step goes there, a click on the other fault begins it, and the steps under the lock are marked."""
    page = kept(PAGE)
    player = page.locator('.mmu-player[data-player="fault"]')
    player.get_by_role("button", name="Reset").click()
    data = json.loads(player.locator("script").text_content())
    player.get_by_role("button", name="takes the mmu-lock").click()
    expect(player.locator(".mmu-state")).to_contain_text("under the mmu-lock")
    locked = player.locator('.mmu-story:visible li[data-locked="true"]')
    assert locked.count() == sum(step["locked"] for step in data["faults"][0]["steps"]) == 6
    player.get_by_role("button", name="fast fault").click()
    expect(player.locator(".mmu-state")).to_have_text(spoken(data, 1, 0))
    assert player.locator('.mmu-story:visible li[data-locked="true"]').count() == 0
