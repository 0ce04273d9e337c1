"""mmu.codetable: the table that KVM's own walker filled in, and tables that nobody should believe."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu.codetable import check_table, hexadecimal, is_table

TABLE = gzip.decompress((Path(__file__).parent / "data" / "page-fault-error-codes.csv.gz").read_bytes()).decode()
HEAD = "".join(TABLE.splitlines(keepends=True)[:2])
ROW = "pte,0,0,0,0,1,0,0,0,0,S,W,0,-,-,600001,600061\n"


def test_every_recorded_row():
    """The rules give the recorded error code and the recorded entry in all 7,680 rows."""
    check = check_table(TABLE)
    assert (int(check.agree.sum()), check.agree.size, check.unreadable) == (7680, 7680, [])


def test_a_wrong_row_is_named():
    """A row with a wrong error code or a wrong entry is reported by its line with both versions."""
    check = check_table(HEAD + ROW + ROW.replace("-,-", "3,1") + ROW.replace("600061", "600021"))
    assert [(row["line"], row["predicted"], row["recorded"]) for row in check.disagreements()] == [
        (4, "err - after 600061", "err 3 after 600061"),
        (5, "err - after 600061", "err - after 600021"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW.replace("pte", "pud"), "level is 'pud'; expected pte, pde, pde2m"),
        (ROW.replace(",S,", ",s,"), "mode is 's'; expected S, U"),
        (ROW.replace("600061", "0x600061"), "after is '0x600061'; expected a hexadecimal number"),
        (ROW.replace("600061", ""), "after is ''"),
        (ROW.replace("-,-", "٣,-"), "err is '٣'"),
        (ROW.replace("600061", "6" * 17), "a cell of 17 characters"),
        ("pte,0\n", "2 cells; expected 17"),
    ],
)
def test_a_row_that_cannot_be_read(row, reason):
    """A malformed row is left out and named with its line and the reason, and the rows around it still count."""
    check = check_table(HEAD + ROW + row + "\n" + ROW)
    assert (int(check.agree.sum()), check.lines.tolist()) == (2, [3, 6])
    [(line, said)] = check.unreadable
    assert line == 4 and reason in said


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (ROW.replace("600001", "600003").replace("600061", "600063"), "w"),
        (ROW.replace("600001", "8000000600001").replace("-,-", "b,1"), "rsvd"),
        (ROW.replace("pte", "pde2m"), "level"),
    ],
)
def test_a_row_that_contradicts_itself(row, column):
    """A row whose columns say of its entry what the entry is not counts as compared, and agrees with no rule."""
    check = check_table(HEAD + ROW + row)
    assert (check.agree.tolist(), check.unreadable) == ([True, False], [])
    assert check.disagreements()[0]["reason"] == f"column {column} and the entry before contradict each other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks level"),
        ("# physbits=0x28\nlevel,wp\n", "lacks mode"),
        (HEAD.replace("physbits=0x28", "") + ROW, "expected physbits=32 to 52"),
        (HEAD.replace("0x28", "99") + ROW, "expected physbits=32 to 52"),
    ],
)
def test_a_text_that_is_no_table(text, message):
    """Without header, columns or the CPU's address width there is nothing to predict from."""
    with pytest.raises(ValueError, match=message):
        check_table(text)


def test_recognised_by_content():
    """A table is known by its column names, whatever its file is called."""
    assert is_table(TABLE) and not is_table("") and not is_table("a,b\n1,2\n")


def test_blanks_around_cells():
    """Blanks around cells, of the header too, change nothing."""
    spaced = (HEAD + ROW).replace(",", " , ")
    assert is_table(spaced) and check_table(spaced).agree.tolist() == [True]


@given(st.lists(st.sampled_from([*ROW.split(","), "x" * 40, "\n", ROW, "#", "0" * 16, "f" * 16])))
@settings(max_examples=60, deadline=None)
def test_hostile_rows(cells):
    """Whatever follows the header, each line that is neither blank nor a comment is predicted or named unreadable."""
    text = HEAD + ",".join(cells)
    check = check_table(text)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    assert sorted([*check.lines.tolist(), *(line for line, _ in check.unreadable)]) == lines[1:]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.booleans())
@settings(deadline=None)
def test_hexadecimal_is_int(words, upper):
    """Reading hexadecimal text by whole columns gives what Python's own int() gives."""
    texts = [f"{word:X}" if upper else f"{word:x}" for word in words]
    values, good = hexadecimal(np.array(texts))
    assert values.tolist() == words and good.all()
