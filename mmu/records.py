"""One piece of kernel trace text to records: which event each line is, what stands before it and what behind it.

The one idea: find the TIMESTAMP and read the columns before it backwards; take the name behind it; match all lines of
one event at once against the event's format (:mod:`mmu.scan`). What mail programs did to lines is undone before a line
is given up. :mod:`mmu.trace` puts the pieces of a file together; its docstring says what the fields mean.

Sources: the formats are Linux 6.1's arch/x86/kvm/trace.h and mmu/mmutrace.h and include/trace/events/kvm.h (facts 4),
with the older and newer forms that stand in public traces (facts 4.1).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu.scan import BLANK, MISSING, PADDING, Cursors, Format, Match, Text, charset

_PFERR = "P=1,W=2,U=4,RSVD=8,F=16"
_PAGE = (
    "sp[ gen {gen:x}] gfn {gfn:x} {:l|}{level:d}[/{guest_levels:d}][ {gpte_bytes:d}-byte][ pae] q{quadrant:d}"
    "{direct:| direct} {access:---|--x|w--|w-x|-u-|-ux|wu-|wux}{invalid:| invalid}[ {pae:!pae|pae}][ {pge:!pge|pge}]"
    " {nxe:!nxe|nxe}[ {wp:!wp|wp}][ {ad:!ad|ad}]{smep:| smep}{smap:| smap}{smm:| smm} root {root:d}"
    " {unsync:sync|unsync}{:|^@}"
)
_INTR = "[ intr_info {intr_info:x} error_code {error_code:x}]"
_EXIT = "[ info {info1:x} {info2:x}][ info1 {info1:x}[ info2 {info2:x}]]" + _INTR

FORMATS: dict[str, Format] = {
    name: Format(text)
    for name, text in {
        # system kvm; without a comma the first forms are older or trace-cmd's own
        "kvm_entry": "vcpu {vcpu:d}[,][ rip {rip:x}]" + _INTR + "[ ]{immediate_exit:|[immediate exit]}",
        "kvm_exit": "[vcpu {vcpu:d} ]reason {reason:s48} rip {rip:x}" + _EXIT + "[ requests {requests:x}]",
        "kvm_nested_vmexit": "[rip {rip:x} reason {reason:s48} info1 {info1:x} info2 {info2:x} int_info {intr_info:x}"
        " int_info_err {error_code:x}][vcpu {vcpu:d} reason {reason:s48} rip {rip:x}" + _EXIT + "]",
        "kvm_page_fault": "[vcpu {vcpu:d} ][rip {rip:x} ]address {address:x} error_code {error_code:x}",
        "kvm_fast_mmio": "fast mmio at gpa {gpa:x}",
        "kvm_mmio": "mmio {kind:read|write|unsatisfied-read} len {len:d} gpa {gpa:x} val {val:x}",
        "vcpu_match_mmio": "gva {gva:x} gpa {gpa:x} {write:Read|Write} {gpa_match:GVA|GPA}",
        "kvm_inj_exception": "{exception:w8}[ ({error_code:x})]{reinjected:| [reinjected]}",
        "kvm_emulate_insn": "{csbase:x}:{rip:x}:{insn:s80}",
        "kvm_cr": "cr_{write:read|write} {cr:x} = {value:x}",
        "kvm_userspace_exit": "reason {reason:w32} ({code:d})",
        "kvm_unmap_hva_range": "mmu notifier unmap range: {start:x} -- {end:x}",
        "kvm_set_spte_hva": "mmu notifier set pte hva: {hva:x}",
        "kvm_age_hva": "mmu notifier age hva: {start:x} -- {end:x}",
        "kvm_test_age_hva": "mmu notifier test age hva: {hva:x}",
        "kvm_dirty_ring_push": "ring {ring:d}: dirty {dirty:x} reset {reset:x} slot {slot:d} offset {offset:x}"
        " (used {used:d})",
        "kvm_dirty_ring_reset": "ring {ring:d}: dirty {dirty:x} reset {reset:x} (used {used:d})",
        "kvm_dirty_ring_exit": "vcpu {vcpu:d}",
        # system kvmmmu
        "kvm_mmu_pagetable_walk": "addr {addr:x} pferr {pferr:x}[ {:" + _PFERR + "}]",
        "kvm_mmu_paging_element": "pte {pte:x} level {level:d}",
        "kvm_mmu_set_accessed_bit": "gpa {gpa:x}",
        "kvm_mmu_set_dirty_bit": "gpa {gpa:x}",
        "kvm_mmu_walker_error": "pferr {pferr:x}[ {:" + _PFERR + "}]",
        "kvm_mmu_get_page": "[{created:existing|new} ]" + _PAGE + "[ {created:existing|new}]",
        "kvm_mmu_sync_page": _PAGE,
        "kvm_mmu_unsync_page": _PAGE,
        "kvm_mmu_prepare_zap_page": _PAGE,
        "mark_mmio_spte": "sptep:{sptep:p} gfn {gfn:x} access {access:x}[ gen {gen:x}]",
        "handle_mmio_page_fault": "addr:{addr:x} gfn {gfn:x} access {access:x}",
        "check_mmio_spte": "spte {spte:x} kvm_gen {kvm_gen:x} spte-gen {spte_gen:x} valid {valid:d}",
        "fast_page_fault": "vcpu {vcpu:d} gva {gva:x} error_code {error_code:"
        + _PFERR
        + "} sptep {sptep:p} old {old:x}"
        " new {new:x} spurious {spurious:d} fixed {fixed:d}",
        "kvm_mmu_zap_all_fast": "kvm-mmu-valid-gen {gen:x} used_pages {used_pages:x}",
        "kvm_mmu_set_spte": "gfn {gfn:x} spte {spte:x} ({r:-|r}{w:-|w}{x:-|x}[{u:-|u}]) level {level:d}[ at {sptep:x}]",
        "kvm_mmu_spte_requested": "gfn {gfn:x} pfn {pfn:x} level {level:d}",
        "kvm_tdp_mmu_spte_changed": "as id {as_id:d} gfn {gfn:x} level {level:d} old_spte {old_spte:x}"
        " new_spte {new_spte:x}",
        "kvm_mmu_split_huge_page": "gfn {gfn:x} spte {spte:x} level {level:d} errno {errno:d}",
        # system ftrace: what a program wrote to trace_marker
        "tracing_mark_write": "{text:s256}",
        # kretprobes, whatever function they are on
        "*_page_fault_ret": "({caller:s80} <- {function:s48}) ret={ret:d}",
    }.items()
}
"""Event to :class:`mmu.scan.Format`; ``*_page_fault_ret`` stands for every name that ends so.

Texts that are a choice are kept as the position in it: ``access`` of a shadow page is role.access, ``unsync`` 0 or 1.
"""

HEAD = np.dtype(
    [
        ("line", np.int64),
        ("count", np.int64),
        ("ns", np.int64),
        ("cpu", np.int32),
        ("pid", np.int32),
        ("comm", "S16"),
        ("flags", "S8"),
    ]
)
"""The fields that every event has; events of KVM without an entry in :data:`FORMATS` have these alone."""

LOST = np.dtype([("line", np.int64), ("cpu", np.int64), ("events", np.int64)])

LONGEST_LINE = 1 << 16  # ftrace and trace-cmd never print half as much
_MOST_COUNTED = 1 << 40  # no file has as many lines, and sums of smaller counts cannot leave 64 bits
_JOIN = 4  # lines over which mail may have wrapped one record
_KRETPROBE_ENDING = b"_page_fault_ret"

_DECIMAL = charset(b"0123456789")
_NAME = charset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_NEWLINE = charset(b"\n")
_QUOTE = BLANK | charset(b">|")  # mail quotes
_TOKEN = ~(BLANK | _NEWLINE)


class Unreadable(NamedTuple):
    """A line that should have been an event and could not be read, and why."""

    line: int
    reason: str


def dtype(event: str) -> np.dtype:
    """The dtype of an event's array; :data:`HEAD` alone for an event without a format.

    >>> dtype("kvm_mmu_set_dirty_bit").names
    ('line', 'count', 'ns', 'cpu', 'pid', 'comm', 'flags', 'gpa')
    """
    form = _format(event)
    return np.dtype(HEAD.descr + [(name, kind) for name, kind in form.dtypes.items()]) if form else HEAD


def _format(event: str) -> Format | None:
    return FORMATS.get("*_page_fault_ret" if event.endswith("_page_fault_ret") else event)


class Piece(NamedTuple):
    """What one piece of text holds; :func:`parse` makes it."""

    events: dict[str, NDArray[Any]]
    lines: int
    other: int
    unreadable: list[Unreadable]
    lost: NDArray[Any]
    taken: int  # bytes of the text that are done with
    soft: bool  # whether these end in a soft break of quoted-printable mail


_OTHER, _EVENT, _UNREADABLE = 0, 1, 2


class _Heads(NamedTuple):
    """What stands before the event's text, one entry a line."""

    reads: NDArray[np.bool_]  # a record starts here: there is a TIMESTAMP, or the name of an event of KVM
    kind: NDArray[np.int16]  # index of the event's format, _GENERIC, or _NO_EVENT
    sure: NDArray[np.bool_]  # the head is understood, so text that does not fit the format is unreadable, not prose
    name: Cursors  # the event's name
    colon: Cursors  # and the colon behind it
    fields: NDArray[Any]  # HEAD


_NAMES = [name for name in FORMATS if not name.startswith("*")]
_KRETPROBE, _GENERIC, _NO_EVENT = len(_NAMES), -1, -2


def _words(text: Text, name: Cursors, end: Cursors) -> NDArray[np.uint64]:
    """The bytes of each name, up to 24 of them, as its first, second and last word, and its length: (4, name)."""
    words = np.ndarray(len(text.bytes) - 7, dtype="<u8", buffer=text.bytes, strides=(1,))
    length = np.maximum(end - name, 0)
    unused = np.uint64(8) * (8 - np.clip(length, 1, 8)).astype(np.uint64)
    first = words[name] & (np.uint64(MISSING) >> unused)
    long = length > 8
    last = np.maximum(end - 8, 0)
    second = np.where(long, words[np.minimum(name + 8, last)], np.uint64(0))
    return np.stack([first, second, np.where(long, words[last], np.uint64(0)), length.astype(np.uint64)])


def _hash(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 1], dtype=np.uint64)
    return np.bitwise_xor.reduce(words * factors[:, None], axis=0)


def _name_table() -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int16]]:
    text = Text("\n".join(_NAMES).encode())
    words = _words(text, text.starts, text.ends)
    order = np.argsort(_hash(words))
    return _hash(words)[order], words[:, order], order.astype(np.int16)


_HASHES, _WORDS, _KINDS = _name_table()  # the names of FORMATS; none is longer than 24 bytes


def _kinds(text: Text, name: Cursors, end: Cursors) -> NDArray[np.int16]:
    """Which event each name is: the index of its format, _GENERIC for KVM's others, _NO_EVENT."""
    words = _words(text, name, end)
    place = np.minimum(np.searchsorted(_HASHES, _hash(words)), len(_HASHES) - 1)
    kind = np.where((_WORDS[:, place] == words).all(axis=0), _KINDS[place], np.int16(_NO_EVENT))
    proper = (end > name) & (text.skip(name, _NAME, most=64) == end)
    kind[~proper] = _NO_EVENT
    unknown = np.flatnonzero(proper & (kind == _NO_EVENT))
    name, end = name[unknown], end[unknown]
    probe = (end - name > len(_KRETPROBE_ENDING)) & text.looking_at(
        np.maximum(end - len(_KRETPROBE_ENDING), 0), _KRETPROBE_ENDING
    )
    ours = text.looking_at(name, b"kvm_") | text.looking_at(np.maximum(name - 4, 0), b"kvm:")
    ours |= text.looking_at(np.maximum(name - 7, 0), b"kvmmmu:")
    kind[unknown] = np.where(probe, _KRETPROBE, np.where(ours, _GENERIC, _NO_EVENT)).astype(np.int16)
    return kind


def _heads(text: Text) -> _Heads:
    n = len(text.starts)
    first = text.skip(text.starts, _QUOTE)
    comment = text.bytes[first] == ord("#")
    colons = np.flatnonzero(text.bytes == ord(":")).astype(np.intp)
    fields = np.zeros(n, dtype=HEAD)
    for field in ("ns", "cpu", "pid"):
        fields[field] = -1
    fields["line"] = np.arange(n, dtype=np.int64)
    fields["count"] = 1

    stamp = _stamps(text, colons, first, fields)  # (line,) the colon behind the TIMESTAMP, -1 where there is none
    stamp[comment] = -1
    stamped = np.flatnonzero(stamp >= 0)
    name = first.copy()
    colon = first.copy()
    name[stamped] = text.skip(stamp[stamped] + 1, BLANK)
    period = text.skip(name[stamped], _DECIMAL)  # a column that perf may print
    name[stamped] = np.where(BLANK[text.bytes[period]], text.skip(period, BLANK), name[stamped])
    for prefix in (b"kvm:", b"kvmmmu:"):  # perf names the system too
        name[stamped] += len(prefix) * text.looking_at(name[stamped], prefix)
    printed = stamped[text.looking_at(name[stamped], b"print:")]  # trace-cmd's name for a mark
    marked = text.skip(name[printed] + len(b"print:"), BLANK)
    is_mark = text.looking_at(marked, b"tracing_mark_write")
    name[printed[is_mark]] = marked[is_mark]
    sentinel = np.append(colons, np.intp(len(text.bytes) - 1))
    colon[stamped] = np.minimum(sentinel[np.searchsorted(colons, name[stamped])], text.ends[stamped])
    kind = np.full(n, _NO_EVENT, dtype=np.int16)
    kind[stamped] = _kinds(text, name[stamped], colon[stamped])
    kind[stamped[text.bytes[colon[stamped]] != ord(":")]] = _NO_EVENT
    sure = stamp >= 0

    _bare(text, colons, (stamp < 0) & ~comment, first, name, colon, kind, sure, fields)
    return _Heads((stamp >= 0) | (kind != _NO_EVENT), kind, sure, name, colon, fields)


def _stamps(text: Text, colons: Cursors, first: Cursors, fields: NDArray[Any]) -> Cursors:
    """Find each line's TIMESTAMP, and read it and what stands before it: TASK-PID [CPU] FLAGS (facts 4.1).

    A comm may hold blanks, slashes, colons and brackets, so the columns are read backwards from the time.
    """
    seen, byte = text.skip, text.bytes
    at = colons[_DECIMAL[byte[colons - 1]] & ~_TOKEN[byte[colons + 1]]]  # (candidate,) "12.5: "
    fraction = seen(at - 1, _DECIMAL, step=-1)
    dotted = byte[fraction] == ord(".")
    seconds = seen(fraction - dotted, _DECIMAL, step=-1)
    before = np.where(dotted, seconds, fraction)
    bounded = ~_TOKEN[byte[before]] | (byte[before] == ord(">"))
    back = seen(before, BLANK, step=-1)
    token = seen(back, _TOKEN, step=-1, most=10)  # the FLAGS column, if the CPU stands before it
    beyond = seen(token, BLANK, step=-1)
    bare_cpu = byte[back] == ord("]")
    flagged = ~bare_cpu & (byte[beyond] == ord("]")) & (beyond < token)
    close = np.where(bare_cpu, back, beyond)
    open_ = seen(close - 1, _DECIMAL, step=-1)
    has_cpu = (bare_cpu | flagged) & (byte[open_] == ord("[")) & (open_ < close - 1)
    line = text.line_of(at)
    good = bounded & np.where(dotted, seconds < fraction - 1, has_cpu) & (before >= first[line] - 1)
    line, keep = np.unique(line[good], return_index=True)
    chosen = np.flatnonzero(good)[keep]  # (stamped line,)

    stamp = np.full(len(first), -1, dtype=np.intp)
    stamp[line] = at[chosen]
    fraction, dotted, seconds, has_cpu = fraction[chosen], dotted[chosen], seconds[chosen], has_cpu[chosen]
    places = at[chosen] - 1 - fraction
    low, _, low_over = text.number(fraction + 1, 10)
    high, _, high_over = text.number(seconds + 1, 10)
    scale = np.uint64(10) ** np.clip(9 - places, 0, 9).astype(np.uint64)
    fits = (
        np.where(dotted, ~high_over & (high < np.uint64(9_000_000_000)) & (places <= 9), low < np.uint64(1 << 63))
        & ~low_over
    )
    ns = np.where(dotted, high * np.uint64(10**9) + low * scale, low)
    fields["ns"][line] = np.where(fits, ns, np.uint64(0)).astype(np.int64) - ~fits

    flags = has_cpu & flagged[chosen]
    fields["flags"][line[flags]] = text.cut(token[chosen][flags] + 1, back[chosen][flags] + 1, 8)
    fields["cpu"][line[has_cpu]] = _small(text, open_[chosen][has_cpu] + 1)
    end = seen(np.where(has_cpu, open_[chosen] - 1, back[chosen]), BLANK, step=-1)
    group = byte[end] == ord(")")  # "( 1234)" or "(-----)": the process, where record-tgid is on
    opening = seen(end, ~(_NEWLINE | charset(b"(")), step=-1, most=16)
    group &= byte[opening] == ord("(")
    end = np.where(group, seen(opening - 1, BLANK, step=-1), end)
    dash = seen(end, _DECIMAL, step=-1)
    has_pid = (dash < end) & (dash >= first[line] - 1)
    fields["pid"][line[has_pid]] = _small(text, dash[has_pid] + 1)
    slash = has_pid & (byte[dash] == ord("/"))  # perf may print pid/tid
    comm_end = np.where(slash, seen(dash - 1, _DECIMAL, step=-1) + 1, dash)
    comm_end = np.where(has_pid, comm_end, end + 1)
    comm = _counted(text, first[line], comm_end, line, fields)
    named = comm_end > comm
    fields["comm"][line[named]] = text.cut(comm[named], comm_end[named], 16)
    return stamp


def _small(text: Text, at: Cursors) -> NDArray[np.int32]:
    """The decimal number at each cursor, -1 where it does not fit."""
    value, _, over = text.number(at, 10)
    fits = ~over & (value < np.uint64(1 << 31))
    return np.where(fits, value, np.uint64(0)).astype(np.int32) - ~fits


def _bare(
    text: Text,
    colons: Cursors,
    lines: NDArray[np.bool_],
    first: Cursors,
    name: Cursors,
    colon: Cursors,
    kind: NDArray[np.int16],
    sure: NDArray[np.bool_],
    fields: NDArray[Any],
) -> None:
    """Find the event in lines without a TIMESTAMP: the first name of an event that a colon follows.

    Only blanks, mail quotes or a count may stand before it; where something else does, the line may be prose.
    """
    line = text.line_of(colons)
    at = colons[lines[line]]
    if not at.size:
        return
    start = text.skip(at - 1, _NAME, step=-1, most=64) + 1
    found = _kinds(text, start, at)
    whole = start.copy()
    for prefix in (b"kvm:", b"kvmmmu:"):
        whole = np.where(text.looking_at(np.maximum(start - len(prefix), 0), prefix), start - len(prefix), whole)
    line = text.line_of(at)
    alone = _counted(text, first[line], whole + 1, line, fields) == whole
    found[(found == _GENERIC) & ~(alone | (whole < start))] = _NO_EVENT
    known = np.flatnonzero(found != _NO_EVENT)
    line, keep = np.unique(line[known], return_index=True)
    known = known[keep]
    kind[line], name[line], colon[line], sure[line] = found[known], start[known], at[known], alone[known]


def _counted(text: Text, first: Cursors, end: Cursors, line: Cursors, fields: NDArray[Any]) -> Cursors:
    """Read the multiplicity that ``uniq -c`` put in front of what stands before ``end``; return where that begins."""
    digits = text.skip(first, _DECIMAL)
    behind = text.skip(digits, BLANK)
    counted = np.flatnonzero((digits > first) & (behind > digits) & (behind < end))
    value, _, over = text.number(first[counted], 10)
    possible = ~over & (value < np.uint64(_MOST_COUNTED))
    fields["count"][line[counted]] = np.where(possible, value, np.uint64(0)).astype(np.int64) - ~possible
    rest = first.copy()
    rest[counted] = behind[counted]
    return rest


class _Parsed(NamedTuple):
    events: dict[str, NDArray[Any]]  # ["line"] is the index of the line in the text
    state: NDArray[np.int8]  # (line,)
    reads: NDArray[np.bool_]  # (line,)
    open: NDArray[np.bool_]  # (line,) its format ends in something optional, which may stand on the next line
    reasons: dict[int, str]  # of the unreadable lines


def _parse(text: Text) -> _Parsed:
    heads = _heads(text)
    state = np.zeros(len(text.starts), dtype=np.int8)
    open_ = np.zeros(len(text.starts), dtype=np.bool_)
    events: dict[str, NDArray[Any]] = {}
    reasons: dict[int, str] = {}
    by_kind = np.argsort(heads.kind, kind="stable")
    kinds, begins = np.unique(heads.kind[by_kind], return_index=True)
    for kind, lines in zip(kinds.tolist(), np.split(by_kind, begins[1:]), strict=True):
        if kind == _NO_EVENT:
            continue
        possible = heads.fields["count"][lines] > 0
        if kind == _GENERIC:
            state[lines] = np.where(possible, np.int8(_EVENT), np.int8(_UNREADABLE))
            reasons.update(dict.fromkeys(lines[~possible].tolist(), _IMPOSSIBLE_COUNT))
            events.update(_by_name(text, heads, lines[possible], heads.fields[lines[possible]]))
            continue
        event = "*_page_fault_ret" if kind == _KRETPROBE else _NAMES[kind]
        form = FORMATS[event]
        match = form.match(text, text.skip(heads.colon[lines] + 1, BLANK))
        match.ok &= possible
        read = lines[match.ok]
        records = np.zeros(len(read), dtype=dtype(event))
        for field in HEAD.names:
            records[field] = heads.fields[field][read]
        for field, column in match.columns.items():
            records[field] = column[match.ok]
        state[read] = _EVENT
        open_[read] = form.open
        if kind == _KRETPROBE:
            events.update(_by_name(text, heads, read, records))
        elif len(read):
            events[event] = records
        for i in np.flatnonzero(~match.ok).tolist():
            line, at = int(lines[i]), int(match.missed_at[i])
            begun = text.raw[heads.colon[line] : at]  # prose that names an event does not go on with its numbers
            if heads.sure[line] or any(digit in begun for digit in b"0123456789"):
                state[line] = _UNREADABLE
                reasons[line] = f"{event}: {_why(text, form, match, i, line, at)}" if possible[i] else _IMPOSSIBLE_COUNT
    return _Parsed(events, state, heads.reads, open_, reasons)


_IMPOSSIBLE_COUNT = f"expected a count from 1 to {_MOST_COUNTED - 1} in front"


def _why(text: Text, form: Format, match: Match, i: int, line: int, at: int) -> str:
    rest = text.raw[at : min(at + 24, int(text.ends[line]))].split(b" ")[0].decode("latin-1")
    found = ascii(rest) if rest else "a blank" if text.raw[at : text.ends[line]].strip() else "the end of the line"
    return f"expected {form.expectations[match.expected[i]]} at column {at - int(text.starts[line]) + 1}, found {found}"


def _by_name(text: Text, heads: _Heads, lines: Cursors, records: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if not len(lines):
        return {}
    names, which = np.unique(text.cut(heads.name[lines], heads.colon[lines], 64), return_inverse=True)
    by_name = np.argsort(which, kind="stable")
    parts = np.split(records[by_name], np.flatnonzero(np.diff(which[by_name])) + 1)
    return {name.decode("latin-1"): part for name, part in zip(names.tolist(), parts, strict=True)}


def _emptied(text: Text, lines: list[int]) -> Text:
    """The same text with these lines empty."""
    keep = np.ones(len(text.bytes), dtype=np.bool_)
    for line in lines:
        keep[text.starts[line] : text.ends[line]] = False
    keep[[0]] = False
    return Text(text.bytes[: text.ends[-1] + 1][keep[: text.ends[-1] + 1]].tobytes())


def _hanging(text: Text) -> NDArray[np.bool_]:
    """Which lines end behind the colon of a TIMESTAMP: mail wrapped there, and the event is on the next line."""
    last = text.skip(text.ends - 1, BLANK, step=-1)
    return (text.bytes[last] == ord(":")) & _DECIMAL[text.bytes[np.maximum(last - 1, 0)]]


def _with_whole_heads(text: Text) -> Text:
    """The same text, with each hanging head moved to the line of its event: the newline goes in front of it."""
    hanging = _hanging(text)
    hanging = np.flatnonzero(hanging[:-1] & ~hanging[1:])
    if not hanging.size:
        return text
    raw = bytearray(text.raw)
    behind = text.skip(text.starts[hanging + 1], _QUOTE)
    for line, event in zip(hanging[::-1].tolist(), behind[::-1].tolist(), strict=True):  # from the end: lengths change
        head = raw[text.starts[line] : text.ends[line]]
        raw[text.starts[line] : event] = b"\n" + head + b" "
    return Text(bytes(raw[1:-PADDING]))


def _soft_breaks(text: Text) -> NDArray[np.bool_]:
    """Which lines end in the ``=`` that quoted-printable mail breaks a line with."""
    end = text.ends - (text.bytes[text.ends - 1] == ord("\r"))
    return text.bytes[end - 1] == ord("=")


def _safe_end(parsed: _Parsed, softs: NDArray[np.bool_]) -> int:
    """The largest number of lines, none of which a later line may yet complete."""
    n = len(softs)
    for i in range(n, max(n - 64, 0), -1):
        if softs[i - 1]:
            continue
        if i < n and parsed.reads[i]:
            return i
        if not parsed.state[max(i - _JOIN, 0) : i].any():  # all of them other
            return i
    return 0 if n <= 64 else n


def _repair(text: Text, parsed: _Parsed, softs: NDArray[np.bool_], soft: bool, n: int) -> None:
    """Read what mail programs and trace-cmd did to records before giving them up (facts 4.1): lines that were wrapped,
    quoted-printable text, and trace-cmd's remarks on fields that it did not find.

    A line that reads by itself is never taken for the continuation of another.
    """
    after_soft = np.concatenate([[soft], softs[:-1]])
    candidates = (parsed.state == _UNREADABLE) | (parsed.state == _OTHER) & softs & ~after_soft
    candidates |= parsed.open & _goes_on(text, parsed)
    variants: list[bytes] = []
    owners: list[tuple[int, int]] = []  # (line, how many more lines it takes)
    for line in np.flatnonzero(candidates[:n]).tolist():
        whole = text.raw[text.starts[line] : text.ends[line]]
        for more in range(_JOIN + 1):
            mended = _mend(whole)
            if more or mended != whole:
                variants.append(mended)
                owners.append((line, more))
            behind = line + more + 1
            if behind >= len(softs) or parsed.reads[behind]:
                break
            tail = text.raw[text.starts[behind] : text.ends[behind]]
            if softs[behind - 1]:
                whole = whole.rstrip(b"\r")[:-1] + tail
            elif parsed.state[line] != _OTHER and tail.strip():
                whole = whole.rstrip() + b" " + tail.lstrip(b" \t>|")
            else:
                break
    if not variants:
        return
    mended = _parse(Text(b"\n".join(variants)))
    chosen = np.full(len(variants), -1, dtype=np.int64)
    taken = -1  # the last line that a mended record took
    best = 0  # the variant that was chosen last
    for variant in np.flatnonzero(mended.state == _EVENT).tolist():
        line, more = owners[variant]
        if line == chosen[best] and mended.open[variant]:  # the longest where more may follow, else the shortest
            chosen[best] = -1
        elif line <= taken:
            continue
        chosen[variant], best = line, variant
        taken = line + more
        parsed.state[line] = _EVENT
        parsed.reasons.pop(line, None)
    for array in mended.events.values():
        array["line"] = chosen[array["line"]]
    for name in {**parsed.events, **mended.events}:
        new = mended.events.get(name, np.zeros(0, dtype=dtype(name)))
        old = parsed.events.get(name, new[:0])
        both = np.concatenate([old[~np.isin(old["line"], chosen)], new[new["line"] >= 0]])
        parsed.events[name] = both[np.argsort(both["line"], kind="stable")]


_TAILS = (b"rip ", b"info", b"intr_info ", b"error_code ", b"requests ", b"gen ", b"at ", b"new", b"existing", b"[")


def _goes_on(text: Text, parsed: _Parsed) -> NDArray[np.bool_]:
    """Which lines are followed by what looks like the optional end of a record, wrapped by mail."""
    found = np.zeros(len(text.starts), dtype=np.bool_)
    alone = np.flatnonzero(~parsed.reads[1:]) + 1
    start = text.skip(text.starts[alone], _QUOTE)
    for tail in _TAILS:
        found[alone - 1] |= text.looking_at(start, tail)
    return found


_REMARK = re.compile(rb"CAN'T FIND FIELD \"[^\"]*\"|<CANT FIND FIELD [^>]*>")
_COMMENT = re.compile(rb".*/\* (.*) \*/\s*")  # the function_graph tracer prints events so
_QUOTED_PRINTABLE = re.compile(rb"=([0-9A-F]{2})")


def _mend(line: bytes) -> bytes:
    line = _COMMENT.sub(rb"\1", _REMARK.sub(b"", line))
    return _QUOTED_PRINTABLE.sub(lambda match: bytes.fromhex(match[1].decode()).replace(b"\n", b" "), line)


_LOSS = re.compile(
    rb"[ \t>|]*(?:CPU:?[ ]*(?P<cpu>\d{1,9})[ ]*)?\[?"
    rb"(?:LOST (?:(?P<lost>\d{1,18}) )?EVENTS|(?:(?P<dropped>\d{1,18}) )?EVENTS DROPPED)\b"
    rb"|# *entries-in-buffer/entries-written: *(?P<kept>\d{1,18})/(?P<written>\d{1,18})"
)


def _losses(text: Text, state: NDArray[np.int8], n: int, first: int) -> NDArray[Any]:
    """``CPU:3 [LOST 12 EVENTS]`` (trace-cmd: ``[12 EVENTS DROPPED]``) and the header of a buffer that ran over."""
    others = np.flatnonzero(state[:n] == _OTHER)
    start = text.skip(text.starts[others], _QUOTE)
    maybe = np.zeros(len(others), dtype=np.bool_)
    for word in (b"CPU", b"LOST ", b"[LOST ", b"# entries"):
        maybe |= text.looking_at(start, word)
    losses = []
    for line in others[maybe].tolist():
        match = _LOSS.match(text.raw, text.starts[line], text.ends[line])
        if match:
            events = int(match["lost"] or match["dropped"] or -1)
            if match["kept"]:
                events = int(match["written"]) - int(match["kept"])
            if events:
                losses.append((line + first, int(match["cpu"] or -1), max(events, -1)))
    return np.array(losses, dtype=LOST)


def parse(lines: bytes, first: int = 1, soft: bool = False, last: bool = True) -> Piece:
    """Parse whole lines, the first of which has this number.

    Args:
        soft: the text before ended in a soft break.
        last: nothing follows. Otherwise lines at the end that may belong together with what comes are not taken.
    """
    given = Text(lines)
    giants = np.flatnonzero(given.ends - given.starts > LONGEST_LINE).tolist()
    text = _with_whole_heads(_emptied(given, giants) if giants else given)
    parsed = _parse(text)
    softs = _soft_breaks(text)
    n = len(text.starts) if last else _safe_end(parsed, softs | _hanging(given))
    _repair(text, parsed, softs, soft, n)
    for line in giants:
        parsed.state[line] = _UNREADABLE
        parsed.reasons[line] = f"longer than {LONGEST_LINE} bytes"
    events = {name: array[: np.searchsorted(array["line"], n)] for name, array in parsed.events.items()}
    for array in events.values():
        array["line"] += first
    unreadable = [Unreadable(line + first, parsed.reasons[line]) for line in sorted(parsed.reasons) if line < n]
    other = int(np.count_nonzero(parsed.state[:n] == _OTHER))
    taken = len(lines) if n == len(given.starts) else int(given.starts[n]) - 1
    lost = _losses(text, parsed.state, n, first)
    return Piece(events, n, other, unreadable, lost, taken, bool(n and softs[n - 1]))
