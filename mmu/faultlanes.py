"""Pictures of faults by cause: one lane a cause, what was recorded above what was predicted. They compute nothing.

The one idea: a prediction drawn under the thing itself needs no score; where the two rows of ticks differ, it is wrong.
Chapter 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmu.causes import CAUSES, Caused
from mmu.picture import FAINT, FAST, INK, LOCK, Picture, canvas, is_narrow, two_widths


@two_widths
def fault_lanes(recordings: Mapping[str, tuple[Caused, Caused]]) -> Picture:
    """The faults of each recording in order, one lane a cause; recorded ticks stand above predicted ones.

    Args:
        recordings: for each name, what was recorded and what was predicted.

    Green ticks were repaired without the mmu-lock, grey ones under it. A dotted rule is a reading of the dirty log.

    >>> none = Caused(*(np.zeros(0, dtype=np.int64) for _ in Caused._fields))
    >>> one = Caused(*(np.full(1, 2, dtype=np.int64) for _ in Caused._fields))
    >>> fault_lanes({"a": (one, one)}).alt
    'a: 1 fault, 1 with the cause that was predicted in that place: dirty log 1 (predicted 1).'
    """
    lanes = {name: np.union1d(seen.cause, said.cause).tolist() for name, (seen, said) in recordings.items()}
    at, words = ((1.1, 1.32), ("rec.", "pred.")) if is_narrow() else ((1.05, 1.18), ("recorded", "predicted"))
    heights = [len(rows) + (1.9 if is_narrow() else 0.9) for rows in lanes.values()]
    findings = []
    with canvas(7.0, 0.42 * sum(heights) + 0.25 * len(heights)) as figure:
        panels = figure.subplots(len(recordings), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (name, (seen, said)) in zip(panels, recordings.items(), strict=True):
            rows = lanes[name]
            count = max(seen.cause.size, said.cause.size)
            for lane, cause in enumerate(rows):
                for faults, low, high in ((seen, lane - 0.36, lane - 0.04), (said, lane + 0.04, lane + 0.36)):
                    for fast, colour in ((True, FAST), (False, LOCK)):
                        here = np.flatnonzero((faults.cause == cause) & (faults.fast == fast))
                        axes.vlines(here, low, high, color=colour, linewidth=max(0.6, 330 / max(count, 1)))
                for place, faults in zip(at, (seen, said), strict=True):
                    number = int((faults.cause == cause).sum())
                    axes.text(place, lane, str(number), transform=axes.get_yaxis_transform(), **_MIDDLE)
            for place, word in zip(at, words, strict=True):
                axes.text(place, -0.85, word, transform=axes.get_yaxis_transform(), **_MIDDLE | {"color": FAINT})
            for reading in np.flatnonzero(np.diff(seen.epoch)) + 0.5:
                axes.vlines(reading, -0.5, len(rows) - 0.5, color=INK, linewidth=0.7, linestyle=":", zorder=0)
            if is_narrow():  # a line of its own, from the left edge
                place = {"xycoords": ("figure fraction", "data"), "va": "center", "weight": "bold"}
                axes.annotate(name, (0.01, -1.75), **place).set_in_layout(False)
            else:
                axes.text(0, -0.85, name, ha="left", va="center", weight="bold")
            axes.set_yticks(range(len(rows)), [CAUSES[cause] for cause in rows], size=9)
            axes.set(xlim=(-0.01 * count, 1.01 * count), ylim=(len(rows) - 0.5, -2.2 if is_narrow() else -1.2))
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelsize=8)
            axes.spines["left"].set_visible(False)
            findings.append(_finding(name, seen, said))
        if is_narrow():
            figure.get_layout_engine().set(rect=(0, 0, 0.97, 1))  # room for the second column of counts
        sep = "\n" if is_narrow() else " "
        panels[-1].set_xlabel(f"faults in order; upper ticks recorded,{sep}lower ticks predicted", size=9)
    return Picture(figure, " ".join(findings))


_MIDDLE = {"ha": "center", "va": "center", "size": 8.5}


def _finding(name: str, seen: Caused, said: Caused) -> str:
    shared = min(seen.cause.size, said.cause.size)
    same = int((seen.cause[:shared] == said.cause[:shared]).sum())
    counts, told = seen.counts(), said.counts()
    parts = [f"{cause} {counts.get(cause, 0)} (predicted {told.get(cause, 0)})" for cause in CAUSES
             if cause in counts or cause in told]  # fmt: skip
    faults = f"{seen.cause.size} fault{'s' * (seen.cause.size != 1)}"
    return f"{name}: {faults}, {same} with the cause that was predicted in that place: {', '.join(parts)}."
