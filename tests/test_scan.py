"""The language of formats: what each part takes, what it gives, and how it fails."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmu.scan import MISSING, PADDING, Format, Text


def scan(form, *lines):
    """Match lines against a format; the fields of those that match."""
    return {name: column.tolist() for name, column in Format(form).scan("\n".join(lines).encode()).items()}


@pytest.mark.parametrize(
    ("form", "line", "fields"),
    [
        ("a {n:d}", "a 12", {"n": [12]}),
        ("a {n:d}", "a   -12  ", {"n": [-12]}),
        ("a {n:d}", "a 0x1F", {"n": [31]}),
        ("a {n:x}", "a 1F", {"n": [31]}),
        ("a {n:x}", "a 0x1f\0\r", {"n": [31]}),
        ("a {n:x}", "a 0x", {"n": []}),
        ("a {n:p}", "a (null)", {"n": [MISSING]}),
        ("a {n:p}", "a ffff8880098a1000", {"n": [0xFFFF8880098A1000]}),
        ("a {n:P=1,W=2} b", "a P|W|0x100 b", {"n": [0x103]}),
        ("a {n:P=1,W=2} b", "a  b", {"n": [0]}),
        ("a {n:P=1,W=2} b", "a P| b", {"n": []}),
        ("{n:sync|unsync}", "unsync", {"n": [1]}),
        ("{n:|un}sync", "sync", {"n": [0]}),
        ("a {n:s8} b", "a PF excp b", {"n": [b"PF excp"]}),
        ("a {n:s3} b", "a four b", {"n": []}),
        ("a {n:s8}", "a  x y  ", {"n": [b"x y"]}),
        ("a {n:w8} b", "a x b", {"n": [b"x"]}),
        ("a {n:w8} b", "a x y b", {"n": []}),
        ("a[ b {n:d}] c", "a b 7 c", {"n": [7]}),
        ("a[ b {n:d}] c", "a c", {"n": [-1]}),
        ("a[ b {n:d}][ d {n:d}]", "a d 8", {"n": [8]}),
        ("a[ b[ {n:d}]]", "a b 9", {"n": [9]}),
        ("a {:x} {n:d}", "a ff 3", {"n": [3]}),
        ("a", "ab", {}),
    ],
)
def test_each_part_of_the_language(form, line, fields):
    """Every kind of part takes what the module's table says, and a line that does not fit gives nothing."""
    assert scan(form, line) == fields


def test_lines_are_matched_independently():
    """Each line has its own cursor: long and short numbers, present and absent options stand in one array."""
    lines = ["v 1 r ff", "v 22", "w 3", "v 333 r 0xffffffffffffffff", "v"]
    assert scan("v {v:d}[ r {r:x}]", *lines) == {"v": [1, 22, 333], "r": [255, MISSING, MISSING]}


@given(st.integers(0, 2**70), st.integers(0, 30))
def test_hexadecimal_numbers_are_exact_or_refused(value, zeros):
    """A hexadecimal number of up to 64 bits is read exactly whatever its leading zeros, a wider one is refused."""
    assert scan("{n:x}", "0" * zeros + f"{value:x}") == {"n": [value] if value < 2**64 else []}


@given(st.integers(-(2**66), 2**66), st.integers(0, 30))
def test_decimal_numbers_are_exact_or_refused(value, zeros):
    """A decimal number within int64 is read exactly, sign and leading zeros included, one beyond is refused."""
    text = "-" * (value < 0) + "0" * zeros + str(abs(value))
    assert scan("{n:d}", text) == {"n": [value] if abs(value) < 2**63 else []}


@example([b"(", b")"])
@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=9))
def test_no_cursor_leaves_its_line(lines):
    """Whatever the bytes, matching ends on the line where it began."""
    text = Text(b"\n".join(lines))
    for form in ("a {n:s8} b", "{n:x} {m:d}", "{n:P=1} [{m:w4}]", "{n:p}"):
        match = Format(form).match(text, text.starts)
        assert (text.line_of(match.at) == np.arange(len(text.starts))).all()


def test_a_failed_match_says_what_was_expected_where():
    """The first part that a line misses is named, with the cursor where it was missed."""
    form = Format("vcpu {vcpu:d} rip 0x{rip:x}")
    text = Text(b"vcpu 1 rap 0x1\nvcpu x\nvcpu 1 rip 0x10000000000000000\n")
    match = form.match(text, text.starts)
    assert [form.expectations[i] for i in match.expected] == ["'rip'", "a number (vcpu)", "rip within 64 bits"]
    assert (match.missed_at - text.starts).tolist() == [7, 5, 13]


def test_the_furthest_failure_is_named():
    """Where an option got further into a line than what stands behind it, its failure is the one that is told."""
    form = Format("vcpu {vcpu:d}[, rip {rip:x}][ info {info:x}]")
    text = Text(b"vcpu 1, rip z\nvcpu 1 info z\nvcpu 1 more\n")
    match = form.match(text, text.starts)
    expected = ["a hexadecimal number (rip)", "a hexadecimal number (info)", "the end of the line"]
    assert [form.expectations[i] for i in match.expected] == expected
    assert (match.missed_at - text.starts).tolist() == [12, 12, 7]


def test_texts_are_padded_with_newlines():
    """Before and behind the lines stand newlines, which no part of a format takes."""
    text = Text(b"abc")
    assert text.raw == b"\nabc\n" + b"\n" * PADDING
    assert (text.starts.tolist(), text.ends.tolist()) == ([1], [4])
