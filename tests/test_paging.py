"""mmu.paging: every state of kvm-unit-tests' access test, and a plain-Python walk for what that test leaves out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import paging
from tests import kut_access as kut
from tests import plain

COUNTS = {(52, False): 933_888, (52, True): 9_338_880, (37, False): 1_916_928, (37, True): 19_169_280}
COUNTS |= {(51, False): 1_916_928, (51, True): 19_169_280, (36, False): 2_899_968, (36, True): 28_999_680}
FORMATS = {"long4": paging.LONG4, "long5": paging.LONG5, "pae": paging.PAE}
FORMATS |= {"legacy": paging.LEGACY, "legacy-pse": paging.LEGACY_PSE}
FLAGS = ("write", "fetch", "user", "wp", "nxe", "smep", "smap", "ac", "pke", "implicit")


def make(states, maxphyaddr):
    """Run kvm-unit-tests' states through the rules: the kernel read of TWICE first, then the access."""
    flag = {name: kut.has(states, name) for name in kut.NAMES}
    entries, pkru = kut.setting(states)
    cpu = {"wp": flag["CR0_WP"], "nxe": flag["EFER_NX"], "smep": flag["CR4_SMEP"], "pke": flag["CR4_PKE"]}
    cpu |= {"pkru": pkru, "maxphyaddr": maxphyaddr}
    read = paging.access(entries, **cpu)
    entries = np.where(flag["TWICE"][:, None], read.entries, entries)
    return paging.access(entries, user=flag["USER"], write=flag["WRITE"], fetch=flag["FETCH"], **cpu)


def differing(states, maxphyaddr):
    """The states whose fault, error code, PTE or PDE is not what kvm-unit-tests expects."""
    out, expected = make(states, maxphyaddr), kut.expect(states)
    same = (out.fault == expected.fault) & (out.code == expected.code) & (out.entries[:, 3] == expected.pte)
    return states[~(same & ((out.entries[:, 2] ^ expected.pde) & ~expected.ignore_pde == 0))]


@pytest.mark.parametrize(("maxphyaddr", "pku"), COUNTS)
def test_number_of_states(maxphyaddr, pku):
    """kvm-unit-tests has exactly as many legal states as its published run and its filter give."""
    assert sum(block.size for block in kut.blocks(maxphyaddr, pku)) == COUNTS[maxphyaddr, pku]


@given(st.integers(0, 2 ** len(kut.NAMES) - 1), st.sampled_from([36, 37, 51, 52]), st.booleans())
@settings(deadline=None)
def test_states_are_a_product(state, maxphyaddr, pku):
    """A state is legal exactly when it is in the enumeration's product of legal groups."""
    flags = np.array([state], dtype=np.uint32)
    groups = [(*kut.RESERVED_FLAGS, "PDE_PSE", "PDE_NX", "PTE_NX", "EFER_NX"), ("FETCH", "WRITE"), kut.PKU_FLAGS]
    groups += [set(kut.NAMES) - {name for group in groups for name in group}]
    parts = [flags & np.uint32(sum(kut.BIT[name] for name in group)) for group in groups]
    assert kut.legal(flags, maxphyaddr, pku) == all(kut.legal(part, maxphyaddr, pku) for part in parts)


@pytest.mark.parametrize(("maxphyaddr", "pku"), [(52, False), (37, False), (51, False), (36, False), (52, True)])
def test_every_legal_state(maxphyaddr, pku):
    """In every legal state the fault, the error code and both entries are those of kvm-unit-tests' plain rules."""
    for block in kut.blocks(maxphyaddr, pku):
        for states in np.array_split(block, max(1, block.size >> 15)):
            assert not differing(states, maxphyaddr).size, hex(differing(states, maxphyaddr)[0])


@pytest.mark.parametrize("maxphyaddr", [36, 37, 51])
def test_sampled_states_with_protection_keys(maxphyaddr):
    """With protection keys and reserved address bits, a seeded sample of one block in ten agrees as well."""
    dice = np.random.default_rng(maxphyaddr)
    for block in kut.blocks(maxphyaddr, True):
        states = dice.choice(block, block.size // 10)
        assert not differing(states, maxphyaddr).size


def test_supervisor_execution_prevention():
    """With CR4.SMEP set as well, which that test's main loop never does, its rules still hold in every state."""
    for block in kut.blocks(52, False):
        assert not differing(block | np.uint32(kut.BIT["CR4_SMEP"]), 52).size


def test_the_oracle_against_its_twin():
    """The vectorised oracle equals its plain-Python twin on 6,000 seeded states of every kind of CPU."""
    dice = np.random.default_rng(5)
    for maxphyaddr, pku in COUNTS:
        blocks = list(kut.blocks(maxphyaddr, pku))
        states = np.concatenate([dice.choice(block, 1000 // len(blocks) + 1) for block in blocks])
        states |= dice.integers(0, 2, states.size, dtype=np.uint32) * np.uint32(kut.BIT["CR4_SMEP"])
        expected, before = kut.expect(states), kut.setting(states).entries
        for place, state in enumerate(states.tolist()):
            fault, code, set_bits = kut.expect_one(state)
            assert (expected.fault[place], expected.code[place]) == (fault, code)
            for kind, column in (("PDE", 2), ("PTE", 3)):
                after = int(before[place, column])
                for name in ("A", "D"):
                    after |= (f"{kind}_{name}" in set_bits) << kut.ENTRY_BITS[name]
                assert after == int(expected.pde[place] if kind == "PDE" else expected.pte[place])


BITS = st.sets(
    st.sampled_from([1, 2, 5, 6, 7, 8, 12, 13, 17, 20, 21, 29, 30, 36, 40, 51, 52, 59, 60, 62, 63]), max_size=3
)
ENTRIES = st.builds(lambda base, bits: base ^ sum(1 << bit for bit in bits), st.sampled_from([7, 7, 7, 6, 0x87]), BITS)


@st.composite
def walks(draw):
    name = draw(st.sampled_from(sorted(FORMATS)))
    levels = draw(st.integers(1, FORMATS[name].levels))
    return name, draw(st.lists(st.lists(ENTRIES, min_size=levels, max_size=levels), min_size=1, max_size=8))


@given(walks(), st.integers(32, 52), st.lists(st.booleans(), min_size=10, max_size=10), st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_any_access_equals_plain_python(walk, maxphyaddr, flags, pkru):
    """In every paging mode, level and CPU setting the arrays give what one plain walk at a time gives."""
    name, entries = walk
    options = dict(zip(FLAGS, flags, strict=True)) | {"pkru": pkru, "maxphyaddr": maxphyaddr}
    options["fetch"] &= not options["write"]
    if FORMATS[name].entry_bytes == 4:
        entries = [[entry & 0xFFFFFFFF for entry in path] for path in entries]
    out = paging.access(np.array(entries, dtype=np.uint64), fmt=FORMATS[name], **options)
    for place, path in enumerate(entries):
        code, after = plain.access(path, name=name, **options)
        assert (bool(out.fault[place]), int(out.code[place])) == (code is not None, code or 0)
        assert out.entries[place].tolist() == after


@pytest.mark.parametrize("nxe", [True, False])
@pytest.mark.parametrize("cpu", range(16), ids=lambda cpu: f"cpu{cpu:04b}")
def test_look_up_equals_the_rules(cpu, nxe):
    """For every leaf, access and CPU setting the table that was asked once says what the rules say each time."""
    options = {name: bool(cpu >> bit & 1) for bit, name in enumerate(("wp", "smep", "smap", "ac"))} | {"nxe": nxe}
    low, kinds = np.arange(256, dtype=np.uint64), np.array([0, 2, 4, 6, 16, 20], dtype=np.uint8)
    extra = np.array([0, 1 << 63, 1 << 51, 1 << 40, 1 << 39, 1 << 52 | 3 << 59], dtype=np.uint64)
    leaf, kind = (grid.ravel() for grid in np.meshgrid(low[:, None] | extra, kinds, indexing="ij"))
    access = {"write": kind & 2 != 0, "user": kind & 4 != 0, "fetch": kind & 16 != 0}
    rules = paging.access(leaf[:, None], maxphyaddr=40, **access, **options)
    codes = paging.fault_codes(leaf, kind, maxphyaddr=40, **options)
    assert codes.tolist() == np.where(rules.fault, rules.code.astype(np.int64), paging.NO_FAULT).tolist()


def test_look_up_block_by_block():
    """Pairs beyond one block are looked up like those in the first."""
    leaf = np.tile(np.array([0, 5, 7], dtype=np.uint64), 70_000)
    codes = paging.fault_codes(leaf, np.full(leaf.size, 6, dtype=np.uint8))
    assert codes.dtype == np.int8 and np.array_equal(codes.reshape(-1, 3), np.broadcast_to([6, 7, -1], (70_000, 3)))


def test_flags_broadcast():
    """One walk with many accesses and many walks with one access are both whole arrays."""
    path = np.array([7, 7, 7, 5], dtype=np.uint64)
    out = paging.access(path, user=True, write=np.array([False, True]))
    assert (out.fault.tolist(), out.code.tolist(), out.entries.shape) == ([False, True], [0, 7], (2, 4))
    assert paging.access(np.stack([path, path]), wp=False, write=True).entries[:, 3].tolist() == [0x65, 0x65]


def test_a_read_that_faults_with_code_zero():
    """A supervisor read of an absent page faults with error code 0, so the fault is told apart from the code."""
    out = paging.access(np.array([[0]], dtype=np.uint64))
    assert out.fault.tolist() == [True] and out.code.tolist() == [0]


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([[7]], {"write": True, "fetch": True}, "expected read, write or fetch"),
        ([[7] * 5], {}, "1 to 4 levels"),
        (7, {}, "expected \\(access, level\\)"),
        ([[7]], {"pkru": 1 << 32}, "expected 32 bits"),
        ([[-1]], {}, "unsigned 64-bit"),
    ],
)
def test_unusable_input(entries, options, message):
    """Accesses that no CPU can make are refused with the value and what was expected."""
    with pytest.raises(ValueError, match=message):
        paging.access(entries, **options)
