"""The players of chapter 3 on the built page, by keyboard: what they say is what the package computes."""

from __future__ import annotations

import random

import numpy as np

from mmu import paging, pfec, spte, update
from mmu.widgets.spte import ACTIONS, TABLES
from mmu.widgets.walk import ACCESSES, CASES, LEVELS, NEEDS, RIGHTS

from .conftest import played

PAGE = "book/03-spte.html"
BIT = {"W": 1 << 1, "U": 1 << 2, "X": 1 << 63}


def player(page, name):
    return page.locator(f'.mmu-player[data-player="{name}"]').first


def path_of(case):
    path = {level: 0x1A2B021 if level == 1 else (5 - level) << 12 | 0x21 for level in LEVELS}
    for level in LEVELS:
        for right in "WU":
            path[level] |= BIT[right]
        for right in CASES[case][2].get(level, ""):
            path[level] ^= BIT[right]
    return path


def test_walk_player(kept):
    """After any keys and switches the walk player shows the entries, what is left, the fault, and who denies."""
    page = kept(PAGE)
    box = player(page, "walk")
    start = (0, path_of(0), CASES[0][1], 0)
    state, past = start, []
    names = list(ACCESSES)
    moves = ["ArrowLeft", "ArrowRight", "1", "2", "3", "4", "a", "u", "r"] + [
        r + str(n) for r in RIGHTS for n in LEVELS
    ]
    box.locator("button").first.focus()
    moves = random.Random(3).choices(moves, k=70)
    pressed, told = [], []
    for move in moves:
        case, path, name, asked = state
        if move[0] in RIGHTS and len(move) == 2:
            pressed.append((".mmu-bit", LEVELS.index(int(move[1])) * len(RIGHTS) + RIGHTS.index(move[0])))
            new = (case, {**path, int(move[1]): path[int(move[1])] ^ BIT[move[0]]}, name, 0)
        else:
            pressed.append(move)
            if move in "1234":
                new = (case, path, name, int(move))
            elif move == "a":
                new = (case, path, names[(names.index(name) + 1) % len(names)], 0)
            elif move == "u":
                new = past.pop() if past else state
            elif move == "r":
                new, past = start, []
            else:
                case = (case + (1 if move == "ArrowRight" else -1)) % len(CASES)
                new = (case, path_of(case), CASES[case][1], 0)
        if move not in "ur" and new != state:
            past.append(state)
        state = case, path, name, asked = new
        words = np.array([[path[level] for level in LEVELS]], dtype=np.uint64)
        out = paging.access(words, **ACCESSES[name])
        code = int(out.code[0])
        said = [f"{name} faults with {code:#04x} {pfec.PFEC.text(code)}: " if out.fault[0] else f"{name} passes: "]
        walk = out.walk
        left = [
            right for right, on in zip(RIGHTS, (walk.writable, walk.user_page, walk.executable), strict=True) if on[0]
        ]
        has = {level: "".join(r for r in RIGHTS if bool(path[level] & BIT[r]) != (r == "X")) for level in LEVELS}
        if asked:
            verb = "permits" if set(NEEDS[name]) <= set(has[asked]) else "denies"
            said.append(f" Level {asked} {verb} it: ")
        kept_on = [set(has[4]), *[set()] * 3]
        for i in (1, 2, 3):
            kept_on[i] = kept_on[i - 1] & set(has[LEVELS[i]])
        shown = [str(right in rights).lower() for rights in kept_on for right in RIGHTS]
        begins = f"At the page: {' '.join(left) or 'nothing'}; "
        told.append((begins, said, [f"{path[level]:#x}" for level in LEVELS], shown))
    read = """root => [
      root.querySelector(".mmu-state").textContent,
      [...root.querySelectorAll("td code")].map(code => code.textContent),
      [...root.querySelectorAll(".mmu-left")].map(cell => cell.dataset.on),
    ]"""
    for move, (text, *heard), (begins, said, *expected) in zip(moves, played(box, pressed, read), told, strict=True):
        assert text.startswith(begins) and all(part in text for part in said), move
        assert heard == expected, move


def acted(table, word, action):
    """The next word: the package's scalar functions, one word at a time."""
    layout, bits = table.layout, spte.LAYOUTS[table.layout].bits
    if action >= 2:
        if spte.classify(word, layout, 1) not in spte.LEAVES:
            return word
        if action == 4:
            return update.age(word, layout)
        return update.write_protect(word, shadow=action == 3, layout=layout)
    write = action == 1
    if "P" in bits:
        present = bits.field(word, "P")
        passes = present and (bits.field(word, "W") or not write)
        code = present | write << 1 | 4
    else:
        check = spte.ept_misconfigured(word, 1, maxphyaddr=52)
        if check > 1:
            return word
        passes = update.allows(word, write=write, layout=layout)
        code = bool(word & 7) | write << 1 | (not write) << 2
    if passes:
        return word | (bits.mask("A", "D") if write else bits.mask("A")) if table.ad_bits else word
    if not pfec.can_be_fast(code, pfec.LINUX_61_AD if table.ad_bits else pfec.LINUX_61_NO_AD):
        return word
    return update.fast_page_fault(word, write=write, ad_bits=table.ad_bits, layout=layout)[0]


def test_spte_player(kept):
    """After any switches and actions the spte player shows the package's next word, its state and what was done."""
    page = kept(PAGE)
    box = player(page, "spte")
    start = (0, TABLES[0].start, "")
    state, past = start, []
    box.locator("button").first.focus()
    rng = random.Random(2012)
    moves, told = [], []
    for move in rng.choices([*"0123401234", "ArrowLeft", "ArrowRight", "u", "r", *["bit"] * 5], k=120):
        kind, word, _ = before = state
        table = TABLES[kind]
        if move == "bit":
            name = rng.choice(table.bits)
            moves.append((".mmu-bits:not([hidden]) .mmu-bit", list(table.bits).index(name)))
            state = (kind, word ^ spte.LAYOUTS[table.layout].bits.mask(name), "")
        else:
            moves.append(move)
            if move in "01234":
                act = list(ACTIONS.values())[int(move)]
                said = act(table, np.array([word], dtype=np.uint64)).said[0]
                state = (kind, acted(table, word, int(move)), said)
            elif move == "u":
                state = past.pop() if past else state
            elif move == "r":
                state, past = start, []
            else:
                kind = (kind + (1 if move == "ArrowRight" else -1)) % len(TABLES)
                state = (kind, TABLES[kind].start, "")
        if move not in "ur" and state != before:
            past.append(before)
        kind, word, said = state
        name = spte.STATES[spte.classify(word, TABLES[kind].layout, 1)]
        now = f"{word:#x}: {name}; the CPU "
        told.append((f"{word:#x}", f"{said} Now {now}" if said else now))
    read = """root => [".mmu-spte-word", ".mmu-state"].map(selector => root.querySelector(selector).textContent)"""
    for move, (shown, text), (word, begins) in zip(moves, played(box, moves, read), told, strict=True):
        assert shown == word and text.startswith(begins), move
