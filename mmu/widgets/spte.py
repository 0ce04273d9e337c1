"""The player that builds an spte bit by bit and lets the guest and KVM act on it (chapter 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu import paging, pfec, spte, update
from mmu.widgets.player import Player


class Table(NamedTuple):
    """A kind of page table: its layout, the bits that can be switched, the bits that stay, and the word shown first."""

    name: str
    layout: str
    bits: tuple[str, ...]  # from the highest
    fixed: int
    start: int
    ad_bits: bool = True


TABLES = (
    Table(
        "NPT and shadow",
        "6.1-npt",
        ("NX", "MMU_P", "MMU_W", "HOST_W", "D", "A", "W", "P"),
        0x625A004,  # the page, and U
        0x625AE65,
    ),
    Table(
        "EPT",
        "6.1-ept",
        ("MMU_W", "HOST_W", "MMU_P", "D", "A", "X", "W", "R"),
        0x625A070,  # the page, and write-back memory whatever the guest's PAT says
        0x60000000625AB75,
    ),
    Table(
        "EPT without A/D bits",
        "6.1-ept",
        ("MMU_W", "HOST_W", "SAVED_X", "SAVED_R", "MMU_P", "X", "W", "R"),
        0x1000000625A070,  # and AD_KIND 1
        0x61000000625A875,
        ad_bits=False,
    ),
)
"""The tables of Linux 6.1 that the player knows, for a 4 KiB page; NPT and shadow paging share their bits."""


class Acted(NamedTuple):
    """What became of each word: the next word, and a sentence."""

    words: NDArray[np.uint64]
    said: list[str]


def words(table: Table) -> NDArray[np.uint64]:
    """Every word that the table's switches can make, ``(word,)``; the first switch is the highest bit of its number."""
    bits = spte.LAYOUTS[table.layout].bits
    number = np.arange(1 << len(table.bits), dtype=np.int64)
    made = np.full(number.shape, table.fixed, dtype=np.uint64)
    for place, name in enumerate(reversed(table.bits)):
        made |= np.where(number >> place & 1 == 1, np.uint64(bits[name].mask), np.uint64(0))
    return made


def number(table: Table, made: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The position in :func:`words` of each word that the switches can make."""
    bits = spte.LAYOUTS[table.layout].bits
    found = np.zeros(made.shape, dtype=np.int64)
    for name in table.bits:
        found = found << 1 | bits.field(made, name).astype(np.int64)
    return found


def permits(table: Table, made: NDArray[np.uint64]) -> NDArray[np.bool]:
    """Whether the CPU lets a guest read, write and fetch through each word, ``(access, word)``."""
    if "P" in table.bits:
        path = made[:, None]  # (word, level)
        kinds = ({}, {"write": True}, {"fetch": True})
        return np.stack([~paging.access(path, user=True, **kind).fault for kind in kinds])
    refused = spte.ept_misconfigured(made, 1, maxphyaddr=52) != 0
    kinds = ({}, {"write": True}, {"fetch": True})
    return np.stack([update.allows(made, **kind, layout=table.layout) & ~refused for kind in kinds])


def cpu_text(table: Table, made: NDArray[np.uint64]) -> list[str]:
    """What the CPU lets a guest do with each word, in a few words."""
    why = [0] * len(made) if "P" in table.bits else spte.ept_misconfigured(made, 1, maxphyaddr=52).tolist()
    said = []
    for check, rights in zip(why, permits(table, made).T.tolist(), strict=True):
        may = _listed(name for name, on in zip(("read", "write", "fetch"), rights, strict=True) if on)
        not_ = " or ".join(name for name, on in zip(("read", "write", "fetch"), rights, strict=True) if not on)
        text = f"lets a guest {may}" + (f", not {not_}" if not_ else "") if may else "lets a guest do nothing"
        said.append(f"refuses the entry as malformed: {spte.EPT_CHECKS[check]}" if check > 1 else text)
    return said


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def guest(table: Table, made: NDArray[np.uint64], *, write: bool) -> Acted:
    """The guest reads or writes through each word: the CPU lets it, or it faults and KVM sees to it."""
    bits = spte.LAYOUTS[table.layout].bits
    lets = permits(table, made)[1 if write else 0]
    marks = bits.mask("A", "D") if write else bits.mask("A")
    used = np.where(table.ad_bits, made | np.uint64(marks), made)
    present = made & np.uint64(bits.mask("P") if "P" in bits else bits.mask("R", "W", "X")) != 0
    codes = present * np.uint64(1) | np.uint64(2 if write else 0) | np.uint64(4 * ("P" in bits or not write))
    tried = pfec.can_be_fast(codes, pfec.LINUX_61_AD if table.ad_bits else pfec.LINUX_61_NO_AD)
    fixed, outcome = update.fast_page_fault(made, write=write, ad_bits=table.ad_bits, layout=table.layout)
    fast = ~lets & tried & (outcome == update.FAST.index("fixed"))
    said = []
    who = "The guest's write" if write else "The guest's read"
    for word, new, passed, after, repaired, try_, code in zip(
        *(column.tolist() for column in (made, fixed, lets, used, fast, tried, codes)), strict=True
    ):
        state = spte.classify(word, table.layout, 1)
        if passed:
            text = f"{who} passes" + (f", and the CPU sets {_changed(bits, word, after)}." if word != after else ".")
        elif state == spte.MMIO:
            text = f"{who} meets an EPT misconfiguration, and KVM emulates it."
        elif state in (spte.ILLEGAL, spte.UNKNOWN):
            text = f"{who} is refused; no kernel makes this word."
        elif repaired:
            changes = _changes(bits, word, new)
            text = f"{who} faults ({pfec.PFEC.text(code)}). fast_page_fault, without a lock: {changes}."
        else:
            text = (
                f"{who} faults ({pfec.PFEC.text(code)}) and takes the slow path: {_why_slow(table, word, try_, write)}."
            )
        said.append(text)
    return Acted(np.where(lets, used, np.where(fast, fixed, made)), said)


def _why_slow(table: Table, word: int, tried: bool, write: bool) -> str:
    if spte.classify(word, table.layout, 1) == spte.NONE or (tried and write):
        return spte.verdict(word, table.layout, 1)[1]
    return "no saved right would allow it" if tried else "by its code the fast path is not tried"


def _changed(bits: spte.Layout, old: int, new: int) -> str:
    return " and ".join(name for name in bits if bits.field(old, name) != bits.field(new, name))


def _changes(bits: spte.Layout, old: int, new: int) -> str:
    return ", ".join(
        f"{name} {bits.field(old, name)}→{bits.field(new, name)}"
        for name in bits
        if bits.field(old, name) != bits.field(new, name)
    )


def host(table: Table, made: NDArray[np.uint64], what: str, new: NDArray[np.uint64]) -> Acted:
    """KVM changes each word that maps a page to ``new``, under the mmu-lock; other words stay."""
    bits = spte.LAYOUTS[table.layout].bits
    states = spte.classify(made, table.layout, 1)
    leaf = np.isin(states, np.array(spte.LEAVES, dtype=states.dtype))
    said = []
    for word, after, maps in zip(made.tolist(), new.tolist(), leaf.tolist(), strict=True):
        changes = _changes(bits, word, after) or "nothing has to change"
        said.append(f"{what}: {changes}." if maps else f"{what}: no page is mapped here, nothing is done.")
    return Acted(np.where(leaf, new, made), said)


ACTIONS: dict[str, Callable[[Table, NDArray[np.uint64]], Acted]] = {
    "the guest reads": lambda table, made: guest(table, made, write=False),
    "the guest writes": lambda table, made: guest(table, made, write=True),
    "dirty log": lambda table, made: host(
        table, made, "The dirty log protects the page", update.write_protect(made, layout=table.layout)
    ),
    "shadow it": lambda table, made: host(
        table,
        made,
        "The page becomes a shadowed guest page table",
        update.write_protect(made, shadow=True, layout=table.layout),
    ),
    "is it used?": lambda table, made: host(
        table, made, "The host asks whether the page is used", update.age(made, table.layout)
    ),
}
"""What can be done to the word, in the order of the keys 0 to 4."""


class SptePlayer(Player):
    """Switch the bits of a Linux 6.1 spte, or let the guest and KVM do it. Chapter 3."""

    module = "spte"

    def __init__(self) -> None:
        shown, sentences = [], {}

        def place(text: str) -> int:
            return sentences.setdefault(text, len(sentences))

        for table in TABLES:
            form = spte.LAYOUTS[table.layout]
            made = words(table)
            acted = [act(table, made) for act in ACTIONS.values()]
            shown.append(
                {
                    "name": table.name,
                    "bits": [
                        {
                            "name": name,
                            "bit": form.bits[name].low,
                            "meaning": form.bits[name].meaning,
                            "software": name in form.software,
                        }
                        for name in table.bits
                    ],
                    "fixed": f"{table.fixed:#x}",
                    "start": number(table, np.array([table.start], dtype=np.uint64)).item(),
                    "state": spte.classify(made, table.layout, 1).tolist(),
                    "cpu": [place(text) for text in cpu_text(table, made)],
                    "next": [number(table, act.words).tolist() for act in acted],
                    "said": [[place(text) for text in act.said] for act in acted],
                }
            )
        super().__init__(
            alt="Switches for the bits of an spte of Linux 6.1, in three kinds of page table; the state that the bits "
            "make, what the CPU permits, and 5 buttons that let the guest read or write and KVM protect the page.",
            data={
                "tables": shown,
                "sentences": list(sentences),
                "states": [{"name": n, "meaning": m} for n, m in zip(spte.STATES, spte.MEANINGS, strict=True)],
                "actions": list(ACTIONS),
            },
        )
