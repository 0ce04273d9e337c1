"""The reader of kernel traces, against real traces of other people's machines and of the project's capture."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from mmu import trace

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "kvm-traces").glob("*.trace.gz"))
PUBLIC = sorted((DATA / "public-traces").glob("*.txt"))


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
    assert np.array_equal(np.sort(t.order()["line"]), t.order()["line"])
