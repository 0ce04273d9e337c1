"""mmu.measured: the stored measurements are told with their machine, date and command, and drawn as they are."""

import json
from pathlib import Path

import pytest

from mmu.measured import Measured

CHART = {
    "machine": "a CPU, 2 CPUs",
    "with": "Python 3, numpy 2",
    "date": "2026-01-02",
    "command": "make measure",
    "panels": [
        {"x": "pages", "y": "ns", "lines": {"the package": [[10, 2.0], [1000, 8.0]], "C at -O2": [[10, 1.0]]}},
        {"x": "vCPUs", "y": "s", "lines": {"the package": [[1, 0.5], [2, 0.25]]}},
    ],
    "marks": {"L1": 100.0},
}


@pytest.fixture
def path(tmp_path):
    """A file with one chart."""
    (tmp_path / "measured.json").write_text(json.dumps({"walk": CHART}))
    return tmp_path / "measured.json"


def test_what_is_told(path):
    """Where a figure comes from is a sentence, and each line's numbers are those of the file."""
    found = Measured(path, "walk")
    assert found.source == ("Measured 2026-01-02 by `make measure` on a CPU, 2 CPUs, Python 3, numpy 2.")
    assert found.lines() == {"the package": {10: 2.0, 1000: 8.0}, "C at -O2": {10: 1.0}}
    assert found.lines(1) == {"the package": {1: 0.5, 2: 0.25}}


def test_what_is_drawn(path):
    """Each panel has its own axis and lines, the cache is a dotted rule with its name, and the text tells both."""
    picture = Measured(path, "walk").picture()
    first, second = picture.figure.axes
    assert (first.get_xlabel(), second.get_xlabel()) == ("pages", "vCPUs")
    drawn = [line.get_ydata().tolist() for line in first.lines if line.get_marker() != "None"]
    assert drawn == [[2.0, 8.0], [1.0]]
    assert "L1" in [text.get_text() for text in first.texts]
    assert picture.alt == (
        "ns: the package, 2 at pages 10, 8 at 1,000; C at -O2, 1 at pages 10, 1 at 10. "
        "s: the package, 0.5 at vCPUs 1, 0.25 at 2. Dotted rules: L1 at 100."
    )


def test_a_chart_that_is_not_there(path):
    """Another name is refused with those that are there."""
    with pytest.raises(ValueError, match="no chart 'race'; expected one of walk"):
        Measured(path, "race")


@pytest.mark.parametrize("name", ["walk", "race", "guest", "queue"])
def test_the_book_has_its_measurements(name):
    """The data that chapters draw holds the package's line in a panel of every chart."""
    found = Measured(Path(__file__).parents[1] / "book/data/measured.json", name)
    assert found.source.startswith("Measured 20")
    assert any(len(line) >= 5 for line in found.lines().values())
