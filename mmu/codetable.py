"""A table of page-fault error codes, one access a row, held against the rules of :mod:`mmu.paging` (chapter 2).

The table is CSV. A comment line gives the CPU (``# physbits=0x28 ...``: its physical address bits) and a header line
names the columns: ``level`` is pte, pde or pde2m, the entry that varies (every other entry on the way is present,
writable, user and executable); ``wp nxe smep smap`` are the control bits; ``p w u nx rsvd`` describe the entry
``before``; ``mode`` is S or U, ``access`` R, W or X, ``ac`` EFLAGS.AC; ``err`` is ``-`` or the error code, ``after``
the entry after the access. Further columns are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmu import paging

CONTROLS = ("wp", "nxe", "smep", "smap", "ac")
STATED = {"p": paging.P, "w": paging.W, "u": paging.U, "nx": paging.NX}
CHOICES = {"level": ("pte", "pde", "pde2m"), "mode": ("S", "U"), "access": ("R", "W", "X")}
CHOICES |= dict.fromkeys((*CONTROLS, *STATED, "rsvd"), ("0", "1"))
NUMBERS = ("err", "before", "after")
LONGEST_CELL = 16  # the digits of a 64-bit word
PERMISSIVE = paging.P | paging.W | paging.U

_DIGITS = np.full(128, 255, dtype=np.uint8)
_DIGITS[[ord(digit) for digit in "0123456789abcdefABCDEF"]] = [*range(16), *range(10, 16)]


def hexadecimal(texts: NDArray[np.str_]) -> tuple[NDArray[np.uint64], NDArray[np.bool]]:
    """Read hexadecimal numbers of 1 to 16 digits, no prefix; return the values (0 for what is none), and which are.

    >>> values, good = hexadecimal(np.array(["1f", "8000000000600000", "0x1", ""]))
    >>> [hex(value) for value in values], good.tolist()
    (['0x1f', '0x8000000000600000', '0x0', '0x0'], [True, True, False, False])
    """
    points = texts.astype(f"U{LONGEST_CELL + 1}").view(np.uint32).reshape(texts.size, LONGEST_CELL + 1)
    digits = _DIGITS[np.minimum(points, 127)].astype(np.uint64)  # (text, place)
    inside = points != 0  # numpy pads a text with NUL on its right
    length = inside.sum(axis=1, dtype=np.int64)
    good = (inside & (digits < 16) | ~inside).all(axis=1) & (length >= 1) & (length <= LONGEST_CELL)
    place = np.clip(length[:, None] - 1 - np.arange(LONGEST_CELL + 1, dtype=np.int64), 0, LONGEST_CELL - 1).astype(
        np.uint64
    )
    shifted = np.where(inside & good[:, None], digits, np.uint64(0)) << place * np.uint64(4)
    return np.bitwise_or.reduce(shifted, axis=1), good


@dataclass(frozen=True)
class TableCheck:
    """What the rules predict for each readable row, beside what the table says; all arrays ``# (row,)``."""

    lines: NDArray[np.int64]  # the row's line number in the text, from 1
    fault: NDArray[np.bool]
    code: NDArray[np.uint64]
    after: NDArray[np.uint64]
    recorded_fault: NDArray[np.bool]
    recorded_code: NDArray[np.uint64]
    recorded_after: NDArray[np.uint64]
    contradicts: NDArray[np.str_]  # the column that says of the entry what it is not; "" where none does
    unreadable: list[tuple[int, str]]  # line number and reason, in the order of the lines

    @property
    def agree(self) -> NDArray[np.bool]:
        """Which rows agree with themselves, and in fault or none, error code, and the entry after the access."""
        same_code = (self.fault == self.recorded_fault) & (self.code == self.recorded_code)
        return same_code & (self.after == self.recorded_after) & (self.contradicts == "")

    def disagreements(self) -> list[dict[str, str | int]]:
        """The rows that do not agree, in the form in which the command line reports them."""
        predicted = (self.fault, self.code, self.after)
        recorded = (self.recorded_fault, self.recorded_code, self.recorded_after)

        def text(row: int, fault: NDArray[np.bool], code: NDArray[np.uint64], after: NDArray[np.uint64]) -> str:
            return (
                f"err {int(code[row]):x} after {int(after[row]):x}"
                if fault[row]
                else f"err - after {int(after[row]):x}"
            )

        return [
            {
                "line": int(self.lines[row]),
                "kind": "error-codes",
                "predicted": text(row, *predicted),
                "recorded": text(row, *recorded),
                "reason": f"column {column} and the entry before contradict each other"
                if (column := str(self.contradicts[row]))
                else "the rules of the page walk give another result for this row",
            }
            for row in np.flatnonzero(~self.agree).tolist()
        ]


def is_table(text: str) -> bool:
    """Whether a text looks like an error-code table: its first line that is no comment names the columns.

    >>> is_table("# physbits=0x28\\nlevel,wp,nxe,smep,smap,p,w,u,nx,rsvd,mode,access,ac,err,before,after\\n")
    True
    """
    header = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    return {*CHOICES, *NUMBERS} <= set(_cells(header))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def check_table(text: str) -> TableCheck:
    """Predict every row of an error-code table from the rules alone, and keep what the table says beside it.

    A row that cannot be read (too few cells, a cell that is no choice of its column) is left out and named in
    ``unreadable`` with its line number and reason. A row whose bit columns contradict its entry ``before`` agrees with
    no rule.

    Raises:
        ValueError: no header line, a column is missing, or no comment says ``physbits=``.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    comments = " ".join(line for _, line in numbered if line.startswith("#"))
    numbered = [(number, line) for number, line in numbered if not line.startswith("#")]
    columns = _cells(numbered[0][1]) if numbered else []
    if missing := [name for name in (*CHOICES, *NUMBERS) if name not in columns]:
        raise ValueError(f"the table's header line lacks {', '.join(missing)}; expected one column for each of them")
    physbits = re.search(r"\bphysbits=(0[xX][0-9a-fA-F]{1,2}|[0-9]{1,2})\b", comments)
    if not physbits or not 32 <= (maxphyaddr := int(physbits[1], 0)) <= 52:
        raise ValueError("no comment line says how many physical address bits the CPU has; expected physbits=32 to 52")

    unreadable: dict[int, str] = {}
    places = [columns.index(name) for name in (*CHOICES, *NUMBERS)]
    lines, rows = [], []
    for number, line in numbered[1:]:
        cells = _cells(line)
        if len(cells) != len(columns):
            unreadable[number] = f"{len(cells)} cells; expected {len(columns)}"
        elif (longest := max((cells[place] for place in places), key=len)) and len(longest) > LONGEST_CELL:
            unreadable[number] = f"a cell of {len(longest)} characters; expected at most {LONGEST_CELL}"
        else:
            lines.append(number)
            rows.append([cells[place] for place in places])
    table = np.array(rows, dtype=f"U{LONGEST_CELL}").reshape(len(rows), len(places))  # (row, column)
    cell = dict(zip((*CHOICES, *NUMBERS), table.T, strict=True))
    number_of = np.array(lines, dtype=np.int64)
    good = np.ones(len(rows), dtype=np.bool)

    def refuse(bad: NDArray[np.bool], reason: str, name: str) -> None:
        for row in np.flatnonzero(good & bad).tolist():
            unreadable[lines[row]] = reason.format(str(cell[name][row]))
        good[bad] = False

    for name, choices in CHOICES.items():
        refuse(~np.isin(cell[name], choices), f"{name} is {{!r}}; expected {', '.join(choices)}", name)
    recorded_fault = cell["err"] != "-"
    words = {"err": hexadecimal(np.where(recorded_fault, cell["err"], "0"))}
    words |= {name: hexadecimal(cell[name]) for name in ("before", "after")}
    for name, (_, is_number) in words.items():
        refuse(~is_number, f"{name} is {{!r}}; expected a hexadecimal number of at most 64 bits", name)
    before = words["before"][0]

    flag = {name: cell[name] == "1" for name in (*CONTROLS, *STATED, "rsvd")}
    large = cell["level"] == "pde2m"
    of_leaf, of_table = (np.uint64(paging.LONG4.reserved(2, leaf, maxphyaddr)) for leaf in (True, False))
    said = {name: (before & bit != 0) != flag[name] for name, bit in STATED.items()}
    said["level"] = ((before & paging.PS != 0) != large) & (cell["level"] != "pte")  # in a pte the bit is PAT
    said["rsvd"] = (before & np.where(large, of_leaf, of_table) != 0) != flag["rsvd"]
    contradicts = np.select(list(said.values()), list(said), "")

    entries = np.full((len(rows), 4), PERMISSIVE, dtype=np.uint64)  # (row, level), root first
    varied = np.arange(len(rows), dtype=np.int64), np.where(cell["level"] == "pte", 3, 2)
    entries[varied] = before
    out = paging.access(
        entries,
        write=cell["access"] == "W",
        fetch=cell["access"] == "X",
        user=cell["mode"] == "U",
        maxphyaddr=maxphyaddr,
        **{name: flag[name] for name in CONTROLS},
    )
    predicted = (out.fault, out.code, out.entries[varied])
    recorded = (recorded_fault, words["err"][0], words["after"][0], contradicts)
    return TableCheck(*(array[good] for array in (number_of, *predicted, *recorded)), sorted(unreadable.items()))
