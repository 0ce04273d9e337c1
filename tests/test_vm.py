"""The simulated guest: against plain twins, against itself one access at a time, and against what may never be."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import kernel, play, scenario, spte, vm
from mmu.host import HUGE_PAGES, Backing
from mmu.kernel import FAULT, PATHS, Kernel
from mmu.slots import LOG_DIRTY_PAGES, READONLY
from mmu.vm import CR3, FETCH, INCREMENT, READ, VCPU, WRITE, Guest, replay_words, stream
from tests.machines import RAM, Machine
from tests.test_replay import DATA

NAMES = ["fast fixed", "fast not fixed", "spurious", "slow", "retry", "emulate", "MMIO"]


def guest(
    pages: int = 64, flags: int = 0, *, huge: bool = False, backing: Backing | None = None, **switches: object
) -> Guest:
    """A guest without paging, with one slot of RAM at gfn 0x1000."""
    machine = Guest(Kernel(**switches))
    machine.add_slot(1, RAM, pages, flags, backing or Backing(pages, huge=huge, content=True))
    machine.vcpus[0] = VCPU(0)
    return machine


def touch(machine: Guest, *accesses: tuple[int, int], vcpu: int = 0) -> list[str]:
    """Make accesses (op, page of the slot); return the path of each fault."""
    op, page = zip(*accesses, strict=True)
    result = machine.run(vcpu, stream(op, (RAM + np.array(page)) << 12))
    return [PATHS[path] for path in result.faults["path"]]


@pytest.mark.parametrize("seed", range(16))
def test_a_whole_stream_is_its_accesses_one_by_one(seed: int) -> None:
    """Faults, values, #PFs and the log are the same whether a stream is one run or one run for each access."""
    outcomes = []
    for whole in (True, False):
        machine, rng = Machine(seed), np.random.default_rng(seed + 1000)
        faults, seen = [], []
        for _ in range(3):
            accesses = machine.stream(rng, 50)
            count = accesses.gva.size
            for part in [slice(count)] if whole else [slice(k, k + 1) for k in range(count)]:
                result = machine.guest.run(0, accesses.take(part))
                result.faults["access"] += part.start or 0
                faults.append(result.faults[[name for name in FAULT.names if name not in ("order", "old", "new")]])
                seen.append(np.stack([result.value, result.fault.astype(np.uint64), result.code]))
            machine.act(rng)
            seen.append(np.tile(machine.guest.memory.dirty[machine.guest.memory.slot(1).indices], (3, 1)))
        outcomes.append((np.concatenate(faults), np.concatenate(seen, axis=1)))
    (faults, seen), (one_by_one, looked) = outcomes
    assert np.array_equal(faults, one_by_one)
    assert np.array_equal(seen, looked)
    assert len(faults) > 20


@pytest.mark.parametrize("seed", range(12))
def test_sptes_stay_legal(seed: int) -> None:
    """No spte that a random machine builds has W without MMU_W, or MMU_W without HOST_W, and rights follow sptes."""
    machine, rng = Machine(seed), np.random.default_rng(seed)
    for _ in range(4):
        machine.guest.run(0, machine.stream(rng, 80))
        machine.act(rng)
        direct, shadow = machine.guest.direct, machine.guest.shadow
        leaves = shadow.sptes[shadow.child < 0]
        large = leaves & shadow.bits.large != 0
        small = np.concatenate([direct.sptes, direct.blocks[direct.blocks > 1], leaves[~large]])
        states = np.concatenate(
            [spte.classify(small, machine.kernel.layout, level=1), spte.classify(leaves[large], machine.kernel.layout)]
        )
        assert not (states == spte.ILLEGAL).any()
        small = direct.sptes != 0
        assert np.array_equal(direct.rights[small], direct.bits.rights(direct.sptes[small]))
        assert not (direct.rights[~small & (direct.mmio >= 0)]).any()


class PlainPage:
    """One 4K page of a TDP MMU over anonymous memory, in plain Python: the spte, the host's page, the dirty bit."""

    def __init__(self) -> None:
        self.spte, self.host, self.dirty, self.logged = "none", "absent", False, False

    def access(self, write: bool) -> list[tuple[bool, str]]:
        """The faults of one access: whether the spte was present, and what became of the fault."""
        faults = []
        while self.spte == "none" or (write and self.spte != "writable"):
            present = self.spte != "none"
            if present and write and self.spte == "protected":
                self.spte, path = "writable", "fast fixed"
            elif write and self.host in ("zero", "shared"):
                self.spte, self.host, path = "none", "own", "retry"
            else:
                self.host = {"absent": "own" if write else "zero", "unmarked": "own" if write else "unmarked"}.get(
                    self.host, self.host
                )
                self.spte = "writable" if self.host == "own" else "read-only"
                path = "fast not fixed" if present and write else "slow"
            self.dirty |= self.logged and self.spte == "writable"
            faults.append((present, path))
        return faults

    def act(self, what: str) -> None:
        """An action on the log or of the host."""
        if what == "log":
            self.logged = not self.logged
            if self.logged:
                self.dirty = False
        if (what == "log" and self.logged) or (what == "get" and self.logged and self.dirty):
            self.spte = "protected" if self.spte == "writable" else self.spte
        if what == "get" and self.logged:
            self.dirty = False
        if what in ("discard", "fork", "refs"):
            self.spte = "none"
        if what == "discard":
            self.host = "absent"
        if what == "fork" and self.host in ("own", "unmarked", "shared"):
            self.host = "shared"
        if what == "exit" and self.host == "shared":
            self.host = "unmarked"  # this process's alone again, but read-only until the next store
        if what == "refs" and self.host == "own":
            self.host = "unmarked"


ACTIONS = ["log", "get", "discard", "fork", "exit", "refs"]
STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)) | st.sampled_from(ACTIONS), min_size=1, max_size=40)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_direct_mmu_is_the_plain_page(steps: list[tuple[int, int] | str]) -> None:
    """Faults of a TDP MMU are those of a few lines of plain Python for each page, whatever the host and the log do."""
    machine = guest(4)
    slot, pages, stored = machine.memory.slots[0], [PlainPage() for _ in range(4)], False
    for step in steps:
        if isinstance(step, tuple):
            stored |= step[0] != READ
            result = machine.run(0, stream([step[0]], [(RAM + step[1]) << 12]))
            seen = [(bool(fault["code"] & np.uint64(1)), PATHS[fault["path"]]) for fault in result.faults]
            assert seen == pages[step[1]].access(step[0] != READ)
            continue
        if step == "log":
            machine.set_flags(slot, slot.flags ^ LOG_DIRTY_PAGES)
        elif step == "get" and slot.logged:
            assert machine.get_dirty_log(slot).tolist() == [page.dirty for page in pages]
        elif step == "exit":
            slot.backing.child_exits()
        elif step in ("discard", "fork", "refs"):
            act, where = {"discard": ("discard", (0, 4)), "fork": ("fork", ()), "refs": ("clear_refs", ())}[step]
            machine.unmapped(slot.backing, getattr(slot.backing, act)(*where))
        for page in pages if step != "fork" or stored else ():  # a mapping of zero pages alone is not copied
            page.act(step)


def test_store_to_a_zero_page_faults_twice() -> None:
    """The first fault breaks the sharing, the host's notice makes it stale; the second maps the copy."""
    assert touch(guest(), (READ, 3), (WRITE, 3)) == ["slow", "retry", "slow"]


def test_dirty_log_is_repaired_without_the_lock() -> None:
    """After logging starts each page's first store is one fast fault, and the bitmap has its bit."""
    machine = guest()
    touch(machine, *((WRITE, page) for page in range(64)))
    machine.set_flags(machine.memory.slots[0], LOG_DIRTY_PAGES)
    assert touch(machine, *((WRITE, page) for page in range(0, 64, 2)), (READ, 1), (WRITE, 0)) == ["fast fixed"] * 32
    assert np.flatnonzero(machine.get_dirty_log(machine.memory.slots[0])).tolist() == list(range(0, 64, 2))


@pytest.mark.parametrize(("policy", "path"), [("none", "slow"), ("3.6", "fast fixed"), ("6.12", "fast fixed")])
def test_policy_decides_the_path_and_not_the_bitmap(policy: str, path: str) -> None:
    """Without a fast path the slow one repairs the same faults, and the log is the same."""
    machine = guest(policy=policy)
    touch(machine, (WRITE, 1), (WRITE, 2))
    machine.set_flags(machine.memory.slots[0], LOG_DIRTY_PAGES)
    assert touch(machine, (WRITE, 2)) == [path]
    assert np.flatnonzero(machine.get_dirty_log(machine.memory.slots[0])).tolist() == [2]


def test_only_the_2012_series_is_fast_on_shadow_pages() -> None:
    """A paged guest on shadow pages takes the slow path for each dirty-log fault, but under the policy of 2012."""
    scene = scenario.load(DATA / "npt0_C.json.gz")
    player = play.Player(scene)
    slow = player.play().faults
    fast = play.Player(scene)
    fast.guest.shadow.kernel = dataclasses.replace(fast.guest.kernel, policy="2012")
    series = fast.play()
    fixed = series.faults["path"] == kernel.FAST_FIXED
    assert not (slow["path"] == kernel.FAST_FIXED).any() and fixed.sum() > 300
    assert np.array_equal(slow["address"], series.faults["address"])
    assert all(item.agrees for item in series.bitmaps)


def test_large_spte_is_not_repaired_fast_under_a_log() -> None:
    """The fast path would mark one page of 512, so it leaves a protected large spte to the slow path (6b73a9606)."""
    backing = Backing(1024, huge=True, content=True)
    backing.populate()
    for release, later in (("6.1", "slow"), ("6.12", "fast fixed")):
        machine = guest(1024, backing=backing, eager_page_split=False, release=release, layout=f"{release}-npt")
        assert touch(machine, (WRITE, 0), (WRITE, 5), (READ, 700)) == ["slow", "slow"]
        machine.set_flags(machine.memory.slots[0], LOG_DIRTY_PAGES)
        # 6.1 drops the large spte for one small one; 6.12 splits it, so the neighbours are there, write-protected.
        assert touch(machine, (WRITE, 5), (WRITE, 6)) == ["fast not fixed", later]
        assert np.flatnonzero(machine.get_dirty_log(machine.memory.slots[0])).tolist() == [5, 6]


def test_eager_split_leaves_only_fast_faults() -> None:
    """Split when logging starts, a huge page gives one fast fault for each page stored to."""
    backing = Backing(HUGE_PAGES, huge=True)
    backing.populate()
    machine = guest(HUGE_PAGES, backing=backing)
    assert touch(machine, (WRITE, 9)) == ["slow"]
    machine.set_flags(machine.memory.slots[0], LOG_DIRTY_PAGES)
    assert touch(machine, *((WRITE, page) for page in range(0, 512, 8))) == ["fast fixed"] * 64


def test_nx_huge_pages_are_split_by_a_fetch() -> None:
    """With the mitigation on a large spte cannot be executed: a fetch faults with P and F and maps 4K instead."""
    backing = Backing(HUGE_PAGES, huge=True)
    backing.populate()
    machine = guest(HUGE_PAGES, backing=backing, nx_huge_pages=True)
    result = machine.run(0, stream([WRITE, FETCH, FETCH, WRITE], [(RAM + page) << 12 for page in (1, 2, 2, 3)]))
    assert [hex(code) for code in result.faults["code"]] == ["0x100000006", "0x100000015", "0x100000006"]


@pytest.mark.parametrize(("release", "op", "faults"), [("6.1", READ, 2), ("6.12", READ, 1), ("6.12", FETCH, 2)])
def test_nx_huge_pages_keep_small_what_was_fetched(release: str, op: int, faults: int) -> None:
    """A table made for a fetch stays, and in 6.1 any other table too; in 6.12 a huge page takes that one's place."""
    backing = Backing(HUGE_PAGES, huge=True)
    backing.populate()
    switches = {"nx_huge_pages": True, "tdp_mmu": False, "release": release, "layout": f"{release}-npt"}
    machine = guest(HUGE_PAGES, LOG_DIRTY_PAGES, backing=backing, **switches)
    assert touch(machine, (op, 0)) == ["slow"]
    machine.set_flags(machine.memory.slots[0], 0)
    assert touch(machine, (WRITE, 0), (WRITE, 100)) == ["slow"] * faults


@pytest.mark.parametrize(("release", "whole"), [("6.1", 1), ("6.12", 0)])
def test_a_cleared_bit_splits_the_huge_page_it_is_in(release: str, whole: int) -> None:
    """Clearing one bit of a log that began all set splits that huge page; 6.1 not where it is the page's first."""
    backing = Backing(2 * HUGE_PAGES, huge=True)
    backing.populate()
    machine = guest(2 * HUGE_PAGES, backing=backing, release=release, layout=f"{release}-npt")
    machine.memory.manual = machine.memory.initially_set = True
    slot = machine.memory.slots[0]
    touch(machine, (WRITE, 0), (WRITE, HUGE_PAGES))
    machine.set_flags(slot, LOG_DIRTY_PAGES)
    machine.clear_dirty_log(slot, 7, np.ones(1, dtype=np.bool))
    machine.clear_dirty_log(slot, HUGE_PAGES, np.ones(1, dtype=np.bool))
    assert (machine.direct.blocks & machine.direct.bits.large != 0).tolist() == [False, bool(whole)]
    assert touch(machine, (WRITE, 8), (WRITE, HUGE_PAGES + 8)) == ["fast not fixed"] * whole


def test_prefetch_fills_the_aligned_eight() -> None:
    """The legacy MMU fills up to seven neighbours from resident, writable host pages, the TDP MMU none."""
    for tdp_mmu, faults in ((True, 16), (False, 2)):
        backing = Backing(16)
        backing.populate()
        machine = guest(16, backing=backing, tdp_mmu=tdp_mmu)
        assert len(touch(machine, *((READ, page) for page in range(16)))) == faults


def test_prefetch_stops_where_the_host_has_nothing() -> None:
    """A run of empty sptes is filled up to its first page that is not resident; not at all in a logged slot."""
    backing = Backing(8)
    backing.populate(0, 5)
    assert len(touch(guest(8, backing=backing, tdp_mmu=False), (READ, 0), *((READ, page) for page in range(5)))) == 1
    machine = guest(8, backing=backing, flags=LOG_DIRTY_PAGES, tdp_mmu=False)
    assert len(touch(machine, (READ, 0), (READ, 1), (READ, 2))) == 3


def test_store_to_a_readonly_slot_is_emulated_each_time() -> None:
    """Reads map the page, stores leave as MMIO with or without an spte, and change nothing."""
    backing = Backing(4, content=True)
    backing.populate()
    backing.bytes[:] = 0x33
    machine = guest(4, READONLY, backing=backing)
    assert touch(machine, (WRITE, 0), (READ, 0), (WRITE, 0), (WRITE, 0)) == ["emulate", "slow", "emulate", "emulate"]
    assert (backing.bytes == 0x33).all()


def test_mmio_spte_lives_as_long_as_its_generation() -> None:
    """The first touch of a hole makes an MMIO spte; any change of the slots makes it stale, which one fault renews."""
    machine = guest()
    assert touch(machine, (READ, 100), (WRITE, 100), (READ, 100)) == ["MMIO"] * 3
    machine.add_slot(7, 0x9000, 1)
    result = machine.run(0, stream([READ, READ], [(RAM + 100) << 12] * 2))
    assert [kernel.RETURNS[ret] for ret in result.faults["ret"]] == ["EMULATE", "none"]
    assert [hex(code) for code in result.faults["code"]] == ["0x10000000d"] * 2
    assert result.faults["old"][0] != result.faults["new"][0] == result.faults["old"][1]


def test_full_ring_stops_the_access_that_filled_it() -> None:
    """At its limit the vCPU leaves; the reset protects the last page too, so its store faults and is entered again."""
    machine = guest(64)
    machine.memory.ring_size = 64 + 16
    touch(machine, *((WRITE, page) for page in range(64)))
    machine.set_flags(machine.memory.slots[0], LOG_DIRTY_PAGES)
    assert touch(machine, *((INCREMENT, page) for page in range(20))) == ["fast fixed"] * 21
    assert [ring.tolist() for ring in machine.full_rings] == [list(range(16))]
    assert machine.harvest(0).tolist() == [15, 16, 17, 18, 19]
    words = machine.memory.words(machine.memory.slots[0], 4).reshape(64, -1)[:, 0]
    assert words[:20].tolist() == [1] * 20  # every increment was made once


def test_recorded_rings_hold_what_is_predicted() -> None:
    """All harvests of the recorded ring scenario, the one at the full ring among them, entry by entry."""
    rings = play.predict(scenario.load(DATA / "npt1_tdp1_K.json.gz")).rings
    assert len(rings) == 5 and all(item.agrees for item in rings)


def test_guest_sees_the_same_on_every_kernel() -> None:
    """Values and #PFs of a scenario do not depend on nested paging, the MMU, the kernel or its switches."""
    for name in ("npt1_tdp1_D", "npt1_tdp1_F", "npt1_tdp1_H", "npt1_tdp1_I"):
        scene = scenario.load(DATA / f"{name}.json.gz")
        for release in ("6.1.0", "6.12.0"):
            for params in (
                {"kvm_amd.npt": "Y", "kvm.tdp_mmu": "Y"},
                {"kvm_amd.npt": "Y", "kvm.tdp_mmu": "N", "kvm.nx_huge_pages": "Y"},
                {"kvm_amd.npt": "N", "kvm.mmio_caching": "N"},
            ):
                other = dataclasses.replace(scene, kernel=release, params={**scene.params, **params})
                assert all(item.agrees for item in play.predict(other).values), (name, release, params)


def test_other_paging_modes_fault_alike_on_shadow_pages() -> None:
    """Two-level and PAE guests with the same program fault as often as one in long mode, and see the same."""
    scene = scenario.load(DATA / "npt0_C.json.gz")
    counts = []
    for cr4, efer in ((0x20, 0xD01), (0x20, 0x800), (0, 0), (0x10, 0)):
        events = tuple(e._replace(cr4=cr4, efer=efer) if isinstance(e, scenario.Vcpu) else e for e in scene.events)
        said = play.predict(dataclasses.replace(scene, events=events))
        assert all(item.agrees for item in said.values + said.bitmaps)
        counts.append(len(said.faults))
    assert len(set(counts)) == 1


ENTRY = 0x12000 + 8 * 8  # of the large page that RAM is mapped by, at the same address


def large_pages(flags: int = 0x87, *, huge: bool = False, **switches: object) -> Guest:
    """A guest on shadow pages, with 4 MiB of RAM that is there; all it maps, its own tables too, it maps by 2 MiB."""
    machine = guest(1024, huge=huge, nested_paging=False, **switches)
    machine.add_slot(0, 0, 512, 0, Backing(512, content=True))
    for slot in machine.memory.slots:
        slot.backing.populate()
    for at, entry in ((0x10000, 0x11027), (0x11000, 0x12027), (0x12000, 0xE7), (ENTRY, RAM << 12 | flags)):
        machine.memory.store(at, entry, 8)
    machine.memory.store(ENTRY + 8, RAM + 512 << 12 | flags, 8)
    machine.vcpus[0] = VCPU(0, 0x80010033, 0x10000, 0x20, 0xD01)
    return machine


def edit(machine: Guest, flags: int) -> None:
    """The guest rewrites the entry of its first large page, and flushes."""
    machine.run(0, stream([WRITE, vm.INVLPG], [ENTRY, RAM << 12], [RAM << 12 | flags, 0]))


def large_sptes(machine: Guest) -> int:
    """How many large sptes map RAM."""
    shadow = machine.shadow
    return int(((shadow.sptes & shadow.bits.large != 0) & (shadow.gfn >= RAM)).sum())


@pytest.mark.parametrize("release", ["6.1", "6.12"])
def test_w_of_a_large_guest_page_waits_for_its_d(release: str) -> None:
    """A read of a clean large page leaves W out of a whole shadow page; the store that sets D brings another one."""
    machine = large_pages(release=release, layout=f"{release}-npt")
    assert touch(machine, (READ, 0), (READ, 7), (READ, 8)) == ["slow", "slow"]  # its neighbours came along
    faults = machine.run(0, stream([WRITE], [(RAM + 8) << 12])).faults
    assert faults["code"].tolist() == [0b11] and PATHS[faults["path"][0]] == "slow"
    assert int(machine.memory.load(np.array([ENTRY], dtype=np.uint64), 8)[0]) & 0x60 == 0x60
    assert touch(machine, (WRITE, 9), (READ, 0), (WRITE, 1)) == ["slow"]  # page 0 is empty in the new shadow page
    edit(machine, 0xA7)
    assert touch(machine, (READ, 0), (READ, 8), (READ, 7)) == ["spurious"]  # D is clear: the first one is found again
    assert sorted(page.access for page in machine.shadow.pages if page.gfn == RAM) == [5, 7]


def test_shadow_pages_of_large_guest_pages_protect_nothing() -> None:
    """Only the three tables of the guest are write-protected; a store to what a large page maps is not emulated."""
    machine = large_pages(0xE7)
    assert touch(machine, *((op, page) for page in range(0, 1024, 8) for op in (READ, WRITE))) == ["slow"] * 128
    assert np.flatnonzero(machine.shadow.tracked).tolist() == [1024 + 0x10, 1024 + 0x11, 1024 + 0x12]
    # A table's neighbours came along with W when a large page mapped it without.
    store = machine.run(0, stream([WRITE, WRITE, WRITE], [0x12FF8, 0x13000, 0xF000]))
    assert [PATHS[path] for path in store.faults["path"]] == ["emulate", "slow"]


@pytest.mark.parametrize(
    ("flags", "user", "codes"),
    [
        (0xE7, True, []),
        (0xE3, True, [0b101, 0b111, 0b10101]),  # U is clear
        (0xE5, True, [0b111]),  # W is clear
        (1 << 63 | 0xE7, True, [0b10101]),
        (1 << 13 | 0xE7, False, [0b1001, 0b1011, 0b11001]),  # a bit of the address that a large page has not
    ],
)
def test_rights_of_a_large_entry_hold_for_all_that_it_maps(flags: int, user: bool, codes: list[int]) -> None:
    """What the entry of a large page forbids is injected as a #PF, wherever in the page the access is."""
    machine = large_pages(flags)
    for page in (0, 100, 511):
        result = machine.run(0, stream([READ, WRITE, FETCH], np.full(3, (RAM + page) << 12), 0, user))
        assert result.code[result.fault].tolist() == codes


@pytest.mark.parametrize("release", ["6.1", "6.12"])
def test_a_large_spte_takes_a_large_page_of_guest_and_host(release: str) -> None:
    """Where the host has a huge page too, one spte maps 2 MiB, until a dirty log begins and after it has ended."""
    machine = large_pages(0xE7, huge=True, release=release, layout=f"{release}-npt")
    slot = machine.memory.slot(1)
    assert touch(machine, *((WRITE, page) for page in range(0, 1024, 64))) == ["slow"] * 2 and large_sptes(machine) == 2
    machine.set_flags(slot, LOG_DIRTY_PAGES)
    assert touch(machine, (READ, 5), (WRITE, 5), (WRITE, 6), (READ, 600)) == ["slow"] * 2  # no neighbours under a log
    assert large_sptes(machine) == 1
    assert np.flatnonzero(machine.get_dirty_log(slot)).tolist() == [5, 6]
    machine.set_flags(slot, 0)
    assert touch(machine, (WRITE, 7), (WRITE, 5), (WRITE, 600)) == ["slow"] * 2 and large_sptes(machine) == 2


def test_a_cleared_bit_takes_w_from_a_large_spte_for_good() -> None:
    """Where the log began all set, clearing a page's bit leaves its large spte without W and without MMU_W."""
    machine = large_pages(0xE7, huge=True)
    slot = machine.memory.slot(1)
    machine.memory.manual = machine.memory.initially_set = True
    touch(machine, (WRITE, 0), (WRITE, 600))
    machine.set_flags(slot, LOG_DIRTY_PAGES)
    machine.clear_dirty_log(slot, 3, np.ones(1, dtype=np.bool))
    bits = machine.shadow.bits
    large = machine.shadow.sptes[machine.shadow._is_large(machine.shadow.sptes)]
    assert sorted(large & (bits.w | bits.mmu_w)) == [0, bits.w | bits.mmu_w]


@pytest.mark.parametrize("switch", [False, True])
def test_a_root_taken_up_again_counts_its_stores_anew(switch: bool) -> None:
    """The third store to the top table of another process drops its shadow page, unless that process ran between."""
    machine = large_pages()
    other = 0x14000
    machine.memory.store(other, 0x11067, 8)
    machine.run(0, stream([CR3, READ, CR3, READ], [other, RAM << 12, 0x10000, RAM << 12]))
    store = stream([WRITE], [other + 0xFF0])
    for step in range(3):
        assert [PATHS[path] for path in machine.run(0, store).faults["path"]][-1] == "emulate"
        if switch and step == 1:
            machine.run(0, stream([CR3, CR3], [other, 0x10000]))
    assert [page.valid for page in machine.shadow.pages if page.gfn == other >> 12] == [switch]


def test_no_large_spte_maps_a_guest_table() -> None:
    """A large page of guest and host in which a guest table lies is mapped by small sptes, the table without W."""
    machine = large_pages(0xE7, huge=True)
    table = RAM + 3 << 12
    assert touch(machine, (WRITE, 0)) == ["slow"] and large_sptes(machine) == 1
    machine.run(0, stream([WRITE], [ENTRY + 16], [table | 0x67]))  # a table of small pages, at gfn 3 of the large one
    machine.memory.store(table, RAM + 700 << 12 | 0x67, 8)
    machine.run(0, stream([READ], [(RAM + 1024) << 12]))
    assert large_sptes(machine) == 1  # without W now
    result = machine.run(0, stream([WRITE, WRITE], [table + 8, (RAM + 4) << 12]))
    assert [PATHS[path] for path in result.faults["path"]] == ["slow"] and large_sptes(machine) == 0


@pytest.mark.parametrize(("huge", "levels"), [(False, [1, 2]), (True, [2])])
def test_a_guest_page_of_1_gib_has_direct_shadow_pages_below_it(huge: bool, levels: list[int]) -> None:
    """A leaf two levels up is shadowed by direct pages down to where the host's page is, all with the same rights."""
    machine = large_pages(huge=huge)
    machine.memory.store(0x11008, 0x83, 8)  # gva 1 GiB on: guest-physical memory from 0 on
    at = (1 << 30) + (RAM + np.array([0, 1, 511])) * 4096
    result = machine.run(0, stream([WRITE, READ, INCREMENT], at, 5))
    assert PATHS[result.faults["path"][0]] == "slow" and len(result.faults) == (1 if huge else 2)
    direct = [page for number, page in enumerate(machine.shadow.pages) if machine.shadow.base[number] >= 0]
    assert sorted(page.level for page in direct) == levels and {page.access for page in direct} == {3}
    assert machine.memory.load(np.array([RAM << 12], dtype=np.uint64), 8).tolist() == [5]


def test_what_is_fetched_is_never_mapped_large_under_nx_huge_pages() -> None:
    """With nx_huge_pages a large spte has NX, so a fetch from it faults and is given small sptes, which stay."""
    machine = large_pages(0xE7, huge=True, nx_huge_pages=True)
    faults = machine.run(0, stream([READ, FETCH, WRITE], [(RAM + page) << 12 for page in (0, 1, 300)])).faults
    assert faults["code"].tolist() == [0, 0b10001, 0b10] and large_sptes(machine) == 0


def test_ept_faults_carry_what_kvm_makes_of_a_qualification() -> None:
    """On EPT a read is U, a write W, and an MMIO spte a misconfiguration: RSVD alone."""
    machine = guest(layout="6.1-ept")
    result = machine.run(
        0, stream([READ, WRITE, WRITE, READ, READ], [(RAM + page) << 12 for page in (0, 0, 1, 99, 99)])
    )
    assert [hex(code) for code in result.faults["code"]] == [
        "0x100000004", "0x100000003", "0x100000002", "0x100000002", "0x100000004", "0x8",
    ]  # fmt: skip
    assert spte.classify(result.faults["new"][2], "6.1-ept", level=1) == spte.WRITABLE


def test_manual_protection_clears_only_what_is_named() -> None:
    """Fetching the log changes nothing; clearing write-protects the dirty pages named and leaves the others."""
    machine = guest(flags=0)
    slot = machine.memory.slots[0]
    machine.memory.manual = True
    touch(machine, *((WRITE, page) for page in range(64)))
    machine.set_flags(slot, LOG_DIRTY_PAGES)
    touch(machine, *((WRITE, page) for page in range(8)))
    assert machine.get_dirty_log(slot).sum() == machine.get_dirty_log(slot).sum() == 8
    machine.clear_dirty_log(slot, 4, np.ones(60, dtype=np.bool))
    assert np.flatnonzero(machine.get_dirty_log(slot)).tolist() == [0, 1, 2, 3]
    assert touch(machine, (WRITE, 3), (WRITE, 4)) == ["fast fixed"]


def test_second_vcpu_finds_what_the_first_mapped() -> None:
    """Two vCPUs share one direct MMU: what one faulted in the other need not."""
    machine = guest()
    machine.vcpus[1] = VCPU(1)
    assert touch(machine, (WRITE, 5)) == ["slow"]
    assert touch(machine, (WRITE, 5), (READ, 6), vcpu=1) == ["slow"]


@pytest.mark.parametrize("switches", [{}, {"tdp_mmu": False}, {"policy": "none"}])
def test_drive_is_run_without_the_values(switches: dict[str, object]) -> None:
    """Driven in pieces, kept or counted, a stream gives the faults and bitmaps that it gives when run."""
    rng = np.random.default_rng(7)
    machines = [guest(300, backing=Backing(300), **switches) for _ in range(3)]
    for _ in range(5):
        gva = (RAM + rng.integers(0, 300, 2000).astype(np.uint64)) << np.uint64(12)
        accesses = stream(rng.choice([READ, WRITE, INCREMENT, FETCH], 2000), gva)
        ran = machines[0].run(0, accesses).faults
        pieces = [accesses.take(slice(start, start + 700)) for start in range(0, 2000, 700)]
        kept = machines[1].drive(0, pieces, keep=True)
        counted = machines[2].drive(0, pieces)
        names = [name for name in FAULT.names if name not in ("order", "old", "new")]  # frames come in another order
        assert np.array_equal(ran[names], kept.faults[names])
        assert kept.counts.tolist() == counted.counts.tolist() == np.bincount(ran["path"], minlength=9).tolist()
        logs = []
        for machine in machines:
            slot = machine.memory.slots[0]
            logs.append(machine.get_dirty_log(slot).tolist() if slot.logged else None)
            machine.set_flags(slot, LOG_DIRTY_PAGES)
        assert logs[0] == logs[1] == logs[2]


def test_drive_meets_holes() -> None:
    """Driven or run, an access where no slot is leaves to user space, though all pages of the slot are open."""
    machines = [guest(8, backing=Backing(8)) for _ in range(2)]
    gfn = np.array([*range(RAM, RAM + 8), RAM + 0x800, RAM + 0x900, RAM + 0x800], dtype=np.uint64)
    for pages in (gfn[:8], gfn):
        accesses = stream(WRITE, pages << np.uint64(12))
        ran = np.bincount(machines[0].run(0, accesses).faults["path"], minlength=len(PATHS))
        assert machines[1].drive(0, [accesses]).counts.tolist() == ran.tolist()
    assert ran[kernel.MMIO] == 3


def test_drive_refuses_what_it_cannot_do() -> None:
    """Guests that keep bytes are for run, and so are control operations."""
    with pytest.raises(ValueError, match="use run"):
        guest().drive(0, [])
    with pytest.raises(ValueError, match="op is 4; drive takes 0 to 3 only"):
        guest(backing=Backing(64)).drive(0, [stream([vm.INVLPG], [0])])


def plain_words(memory: list[int], accesses: list[tuple[int, int, int]]) -> list[int]:
    """Reads, writes and increments on words, one after the other."""
    found = []
    for word, op, value in accesses:
        if op == WRITE:
            memory[word] = value
        elif op == INCREMENT:
            memory[word] = memory[word] + 1 & 0xFFFFFFFF
        found.append(memory[word] if op == READ else 0)
    return found


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 0xFFFFFFFF)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_words_are_as_if_one_after_the_other(accesses: list[tuple[int, int, int]]) -> None:
    """What each read finds, and what memory holds in the end, is what a plain loop gives."""
    memory, plain = np.full(4, 0xFFFFFFFE, dtype=np.uint32), [0xFFFFFFFE] * 4
    word, op, value = (np.array(column) for column in zip(*accesses, strict=True))
    found = replay_words(memory, word.astype(np.int64), op.astype(np.uint8), value.astype(np.uint64))
    assert (found & np.uint64(0xFFFFFFFF)).tolist() == plain_words(plain, accesses)
    assert memory.tolist() == plain


def test_wrong_arguments_are_named() -> None:
    """Errors say what was given and what was expected."""
    with pytest.raises(ValueError, match="op is 9; expected 0 to 6"):
        stream([9], [0])
    with pytest.raises(ValueError, match="release is '5\\.4'"):
        Kernel(release="5.4")
    with pytest.raises(ValueError, match="policy is 'quick'"):
        Kernel(policy="quick")
    with pytest.raises(ValueError, match="a backing has 0 pages"):
        Backing(0)
    machine = guest()
    with pytest.raises(ValueError, match=r"vCPU 3 does not exist; expected one of \[0\]"):
        machine.run(3, stream([READ], [0]))
    with pytest.raises(ValueError, match=r"slot 2 at gfn 0x1020 overlaps slot 1"):
        machine.add_slot(2, 0x1020, 4)
    with pytest.raises(ValueError, match="slot 3 has 9 pages; its backing has 8"):
        machine.add_slot(3, 0x9000, 9, 0, Backing(8))


def test_paths_and_returns_have_their_names() -> None:
    """The names that records carry numbers of are those the book uses."""
    assert list(PATHS[:7]) == NAMES and kernel.RETURNS[kernel.RET_FIXED] == "FIXED"
    assert vm.OPS == scenario.OPS


def long_mode(accesses: list[list[str]], *, nested: bool) -> play.Prediction:
    """A client that maps its own pages and 16 of RAM, and whose guest makes these accesses in its first run."""
    root, ram = "0x10000", "0x1000000"
    slots = [("0x0", "0x200000", "prefaulted"), (ram, "0x10000", "prefaulted")]
    maps = [("0x1000", "0x1000", 15, "0x63"), ("0x10000", "0x10000", 496, "0x63"), ("0xa000", "0xa000", 1, "0x65"),
            (ram, ram, 15, "0x67")]  # fmt: skip
    rows = [[*row[:2], "0x0", "0x0", *(row[2:] or [None])] for row in accesses]
    text = json.dumps(
        {
            "kernel": "6.1.0", "params": {"kvm_amd.npt": "Y" if nested else "N"},
            "events": [
                *({"t": "memslot", "slot": number, "gpa": gpa, "size": size, "flags": 0, "hva": hex(1 << 40 + number),
                   "backing": how, "ns": 0, "ns_end": 1} for number, (gpa, size, how) in enumerate(slots)),
                *({"t": "gmap_range", "root": root, "gva": gva, "gpa": gpa, "n": n, "flags": flags}
                  for gva, gpa, n, flags in maps),
                {"t": "vcpu", "vcpu": 0, "gmode": "long64", "cr0": "0x80010033", "cr3": root, "cr4": "0x20",
                 "efer": "0xd01"},
                {"t": "run", "vcpu": 0, "phase": "", "ns": 2, "ns_end": 3, "accesses": rows},
            ],
        }
    )  # fmt: skip
    return play.predict(scenario.parse(text))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("before", "user", "again"),
    [
        ([], "", 3),  # IDT, GDT and stack
        ([["X", "0x1000ff0"]], "", 2),  # a call has pushed onto the stack before
        ([], "u", 2),  # IRET to CPL 3 has used stack and GDT; IDT and the task state segment remain
        ([["uR", "0x1000000"]], "u", 0),  # CPL 3 is left by an interrupt that goes the same way
        ([["uR", "0x1000000"]], "", 0),
        ([["W", "0x100f000", "0x2", "0x100f000"]], "u", 1),  # a #PF at CPL 0 needs no task state segment
    ],
)
def test_a_page_fault_is_injected_again_for_each_page_missing_on_its_way(nested, before, user, again) -> None:
    """KVM injects a #PF anew after each fault in its delivery, which touches what CPL it came from makes it touch."""
    code = "0x6" if user else "0x2"
    said = long_mode([*before, [f"{user}W", "0x100f000", code, "0x100f000"]], nested=nested)
    mine = [error for _, error, reinjected in said.injected if reinjected and error == int(code, 16)]
    assert len(mine) == again
    assert all(item.agrees for item in said.values if item.kind != "value")


def test_what_the_client_filled_last_is_not_what_it_filled_first() -> None:
    """A slot's bytes are those that its first reads find, but where pages were made equal for KSM later on."""
    slot = {"t": "memslot", "slot": 1, "gpa": "0x1000000", "size": "0x10000", "flags": 0, "hva": "0x7f0000000000",
            "backing": "anon prefaulted NOHUGEPAGE", "ns": 0, "ns_end": 1}  # fmt: skip
    merged = {"t": "host", "what": "madvise(MADV_MERGEABLE), ksm run=1 for 1.5s", "gpa": "0x1002000", "len": "0x4000"}
    rows = [["R", "0x1003080", "0x0", "0x5a5a5a5a", None], ["R", "0x1009080", "0x0", "0x77777777", None]]
    text = json.dumps(
        {
            "kernel": "6.1.0", "params": {"kvm_amd.npt": "Y"},
            "events": [
                slot, {"t": "vcpu", "vcpu": 0, "gmode": "flat32", "cr0": "0x33", "cr3": "0", "cr4": "0", "efer": "0"},
                {"t": "phase", "name": "", "ns": 2}, merged | {"ns": 3},
                {"t": "run", "vcpu": 0, "phase": "", "ns": 4, "ns_end": 5, "accesses": rows},
            ],
        }
    )  # fmt: skip
    said = play.predict(scenario.parse(text))
    assert len(said.values) == 2 and all(item.agrees for item in said.values)
