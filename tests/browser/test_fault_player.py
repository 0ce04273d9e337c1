"""The player of recorded faults on the built page, by keyboard and by mouse: what it says is what the package tells."""

from __future__ import annotations

import json
import random

import pytest
from playwright.sync_api import expect

from .conftest import played

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
    player.get_by_role("button", name="Reset").click()
    player.locator("button").first.focus()
    now, past, told = (0, 0), [], []
    keys = random.Random(1).choices(["ArrowRight", "ArrowLeft", "s", "f", "u", "r"], [14, 4, 1, 2, 3, 1], k=70)
    for key in keys:
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
        quoted = step["flags"] + step["quoted"] if step["quoted"] else None
        told.append([spoken(data, *now), [step["label"]], quoted])
    read = """root => {
      const marked = [...root.querySelectorAll('.mmu-story button[aria-current="step"]')];
      const quoted = root.querySelector(".mmu-quoted");
      return [root.querySelector(".mmu-state").textContent,
        marked.filter(button => button.checkVisibility()).map(button => button.textContent.slice(1)),
        quoted.textContent.includes("No event") ? null : quoted.querySelector("code").textContent];
    }"""
    for key, heard, expected in zip(keys, played(player, keys, read), told, strict=True):
        assert heard == expected, key


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
