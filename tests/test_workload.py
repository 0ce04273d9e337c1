"""mmu.workload: what each benchmark does to each MMU."""

import inspect

import numpy as np
import pytest

from mmu import paging
from mmu.workload import (
    FRAME_BUFFER,
    KERNELS,
    RAM,
    SOURCES,
    TABLES,
    WORKLOADS,
    build,
    demand_paging,
    frame_buffer_pages,
    kernbench,
    migration,
    play,
    steady_state,
    with_policy,
    x11perf,
)  # fmt: skip


def counts(workload, mmu, policy, seed=1):
    return play(workload, with_policy(mmu, policy), np.random.default_rng(seed))


@pytest.mark.parametrize("mmu", list(KERNELS))
def test_x11perf_faults_once_a_page_and_refresh(mmu):
    """After the first refresh each page of the window faults once a refresh, on every MMU alike."""
    tally = counts(x11perf(operations=3), mmu, "2012")
    assert tally.write_protect.tolist() == [0, 500, 500, 500, 0]
    assert tally.by_path("fast fixed").tolist() == [0, 500, 500, 500, 0]
    assert tally.dirty.tolist() == [500, 500, 500, 500, -1]


@pytest.mark.parametrize(("mmu", "fast"), [("EPT", 500), ("NPT", 500), ("soft MMU", 0)])
def test_today_the_soft_mmu_is_never_fast(mmu, fast):
    """Linux 6.1 repairs them without the lock under EPT and NPT, and never for a paged guest under the soft MMU."""
    tally = counts(x11perf(operations=2), mmu, "6.1")
    assert tally.by_path("fast fixed")[1:4].tolist() == [fast] * 3
    assert tally.by_path("slow")[1:4].tolist() == [500 - fast] * 3


def test_more_operations_make_no_more_faults():
    """Only the first operation after a refresh faults."""
    one, many = (counts(x11perf(operations=n), "EPT", "2012") for n in (1, 8))
    assert np.array_equal(one.paths, many.paths)
    assert many.accesses.sum() == 8 * one.accesses.sum()


@pytest.mark.parametrize(("stride", "pages"), [(2000, 245), (4096, 500), (8192, 500), (7680, 689)])
def test_pages_of_the_window(stride, pages):
    """500 rows of 2000 bytes lie in 245 pages when packed, in one page each at a stride of whole pages."""
    found = frame_buffer_pages(500, 2000, stride)
    plain = {byte // 4096 for row in range(500) for byte in range(row * stride, row * stride + 2000)}
    assert found.tolist() == sorted(plain)
    assert found.size == pages


@pytest.mark.parametrize("mmu", list(KERNELS))
def test_migration_faults_are_the_dirty_pages(mmu):
    """In pre-copy each page that a round finds dirty took one write-protect fault, and every one can be fast."""
    tally = counts(migration(ram=2048), mmu, "2012")
    assert np.array_equal(tally.write_protect[:-1], tally.dirty[:-1])
    assert np.array_equal(tally.by_path("fast fixed")[:-1], tally.dirty[:-1])
    assert np.all(np.diff(tally.dirty[:-1]) < 0)
    assert tally.dirty[-2] <= 64


def test_migration_is_the_same_on_every_mmu():
    """What a guest writes, and so what is dirty, does not depend on the MMU or on who repairs its faults."""
    seen = {tuple(counts(migration(ram=1024), mmu, policy).dirty) for mmu in KERNELS for policy in ("none", "2012")}
    assert len(seen) == 1


def test_migration_that_never_ends():
    """A guest that writes faster than pages are sent stops at the limit of rounds."""
    tally = counts(migration(ram=512, writes_per_page=20.0, hot_share=0.0, rounds=5), "EPT", "2012")
    assert (tally.dirty >= 0).sum() == 5
    assert tally.dirty[4] > 500


def test_kernbench_has_no_write_protect_faults_on_data():
    """Without a dirty log nothing is there to be repaired fast: no data page takes such a fault."""
    for mmu in KERNELS:
        tally = counts(kernbench(processes=3, pages=16), mmu, "2012")
        assert tally.by_path("fast fixed").sum() == tally.write_protect.sum() == 0


def test_kernbench_churns_shadow_page_tables():
    """The soft MMU emulates two stores to an upper table for each process and hands back each fault of a shared page;
    EPT hears of neither."""
    shadow = counts(kernbench(processes=3, pages=16, copied=0.25), "soft MMU", "6.1")
    assert shadow.by_path("emulate").sum() == 2 * 3
    assert shadow.by_path("injected").sum() == 4 * 3
    ept = counts(kernbench(processes=3, pages=16, copied=0.25), "EPT", "6.1")
    assert ept.by_path("emulate").sum() == ept.by_path("injected").sum() == 0


@pytest.mark.parametrize("mmu", list(KERNELS))
def test_demand_paging_faults_once_a_page(mmu):
    """Every page's first touch is a slow fault, and with one vCPU or four there are as many."""
    for vcpus in (1, 4):
        tally = counts(demand_paging(ram=512, vcpus=vcpus), mmu, "2012")
        assert tally.by_path("fast fixed").sum() == tally.write_protect.sum() == 0
        assert 512 <= tally.by_path("slow").sum() <= 512 + 16  # under nested paging the tables themselves, too


def test_steady_state_without_a_log_is_quiet():
    """A settled guest without a log takes no fault at all, whatever it writes: the condition of the claim of 2012."""
    for mmu in KERNELS:
        quiet = counts(steady_state(ram=256, logged=False), mmu, "6.1")
        assert quiet.write_protect.sum() == 0
        first_touch = counts(steady_state(ram=256, logged=False, rounds=1), mmu, "6.1")
        assert np.array_equal(quiet.paths.sum(axis=0), first_touch.paths.sum(axis=0))


def test_steady_state_with_a_log_has_only_write_protect_faults():
    """With a log every fault of a settled guest is a write-protect fault, as the message of 2012 says."""
    tally = counts(steady_state(ram=256), "EPT", "6.1")
    assert np.array_equal(tally.write_protect[1:], tally.faults[1:])


def test_write_share_decides():
    """Reads never fault on a clean page, so a guest that only reads takes none."""
    tally = counts(steady_state(ram=256, write_share=0.0, rounds=3), "EPT", "6.1")
    assert tally.faults[1:].tolist() == [0, 0, 0]


def test_a_seed_repeats_a_run():
    """The same generator gives the same run, another one another."""
    one, same, other = (counts(migration(ram=512), "EPT", "2012", seed) for seed in (1, 1, 2))
    assert np.array_equal(one.paths, same.paths)
    assert not np.array_equal(one.dirty, other.dirty)


@pytest.mark.parametrize("ram", [10, 511, 512, 1500])
def test_guest_tables(ram):
    """The guest's own tables map every page of memory, frame buffer and tables to itself, and nothing else."""
    workload = kernbench(processes=2, pages=ram // 2)
    guest, layout = build(workload, KERNELS["EPT"])
    words = guest.memory.words(guest.memory.slot(TABLES), 8).reshape(-1, 512)
    page = np.arange((layout.tables - 3) * 512, dtype=np.uint64)
    leaf = words[3 : layout.tables].ravel()
    mapped = leaf & paging.P != 0
    assert np.array_equal((leaf & paging.PFN)[mapped] >> np.uint64(12), page[mapped])
    slots = [guest.memory.slot(number) for number in (RAM, FRAME_BUFFER, TABLES)]
    covered = np.concatenate([np.arange(s.base, s.base + s.pages) for s in slots if s])
    assert np.array_equal(np.flatnonzero(mapped), covered)


def test_every_parameter_has_a_source():
    """Each parameter of each workload is listed with where its default comes from."""
    for name, make in WORKLOADS.items():
        assert list(inspect.signature(make).parameters) == list(SOURCES[name]), name
