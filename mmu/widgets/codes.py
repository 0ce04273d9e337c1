"""The player of page-fault error codes (chapter 2)."""

from __future__ import annotations

from mmu import pfec
from mmu.widgets.player import Player


class CodePlayer(Player):
    """Toggle the five low bits of a page-fault error code and read what each of three rules makes of it. Chapter 2.

    Args:
        code: the code that is shown first, 0 to 31.
    """

    module = "codes"

    def __init__(self, code: int = 0x7) -> None:
        if not 0 <= code < 32:
            raise ValueError(f"code is {code:#x}; expected one of bits 0 to 4 alone, 0x0 to 0x1f")
        bits = [{"name": name, "meaning": pfec.PFEC[name].meaning} for name in ("P", "W", "U", "RSVD", "F")]
        codes = [
            {
                "flags": pfec.PFEC.text(value) if value else "none",
                "sentence": "no fault carries this code" if pfec.impossible(value) else pfec.describe(value),
                "verdicts": [vars(pfec.verdict(value, rule)) for rule in pfec.SOURCES],
            }
            for value in range(32)
        ]
        rules = [{"name": name, "source": source} for name, source in pfec.SOURCES.items()]
        super().__init__(
            alt="Five switches for the bits P, W, U, RSVD and F of a page-fault error code, and under them what the "
            "rule of 2012 and Linux 6.1's test make of the code.",
            data={"bits": bits, "codes": codes, "rules": rules, "start": code},
        )
