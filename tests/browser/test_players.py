"""The players on the built pages, by keyboard: what they say is what the package computes."""

from __future__ import annotations

import json
import random

import pytest
from playwright.sync_api import expect

from mmu import pfec

from .conftest import SAID, SITE, played
from .test_pages import PAGES

ASKING = [name for name in PAGES if 'data-player="question"' in (SITE / name).read_text(encoding="utf-8")]


def players(page, name):
    return page.locator(f'.mmu-player[data-player="{name}"]')


def test_code_player(kept):
    """After any keys the PFEC player shows the package's flags, sentence and three verdicts for that code."""
    page = kept("book/02-pfec.html")
    player = players(page, "codes").first
    player.locator("button").first.focus()
    keys = random.Random(2012).choices(["0", "1", "2", "3", "4", "ArrowLeft", "ArrowRight", "u", "r"], k=60)
    code, past, told = 0x7, [], []
    for key in keys:
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
        verdicts = {rule: pfec.verdict(code, rule) for rule in pfec.SOURCES}
        heard = "; ".join(f"{rule}: {verdict.verdict}" for rule, verdict in verdicts.items())
        pressed = [str(bool(code >> bit & 1)).lower() for bit in (4, 3, 2, 1, 0)]
        rows = [[verdict.verdict, verdict.reason] for verdict in verdicts.values()]
        told.append([f"{code:#04x} {flags}: {sentence}. {heard}.", pressed, rows])
    read = """root => [
      root.querySelector(".mmu-state").textContent,
      [...root.querySelectorAll(".mmu-bit")].map(bit => bit.ariaPressed),
      [...root.querySelectorAll("tbody tr")].map(row => [...row.querySelectorAll("td")].map(cell => cell.textContent)),
    ]"""
    for key, heard, expected in zip(keys, played(player, keys, read), told, strict=True):
        assert all(row[0].endswith(verdict) for row, (verdict, _) in zip(heard[2], expected[2], strict=True))
        assert [*heard[:2], [row[1] for row in heard[2]]] == [*expected[:2], [reason for _, reason in expected[2]]], key


def test_code_player_by_mouse(kept):
    """A click on a switch toggles its bit, and Undo takes it back."""
    page = kept("book/02-pfec.html", 390)
    player = players(page, "codes").first
    player.get_by_role("button", name="Reset").click()
    player.get_by_role("button", name="bit 3 RSVD").click()
    expect(player.locator(".mmu-state")).to_contain_text("0x0f")
    player.get_by_role("button", name="Undo").click()
    expect(player.locator(".mmu-state")).to_contain_text("0x07")


@pytest.mark.parametrize("name", ASKING)
def test_questions(kept, name):
    """Each answer of each question, chosen by its number key, gets its own words, and exactly one is right."""
    done = set()
    for player in players(kept(name), "question").all():
        data = json.loads(player.locator("script").text_content())
        player.locator("button").first.focus()
        signs = ["✓ Yes." if number == data["right"] else "✗ No." for number in range(len(data["choices"]))]
        told = [f"{sign} {choice['because']}" for sign, choice in zip(signs, data["choices"], strict=True)]
        assert played(player, [str(number + 1) for number in range(len(told))], SAID, done) == told
