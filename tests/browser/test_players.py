"""The players on the built pages, by keyboard: what they say is what the package computes."""

from __future__ import annotations

import json
import random

import pytest
from playwright.sync_api import expect

from mmu import pfec

from .conftest import SITE
from .test_pages import PAGES

ASKING = [name for name in PAGES if 'data-player="question"' in (SITE / name).read_text(encoding="utf-8")]


def players(page, name):
    return page.locator(f'.mmu-player[data-player="{name}"]')


def test_code_player(kept):
    """After any keys the PFEC player shows the package's flags, sentence and three verdicts for that code."""
    page = kept("book/02-pfec.html")
    player = players(page, "codes").first
    player.locator("button").first.focus()
    code, past = 0x7, []
    for key in random.Random(2012).choices(["0", "1", "2", "3", "4", "ArrowLeft", "ArrowRight", "u", "r"], k=60):
        page.keyboard.press(key)
        if key in "01234":
            past.append(code)
            code ^= 1 << int(key)
        elif key == "u":
            code = past.pop() if past else code
        elif key == "r":
            code, past = 0x7, []
        else:
            past.append(code)
            code = (code + (1 if key == "ArrowRight" else -1)) % 32
        sentence = "no fault carries this code" if pfec.impossible(code) else pfec.describe(code)
        flags = pfec.PFEC.text(code) if code else "none"
        heard = "; ".join(f"{rule}: {pfec.verdict(code, rule).verdict}" for rule in pfec.SOURCES)
        expect(player.locator(".mmu-state")).to_have_text(f"{code:#04x} {flags}: {sentence}. {heard}.")
        pressed = player.locator(".mmu-bit").evaluate_all("bits => bits.map(bit => bit.ariaPressed)")
        assert pressed == [str(bool(code >> bit & 1)).lower() for bit in (4, 3, 2, 1, 0)]
        rows = player.locator("tbody tr").all()
        for row, rule in zip(rows, pfec.SOURCES, strict=True):
            verdict = pfec.verdict(code, rule)
            assert row.locator("td").all_text_contents()[0].endswith(verdict.verdict)
            assert row.locator("td").all_text_contents()[1] == verdict.reason


def test_code_player_by_mouse(kept):
    """A click on a switch toggles its bit, and Undo takes it back."""
    page = kept("book/02-pfec.html", 390)
    player = players(page, "codes").first
    player.get_by_role("button", name="bit 3 RSVD").click()
    expect(player.locator(".mmu-state")).to_contain_text("0x0f")
    player.get_by_role("button", name="Undo").click()
    expect(player.locator(".mmu-state")).to_contain_text("0x07")


@pytest.mark.parametrize("name", ASKING)
def test_questions(kept, name):
    """Each answer of each question, chosen by its number key, gets its own words, and exactly one is right."""
    page = kept(name)
    for player in players(page, "question").all():
        data = json.loads(player.locator("script").text_content())
        player.locator("button").first.focus()
        for number, choice in enumerate(data["choices"]):
            page.keyboard.press(str(number + 1))
            sign = "✓ Yes." if number == data["right"] else "✗ No."
            expect(player.locator(".mmu-state")).to_have_text(f"{sign} {choice['because']}")
