"""A figure that carries its finding as text, and the colours and marks that mean the same thing in every chapter.

The one idea: a picture without its finding in words is unfinished. :class:`Picture` joins the two; the words become the
``text/plain`` of the cell, which the tests compare with a new run, and the alternative text of the image on the page.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

VCPU = ("#1250D2", "#BB4A14", "#732495")
"""vCPU 0, 1, 2: lane 1 with circles, lane 2 with squares, lane 3 with triangles."""
VCPU_MARKS = ("o", "s", "^")
LOCK = "#626973"
"""Whatever is done under the mmu-lock: a thick, hatched band."""
FAST = "#0F8152"
"""The fast path and the read side: a thin line with open ends."""
OOPS = "#501317"
"""A violated invariant: a cross, a heavy outline, the word OOPS."""
INK, FAINT, PAPER = "#1B1F24", "#6B737C", "#FFFFFF"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "hatch.linewidth": 0.6,
}
_DOTS_PER_INCH = 100  # on the page; the file holds twice as many


@dataclass(frozen=True)
class Picture:
    """A drawn figure and the sentence that states what it shows, with the numbers that it shows.

    Args:
        figure: what was drawn.
        alt: the finding, with a number or a comparison, for those who do not see the picture and for the tests.

    Raises:
        ValueError: ``alt`` states no number: a finding that nothing can check.
    """

    figure: Figure = field(repr=False)
    alt: str

    def __post_init__(self) -> None:
        if not any(character.isdigit() for character in self.alt):
            raise ValueError(f"alt text {self.alt!r} states no number; expected the finding that the figure shows")

    def png(self) -> bytes:
        """The picture as PNG at twice the page's resolution, without a date or a program's name inside."""
        out = io.BytesIO()
        FigureCanvasAgg(self.figure)
        self.figure.savefig(out, format="png", dpi=2 * _DOTS_PER_INCH, metadata={"Software": None})
        return out.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(inches * _DOTS_PER_INCH) for inches in self.figure.get_size_inches())
        data = {"image/png": self.png(), "text/plain": self.alt}
        return data, {"image/png": {"width": width, "height": height}}


@contextmanager
def canvas(width: float = 7.0, height: float = 3.0) -> Iterator[Figure]:
    """Yield an empty figure of ``width`` by ``height`` inches in the book's style; 7 inches fill a page's column."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")
