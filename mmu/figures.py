"""The book's pictures. They draw what they are given and compute nothing but counts for their alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.patches import Rectangle

from mmu import pfec
from mmu.picture import FAINT, FAST, INK, LOCK, PAPER, VCPU, Picture, canvas

VERDICT_STYLE = {
    "fast": {"facecolor": FAST, "edgecolor": FAST, "hatch": "", "ink": PAPER, "sign": "fast"},
    "slow": {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "////", "ink": INK, "sign": "slow"},
    "impossible": {"facecolor": PAPER, "edgecolor": FAINT, "hatch": "", "ink": FAINT, "sign": "×"},
}


def codes(rule: str = pfec.LINUX_61_AD) -> Picture:
    """All 32 codes of bits 0 to 4 as a map: rows are F and RSVD, columns are U, W and P; each cell says its verdict.

    Chapter 2.

    >>> codes(pfec.SERIES_2012).alt
    'Of 32 codes, 14 cannot occur; the rule "2012 series" lets 6 try the fast path and sends 12 to the slow one.'
    """
    verdicts = [pfec.verdict(code, rule).verdict for code in range(32)]
    with canvas(7.0, 3.1) as figure:
        axes = figure.add_subplot()
        for code, verdict in enumerate(verdicts):
            column, row = code & 7, code >> 3
            style = VERDICT_STYLE[verdict]
            box = {key: style[key] for key in ("facecolor", "edgecolor", "hatch")}
            axes.add_patch(Rectangle((column + 0.04, row + 0.05), 0.92, 0.9, linewidth=1.2, **box))
            plate = {"facecolor": box["facecolor"], "edgecolor": "none", "pad": 1.5}
            middle = {"ha": "center", "va": "center", "color": style["ink"], "bbox": plate}
            axes.text(column + 0.5, row + 0.36, f"{code:#04x}", family="DejaVu Sans Mono", **middle)
            axes.text(column + 0.5, row + 0.70, style["sign"], size=9, **middle)
        columns = ["|".join(n for n in "PWU" if pfec.PFEC.field(c, n)) or "none" for c in range(8)]
        axes.set_xticks(np.arange(8) + 0.5, columns)
        axes.set_yticks(np.arange(4) + 0.5, ["no F, no RSVD", "RSVD", "F", "F|RSVD"])
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


def fault_codes(columns: Mapping[str, Sequence[tuple[int, int]]]) -> Picture:
    """Recorded faults by error code, one panel a recording, in descending order, each bar labelled with its count.

    Args:
        columns: for each recording's name its ``(error code, count)`` pairs; codes as they reach the handler.

    Bars of codes that Linux 6.1 may repair without the lock are solid, the others hatched. Chapter 2.
    """
    longest = max(len(pairs) for pairs in columns.values())
    widest = max(n for pairs in columns.values() for _, n in pairs)
    findings = []
    with canvas(7.0, 0.8 + 0.3 * longest) as figure:
        for axes, (name, pairs) in zip(
            figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True
        ):
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
            axes.set(ylim=(longest - 0.4, -0.6), xlim=(0, 1.15 * widest), xlabel=f"faults, {name}")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            top, most = pairs[0]
            findings.append(
                f"{name}: {total} faults with {len(pairs)} codes, most often {pfec.PFEC.text(top)} ({most} times); "
                f"{fast} are candidates for the fast path"
            )
    return Picture(figure, "; ".join(findings) + ".")


def three_walks() -> Picture:
    """Which tables the CPU walks under shadow paging, NPT and EPT, who made them, and how a refusal is reported.

    Chapter 2.
    """
    guest, kvm = {"facecolor": PAPER, "edgecolor": VCPU[0]}, {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "////"}
    rows = [
        ("shadow paging", [("shadow table", "made by KVM", kvm, 2)], "page fault", "error code"),
        ("NPT (AMD)", [("guest's table", "made by the guest", guest, 1), ("nested table", "made by KVM", kvm, 1)],
         "nested page fault", "EXITINFO1"),
        ("EPT (Intel)", [("guest's table", "made by the guest", guest, 1), ("EPT table", "made by KVM", kvm, 1)],
         "EPT violation", "exit qualification"),
    ]  # fmt: skip
    with canvas(7.0, 3.0) as figure:
        axes = figure.add_subplot()
        for row, (name, tables, event, number) in enumerate(rows):
            axes.text(0, row, name, va="center", weight="bold")
            place = 1.75
            for label, maker, style, width in tables:
                axes.add_patch(Rectangle((place, row - 0.34), 1.5 * width - 0.1, 0.68, linewidth=1.4, **style))
                plate = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
                middle = place + 0.75 * width - 0.05
                axes.text(middle, row - 0.12, label, ha="center", va="center", size=9, bbox=plate)
                axes.text(middle, row + 0.16, maker, ha="center", va="center", size=8, color=FAINT, bbox=plate)
                place += 1.5 * width
            axes.annotate("", (5.25, row), (4.68, row), arrowprops={"arrowstyle": "->", "color": INK})
            axes.text(5.32, row - 0.12, event, va="center", size=9)
            axes.text(5.32, row + 0.16, f"with an {number}", va="center", size=8, color=FAINT)
        heads = [(1.75, "guest virtual"), (3.25, "guest physical"), (4.65, "host physical")]
        for place, head in heads:
            axes.text(place, -0.72, f"{head}", ha="center", va="center", size=8, color=FAINT)
            axes.plot([place, place], [-0.6, 2.45], color=FAINT, linewidth=0.6, linestyle=":", zorder=0)
        axes.text(5.32, -0.72, "a refusal is reported as", va="center", size=8, color=FAINT)
        axes.set(xlim=(0, 6.9), ylim=(2.5, -0.9))
        axes.set_axis_off()
    tables = ", ".join(f"{name}: {len(list(walked))}" for name, walked, _, _ in rows)
    return Picture(
        figure,
        f"Tables between a guest virtual and a host physical address ({tables}). KVM makes the only table of shadow "
        "paging and the second one of NPT and EPT; each of the three reports a refusal under another name.",
    )
