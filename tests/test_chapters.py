"""The stored chapters: what the pages show and what the tests compare."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mmu.picture import Picture, canvas

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))


def outputs(chapter):
    for cell in json.loads(chapter.read_text())["cells"]:
        for output in cell.get("outputs", []):
            yield cell, output


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_name_no_machine(chapter):
    """Nothing stored in a chapter names a folder or a memory address of the machine that ran it."""
    for _, output in outputs(chapter):
        text = json.dumps({key: value for key, value in output.items() if key != "data"})
        text += json.dumps({kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"})
        assert not re.search(r"/(home|root|tmp|work|usr)/|at 0x[0-9a-f]{9,}>", text)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_pictures_carry_the_text_that_their_cell_computed(chapter):
    """A stored picture's alternative text is the finding its cell printed, which has a number in it."""
    for cell, output in outputs(chapter):
        if "image/png" in output.get("data", {}):
            finding = "".join(output["data"]["text/plain"])
            assert cell["metadata"]["mystnb"]["image"]["alt"] == finding
            assert re.search(r"\d", finding)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_cell_escapes_its_comparison(chapter):
    """No cell is exempt from being run and compared, but for a stated reason in its own metadata."""
    for cell in json.loads(chapter.read_text())["cells"]:
        exempt = [
            tag for tag in cell["metadata"].get("tags", []) if tag.startswith("nbval") or tag == "raises-exception"
        ]
        assert not exempt or cell["metadata"].get("reason"), exempt


def test_a_picture_must_state_a_number():
    """A picture whose alternative text has no number cannot be made."""
    with canvas() as figure:
        pass
    with pytest.raises(ValueError, match="states no number"):
        Picture(figure, "a nice picture")
