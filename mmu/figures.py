"""The book's pictures. They draw what they are given and compute nothing but counts for their alternative text.

:func:`ribbon` shows words bit by bit, :func:`lanes` what several actors do one after the other, :func:`wall` every
schedule as one cell, :func:`codes` and :func:`fault_codes` error codes. All speak the one visual language of
:mod:`mmu.picture`; each returns a :class:`~mmu.picture.Picture`, the drawing with its finding in words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from numpy.typing import ArrayLike, NDArray

from mmu import pfec, update
from mmu.bits import WORD_BITS, Layout
from mmu.picture import (
    FAINT,
    FAST,
    INK,
    LOCK,
    OOPS,
    PAPER,
    PIXEL,
    VCPU,
    VCPU_MARKS,
    Picture,
    canvas,
    is_narrow,
    two_widths,
)
from mmu.spte import STATES, SpteLayout, classify, layout_named

VERDICT_STYLE = {
    "fast": {"facecolor": FAST, "edgecolor": FAST, "hatch": "", "ink": PAPER, "sign": "fast"},
    "slow": {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "////", "ink": INK, "sign": "slow"},
    "impossible": {"facecolor": PAPER, "edgecolor": FAINT, "hatch": "", "ink": FAINT, "sign": "×"},
}


@two_widths
def codes(rule: str = pfec.LINUX_61_AD) -> Picture:
    """All 32 codes of bits 0 to 4 as a map: rows are F and RSVD, columns are U, W and P; each cell says its verdict.

    Chapter 2.

    >>> codes(pfec.SERIES_2012).alt
    'Of 32 codes, 14 cannot occur; the rule "2012 series" lets 6 try the fast path and sends 12 to the slow one.'
    """
    verdicts = [pfec.verdict(code, rule).verdict for code in range(32)]
    small = 7.5 if is_narrow() else 9
    with canvas(7.0, 3.1, narrow=3.1) as figure:
        axes = figure.add_subplot()
        for code, verdict in enumerate(verdicts):
            column, row = code & 7, code >> 3
            style = VERDICT_STYLE[verdict]
            box = {key: style[key] for key in ("facecolor", "edgecolor", "hatch")}
            axes.add_patch(Rectangle((column + 0.04, row + 0.05), 0.92, 0.9, linewidth=1.2, **box))
            plate = {"facecolor": box["facecolor"], "edgecolor": "none", "pad": 1.5}
            middle = {"ha": "center", "va": "center", "color": style["ink"], "bbox": plate}
            axes.text(column + 0.5, row + 0.36, f"{code:#04x}", family=_MONO, size=small + 1, **middle)
            axes.text(column + 0.5, row + 0.70, style["sign"], size=small, **middle)
        columns = ["|".join(n for n in "PWU" if pfec.PFEC.field(c, n)) or "none" for c in range(8)]
        axes.set_xticks(np.arange(8, dtype=np.int64) + 0.5, columns, size=small)
        rows = ["no F,\nno RSVD", "RSVD", "F", "F|RSVD"]
        axes.set_yticks(np.arange(4, dtype=np.int64) + 0.5, rows, size=small)
        axes.set(xlim=(0, 8), ylim=(4, 0))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    count = {name: verdicts.count(name) for name in VERDICT_STYLE}
    return Picture(
        figure,
        f'Of 32 codes, {count["impossible"]} cannot occur; the rule "{rule}" lets {count["fast"]} try the fast path '
        f"and sends {count['slow']} to the slow one.",
    )


@two_widths
def fault_codes(columns: Mapping[str, Sequence[tuple[int, int]]]) -> Picture:
    """Recorded faults by error code, one panel a recording, in descending order, each bar labelled with its count.

    Args:
        columns: for each recording's name its ``(error code, count)`` pairs; codes as they reach the handler.

    Bars of codes that Linux 6.1 may repair without the lock are solid, the others hatched. Chapter 2.
    """
    longest = max(len(pairs) for pairs in columns.values())
    widest = max(n for pairs in columns.values() for _, n in pairs)
    findings = []
    rows = [len(pairs) if is_narrow() else longest for pairs in columns.values()]
    shape, heights = ((len(rows), 1), rows) if is_narrow() else ((1, len(rows)), None)
    with canvas(7.0, 0.8 + 0.3 * longest, narrow=0.3 * sum(rows) + 0.7 * len(rows)) as figure:
        every = figure.subplots(*shape, squeeze=False, height_ratios=heights).ravel()
        for axes, (name, pairs), most in zip(every, columns.items(), rows, strict=True):
            pairs = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
            total = sum(n for _, n in pairs)
            fast = sum(n for code, n in pairs if pfec.can_be_fast(code))
            for row, (code, n) in enumerate(pairs):
                style = VERDICT_STYLE["fast" if pfec.can_be_fast(code) else "slow"]
                box = {key: style[key] for key in ("facecolor", "edgecolor", "hatch")}
                axes.barh(row, n, height=0.7, linewidth=1.2, **box)
                axes.annotate(f"{n}", (n, row), xytext=(4, 0), textcoords="offset points", va="center", size=9)
            axes.set_yticks(
                range(len(pairs)),
                [f"{pfec.PFEC.text(code) if code else 'none'}  {code:#04x}" for code, _ in pairs],
                size=9,
            )
            axes.set(ylim=(most - 0.4, -0.6), xlim=(0, 1.15 * widest), xlabel=f"faults, {name}")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            top, times = pairs[0]
            findings.append(
                f"{name}: {total} faults with {len(pairs)} codes, most often {pfec.PFEC.text(top)} ({times} times); "
                f"{fast} are candidates for the fast path"
            )
    return Picture(figure, "; ".join(findings) + ".")


@two_widths
def transitions(layout: str = "6.1-npt") -> Picture:
    """Which of the states that tell who may write follow on which: rows are the old state, columns the new one.

    A cell names the rows of :data:`mmu.update.TRANSITIONS` that make the change; it is solid where one of them takes no
    lock, hatched where all do, × where no kernel makes the change. Chapter 3.

    >>> transitions().alt
    'Of 20 changes between the 5 states, 15 are legal; 1 of them needs no lock: write-protected: dirty log to writable.'
    """
    form = layout_named(layout)
    leaf = update.make_spte(0x625A, layout=layout)
    blank = leaf & ~form.bits.mask(*_WRITERS)
    words = [0] + [blank | form.bits.pack(**dict(zip(_WRITERS, three, strict=True))) for three in _LEGAL]
    names = [STATES[classify(word, form, 1)] for word in words]
    legal, free = 0, []
    small = 7.5 if is_narrow() else 9
    with canvas(7.0, 4.3, narrow=4.3) as figure:
        axes = figure.add_subplot()
        for row, old in enumerate(words):
            for column, new in enumerate(words):
                if row == column:
                    continue
                makers = update.makers(old, new, form, 1)
                unlocked = any(maker.lock == update.NO_LOCK for maker in makers)
                kind = "fast" if unlocked else "slow" if makers else "impossible"
                style = VERDICT_STYLE[kind]
                legal += bool(makers)
                free += [f"{names[row]} to {names[column]}"] * unlocked
                box = {key: style[key] for key in ("facecolor", "edgecolor", "hatch")}
                axes.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, linewidth=1.2, **box))
                plate = {"facecolor": box["facecolor"], "edgecolor": "none", "pad": 1.5}
                middle = {"ha": "center", "va": "center", "color": style["ink"], "bbox": plate}
                text = "\n".join(maker.name for maker in makers) or style["sign"]
                text = text.replace(" ", "\n") if is_narrow() else text
                axes.text(column + 0.5, row + 0.5, text, size=small, **middle)
        bits = ["".join(map(str, three)) for three in _LEGAL]
        short = [names[0], *bits]
        long = [names[0], *(f"{name}\n{three}" for name, three in zip(names[1:], bits, strict=True))]
        axes.set_xticks(np.arange(5, dtype=np.int64) + 0.5, [f"to {three}" for three in short], size=small)
        axes.set_yticks(np.arange(5, dtype=np.int64) + 0.5, [label.replace(": ", ":\n") for label in long], size=small)
        axes.set(xlim=(0, 5), ylim=(5, 0))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return Picture(
        figure,
        f"Of {len(words) * (len(words) - 1)} changes between the {len(words)} states, {legal} are legal; "
        f"{len(free)} of them needs no lock: {'; '.join(free)}.",
    )


_WRITERS = ("HOST_W", "MMU_W", "W")
_LEGAL = ((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0))


@two_widths
def three_walks() -> Picture:
    """Which tables the CPU walks under shadow paging, NPT and EPT, who made them, and how a refusal is reported.

    Chapter 2.
    """
    guest, kvm = {"facecolor": PAPER, "edgecolor": VCPU[0]}, {"facecolor": "#E9ECEF", "edgecolor": LOCK}
    rows = [
        ("shadow paging", [("shadow table", "made by KVM", kvm, 2)], "page fault", "error code"),
        ("NPT (AMD)", [("guest's table", "made by the guest", guest, 1), ("nested table", "made by KVM", kvm, 1)],
         "nested page fault", "EXITINFO1"),
        ("EPT (Intel)", [("guest's table", "made by the guest", guest, 1), ("EPT table", "made by KVM", kvm, 1)],
         "EPT violation", "exit qualification"),
    ]  # fmt: skip
    # on a phone a name stands above its tables, and there is less room for these
    lift, first, unit, size, right = (0.56, 0.0, 1.08, 7.5, 3.85) if is_narrow() else (0.0, 1.75, 1.5, 9, 6.9)
    pitch = 1.35 if is_narrow() else 1.0
    event_at = first + 2 * unit + (0.3 if is_narrow() else 0.57)
    with canvas(7.0, 3.0, narrow=3.9) as figure:
        axes = figure.add_subplot()
        for place, (name, tables, event, number) in enumerate(rows):
            row = pitch * place
            axes.text(0, row - lift, name, va="center", weight="bold")
            left = first
            for label, maker, style, width in tables:
                axes.add_patch(Rectangle((left, row - 0.34), unit * width - 0.1, 0.68, linewidth=1.4, **style))
                middle = left + unit / 2 * width - 0.05
                axes.text(middle, row - 0.12, label, ha="center", va="center", size=size)
                axes.text(middle, row + 0.16, maker, ha="center", va="center", size=size - 1, color=FAINT)
                left += unit * width
            axes.annotate("", (event_at - 0.07, row), (left - 0.07, row), arrowprops={"arrowstyle": "->", "color": INK})
            axes.text(event_at, row - 0.12, event, va="center", size=size + 0.5)
            axes.text(event_at, row + 0.16, f"with an {number}", va="center", size=size - 0.5, color=FAINT)
        top, bottom = -0.72 - 1.0 * lift, 2 * pitch + 0.45
        for place, head in enumerate(("guest virtual", "guest physical", "host physical")):
            x = first + unit * place - 0.1 * (place == 2)
            side = "left" if is_narrow() and not place else "center"
            head = head.replace(" ", "\n") if is_narrow() else head
            axes.text(x, top, head, ha=side, va="center", size=7.5, color=FAINT)
            axes.plot(
                [x, x],
                [top + (0.24 if is_narrow() else 0.12), bottom],
                color=FAINT,
                linewidth=0.6,
                linestyle=":",
                zorder=0,
            )
        if not is_narrow():
            axes.text(event_at, top, "a refusal is reported as", va="center", size=8, color=FAINT)
        axes.set(xlim=(-0.02, right), ylim=(bottom + 0.05, top - 0.18))
        axes.set_axis_off()
    tables = ", ".join(f"{name}: {len(list(walked))}" for name, walked, _, _ in rows)
    return Picture(
        figure,
        f"Tables between a guest virtual and a host physical address ({tables}). KVM makes the only table of shadow "
        "paging and the second one of NPT and EPT; each of the three reports a refusal under another name.",
    )


# Words, bit by bit ---------------------------------------------------------------------------------------------------

_LETTERS = {
    "PWT": "T", "PCD": "C", "PS": "S", "HOST_W": "H", "MMU_W": "M", "MMU_P": "K", "NX": "N", "SVE": "V", "IPAT": "I",
    "SAVED_R": "r", "SAVED_X": "x", "RSVD": "R",
}  # fmt: skip
_MONO = "DejaVu Sans Mono"


class Row(NamedTuple):
    """One word of a :func:`ribbon`: what it is called, its value and the layout that names its bits."""

    label: str
    word: int
    layout: Layout | SpteLayout | str


@two_widths
def ribbon(rows: Sequence[Row | tuple[str, int, Layout | SpteLayout | str]]) -> Picture:
    """Words as 64 cells each, the highest bit first: set is filled with its letter, clear is outlined.

    A word has two rows of 32 cells, on a phone four of 16. Bits that only KVM reads are round, those that the CPU reads
    are square, bits without a name are dots; below stands which letter means which name, where it is not the first. A
    bit that differs from the row above, where that row has the same layout, is underlined.

    Args:
        rows: the words from top to bottom; a layout is a :class:`mmu.bits.Layout`, an spte's, or its name.

    Chapters 2, 3 and 10.

    >>> ribbon([("before", 0x625ae65, "6.1-npt"), ("after", 0x625ae67, "6.1-npt")]).alt
    'before 0x625ae65: set are P, U, A, D, HOST_W, MMU_W, MMU_P, PFN 0x625a; after 0x625ae67: 1 bit differs, W 0 to 1.'
    """
    words = [_Word(label, int(word), *_bits_of(layout)) for label, word, layout in rows]
    grid = _Grid(360, 16, 18) if is_narrow() else _Grid(700, 32, 20)
    last = [i + 1 == len(words) or words[i + 1].layout is not words[i].layout for i in range(len(words))]
    lines: list[tuple[int, int, float]] = []  # (word, line of its cells, y of these)
    y = 4.0
    for i, word in enumerate(words):
        y += 22
        for line in range(WORD_BITS // grid.columns):
            lines.append((i, line, y + 11))
            y += grid.cell + 18 + (grid.name_height(word.layout, line) if last[i] else 0)
    key = _ribbon_key(words)
    height = ceil(y + 17 * len(key))
    with canvas(grid.width * PIXEL, height * PIXEL) as figure:
        axes = _pixels(figure, grid.width, height)
        for i, line, top in lines:
            word = words[i]
            if line == 0:
                middle = {"y": top - 22, "size": 10, "va": "center"}
                axes.text(x=grid.margin, s=word.label, **middle)
                axes.text(x=grid.width - grid.margin, s=f"{word.value:#x}", ha="right", family=_MONO, **middle)
            before = words[i - 1].value if i and words[i - 1].layout is word.layout else word.value
            _draw_cells(axes, grid, word, before, line, top)
            if last[i]:
                _draw_names(axes, grid, word.layout, line, top)
        for line, said in enumerate(key):
            axes.text(grid.margin, y + 17 * line + 9, said, size=8.5, va="center", color=FAINT)
    return Picture(figure, _ribbon_text(words))


def _ribbon_key(words: Sequence[_Word]) -> list[str]:
    """What shapes and letters mean, in lines."""
    lines = []
    if any(word.software for word in words):
        lines += [
            "square: the CPU reads the bit; round: only KVM does" + ("" if is_narrow() else "; dot: it has no name")
        ]
    names = dict.fromkeys(name for word in words for name, value in word.layout.unpack(word.value).items() if value)
    letters = ", ".join(f"{_LETTERS[name]} is {name}" for name in names if name in _LETTERS)
    return lines + textwrap.wrap(letters, 52 if is_narrow() else 100)


class _Word(NamedTuple):
    label: str
    value: int
    layout: Layout
    software: tuple[str, ...]


class _Grid(NamedTuple):
    """Where a ribbon's cells stand, in pixels of the page; a quarter of a cell parts two hexadecimal digits."""

    width: int
    columns: int
    cell: int
    margin: int = 8

    @property
    def pitch(self) -> float:
        return (self.width - 2 * self.margin) / (self.columns + 0.25 * (self.columns // 4 - 1))

    def bits(self, line: int) -> range:
        """The bits of one line of cells, from left to right."""
        high = WORD_BITS - 1 - line * self.columns
        return range(high, high - self.columns, -1)

    def x(self, bit: int) -> float:
        column = (WORD_BITS - 1 - bit) % self.columns
        return self.margin + self.pitch * (column + 0.25 * (column // 4))

    def spans(self, layout: Layout, line: int) -> list[tuple[str, float, float, bool, bool]]:
        """(name, left, right, more than one cell, name fits in a line) of each field in one line of cells."""
        found = []
        for field in layout.values():
            cells = [self.x(bit) for bit in self.bits(line) if field.low <= bit <= field.top]
            if cells:
                left, right = min(cells), max(cells) + self.pitch
                found.append((field.name, left, right, len(cells) > 1, right - left > 7.0 * len(field.name)))
        return found

    def name_height(self, layout: Layout, line: int) -> float:
        return max((14 if fits else 6 + 6.4 * len(n)) + 5 * many for n, *_, many, fits in self.spans(layout, line)) + 4


def _bits_of(layout: Layout | SpteLayout | str) -> tuple[Layout, tuple[str, ...]]:
    if isinstance(layout, Layout):
        return layout, ()
    form = layout_named(layout)
    return form.bits, form.software


def _pixels(figure: Figure, width: float, height: float) -> Axes:
    """Axes over the whole figure whose unit is the page's pixel, y downward."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def _draw_cells(axes: Axes, grid: _Grid, word: _Word, before: int, line: int, top: float) -> None:
    name_of = {bit: field.name for field in word.layout.values() for bit in range(field.low, field.top + 1)}
    middle = {"ha": "center", "va": "center"}
    wide = grid.pitch - 1.6
    for bit in grid.bits(line):
        x, name, on = grid.x(bit), name_of.get(bit), word.value >> bit & 1
        centre = x + grid.pitch / 2
        if bit % 4 == 0 or bit == WORD_BITS - 1:
            axes.text(centre, top - 5, f"{bit}", size=7, color=FAINT, **middle)
        if name is None and not on:
            axes.plot(centre, top + grid.cell / 2, marker=".", color=FAINT, markersize=2)
            continue
        box = {"facecolor": INK if on else PAPER, "edgecolor": INK if name else OOPS, "linewidth": 0.9}
        if name in word.software:
            style = f"round,pad=0,rounding_size={0.42 * min(wide, grid.cell)}"
            axes.add_patch(FancyBboxPatch((x + 0.8, top), wide, grid.cell, boxstyle=style, **box))
        else:
            axes.add_patch(Rectangle((x + 0.8, top), wide, grid.cell, **box))
        if on:
            letter = "?" if name is None else _LETTERS.get(name, name[0] if word.layout[name].width == 1 else "1")
            axes.text(centre, top + grid.cell / 2 + 0.5, letter, size=7.5, color=PAPER, **middle)
        if (word.value ^ before) >> bit & 1:
            under = top + grid.cell + 4
            axes.plot([x, x + grid.pitch], [under, under], color=INK, linewidth=2.5, solid_capstyle="butt")


def _draw_names(axes: Axes, grid: _Grid, layout: Layout, line: int, top: float) -> None:
    below = top + grid.cell + 8
    for name, left, right, many, fits in grid.spans(layout, line):
        if many:
            x, y = [left + 1, left + 1, right - 1, right - 1], [below - 2, below + 1, below + 1, below - 2]
            axes.plot(x, y, color=INK, linewidth=0.8)
        place = {"rotation": 0, "size": 7.5} if fits else {"rotation": 90, "size": 6.8 if is_narrow() else 8}
        axes.text((left + right) / 2, below + (4 if many else 1), name, ha="center", va="top", **place)


def _ribbon_text(words: Sequence[_Word]) -> str:
    parts = []
    for i, (label, value, layout, _) in enumerate(words):
        number = {name: "" if field.width == 1 else "#x" for name, field in layout.items()}
        fields = layout.unpack(value)
        if i and words[i - 1].layout is layout:
            old = layout.unpack(words[i - 1].value)
            count = (value ^ words[i - 1].value).bit_count()
            changes = [f"{n} {old[n]:{number[n]}} to {v:{number[n]}}" for n, v in fields.items() if v != old[n]]
            said = f"{count or 'no'} {'bit differs' if count < 2 else 'bits differ'}" + "".join(
                f", {c}" for c in changes
            )
        else:
            names = [n if layout[n].width == 1 else f"{n} {v:#x}" for n, v in fields.items() if v]
            said = f"set are {', '.join(names)}" if names else "no bit is set"
        parts.append(f"{label} {value:#x}: {said}".lstrip())
    return "; ".join(parts) + "."


# What several actors do, one after the other -------------------------------------------------------------------------

STEP = "step"
BARRIER = "barrier"
SUCCEEDED, FAILED = "cmpxchg that succeeded", "cmpxchg that failed"
LOCKS, UNLOCKS = "takes the lock", "drops the lock"
VIOLATED = "OOPS"
"""Kinds of :class:`Step`: a barrier is a rule, a cmpxchg a diamond, a held lock a band, a violation a cross."""


class Step(NamedTuple):
    """One line of :func:`lanes`: who does what, of which kind, what is shared after it, and when (else its number)."""

    actor: int
    text: str
    kind: str = STEP
    state: str = ""
    when: str = ""


@two_widths
def lanes(steps: Sequence[Step], actors: Sequence[str], *, state: str = "") -> Picture:
    """Steps of up to three actors: time runs down, one lane an actor with its colour and mark.

    A barrier is a rule through the lane, a cmpxchg a diamond that is filled when it succeeded, a held lock a thick
    hatched band beside the lane, a violated invariant a cross and the word OOPS in a heavy frame. On a phone the lanes
    lie close together, with the words beside them.

    Args:
        steps: from first to last; the actor of a violation is ignored.
        actors: their names, lane by lane.
        state: heading of the column with what is shared after each step; empty: no such column.

    Chapters 1 and 7 to 13.

    >>> lanes([Step(0, "reads the spte"), Step(1, "cmpxchg", SUCCEEDED)], ["vCPU 0", "vCPU 1"]).alt
    '2 steps (vCPU 0: 1; vCPU 1: 1); of 1 cmpxchg 1 succeeded; no invariant is violated.'
    """
    if not 1 <= len(actors) <= len(VCPU):
        raise ValueError(f"{len(actors)} actors; expected 1 to {len(VCPU)}: each has a colour and a mark of its own")
    narrow = is_narrow()
    width = 360 if narrow else 700
    left = 24 + 6 * max([0, *(len(step.when) for step in steps)])
    column = bool(state) and not narrow
    right = 8 + (8 + max(8.4 * len(state), *(7.1 * len(step.state) for step in steps)) if column else 0)
    pitch = 34.0 if narrow else (width - left - right) / len(actors)
    lane = [left + 18 + pitch * i for i in range(len(actors))]
    words_at = [lane[-1] + 18] * len(actors) if narrow else [x + 17 for x in lane]
    room = width - 8 - words_at[0] if narrow else pitch - 42
    head = [[name] if narrow else _wrap(name, 0.86 * room) for name in actors]  # bold letters are wider
    text = [_wrap(step.text, width - 110 if step.kind == VIOLATED else room) for step in steps]
    under = [[step.state] if narrow and state and step.state else [] for step in steps]
    y = 18.0 + 15 * (len(actors) if narrow else max(len(lines) for lines in head))
    centres = []
    for step, lines, more in zip(steps, text, under, strict=True):
        framed = 10 if step.kind == VIOLATED else 0
        centres.append(y + 12 + framed / 2)
        y += 10 + 14 * len(lines + more) + framed
    height = ceil(y + 8)
    with canvas(width * PIXEL, height * PIXEL) as figure:
        axes = _pixels(figure, width, height)
        for i, lines in enumerate(head):
            x, top = (14, 13.0 + 15 * i) if narrow else (lane[i], 13.0)
            axes.plot(x, top, marker=VCPU_MARKS[i], color=VCPU[i], markersize=7)
            _lines(axes, x + 13, top, lines, 15, size=9.5, color=VCPU[i], weight="bold")
            _draw_lane(axes, i, lane[i], steps, centres)
        if column:
            _lines(axes, width - right + 8, 13.0, [state], size=9.5, color=FAINT)
        for number, (step, lines, more, centre) in enumerate(zip(steps, text, under, centres, strict=True), 1):
            if step.kind == VIOLATED:
                _draw_violation(axes, width, centre, lines)
                continue
            _lines(axes, left - 4, centre, [step.when or f"{number}"], size=8, ha="right", color=FAINT)
            _draw_step(axes, step, lane[step.actor], centre)
            _lines(axes, words_at[step.actor], centre, lines, size=9)
            _lines(axes, words_at[step.actor], centre + 14 * len(lines), more, size=8.5, color=FAINT, family=_MONO)
            if column:
                _lines(axes, width - right + 8, centre, [step.state], size=8.5, family=_MONO)
    return Picture(figure, _lanes_text(steps, actors))


def _wrap(text: str, room: float) -> list[str]:
    return textwrap.wrap(text, max(8, int(room / 6.7)), break_long_words=False, break_on_hyphens=False) or [""]


def _lines(axes: Axes, x: float, centre: float, lines: Sequence[str], height: float = 14, **style: object) -> None:
    for i, line in enumerate(lines):  # one text a line: baselines then stand where the marks do, whatever the letters
        axes.text(x, centre + 4 + height * i, line, va="baseline", **style)


def _draw_violation(axes: Axes, width: float, centre: float, lines: Sequence[str]) -> None:
    frame = {"facecolor": PAPER, "edgecolor": OOPS, "linewidth": 2.6}
    axes.add_patch(Rectangle((10, centre - 13), width - 20, 14 * len(lines) + 12, **frame))
    axes.plot(26, centre, marker="x", color=OOPS, markersize=9, markeredgewidth=3)
    _lines(axes, 42, centre, ["OOPS"], size=10, weight="bold", color=OOPS)
    _lines(axes, 92, centre, lines, size=9, color=OOPS)


def _draw_lane(axes: Axes, actor: int, x: float, steps: Sequence[Step], centres: Sequence[float]) -> None:
    mine = [(step, y) for step, y in zip(steps, centres, strict=True) if step.actor == actor and step.kind != VIOLATED]
    if not mine:
        return
    axes.plot([x, x], [mine[0][1] - 10, mine[-1][1] + 10], color=VCPU[actor], linewidth=1.2)
    taken = None
    for step, y in mine:
        if step.kind == LOCKS:
            taken = y
        if step.kind == UNLOCKS and taken is not None:
            _draw_band(axes, x, taken, y)
            taken = None
    if taken is not None:  # still held when the story ends
        _draw_band(axes, x, taken, mine[-1][1] + 10)


def _draw_band(axes: Axes, x: float, top: float, bottom: float) -> None:
    band = {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "/////", "linewidth": 1.2}
    axes.add_patch(Rectangle((x - 17, top - 9), 9, bottom - top + 18, **band))


def _draw_step(axes: Axes, step: Step, x: float, y: float) -> None:
    colour = VCPU[step.actor]
    if step.kind == BARRIER:
        axes.plot([x - 12, x + 12], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
    elif step.kind in (SUCCEEDED, FAILED):
        fill = colour if step.kind == SUCCEEDED else PAPER
        axes.plot(x, y, marker="D", color=colour, markerfacecolor=fill, markersize=8, markeredgewidth=1.8)
    else:
        axes.plot(x, y, marker=VCPU_MARKS[step.actor], color=colour, markersize=7)


def _lanes_text(steps: Sequence[Step], actors: Sequence[str]) -> str:
    done = [step for step in steps if step.kind != VIOLATED]
    share = "; ".join(f"{name}: {sum(step.actor == i for step in done)}" for i, name in enumerate(actors))
    tried, won = (sum(step.kind in kinds for step in done) for kinds in ((SUCCEEDED, FAILED), (SUCCEEDED,)))
    said = [f"{len(done)} {'step' if len(done) == 1 else 'steps'} ({share})"]
    said += [f"of {tried} cmpxchg {won or 'none'} succeeded"] if tried else []
    violated = [step.text for step in steps if step.kind == VIOLATED]
    return "; ".join([*said, f"OOPS: {violated[0]}" if violated else "no invariant is violated"]) + "."


# Every schedule, one cell each ---------------------------------------------------------------------------------------


@two_widths
def wall(panels: Mapping[str, ArrayLike], *, what: str = "schedules", bad: str = "OOPS") -> Picture:
    """Every schedule as one cell, in order, row by row: good ones are outlines, bad ones dark and crossed out.

    Args:
        panels: for each name an array with one entry a schedule, true where it ends badly; same order in each.
        what: what the cells are, in the plural.
        bad: what the bad ones end in.

    With too many cells to cross out each, a ring marks each bad one while they are few. Chapters 7 to 9.

    >>> wall({"unique ids": [False] * 70, "one id for all": [True] + [False] * 69}).alt
    'unique ids: none of 70 schedules ends in OOPS; one id for all: 1 of 70 schedules ends in OOPS (1.43 %).'
    """
    ends = {name: np.asarray(column, dtype=np.bool_).reshape(-1) for name, column in panels.items()}
    if not ends or not all(column.size for column in ends.values()):
        raise ValueError(f"wall of {list(panels)}: expected at least one panel, and one entry a schedule in each")
    longest = max(column.size for column in ends.values())
    width = 360 if is_narrow() else 700
    inner = width - 16
    # cells of at most 22 px, and smaller until all panels together are about half as high as wide; on whole dots
    cell = min(22.0, max(0.5 if is_narrow() else 1.0, int(2 * (inner * 320 / (longest * len(ends))) ** 0.5) / 2))
    columns = max(1, int(inner / cell))
    heights = [-(-column.size // columns) * cell for column in ends.values()]
    head = 50 if is_narrow() else 34
    total = ceil(sum(heights) + head * len(ends))
    findings = []
    with canvas(width * PIXEL, total * PIXEL) as figure:
        axes = _pixels(figure, width, total)
        top = 0.0
        for (name, column), height in zip(ends.items(), heights, strict=True):
            count = int(column.sum())
            share = f" ({100 * count / column.size:.3g} %)" if count else ""
            verb = "ends" if count < 2 else "end"
            finding = f"{f'{count:,}' if count else 'none'} of {column.size:,} {what} {verb} in {bad}{share}"
            findings.append(f"{name}: {finding}")
            axes.text(8, top + 14, name, size=10, va="center", weight="bold", color=OOPS if count else INK)
            x, y, side = (8, top + 30, "left") if is_narrow() else (width - 8, top + 14, "right")
            axes.text(x, y, finding, size=9 if is_narrow() else 10, va="center", ha=side, color=OOPS if count else INK)
            _draw_wall(axes, column, 8.0, top + head - 8, cell, columns)
            top += height + head
    return Picture(figure, "; ".join(findings) + ".")


def _draw_wall(axes: Axes, bad: NDArray[np.bool_], left: float, top: float, cell: float, columns: int) -> None:
    order = np.arange(bad.size, dtype=np.int64)
    x, y = left + cell * (order % columns), top + cell * (order // columns)  # (schedule,)
    if cell >= 5:
        near, far = 0.13 * cell, 0.87 * cell
        corners = np.array([[near, near], [far, near], [far, far], [near, far]], dtype=np.float64)
        boxes = np.stack([x, y], axis=1)[:, None, :] + corners  # (schedule, corner, xy)
        style = {"linewidths": 0.5}
        axes.add_collection(PolyCollection(boxes[~bad], facecolors=PAPER, edgecolors=FAINT, **style), autolim=False)
        axes.add_collection(PolyCollection(boxes[bad], facecolors=OOPS, edgecolors=OOPS, **style), autolim=False)
        mark = {"marker": "x", "color": PAPER, "markersize": 0.42 * cell, "markeredgewidth": max(0.6, 0.07 * cell)}
    else:
        rows = -(-bad.size // columns)
        shade = np.full(rows * columns, 2, dtype=np.int64)  # 0 good, 1 bad, 2 no schedule
        shade[: bad.size] = bad
        picture = {"cmap": ListedColormap(["#DFE3E8", OOPS, PAPER]), "vmin": 0, "vmax": 2, "interpolation": "nearest"}
        extent = (left, left + columns * cell, top + rows * cell, top)
        limits = axes.get_xlim(), axes.get_ylim()
        axes.imshow(shade.reshape(rows, columns), extent=extent, aspect="auto", **picture)
        axes.set(xlim=limits[0], ylim=limits[1])
        if bad.sum() > 200:
            return
        mark = {"marker": "o", "color": OOPS, "markerfacecolor": "none", "markersize": 6, "markeredgewidth": 1.2}
    axes.plot(x[bad] + cell / 2, y[bad] + cell / 2, linestyle="", **mark)
