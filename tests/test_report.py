"""What a trace says, against counts taken from the same text by other means and against hand-made traces."""

import argparse
import gzip
import io
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmu import progress, report, report_page, trace

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "kvm-traces").glob("*.trace.gz"))
STORM = DATA / "public-traces" / "01-nested-ept-spurious-2024-09-09.txt"
KEYS = "lines events other unreadable lost layout faults fast hottest first last".split()


def run(*arguments):
    """Run the command as ``python -m mmu`` does and return its exit code."""
    parser = argparse.ArgumentParser()
    report.add_parser(parser.add_subparsers())
    options = parser.parse_args(["report", *map(str, arguments)])
    return options.run(options)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_counts_equal_those_of_regular_expressions_over_the_text(path):
    """Faults by code and vCPU, fast repairs, hottest pages and the time span are what a search of the text counts."""
    text = gzip.decompress(path.read_bytes()).decode()
    faults = re.findall(r"kvm_page_fault: vcpu (\d+) .* address 0x([0-9a-f]+) error_code (0x[0-9a-f]+)", text)
    fast = re.findall(r"fast_page_fault: vcpu (\d+) .* spurious (\d) fixed (\d)", text)
    stamps = [float(stamp) for stamp in re.findall(r"\] \S{5} +(\d+\.\d{6}): ", text)]
    found = report.report(path)
    assert found["faults"]["by_code"] == Counter(code for _, _, code in faults)
    assert found["faults"]["by_vcpu"] == Counter(vcpu for vcpu, _, _ in faults)
    assert found["fast"]["fixed"] == sum(fixed == "1" for _, _, fixed in fast)
    assert found["fast"]["spurious"] == sum(spurious == "1" for _, spurious, _ in fast)
    assert sum(sum(counts.values()) for counts in found["fast"]["by_vcpu"].values()) == len(fast)
    pages = Counter(int(address, 16) >> 12 for _, address, _ in faults)
    assert found["hottest"] == [list(item) for item in sorted(pages.items(), key=lambda i: (-i[1], i[0]))[:10]]
    assert (found["first"], found["last"]) == (min(stamps), max(stamps))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_layout_is_inferred_for_every_capture(path):
    """Captures of Linux 6.1 and 6.12, nested and shadow, show their layout, as the file's name has the kernel."""
    found = report.report(path)
    assert found["layout"] == ("6.12-npt" if path.name.startswith("k612") else "6.1-npt")
    assert found["mmu"] == ("shadow" if "npt0" in path.name else "npt")


def test_uniq_counts_are_multiplicities():
    """The spurious storm's counted lines stand for the numbers in front of them."""
    counts = [int(n) for n in re.findall(r"^(\d+) +fast_page_fault:", STORM.read_text(), re.MULTILINE)]
    found = report.report(STORM)
    assert found["fast"]["spurious"] == sum(counts) + 7
    assert found["fast"]["by_vcpu"]["2"] == {"fixed": 0, "not_fixed": 0, "spurious": 764741}
    assert found["layout"] == "6.1-ept"


FAULT = "kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code {}\n"
SPTE = "kvm_mmu_set_spte: gfn 1 spte {} (rwxu) level 1 at 1000\n"
CHANGED = "kvm_tdp_mmu_spte_changed: as id 0 gfn 1 level 1 old_spte {} new_spte {}\n"
EPT, NPT, PFEC = FAULT.format("0x182"), FAULT.format("0x100000006"), FAULT.format("0x6")


@pytest.mark.parametrize(
    ("text", "layout", "mmu"),
    [
        (EPT + SPTE.format("60000045529cb77"), "6.1-ept", "ept"),
        (EPT + CHANGED.format("0", "60000045529cb77"), "6.1-ept", "ept"),
        (EPT + CHANGED.format("8000000000000000", "60000045529cb77"), "6.12-ept", "ept"),
        (EPT + SPTE.format("86000080a5669b37"), "6.12-ept", "ept"),
        (EPT + SPTE.format("2c583bf77"), "5.10-ept", "ept"),
        (EPT + SPTE.format("2c583b377"), "5.10-ept", "ept"),
        (NPT + SPTE.format("1003eb27e67"), "6.1-npt", "npt"),
        (NPT + SPTE.format("43c6825"), "6.1-npt", "npt"),
        (NPT + CHANGED.format("80000000000005a0", "1003eb27e67"), "6.12-npt", "npt"),
        (NPT + SPTE.format("8be2171c67"), "5.10-shadow", "npt"),
        (NPT + SPTE.format("8be2171025"), "5.10-shadow", "npt"),
        (PFEC + SPTE.format("3505e63"), "6.1-npt", "shadow"),
        (PFEC + SPTE.format("8be2171025"), "5.10-shadow", "shadow"),
    ],
)
def test_layout_follows_from_the_bits_that_present_sptes_carry(text, layout, mmu):
    """Software bits 9 to 11, 57 and 58, and bit 63 of not-present sptes, tell kernels apart (facts 3.6, 3.7)."""
    found = report.report(text.encode())
    assert (found["layout"], found["mmu"]) == (layout, mmu)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kvm_entry: vcpu 0, rip 0x1\n", "neither exits nor error codes"),
        (EPT + NPT, "several are mixed"),
        (EPT, "no present spte"),
        (NPT + SPTE.format("60000045529cb77"), "several machines"),
        (NPT + SPTE.format("1003eb27e67") + SPTE.format("8be2171025"), "kernels are mixed"),
        (NPT + CHANGED.format("0", "80000000000005a0") + SPTE.format("1003eb27e67"), "kernels are mixed"),
        (NPT + CHANGED.format("0", "8000080000027"), "no present spte"),
    ],
)
def test_what_cannot_be_inferred_is_said(text, reason):
    """A trace that shows too little, or too much, has no layout, and its report says why."""
    found = report.report(text.encode())
    assert found["layout"] is None
    assert reason in found["layout_reason"]
    assert "not known" in report.text(found, "trace")


def test_a_given_layout_overrides_the_inferred_one(capsys):
    """``--layout`` is taken as it stands, and a name that is none is refused with the names that are."""
    assert run(STORM, "--layout", "6.12-ept", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "6.12-ept"
    with pytest.raises(ValueError, match=r"'7.0-ept'; expected one of 2012-ept"):
        report.report(STORM, "7.0-ept")


def test_losses_come_first_and_are_added_up():
    """LOST EVENTS lines and the header of an overrun buffer stand right under the file's name."""
    header = "# entries-in-buffer/entries-written: 100/130   #P:2\n"
    found = report.report((header + "CPU:1 [LOST 12 EVENTS]\n" + NPT + "CPU:0 [LOST EVENTS]\n").encode())
    assert found["lost"] == 43
    assert [loss["cpu"] for loss in found["losses"]] == [None, 1, 0]
    lines = report.text(found, "trace").splitlines()
    assert "LOST" in lines[1] and "at least 43" in lines[1]


def test_both_flags_of_an_old_kernel_mean_spurious():
    """Up to 5.12 spurious and fixed are both 1 when the old spte was writable already."""
    line = "fast_page_fault: vcpu 0 gva 0 error_code W sptep 0 old {} new {} spurious {} fixed {}\n"
    text = line.format("0xc67", "c67", 1, 1) + line.format("0xc65", "c67", 0, 1) + line.format("0xc65", "c65", 0, 0)
    fast = report.report(text.encode())["fast"]
    assert (fast["fixed"], fast["not_fixed"], fast["spurious"]) == (1, 1, 1)


def test_one_file_is_one_object_with_the_keys_of_the_contract(capsys):
    """``--json`` prints one object and nothing else, with every key that the contract names."""
    assert run(STORM, "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1
    assert set(KEYS) <= set(found)
    assert {type(value) for value in found["events"].values()} == {int}


def test_one_bad_file_does_not_stop_the_others(tmp_path, capsys):
    """A missing file and one without events make the exit code 2, and the others are reported all the same."""
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert run(tmp_path / "missing", empty, STORM, "--json") == 2
    captured = capsys.readouterr()
    files = json.loads(captured.out)["files"]
    assert (files[0]["path"], files[0]["error"]) == (str(tmp_path / "missing"), "No such file or directory")
    assert set(files[0]) == set(files[2]) | {"error"}  # the same keys, of nothing
    assert "no event of KVM" in files[1]["error"]
    assert files[2]["events"]["kvm_entry"] == 8
    assert captured.err.count("report: ") == 2


def test_a_truncated_gzip_is_reported_up_to_its_end(tmp_path, capsys):
    """What a cut-off gzip file still holds is reported, labelled partial, with the place and exit code 2."""
    cut = tmp_path / "cut.gz"
    cut.write_bytes(RECORDED[0].read_bytes()[:9000])
    assert run(cut, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False
    assert found["events"]["kvm_entry"] > 50
    assert "cut off" in found["unreadable"][-1]["reason"]


def test_ctrl_c_reports_what_was_read(monkeypatch, capsys):
    """An interrupt ends the reading; what was read is reported as partial, with exit code 3."""
    original = report.trace.chunks
    monkeypatch.setattr(report.trace, "chunks", lambda path: _then_interrupt(original(b"kvm_entry: vcpu 0\n" * 5)))
    assert run(STORM) == 3
    out = capsys.readouterr().out
    assert "PARTIAL" in out and "kvm_entry" in out


def _then_interrupt(pieces):
    yield from pieces
    raise KeyboardInterrupt


HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(1)></style><style>*{{}}'&amp;--><!--]]>{}"""
EVIL = (
    " {0}-7 [001] ..... 1.5: kvm_exit: vcpu 0 reason {0} rip 0x1 info1 0x0 info2 0x0\n"
    " {0}-7 [001] ..... 1.6: tracing_mark_write: DIRTY_GET_BEGIN {0}\n"
    " {0}-7 [001] ..... 1.7: kvm_emulate_insn: 0:1:{0}\n"
    " qemu-7 [001] ..... 1.8: kvm_page_fault: vcpu 0 rip {0}\n"
    " qemu-7 [001] ..... 1.9: kvm_{0}: {0}\n"
    " qemu-7 [001] ..... 2.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x100000007\n"
)


class Elements(HTMLParser):
    """What a page's markup holds."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_in_a_trace_or_its_name_becomes_markup(tmp_path):
    """A page of hostile traces has the elements and attributes of a page of kind ones, and all else is text."""
    pages = []
    for word in (HOSTILE, "word"):
        name = word.replace("/", "%")[:80]
        path = tmp_path / f"{name}.txt"
        path.write_text(EVIL.format(word))
        out = tmp_path / "out.html"
        assert run(path, STORM, "--html", out) == 0
        pages.append(out.read_text())
    evil, kind = map(Elements, pages)
    assert set(evil.tags) == set(kind.tags) and evil.attributes == kind.attributes
    assert not {"script", "img", "iframe", "link", "object", "a"} & set(evil.tags)
    assert not [name for name in evil.attributes if name.startswith("on")]
    assert any("<script>alert(1)<%script>" in text for text in evil.text)
    assert "://" not in pages[0] and "url(" not in pages[0]
    assert """content="default-src 'none'; style-src 'unsafe-inline';""" in pages[0]


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    """A folder that is not there is exit code 2."""
    assert run(STORM, "--html", tmp_path / "no" / "folder") == 2


def test_the_page_shows_each_part(tmp_path):
    """Causes over time, codes, the fast path, rounds, hottest pages, histories and MMIO all stand on the page."""
    out = tmp_path / "out.html"
    names = ("npt1_tdp1_C", "npt1_tdp1_D")
    assert run(*(DATA / "kvm-traces" / f"{name}.trace.gz" for name in names), "--html", out) == 0
    text = " ".join(Elements(out.read_text()).text)
    for part in (
        "Faults over time, by cause", "Error codes", "The fast path, vCPU by vCPU", "Lock-free repairs per second",
        "Rounds of the dirty log", "Pages that fault most, by gfn", "Sptes and their histories", "MMIO",
        "No spurious storm, no refault loop", "80 reads",
    ):  # fmt: skip
        assert part in text
    assert out.read_text() == report_page.page(
        [
            (str(path), found, report.text(found, str(path)))
            for path in (DATA / "kvm-traces" / f"{name}.trace.gz" for name in names)
            for found in [report.report(path)]
        ]
    )


def test_symptoms_stand_first_in_text_json_and_page(tmp_path, capsys):
    """The storm's trace says so in all three forms."""
    out = tmp_path / "out.html"
    assert run(STORM, "--json", "--html", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("storm" in one["rule"] and "6,275,388" in one["what"] for one in found["symptoms"])
    assert "OOPS" in out.read_text() and "6,275,388 spurious faults at one spte by 8 vCPUs" in out.read_text()
    assert "storm: 6,275,388" in report.text(found, "storm") or "more symptoms" in report.text(found, "storm")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_over_time_adds_up_to_the_whole(path):
    """All slices together are all faults, and the fast path's events are all of its events."""
    found = report.report(path)
    over = found["over_time"]
    assert sum(map(sum, over["causes"].values())) == sum(found["faults"]["by_code"].values())
    fast = found["fast"]
    assert [sum(over["fast"][name]) for name in ("fixed", "spurious", "not fixed")] == [
        fast["fixed"], fast["spurious"], fast["not_fixed"]
    ]  # fmt: skip
    assert {len(bins) for bins in (*over["causes"].values(), *over["fast"].values())} in ({n} for n in range(97))


def test_rounds_are_those_of_the_recorded_bitmaps():
    """The pages that each sweep protects are as many as the dirty bitmap before it had; then repairs follow."""
    scene = json.loads(gzip.decompress((DATA / "kvm-traces" / "npt1_tdp1_C.json.gz").read_bytes()))
    gets = [event for event in scene["events"] if "bitmap" in event]
    pages = [bin(int.from_bytes(bytes.fromhex(event["bitmap"]), "little")).count("1") for event in gets]
    rounds = report.report(DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz")["over_time"]["rounds"]
    # The first sweep is of the log's beginning; each bitmap is what was written to since the sweep before it.
    assert [one["pages"] for one in rounds][1:] == pages[: len(rounds) - 1]


def test_where_a_piece_ends_does_not_change_what_is_over_time():
    """Small pieces give the slices, rounds and symptoms that the whole gives."""
    for path in (DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz", DATA / "kvm-traces" / "npt1_tdp1_D.trace.gz", STORM):
        tally = report.Tally()
        for piece in trace.chunks(path, 1 << 13):
            tally.add(piece)
        whole = report.report(path)
        assert tally.timeline.answer() == whole["over_time"] and tally.found() == whole["symptoms"]


def test_recordings_one_behind_the_other_are_counted_too():
    """Where time starts again, what is earlier than the first event stands in the first slice, and nothing is lost."""
    text = b"".join(
        gzip.decompress((DATA / "kvm-traces" / f"{name}.trace.gz").read_bytes())
        for name in ("npt1_tdp1_H", "npt1_tdp1_C")
    )
    over = report.report(text)["over_time"]
    assert sum(map(sum, over["causes"].values())) == 683 + 601


def test_a_bar_is_drawn_for_long_files_on_terminals(monkeypatch, capsys):
    """Reading through a bar gives the bytes, and a terminal sees each hundredth once."""
    monkeypatch.setattr(progress, "LONG", 100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress.Bar(io.BytesIO(bytes(1000)), 1000)
    assert sum(len(bar.read(10)) for _ in range(101)) == 1000
    drawn = capsys.readouterr().err
    assert drawn.count("%") == 100 and " 50 %" in drawn
