"""How the cost of the package grows, as it was measured on one machine on one day: read, told and drawn.

The one idea: a page cannot measure, and a cell that measures cannot be compared with its stored output. So
``make measure`` writes what it measured to ``book/data/measured.json``, with machine, versions, date and command, and
the chapters draw that. Whoever wants their own curves runs it, and then the cell. Chapters 5, 9 and 11.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmu.graces import Curve, curves
from mmu.picture import Picture


class Measured:
    """One chart of a file of measurements.

    Args:
        path: the file that ``make measure`` wrote.
        name: which chart: ``walk``, ``race``, ``guest`` or ``queue``.

    Raises:
        ValueError: the file has no chart of that name.
    """

    def __init__(self, path: Path | str, name: str) -> None:
        charts: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if name not in charts:
            raise ValueError(f"{path} has no chart {name!r}; expected one of {', '.join(charts)}")
        self._chart = charts[name]

    @property
    def source(self) -> str:
        """Where, when and with what it was measured, and how to measure again."""
        told = self._chart
        return f"Measured {told['date']} by `{told['command']}` on {told['machine']}, {told['with']}."

    def lines(self, panel: int = 0) -> dict[str, dict[float, float]]:
        """What one panel measured: for each line's name, y by x."""
        return {name: dict(map(tuple, line)) for name, line in self._chart["panels"][panel]["lines"].items()}

    def picture(self) -> Picture:
        """All panels on logarithmic axes; dotted rules mark where a cache is full, if that was measured."""
        panels = {
            panel["y"]: [Curve(name, list(line), dots=list(line.values())) for name, line in self.lines(i).items()]
            for i, panel in enumerate(self._chart["panels"])
        }
        return curves(panels, [panel["x"] for panel in self._chart["panels"]], self._chart["marks"])
