"""The reader of kernel traces: against real traces, a plain reader, generated lines and hostile text."""

import gzip
import io
import re
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import records, trace
from mmu.trace import MISSING
from tests import plain_trace

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "kvm-traces").glob("*.trace.gz"))
PUBLIC = sorted((DATA / "public-traces").glob("*.txt"))
SHORT = gzip.decompress((DATA / "kvm-traces" / "npt1_tdp1_E.trace.gz").read_bytes())
EXIT = "info1 0x0000000000000184 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000"


def only(text, event):
    """Read a text that must hold exactly one event, and return it."""
    t = trace.read(text if isinstance(text, bytes) else text.encode())
    assert t.unreadable == [] and list(t) == [event] and len(t[event]) == 1
    return t[event][0]


def reason(text):
    """Read one line that must be unreadable, and return why."""
    t = trace.read(text if isinstance(text, bytes) else text.encode())
    assert len(t.unreadable) == 1 and len(t) == 0
    return t.unreadable[0].reason


def content(pieces):
    """All that pieces of a trace say, as plain lists."""
    pieces = list(pieces)
    events = {event for piece in pieces for event in piece}
    return (
        {event: [row for piece in pieces for row in piece[event].tolist()] for event in events},
        sum(piece.lines for piece in pieces),
        sum(piece.other for piece in pieces),
        [line for piece in pieces for line in piece.unreadable],
        [loss for piece in pieces for loss in piece.lost.tolist()],
    )


# Real traces


@pytest.mark.parametrize("path", RECORDED + PUBLIC, ids=lambda path: path.name)
def test_every_event_line_of_a_real_trace_is_read(path):
    """No line of the stored traces is unreadable, and every line is an event or not one."""
    t = trace.read(path)
    assert t.unreadable == []
    assert sum(len(t[event]) for event in t) + t.other == t.lines


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_a_capture_has_only_events_behind_its_header(path):
    """What is no event in a captured trace is its header of comments, and the kernel's own count equals ours."""
    text = gzip.decompress(path.read_bytes())
    t = trace.read(path)
    assert t.other == sum(line.startswith(b"#") for line in text.splitlines())
    kept = int(text.split(b"entries-in-buffer/entries-written: ")[1].split(b"/")[0])
    assert sum(t.counts().values()) == kept


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_every_value_equals_the_plain_readers(path):
    """Every field of every event of a captured trace is what one regular expression a line finds."""
    plain = plain_trace.read(gzip.decompress(path.read_bytes()).decode())
    t = trace.read(path)
    order = t.order()
    assert [(line, event.decode()) for line, event, _ in order.tolist()] == [(line, event) for line, event, _ in plain]
    for event in t:
        expected = [fields for _, name, fields in plain if name == event]
        for field in {name for fields in expected for name in fields}:
            absent = trace.absent(t[event].dtype[field])
            assert t[event][field].tolist() == [fields.get(field, absent) for fields in expected], (event, field)


def test_public_lines_carry_what_their_authors_show():
    """Values of lines from other people's machines, read off by eye."""
    storm, walks, misc = (trace.read(path) for path in (PUBLIC[0], PUBLIC[2], PUBLIC[4]))
    assert storm["fast_page_fault"]["count"].max() == 888879
    assert set(storm["fast_page_fault"]["old"].tolist()) == {0x61000034D4FE877, 0x61000012EB86877, 0x61000012EB84877}
    assert set(storm["fast_page_fault"]["error_code"].tolist()) == {0x10}
    assert walks["kvm_mmu_pagetable_walk"]["pferr"].tolist() == [0x10, 0, 2, 2]
    assert walks["kvm_mmu_prepare_zap_page"][["gfn", "level", "direct", "access"]].tolist() == [(0x1000, 1, 1, 7)]
    assert walks["kvm_cr"][["write", "cr", "value"]].tolist() == [(1, 4, 0xB0)]
    assert misc["kvm_nested_vmexit"]["info1"].tolist() == [0x200000006, 0x200000006, 0x100000014]
    assert misc["kvm_exit"][["vcpu", "reason", "info1"]].tolist() == [
        (1, b"npf", 0x100000014),
        (-1, b"EXIT_NPF", 0x200000006),
    ]
    assert misc["kvm_mmu_set_spte"][["comm", "pid", "cpu"]].tolist() == [(b"tdxvm-13694", 13714, 65)]


# Shapes of lines


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("qemu-5791    [023] d.... 3602162.971191: ", (3602162971191000, 23, 5791, b"qemu", b"d....")),
        ("        CPU-353246 [041] 5473778.770321: ", (5473778770321000, 41, 353246, b"CPU", b"")),
        ("CPU 0/KVM-995362 [007] .N.1. 1.000001: ", (1000001000, 7, 995362, b"CPU 0/KVM", b".N.1.")),
        ("CPU 0/KVM  699876 [020] 18136.763707: kvm:", (18136763707000, 20, 699876, b"CPU 0/KVM", b"")),
        ("qemu-kvm 77/1240 [001] 12.345678901:    ", (12345678901, 1, 1240, b"qemu-kvm", b"")),
        ("qemu-kvm 1240 [001] 12.000000:      1 kvm:", (12000000000, 1, 1240, b"qemu-kvm", b"")),
        ("  <...>-5786  (-----) [029] d... 3.000000: ", (3000000000, 29, 5786, b"<...>", b"d...")),
        ("  qemu-5786   ( 5700) [029] .... 3.000000: ", (3000000000, 29, 5786, b"qemu", b"....")),
        ("  a [1]: b-12 [003] 4.5: ", (4500000000, 3, 12, b"a [1]: b", b"")),
        ("  kworker/0:1-mm_pe-9 [000] d.h2. 77: ", (77, 0, 9, b"kworker/0:1-mm_p", b"d.h2.")),
        ("> > qemu-1 [000] .... 1.000000: ", (1000000000, 0, 1, b"qemu", b"....")),
        ("qemu 12 1.000000: kvm:", (1000000000, -1, 12, b"qemu", b"")),
        ("[001]   770.850287:              kvm:", (770850287000, 1, -1, b"", b"")),
        ("770.850287: ", (770850287000, -1, -1, b"", b"")),
        ("", (-1, -1, -1, b"", b"")),
        ("kvm:", (-1, -1, -1, b"", b"")),
    ],
)
def test_every_shape_of_head_is_read(head, expected):
    """Task, CPU, flags and time are read where they are, and missing where they are not."""
    entry = only(head + "kvm_entry: vcpu 3, rip 0xfff0\n", "kvm_entry")
    assert entry[["ns", "cpu", "pid", "comm", "flags"]].item() == expected
    assert (entry["vcpu"], entry["rip"]) == (3, 0xFFF0)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("     12 ", (12, -1, b"")),
        ("711132 kvm:", (711132, -1, b"")),
        ("> 5 ", (5, -1, b"")),
        ("      3 qemu-5791 [023] d.... 1.000000: ", (3, 5791, b"qemu")),
        ("      3 qemu-5791 [023] ", (3, -1, b"")),
        ("5791 [023] 1.000000: ", (1, 5791, b"")),
        ("5791 1.000000: ", (1, 5791, b"")),
    ],
)
def test_a_count_in_front_is_a_multiplicity(head, expected):
    """A number that uniq -c put in front of any shape of line is its count, and a thread's number is not."""
    entry = only(head + "kvm_entry: vcpu 3, rip 0xfff0\n", "kvm_entry")
    assert entry[["count", "pid", "comm"]].item() == expected


@pytest.mark.parametrize(
    ("line", "event", "expected"),
    [
        ("kvm_entry: vcpu 1", "kvm_entry", {"vcpu": 1, "rip": MISSING}),
        ("kvm_entry: vcpu 0, rip 0xa003[immediate exit]", "kvm_entry", {"immediate_exit": 1}),
        ("kvm_entry:  vcpu 1 rip 0xffffffff81036706", "kvm_entry", {"rip": 0xFFFFFFFF81036706}),
        ("kvm_exit: reason UNKNOWN (71) rip 0x1 info 683 0", "kvm_exit", {"reason": b"UNKNOWN (71)", "info1": 0x683}),
        ("kvm_exit: vcpu 2 reason PF excp rip 0x1 " + EXIT, "kvm_exit", {"reason": b"PF excp", "info1": 0x184}),
        ("kvm_exit: reason CR rip 0x1 " + EXIT + " requests 0x20", "kvm_exit", {"vcpu": -1, "requests": 0x20}),
        ("kvm_page_fault: address febd0000 error_code 181", "kvm_page_fault", {"vcpu": -1, "error_code": 0x181}),
        ("kvm_page_fault:  vcpu 1 address 0x5000 error_code 0xf82", "kvm_page_fault", {"vcpu": 1, "rip": MISSING}),
        ("kvm_mmu_set_spte: gfn 3 spte b77 (rwx) level 1", "kvm_mmu_set_spte", {"u": -1, "sptep": MISSING}),
        ("kvm_mmu_set_spte: gfn 3 spte b77 (r-xu) level 2 at 1008", "kvm_mmu_set_spte", {"w": 0, "u": 1, "level": 2}),
        ("kvm_inj_exception: #DB [reinjected]", "kvm_inj_exception", {"exception": b"#DB", "error_code": MISSING}),
        ("kvm_inj_exception: #PF (0x3) [reinjected]", "kvm_inj_exception", {"error_code": 3, "reinjected": 1}),
        ("kvm_emulate_insn:  0:fff0: f3 a5 FAIL", "kvm_emulate_insn", {"rip": 0xFFF0, "insn": b"f3 a5 FAIL"}),
        ("mark_mmio_spte: sptep:00000000fd98c937 gfn 8 access 7 gen c", "mark_mmio_spte", {"gen": 12}),
        ("a_page_fault_ret: (f+0x1/0x2 [kvm] <- g) ret=5", "a_page_fault_ret", {"ret": 5, "function": b"g"}),
        ("a_page_fault_ret: (f+0x1/0x2 <- g) ret=0xffffffffffffffff", "a_page_fault_ret", {"ret": -1}),
        ("print:   tracing_mark_write: PHASE  one", "tracing_mark_write", {"text": b"PHASE  one"}),
        ("kvm_msr: msr_write 1d9 = 0x4000", "kvm_msr", {"cpu": 1}),
        ("kvmmmu:some_new_event: a 1", "some_new_event", {"cpu": 1}),
    ],
)
def test_older_and_newer_forms_of_events_are_read(line, event, expected):
    """Each event is read in the forms that kernels and trace-cmd print, and what a form lacks is missing."""
    found = only(f"qemu-1 [001] 1.000000: {line}\n", event)
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sp gen 0 gfn 14b l1 8-byte q0 direct wux nxe ad root 0 sync new", (1, 0x14B, 1, 8, 1, 7, 1, 1, 0)),
        ("sp gen 0 gfn 14b l1 8-byte q0 direct wux nxe ad root 0 sync\0 new", (1, 0x14B, 1, 8, 1, 7, 1, 1, 0)),
        ("sp gen 1 gfn 0 l4 4-byte q3 --x invalid !nxe !ad root 2 unsync existing", (0, 0, 4, 4, 0, 1, 0, 0, 1)),
        ("new sp gfn 0 4 q0 direct wux pae !nxe !wp root 0 sync", (1, 0, 4, -1, 1, 7, 0, -1, 0)),
        ("existing sp gfn 3a22e 1/4 q3 direct --x !pge !nxe root 6 sync", (0, 0x3A22E, 1, -1, 1, 1, 0, -1, 0)),
    ],
)
def test_shadow_page_texts_of_all_ages_are_read(line, expected):
    """kvm_mmu_get_page is read as 6.1 prints it, with the NUL byte too, and as old kernels and trace-cmd do."""
    page = only("kvm_mmu_get_page: " + line, "kvm_mmu_get_page")
    names = ["created", "gfn", "level", "gpte_bytes", "direct", "access", "nxe", "ad", "unsync"]
    assert page[names].item() == expected


@pytest.mark.parametrize(
    ("flags", "code"),
    [("", 0), ("P|W|U", 7), ("F", 16), ("P|W|U|RSVD|F", 31), ("P|W|U|0x100000000", 0x100000007), ("0x8000", 0x8000)],
)
def test_flags_of_fast_page_fault_become_an_error_code(flags, code):
    """Flag names and numbers joined by | become one word; F is fetch, not fifteen; no flags at all are 0."""
    line = f"fast_page_fault: vcpu 0 gva 1000 error_code {flags} sptep (____ptrval____) old 0 new 0 spurious 0 fixed 1"
    fault = only(line, "fast_page_fault")
    assert (fault["error_code"], fault["sptep"], fault["fixed"]) == (code, MISSING, 1)


def test_what_is_no_event_is_other():
    """Headers, comments, separators, perf-top lines, stack frames and other subsystems' events are other."""
    lines = [
        "cpus=48",
        "# kvm_entry: vcpu 0",
        "--",
        "",
        "   3.19%  reason EPT_MISCONFIG rip 0xffffffff81a42401 info 0 0",
        "  CPU-353246 [041] 5473778.770320: write_msr:            1d9, value 4000",
        " qemu-1695082 [012] ...1. 722267.552906: <stack trace>",
        " => kvm_mmu_page_fault",
        " qemu-1 [012] ...1. 7.0: kvm_set_spte <-kvm_mmu_page_fault",
        " qemu-1 [012] ...1. 7.0: print: hello",
        " 2)   0.123 us    |  kvm_page_fault();",
        "the guest loops in kvm_page_fault: it never returns",
    ]
    t = trace.read("\n".join(lines).encode())
    assert (t.lines, t.other, t.unreadable, len(t)) == (len(lines), len(lines), [], 0)


def test_losses_are_exposed():
    """LOST EVENTS lines, trace-cmd's DROPPED ones and the header of an overrun buffer give line, CPU and number."""
    text = b"# entries-in-buffer/entries-written: 5/9   #P:2\nCPU:3 [LOST 12 EVENTS]\nCPU:1 [LOST EVENTS]\n"
    t = trace.read(text + b"kvm_entry: vcpu 0\nCPU:4 [99 EVENTS DROPPED]\n# entries-in-buffer/entries-written: 5/5\n")
    assert t.lost.tolist() == [(1, -1, 4), (2, 3, 12), (3, 1, -1), (5, 4, 99)]
    assert t.other == 5


# What mail does to lines


def mail_wrapped(text):
    return "\n".join(
        "\n".join(textwrap.wrap(line, 72, break_long_words=False)) if line[:1] != "#" else line
        for line in text.split("\n")
    )


def quoted_printable(text):
    return re.sub(r"(?m)^(.{75})(?=.)", "\\1=\n", text.replace("=", "=3D"))


def reply(text):
    return re.sub("(?m)^", "> ", mail_wrapped(text)).replace("\n", "\r\n")


@pytest.mark.parametrize("damage", [mail_wrapped, quoted_printable, reply], ids=lambda damage: damage.__name__)
def test_a_trace_survives_mail(damage):
    """A trace that mail wrapped, quoted-printed or quoted in a reply holds the same events as the trace itself."""
    t, mailed = trace.read(SHORT), trace.read(damage(SHORT.decode()).encode())
    assert mailed.unreadable == []
    assert mailed.counts() == t.counts()
    for event in t:
        fields = [name for name in t[event].dtype.names if name not in ("line", "text")]
        assert mailed[event][fields].tolist() == t[event][fields].tolist()


def test_a_wrapped_record_is_read_to_its_end():
    """Where a record's end is optional, what mail put on the next lines still belongs to it, and prose does not."""
    head = "qemu-1 [038] .... 2825.959082: kvm_exit: vcpu 1 reason npf rip 0xfd11d"
    assert only(f"{head}\ninfo 100000014 fd000\n", "kvm_exit")["info2"] == 0xFD000
    assert only(f"{head} info1 0x1\ninfo2 0x2\nintr_info 0x3\nerror_code 0x4\n", "kvm_exit")["error_code"] == 4
    assert only(f"{head}\ninformation follows\n", "kvm_exit")["info1"] == MISSING


def test_a_line_that_reads_by_itself_is_never_a_continuation():
    """A truncated record takes nothing from the event behind it."""
    t = trace.read(b"kvm_page_fault: vcpu 0 rip 0x1 address\nkvm_entry: vcpu 1, rip 0x5\n")
    assert [line.line for line in t.unreadable] == [1]
    assert t["kvm_entry"]["line"].tolist() == [2]


def test_function_graph_comments_are_events():
    """The function_graph tracer prints events as comments; they are read."""
    assert (
        only(" 2)    |  /* kvm_page_fault: vcpu 0 rip 0x1 address 0x2 error_code 0x3 */", "kvm_page_fault")["rip"] == 1
    )


# What cannot be read


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("kvm_page_fault: vcpu 0 rip 0x1 address 0x10000000000000000 error_code 0x1", "address within 64 bits"),
        ("kvm_page_fault: vcpu 0 rip 0x1 address 0x2 error_code", "expected a blank at column 54, found the end"),
        (
            "kvm_page_fault: vcpu x rip 0x1 address 0x2 error_code 0x1",
            "expected a number (vcpu) at column 22, found 'x'",
        ),
        ("kvm_entry: vcpu 9223372036854775808", "vcpu within 64 bits"),
        ("kvm_entry: vcpu 1, rip 0x1 and more", "the end of the line at column 28, found 'and'"),
        (
            "fast_page_fault: vcpu 0 gva 0 error_code 0x1ffffffffffffffff sptep 0 old 0 new 0 spurious 0 fixed 0",
            "64 bits",
        ),
        ("kvm_mmu_get_page: sp gen 0 gfn 0 l4 8-byte q0 rwx nxe ad root 0 sync new", "one of ---|--x"),
        ("qemu-1 [000] 1.0: kvm_entry: \xff\xfe", "expected 'vcpu'"),
        ("tracing_mark_write: " + "x" * 257, "text of at most 256 bytes"),
        (f"{2**40} kvm_entry: vcpu 0", f"a count from 1 to {2**40 - 1}"),
        ("0 kvm_entry: vcpu 0", "a count from 1"),
        ("0 kvm:kvm_msr: msr_read 1", "a count from 1"),
        ("x" * (records.LONGEST_LINE + 1), "longer than 65536 bytes"),
    ],
)
def test_an_unreadable_line_has_a_number_and_a_reason(line, why):
    """A line that cannot be read is counted with its number and what was expected where."""
    text = b"cpus=2\n" + line.encode("latin-1") + b"\n"
    t = trace.read(text)
    assert [unreadable.line for unreadable in t.unreadable] == [2]
    assert why in t.unreadable[0].reason
    assert (t.lines, t.other, len(t)) == (2, 1, 0)


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_64_bit_values_are_exact(value):
    """Hexadecimal fields hold every 64-bit value, with and without leading zeros and prefix."""
    for text in (f"{value:x}", f"{value:#x}", f"{value:#034x}", f"{value:X}"):
        assert only(f"kvm_mmu_paging_element: pte {text} level 1", "kvm_mmu_paging_element")["pte"] == value


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63 - 1)])
def test_63_bit_decimals_are_exact(value):
    """Decimal fields hold every value of int64 but the lowest."""
    line = f"kvm_mmu_split_huge_page: gfn 0 spte 0 level 2 errno {value}"
    assert only(line, "kvm_mmu_split_huge_page")["errno"] == value


def test_a_name_that_is_no_event_is_refused():
    """Asking for what KVM never traces names the mistake; a known event that the trace lacks is an empty array."""
    t = trace.read(b"kvm_entry: vcpu 1\n")
    with pytest.raises(KeyError, match="'page_fault' is no event of KVM; expected one of kvm_entry"):
        t["page_fault"]
    assert t["kvm_exit"].dtype == trace.dtype("kvm_exit") and len(t["kvm_exit"]) == 0
    assert "kvm_exit" not in t and list(t) == ["kvm_entry"]


# Sources


def test_all_sources_are_read_alike(tmp_path, monkeypatch):
    """A path, gzipped or plain, bytes, binary and text files and standard input give the same trace."""
    plain, packed = tmp_path / "trace", tmp_path / "trace.gz"
    plain.write_bytes(SHORT)
    packed.write_bytes(gzip.compress(SHORT[:5000]) + bytes(100) + gzip.compress(SHORT[5000:]))
    expected = content([trace.read(SHORT)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SHORT)))
    for source in (plain, str(packed), packed.read_bytes(), io.BytesIO(SHORT), io.StringIO(SHORT.decode()), "-"):
        assert content([trace.read(source)]) == expected
    with pytest.raises(FileNotFoundError):
        trace.read(tmp_path / "missing")


@pytest.mark.parametrize("keep", [1, 2, 9, 12, 5000, -9, -1])
def test_a_truncated_gzip_is_read_up_to_its_end(keep):
    """Lines before the cut are read, and the cut is reported at the line where it is."""
    t = trace.read(gzip.compress(SHORT)[:keep])
    whole = trace.read(SHORT)
    if keep > 1:  # a single byte is not yet a gzip file
        assert "cut off" in t.unreadable[-1].reason
        assert not t.complete
    assert whole.complete
    for event in t:
        assert t[event][:-1].tolist() == whole[event][: len(t[event]) - 1].tolist()
    if keep == 5000:
        assert t.lines > 100
        assert t.unreadable[-1].line in (t.lines, t.lines + 1)


def test_a_damaged_gzip_is_reported():
    """A flipped byte inside a gzip stream ends the reading with a reason, not with an exception."""
    packed = bytearray(gzip.compress(SHORT))
    packed[5000] ^= 0xFF
    t = trace.read(bytes(packed))
    assert "damaged" in t.unreadable[-1].reason and not t.complete


def test_memory_is_flat_in_the_size_of_the_trace():
    """Reading eight times as much text in chunks takes the same memory, and giant lines are not kept."""

    def peak(copies):
        text = SHORT.split(b"#              | |", 1)[1].split(b"\n", 1)[1]
        blocks = iter([text] * copies + [b"x" * 500_000] * copies + [b""])
        source = type("Stream", (), {"read": lambda self, size: next(blocks) if size else b""})()
        tracemalloc.start()
        lines = sum(piece.lines for piece in trace.chunks(source, 1 << 18))
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return lines, taken

    (few, little), (many, much) = peak(2), peak(16)
    assert many > 7 * few
    assert much < 1.2 * little


# Generated and hostile text

NUMBER = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1])
VCPU = st.integers(0, 2**31 - 1)


@st.composite
def records(draw):
    """A line as the kernel's format strings print it, with the event and the values that it was printed from."""
    n = [draw(NUMBER) for _ in range(6)]
    vcpu, level, bit = draw(VCPU), draw(st.integers(1, 5)), [draw(st.booleans()) for _ in range(4)]
    flags = draw(st.lists(st.sampled_from(list(plain_trace.FLAGS)), unique=True))
    kind = draw(st.integers(0, 6))
    if kind == 0:
        event, text = "kvm_entry", f"vcpu {vcpu}, rip 0x{n[0]:x}"
        values = {"vcpu": vcpu, "rip": n[0]}
    elif kind == 1:
        event = "kvm_exit"
        text = (
            f"vcpu {vcpu} reason npf rip 0x{n[0]:x} info1 0x{n[1]:016x} info2 0x{n[2]:016x}"
            f" intr_info 0x{n[3] >> 32:08x} error_code 0x{n[4] >> 32:08x}"
        )
        values = dict(vcpu=vcpu, reason=b"npf", rip=n[0], info1=n[1], info2=n[2], intr_info=n[3] >> 32)
    elif kind == 2:
        event, text = "kvm_page_fault", f"vcpu {vcpu} rip 0x{n[0]:x} address 0x{n[1]:016x} error_code 0x{n[2]:x}"
        values = dict(vcpu=vcpu, rip=n[0], address=n[1], error_code=n[2])
    elif kind == 3:
        event = "fast_page_fault"
        high = n[4] & ~0x1F
        shown = "|".join(flags + ([f"{high:#x}"] if high else []))
        text = (
            f"vcpu {vcpu} gva {n[0]:x} error_code {shown} sptep {n[1]:016x} old {n[2]:#x} new {n[3]:x}"
            f" spurious {bit[0]:d} fixed {bit[1]:d}"
        ).replace("old 0x0 ", "old 0 ")
        code = sum(plain_trace.FLAGS[flag] for flag in flags) | high
        values = dict(vcpu=vcpu, gva=n[0], error_code=code, sptep=n[1], old=n[2], new=n[3], fixed=bit[1])
    elif kind == 4:
        event = "kvm_tdp_mmu_spte_changed"
        text = f"as id {bit[0]:d} gfn {n[0]:x} level {level} old_spte {n[1]:x} new_spte {n[2]:x}"
        values = dict(as_id=bit[0], gfn=n[0], level=level, old_spte=n[1], new_spte=n[2])
    elif kind == 5:
        event = "kvm_mmu_get_page"
        access = draw(st.integers(0, 7))
        text = (
            f"sp gen {n[0] & 1} gfn {n[1]:x} l{level} {8 - 4 * bit[0]}-byte q{n[2] & 3}{' direct' * bit[1]}"
            f" {plain_trace.CHOICES['access'][access]}{' invalid' * bit[2]} {'!' * bit[3]}nxe ad root 0 sync new"
        )
        values = dict(gfn=n[1], level=level, quadrant=n[2] & 3, direct=bit[1], access=access, invalid=bit[2])
    else:
        event, text = "kvm_mmu_pagetable_walk", f"addr {n[0]:x} pferr {n[1] & 0x1F:x} {'|'.join(flags)}"
        values = dict(addr=n[0], pferr=n[1] & 0x1F)
    return event, text, values


@st.composite
def heads(draw):
    """What may stand before an event: none, ftrace's, trace-cmd's or perf's columns, with their values."""
    if draw(st.booleans()) and draw(st.booleans()):
        return "", dict(ns=-1, cpu=-1, pid=-1)
    pid, cpu = draw(st.integers(0, 2**22)), draw(st.integers(0, 8191))
    micro = draw(st.integers(0, 2**33 * 10**6))
    comm = draw(st.sampled_from(["qemu", "CPU 0/KVM", "<...>", "kworker/3:1", "a-b [2]", "x: y"]))
    stamp = f"{micro // 10**6}.{micro % 10**6:06d}: "
    shape = draw(st.sampled_from(["{0}-{1} [{2:03d}] d..1. ", "   {0}-{1} [{2:03d}]  ", "{0} {1} [{2:03d}] "]))
    return shape.format(comm, pid, cpu) + stamp, dict(ns=micro * 1000, cpu=cpu, pid=pid, comm=comm.encode())


@given(st.lists(st.tuples(heads(), records()), min_size=1, max_size=8))
@settings(deadline=None)
def test_generated_lines_come_back(lines):
    """What the kernel's format strings print from any values, behind any head, is read back as these values."""
    t = trace.read("\n".join(head + event + ": " + text for (head, _), (event, text, _) in lines).encode())
    assert t.unreadable == []
    order = t.order()
    assert order["line"].tolist() == list(range(1, len(lines) + 1))
    for (_, event, row), ((_, before), (name, _, values)) in zip(order.tolist(), lines, strict=True):
        assert event.decode() == name
        found = t[name][row]
        assert {field: found[field] for field in {**before, **values}} == {**before, **values}


FRAGMENT = st.sampled_from(
    SHORT.splitlines()[12::90]
    + [line for path in PUBLIC for line in path.read_bytes().splitlines()[4::9]]
    + [b"CPU:3 [LOST 12 EVENTS]", b"x: kvm_pag=", b"e_fault: address 1 error_code 2", b"info1 0x1 info2 0x2", b"", b"="]
    + [
        b"> a-1 [0] .... 1.2: kvm_page_fault: address",
        b"> 84d000 error_code 4",
        b"ring 0:",
        b"\x1f\x8b",
        b"12: 13: :",
        b">1:",
        b"a-1 [0] 1.5: ",
    ]
)


@st.composite
def damaged(draw):
    """A real line, cut, or with bytes put into it."""
    line = draw(FRAGMENT)
    place = draw(st.integers(0, len(line)))
    kind = draw(st.integers(0, 3))
    if kind == 1:
        return line[:place]
    if kind == 2:
        return (
            line[:place] + draw(st.binary(max_size=3) | st.sampled_from([b"=\n", b"\n", b"\0", b"\r"])) + line[place:]
        )
    return line


@given(
    st.lists(damaged() | st.binary(max_size=40), max_size=25), st.sampled_from([b"\n", b"\r\n"]), st.integers(40, 2000)
)
@settings(deadline=None)
def test_hostile_text_is_accounted_for_line_by_line(lines, newline, size):
    """Whatever the text, every line is an event, other or unreadable, and where chunks end changes nothing."""
    text = newline.join(lines)
    if text.startswith(b"\x1f\x8b"):
        text = b"\n" + text
    t = trace.read(text)
    assert t.lines == len(text.split(b"\n")) - (text.endswith(b"\n") or not text)
    numbers = np.concatenate([t[event]["line"] for event in t] + [[line.line for line in t.unreadable]])
    assert len(set(numbers.tolist())) == len(numbers) == t.lines - t.other
    assert content(trace.chunks(text, size)) == content([t])


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_any_bytes_are_read_without_an_exception(noise):
    """Noise, also when it claims to be gzip, raises nothing and yields no event."""
    for text in (noise, b"\x1f\x8b" + noise, gzip.compress(noise)[: len(noise) // 2]):
        t = trace.read(text)
        assert t.other + len(t.unreadable) + sum(len(t[event]) for event in t) >= t.lines
