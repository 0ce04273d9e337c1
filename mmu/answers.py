"""The pictures of chapter 12: one entry in five layouts, and a cost that was moved.

They draw what :mod:`mmu.spte` and :mod:`mmu.published` hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import published
from mmu.figures import Row
from mmu.picture import LOCK, PAPER, VCPU, Picture, canvas, is_narrow, two_widths
from mmu.spte import LAYOUTS

KERNELS = ("2012", "3.6", "5.10", "6.1", "6.12")
"""The kernels whose layouts are set side by side."""


def layouts(table: str) -> list[str]:
    """The names of the five layouts for one kind of table, oldest first; from 6.1 on NPT and shadow paging share one.

    >>> layouts("ept")
    ['2012-ept', '3.6-ept', '5.10-ept', '6.1-ept', '6.12-ept']

    Args:
        table: ``"ept"`` or ``"shadow"``.

    Raises:
        ValueError: another kind of table.
    """
    if table not in ("ept", "shadow"):
        raise ValueError(f"table is {table!r}; expected 'ept' or 'shadow'")
    names = (f"{kernel}-{table}" for kernel in KERNELS)
    return [name if name in LAYOUTS else name.replace("shadow", "npt") for name in names]


def same(table: str, **fields: int) -> list[Row]:
    """One entry as each of five kernels would write it: of the fields, those that its layout has. Chapter 12.

    From 6.10 on a present entry of EPT has bit 63 set too, so that the CPU never turns a violation into a #VE.

    >>> [hex(row.word) for row in same("ept", R=1, W=1, PFN=0x34D4F, MMU_P=1, MMU_W=1)]
    ['0x34d4f003', '0x34d4f803', '0x34d4f803', '0x400000034d4f803', '0x8400000034d4f803']
    """
    rows = []
    for name in layouts(table):
        form = LAYOUTS[name]
        known = {field: value for field, value in fields.items() if field in form.bits}
        kernel = name.partition("-")[0]
        said = "Linux 3.4, 2012 series" if kernel == "2012" else f"Linux {kernel}"
        rows.append(Row(said, form.bits.pack(**known) | (form.none if form.ept else 0), form))
    return rows


def where(name: str, layout: str) -> str:
    """The bits in which a layout keeps a field, as text: ``11``, ``53:52``, or a dash. Chapter 12.

    >>> where("MMU_W", "3.6-ept"), where("AD_KIND", "6.1-ept"), where("ID", "6.1-ept")
    ('11', '53:52', '-')
    """
    bits = LAYOUTS[layout].bits
    if name not in bits:
        return "-"
    field = bits[name]
    return f"{field.low}" if field.width == 1 else f"{field.top}:{field.low}"


@two_widths
def moved_cost(table: NDArray[np.void] = published.EAGER_SPLIT) -> Picture:
    """Who waits for the splitting of huge pages: bars of two phases, for two kernels, as published. Chapter 12.

    Args:
        table: like :data:`mmu.published.EAGER_SPLIT`.
    """
    style: dict[str, dict[str, Any]] = {
        "enable": {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "/////"},
        "write": {"facecolor": VCPU[0], "edgecolor": VCPU[0]},
    }
    findings = []
    sep = "\n" if is_narrow() else ", "
    with canvas(7.0, 2.0, narrow=2.6) as figure:
        axes = figure.add_subplot()
        for row, entry in enumerate(table):
            start = 0.0
            for phase in ("enable", "write"):
                axes.barh(row, entry[phase], left=start, height=0.42, linewidth=1.2, **style[phase])
                start += float(entry[phase])
            text = f"switching the log on {entry['enable']:g} s{sep}the guest’s first writes {entry['write']:g} s"
            axes.text(0, row - 0.3, text, va="bottom", size=9)
            findings.append(
                f"split {entry['split']}: {entry['enable']:g} s to switch the log on, {entry['write']:g} s for the "
                "first writes"
            )
        names = [f"split {name}".replace(" when ", "\nwhen ") for name in table["split"]]
        names = [name.replace(" is ", "\nis ") if is_narrow() else name for name in names]
        axes.set_yticks(range(len(table)), names, size=9)
        axes.set(ylim=(len(table) - 0.6, -0.7), xlim=(0, 3.2), xlabel="seconds, 96 vCPUs")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return Picture(figure, "; ".join(findings) + ".")
