"""A figure that carries its finding as text, and the colours and marks that mean the same thing in every chapter.

The one idea: a picture without its finding in words is unfinished. :class:`Picture` joins the two; the words become the
``text/plain`` of the cell, which the tests compare with a new run, and the alternative text of the image on the page.

Words that fit a page are too small on a phone. So a function marked :func:`two_widths` draws twice, and the page shows
the narrow drawing below 600 px (``book/_tools/fpf.py``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec

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
PIXEL = 1 / _DOTS_PER_INCH
"""A pixel of the page, in inches."""
NARROW = 3.6
"""The width of a phone's column, in inches."""
_narrow = ContextVar("narrow", default=False)
_Given = ParamSpec("_Given")


@dataclass(frozen=True)
class Picture:
    """A drawn figure and the sentence that states what it shows, with the numbers that it shows.

    Args:
        figure: what was drawn.
        alt: the finding, with a number or a comparison, for those who do not see the picture and for the tests.
        narrow: the same drawn for a phone, if that is another drawing.

    Raises:
        ValueError: ``alt`` states no number: a finding that nothing can check.
    """

    figure: Figure = field(repr=False)
    alt: str
    narrow: Figure | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not any(character.isdigit() for character in self.alt):
            raise ValueError(f"alt text {self.alt!r} states no number; expected the finding that the figure shows")

    def png(self, *, narrow: bool = False) -> bytes:
        """The picture as PNG at twice the page's resolution, without a date or a program's name inside."""
        out, figure = io.BytesIO(), self.narrow if narrow and self.narrow else self.figure
        FigureCanvasAgg(figure)
        figure.savefig(out, format="png", dpi=2 * _DOTS_PER_INCH, metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out once: another round would move things by a hair
        return out.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(inches * _DOTS_PER_INCH) for inches in self.figure.get_size_inches())
        data = {"image/png": self.png(), "text/plain": self.alt}
        about: dict[str, Any] = {"width": width, "height": height}
        if self.narrow:
            about["narrow"] = base64.b64encode(self.png(narrow=True)).decode()
        return data, {"image/png": about}


def two_widths(draw: Callable[_Given, Picture]) -> Callable[_Given, Picture]:
    """Let a function draw its picture for a page and again for a phone; it asks :func:`is_narrow` what differs."""

    @wraps(draw)
    def both(*args: _Given.args, **options: _Given.kwargs) -> Picture:
        picture = draw(*args, **options)
        token = _narrow.set(True)
        try:
            return replace(picture, narrow=draw(*args, **options).figure)
        finally:
            _narrow.reset(token)

    return both


def is_narrow() -> bool:
    """Whether what is drawn now is for a phone."""
    return _narrow.get()


@contextmanager
def canvas(width: float = 7.0, height: float = 3.0, *, narrow: float = 0.0) -> Iterator[Figure]:
    """Yield an empty figure of ``width`` by ``height`` inches in the book's style; 7 inches fill a page's column.

    For a phone it is as wide as a phone's column, and ``narrow`` high, if that is given.
    """
    size = (min(width, NARROW), narrow or height) if is_narrow() else (width, height)
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=size, layout="constrained")
