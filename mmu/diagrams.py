"""The pictures of races: schedules as lanes, changes of protocols, outcome grids, the id field and its neighbours.

They draw what a :class:`mmu.board.Board` or an spte's layout holds and count nothing but what their text states.
"""

from __future__ import annotations

import difflib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from mmu import spte
from mmu.board import Board, Move
from mmu.figures import BARRIER, FAILED, LOCKS, SUCCEEDED, UNLOCKS, VIOLATED, Step, lanes
from mmu.picture import FAINT, FAST, INK, OOPS, PAPER, Picture, canvas, is_narrow, two_widths

_KIND = {"barrier": BARRIER, "succeeded": SUCCEEDED, "failed": FAILED, "locks": LOCKS, "unlocks": UNLOCKS}


def schedule(game: Board, moves: Sequence[Move], *, oops: str = "write-protected, unlocked, and writable") -> Picture:
    """Moves on a board as lanes, with what each changed beside it. Chapters 6 to 10.

    >>> from mmu.board import board
    >>> from mmu.protocols import one_shot
    >>> game = board(one_shot(2, "no-id"), "SC")
    >>> schedule(game, game.shortest()).alt.partition(";")[0]
    '8 steps (vCPU 0, fault: 3'
    """
    machine = game.machine
    steps, before = [], machine.unpack(game.states[0].shared)
    broken = None
    for move in moves:
        after = machine.unpack(game.states[move.target].shared)
        new = {name.removeprefix("spte."): value for name, value in after.items() if value != before[name]}
        changed = ", ".join(f"{name}={value}" for name, value in new.items())
        text = move.text.removesuffix(" succeeds").replace(" (into its store buffer)", ", buffered")
        steps.append(Step(move.actor, text, _KIND.get(move.kind, "step"), changed))
        before = after
        if game.oops[move.target]:
            broken = move
            break
    if broken:
        steps.append(Step(broken.actor, oops, VIOLATED))
    actors = [f"vCPU {vcpu}, {' or '.join(paths)}" for vcpu, paths in enumerate(machine.program.actors)]
    return lanes(steps, actors, state="changed")


def lines(text: str) -> list[str]:
    """The steps of a protocol's text without its comments and empty lines."""
    bare = (line.partition("#")[0].rstrip() for line in text.strip("\n").splitlines())
    return [line for line in bare if line]


@dataclass(frozen=True)
class Diff:
    """What changes from one protocol to the next, and what each is worth: text for a test, HTML for a page.

    Args:
        before, after: the two texts.
        was, now: the verdicts on them, one sentence each, with their numbers.
    """

    before: str
    after: str
    was: str
    now: str

    @classmethod
    def between(cls, before: Board, after: Board) -> Diff:
        """The change between the programs of two boards, with the verdict on each."""
        old, new = (game.machine.program.text for game in (before, after))
        return cls(old, new, before.verdict(), after.verdict())

    def lines(self) -> list[str]:
        """The paths that differ, each line with `` ``, ``-`` or ``+`` before it."""
        told: list[str] = []
        for path in self._paths():
            old, new = ([line for line in part if line.strip()] for part in (path[0], path[1]))
            if old != new:
                for what, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
                    same = what == "equal"
                    told += [("  " if same else "- ") + line for line in old[a:b]]
                    told += [] if same else ["+ " + line for line in new[c:d]]
        return told

    def _paths(self) -> list[tuple[list[str], list[str]]]:
        split = []
        for text in (self.before, self.after):
            parts: dict[str, list[str]] = {}
            name = ""
            for line in lines(text):
                if not line[0].isspace():
                    name = line if line.endswith(":") else "words"
                parts.setdefault(name, []).append(line)
            split.append(parts)
        return [(split[0].get(name, []), split[1].get(name, [])) for name in dict.fromkeys([*split[0], *split[1]])]

    @staticmethod
    def _said(when: str, verdict: str) -> str:
        kind = "mmu-safe" if verdict.startswith("Safe") else "mmu-broken"
        return f'<p class="{kind}">{when}: {html.escape(verdict)}</p>'

    def __repr__(self) -> str:
        return "\n".join([f"before: {self.was}", *self.lines(), f"after: {self.now}"])

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, str]]:
        rows = []
        for line in self.lines():
            kind = {"-": "del", "+": "ins"}.get(line[0], "span")
            rows.append(f"<{kind}>{html.escape(line)}</{kind}>")
        page = (
            f'<div class="mmu-diff">{self._said("before", self.was)}<pre>{chr(10).join(rows)}</pre>'
            f"{self._said('after', self.now)}</div>"
        )
        return {"text/plain": repr(self), "text/html": page}, {}


@dataclass(frozen=True)
class Index:
    """A list of games with what each shows, and a link that replays its loaded schedule on the same page (gallery)."""

    games: Sequence[Any]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                game.data["title"],
                game.data["memory"],
                f"{len(game.data['line'])}",
                f"#race-{game.data['name']}={','.join(game.data['line'])}",
            )
            for game in self.games
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{title}: {memory}, {steps} moves, {link}" for title, memory, steps, link in self._rows())

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, str]]:
        rows = "".join(
            f'<tr><th scope="row"><a href="{html.escape(link)}">{html.escape(title)}</a></th>'
            f"<td>{memory}</td><td>{steps}</td></tr>"
            for title, memory, steps, link in self._rows()
        )
        head = "".join(f'<th scope="col">{name}</th>' for name in ("counterexample", "memory", "moves"))
        page = f'<table class="mmu-index"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        return {"text/plain": repr(self), "text/html": page}, {}


@two_widths
def outcomes(
    panels: Mapping[str, Mapping[tuple[int, int], int]], names: tuple[str, str], bad: tuple[int, int]
) -> Picture:
    """How many schedules end with which pair of values, one column a setting; the bad pair framed. Chapter 6.

    >>> outcomes({"SC": {(0, 1): 1, (1, 0): 1}}, ("a", "b"), (0, 0)).alt
    'SC: a=0 b=0 in 0 of 2 schedules, never.'
    """
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    findings = []
    size, sep = (8, "\n") if is_narrow() else (10, "  ")
    with canvas(7.0, 2.6, narrow=3.0) as figure:
        axes = figure.add_subplot()
        for column, (name, counted) in enumerate(panels.items()):
            total = sum(counted.values())
            for row, pair in enumerate(pairs):
                times = counted.get(pair, 0)
                wrong = pair == bad
                edge, width = (OOPS, 2.6) if wrong and times else (FAINT, 0.8)
                box = {"facecolor": PAPER, "edgecolor": edge, "linewidth": width}
                axes.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, **box))
                share = times / total
                fill = OOPS if wrong else FAST
                axes.add_patch(
                    Rectangle((column + 0.07, row + 0.74), 0.86 * share, 0.12, facecolor=fill, edgecolor="none")
                )
                text = f"{times:,} of {total:,}" if times else "never"
                ink = (OOPS if times else FAINT) if wrong else (INK if times else FAINT)
                sign = f"OOPS{sep}" if wrong and times else ""
                axes.text(column + 0.5, row + 0.42, sign + text, ha="center", va="center", color=ink, size=size)
            times = counted.get(bad, 0)
            ends = f"{names[0]}={bad[0]} {names[1]}={bad[1]} in {times:,} of {total:,} schedules"
            findings.append(f"{name}: {ends}{'' if times else ', never'}")
        heads = [name.replace(", ", ",\n") if is_narrow() else name for name in panels]
        axes.set_xticks([column + 0.5 for column in range(len(panels))], heads, size=size)
        ends = [f"{names[0]}={a},{sep[:1]}{names[1]}={b}" for a, b in pairs]
        axes.set_yticks([row + 0.5 for row in range(4)], ends, size=size)
        axes.set(xlim=(0, len(panels)), ylim=(4, 0))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return Picture(figure, "; ".join(findings) + ".")


@two_widths
def id_growth(layout: str = "2012-ept", widest: int = 12) -> Picture:
    """The id field growing upward from where it is inferred to start, above the bits of the MMIO mask. Chapter 10.

    >>> id_growth().alt.partition(".")[0]
    'From bit 49 up the field has 127 ids with 7 bits, 254 with 8 (1 would read as MMIO), 509 with 9 (2 would)'
    """
    form = spte.LAYOUTS[layout]
    low, floor = form.identification.low, 44
    leaf = np.uint64(sum(form.bits[name].mask for name in ("R", "W", "X")))
    widths = range(5, widest + 1)
    usable, clash = {}, {}
    for width in widths:
        ids = np.arange(1, 1 << width, dtype=np.uint64)  # (id,)
        lost = spte.is_mmio(leaf | ids << np.uint64(low), form)
        usable[width], clash[width] = int((~lost).sum()), int(lost.sum())
    with canvas(7.0, 3.3) as figure:
        axes = figure.add_subplot()
        for row, name in [(0, "MMIO mask"), *((width - 3, f"{width} bits") for width in widths)]:
            for bit in range(floor, 64):
                own = low <= bit < low + row + 3 if row else form.mmio_mask >> bit & 1
                used = any(field.mask >> bit & 1 for field_name, field in form.bits.items() if field_name != "ID")
                box = {"facecolor": INK if own else PAPER, "edgecolor": INK if own or used else FAINT, "linewidth": 0.8}
                axes.add_patch(
                    Rectangle((63 - bit + 0.08, row + 0.12), 0.84, 0.76, hatch="////" if used else "", **box)
                )
                if low <= bit < 52:  # address, on a CPU that has so many bits of it
                    light = {"facecolor": "none", "edgecolor": PAPER, "linewidth": 0, "hatch": "///"}
                    axes.add_patch(Rectangle((63 - bit + 0.08, row + 0.12), 0.84, 0.76, **light))
            text = (
                "" if not row else f"{usable[row + 3]:,} ids" + (f", {clash[row + 3]} lost" if clash[row + 3] else "")
            )
            lost = row and clash[row + 3]
            axes.text(64 - floor + 0.3, row + 0.5, text, va="center", color=OOPS if lost else INK)
            axes.text(-0.3, row + 0.5, name, va="center", ha="right")
        axes.text(63 - 46 + 0.5, 1.5, "page frame number", ha="center", va="center", size=8, color=FAINT)
        bits = [63, 56, 49, floor] if is_narrow() else [63, 60, 57, 56, 52, 49, 48, floor]
        axes.set_xticks([63 - bit + 0.5 for bit in bits], [str(bit) for bit in bits], size=8)
        axes.set(xlim=(-4.2, 64 - floor + 5.5), ylim=(widest - 2, 0), yticks=[])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return Picture(
        figure,
        f"From bit {low} up the field has {usable[7]} ids with 7 bits, {usable[8]} with 8 ({clash[8]} would read as "
        f"MMIO), {usable[9]} with 9 ({clash[9]} would). Below bit {low} is the page frame number, "
        "and on a CPU with 52 address bits it goes on to bit 51.",
    )
