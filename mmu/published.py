"""Measurements that others published, as they published them, and what one fault costs by them.

The one idea: what a fault costs can only be said with a source. A table here holds the numbers of one message, in its
own units and digits; the functions are the arithmetic that turns them into a cost for one page. Chapter 1.

Not found published anywhere: how long an EPT violation takes by itself, without what KVM then does about it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

PAGES_PER_GIB = 1 << 18
"""Pages of 4 KiB in one GiB, which is what each vCPU of the tests below writes in a round."""

SPLIT_ON_FAULT: NDArray[np.void] = np.array(
    [
        (2, 0.317710329, 0.296204596, 0.058689782),
        (4, 0.337102375, 0.299841017, 0.060343076),
        (8, 0.386025681, 0.297274460, 0.060399702),
        (16, 0.791462524, 0.298942578, 0.062508699),
        (32, 1.719646014, 0.313101996, 0.075984855),
        (64, 2.527973150, 0.455779206, 0.079789363),
        (96, 2.681123208, 0.673778787, 0.165386739),
    ],
    dtype=[("vcpus", np.int64), ("built", np.float64), ("split", np.float64), ("eager", np.float64)],
)
"""Seconds in which ``vcpus`` vCPUs each wrote 1 GiB after the dirty log was switched on; memory in 1 GiB huge pages.

Three kernels: ``built``, each small page is built anew on its first write; ``split``, the first write splits the huge
page and the others find their small page in place; ``eager``, pages were split beforehand. Source: David Matlack,
"[PATCH 3/3] KVM: x86/mmu: Split huge pages mapped by the TDP MMU on fault", 2022-04-01, the table for 100 % writes.
"""

FAST_TDP: NDArray[np.void] = np.array(
    [("dirty log", 64, 3.545234984, 0.312197959), ("access tracking", 64, 3.249645416, 0.298275545)],
    dtype=[("test", "U16"), ("vcpus", np.int64), ("before", np.float64), ("after", np.float64)],
)
"""Seconds in which 64 vCPUs each wrote their memory after its rights were taken away, before and after the TDP MMU got
the fast path. EPT without A/D bits and without PML, so that each page takes a fault. Source: David Matlack, "[PATCH
0/8] KVM: x86/mmu: Fast page fault support for the TDP MMU", 2021-06-11. That each vCPU has 1 GiB is the test's default,
which the message does not repeat.
"""

MIGRATION_2012 = {
    "EPT": ((309, 275, 289), (295, 259, 271)),
    "soft MMU": ((368, 292, 307), (341, 289, 275)),
}
"""Totals of three migrations with dbench before the series and of three after it, in seconds (the unit is inferred);
guest with two vCPUs. Source: Xiao Guangrong, "[PATCH 00/13] KVM: MMU: fast page fault", 2012-03-29.
"""

X11PERF_2012 = {"EPT": (7060, 7150), "soft MMU": (6980, 7490)}
"""Operations a second of ``x11perf -comppixwin500`` before and after; guest with four vCPUs. Source: as above."""

VMCALL = 1529
"""Cycles of the shortest way out of a guest and back, a ``vmcall``, on a Skylake server.

Source: Wanpeng Li, "[PATCH v2] KVM: VMX: Micro-optimize vmexit time when not exposing PMU", 2020-03-13.
"""

WORLD_SWITCH = (2000, 2.93)
"""Cycles of a VM exit and entry themselves on a Xeon X5570 with Linux 2.6.34, and that machine's clock in GHz.

Source: Landau, Ben-Yehuda, Gordon, "SplitX: Split Guest/Hypervisor Execution on Multi-Core".
"""

EAGER_SPLIT: NDArray[np.void] = np.array(
    [("when a page is written", 0.001, 2.94), ("when the log is switched on", 1.55, 0.14)],
    dtype=[("split", "U32"), ("enable", np.float64), ("write", np.float64)],
)
"""Seconds to switch the dirty log on, and until 96 vCPUs have then written all their memory once, in huge pages of
1 GiB, where these are split by the faults and where they are split beforehand. CPU seconds of splitting: 270 and 1.55.
Source: David Matlack, the message of Linux commit a3fe5dbda0a4. Chapter 12.
"""

DIRTY_RING = {"bitmap": 55, "ring": 73}
"""Seconds to migrate a guest of 24 GiB that writes 800 MB/s. Source: Peter Xu, the dirty ring series, version 15."""

INITIALLY_SET = (460, 10)
"""Milliseconds to switch on the dirty log of 128 GiB, before and after a slot may begin with every page noted as dirty,
so that nothing need be write-protected yet. Source: Jay Zhou, 2020. Chapter 12.
"""

PARALLEL_FAULTS: NDArray[np.void] = np.array(
    [("populate", 110.193, 16.112), ("enable the log", 4.829, 7.057), ("write", 3.949, 0.275),
     ("get the log", 0.822, 5.468), ("disable the log", 2.995, 3.088)],
    dtype=[("phase", "U16"), ("before", np.float64), ("after", np.float64)],
)  # fmt: skip
"""Seconds of each phase of the dirty-log test with 96 vCPUs and 3 GiB each, before and after faults of the TDP MMU
run in parallel. Source: Ben Gardon, series of 2021-01-12. Chapter 12.
"""

PML_ENTRIES = 512
"""Pages that the CPU notes by itself before it leaves the guest once. Source: Kai Huang, PML series, 2015-01-28."""


def per_page(seconds: ArrayLike, gib: float = 1.0) -> NDArray[np.float64]:
    """Microseconds for one page, of vCPUs that each write ``gib`` GiB page by page; any shape.

    It holds what happens between one page's first write and the next one's: the guest's loop, the exit, KVM's work,
    the way back, and any waiting. The number of vCPUs does not enter: they work side by side.

    >>> per_page(FAST_TDP["before"][0]).round(1), per_page(FAST_TDP["after"][0]).round(2)
    (np.float64(13.5), np.float64(1.19))
    """
    return np.asarray(seconds, dtype=np.float64) * 1e6 / (gib * PAGES_PER_GIB)


def serial_section(seconds: ArrayLike, vcpus: ArrayLike, gib: float = 1.0) -> NDArray[np.float64]:
    """Nanoseconds that each fault would hold a lock, if the vCPUs did nothing but wait for it in turn; any shape.

    A fitted number and an upper bound: whatever part of the time is not spent in turn makes it smaller.

    >>> serial_section(FAST_TDP["before"][0], 64).round()
    np.float64(211.0)
    """
    return 1e3 * per_page(seconds, gib) / np.asarray(vcpus, dtype=np.float64)
