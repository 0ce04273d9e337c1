"""The player of the id field: put a number into an spte and see what it eats (chapter 10)."""

from __future__ import annotations

import numpy as np

from mmu import spte
from mmu.widgets.player import Player

WIDEST = 12
LETTERS = {"PS": "S"}  # of a field's cell where its first letter is another field's


class IdFieldPlayer(Player):
    """Move and widen the field of a vCPU's id inside an EPT spte of 2012, and see what it runs into. Chapter 10.

    Args:
        low: the field's lowest bit at the start.
        width: how many bits it has at the start, 1 to 12.
    """

    module = "idfield"

    def __init__(self, low: int = 50, width: int = 4) -> None:
        form = spte.LAYOUTS["2012-ept"]
        cells = [""] * 64
        cells[_TOP.start : _TOP.stop] = ["a"] * len(_TOP)
        for name, field in form.bits.items():
            if name != "ID":
                cells[field.low : field.low + field.width] = [LETTERS.get(name, name[0])] * field.width
        if not 1 <= width <= WIDEST or not 0 <= low <= 64 - width:
            raise ValueError(f"{width} bits from bit {low} up; expected 1 to {WIDEST} bits inside the 64 of an spte")
        super().__init__(
            alt="The 64 bits of an EPT spte of 2012 and in them a field for a vCPU's id that you move and widen; "
            f"under them, what it overlaps and how many ids it has. It starts with {width} bits from bit {low} up.",
            data={
                "cells": cells,
                "states": [[self._state(lowest, wide) for lowest in range(65 - wide)] for wide in range(1, WIDEST + 1)],
                "maybe": list(_TOP),
                "mmio": [bit for bit in range(64) if form.mmio_mask >> bit & 1],
                "start": [low, width],
            },
        )

    @staticmethod
    def _state(low: int, width: int) -> list[str]:
        """A verdict's sign and its words for the field of ``width`` bits from ``low`` up."""
        form = spte.LAYOUTS["2012-ept"]
        own = ((1 << width) - 1) << low
        eaten = [name for name, field in form.bits.items() if name != "ID" and field.mask & own]
        bits = _bits(low, width)
        if eaten:
            return ["×", f"{width} wide, {bits}: overlaps {', '.join(eaten)}. A mark would change what the entry says."]
        ids = np.arange(1, 1 << width, dtype=np.uint64)  # (id,) 0 is nobody
        leaf = np.uint64(sum(form.bits[name].mask for name in ("R", "W", "X")))
        shared = range(max(low, _TOP.start), min(low + width, _TOP.stop))
        mmio = ids[spte.is_mmio(leaf | ids << np.uint64(low), form)]
        usable = len(ids) - len(mmio)
        said = f"{width} wide, {bits}: {usable:,} {'id' if usable == 1 else 'ids'}"
        warned = ""
        if mmio.size:
            first = f"{int(mmio[0])}" if mmio.size == 1 else f"{int(mmio[0])} and {len(mmio) - 1} more"
            warned = f" Id {first} cannot be used: on a writable, executable page the entry would read as MMIO."
        if shared:
            where = _bits(shared[0], len(shared)).capitalize()
            warned += f" {where}: address on a CPU that has 52 bits of it; on others they must be 0."
        if warned:
            return ["!", f"{said}.{warned}"]
        return ["✓", f"{said}, 1 to {usable:,}, and 0 for nobody."]


_PFN = spte.LAYOUTS["2012-ept"].bits["PFN"]
_TOP = range(_PFN.low + _PFN.width, 52)  # where a CPU that has them keeps the top of an address


def _bits(low: int, width: int) -> str:
    return f"bits {low} to {low + width - 1}" if width > 1 else f"bit {low}"
