"""Kernel trace text to arrays, and nothing else: what ftrace, ``trace-cmd report`` and ``perf script`` print of KVM.

>>> t = read(b'''qemu-5786 [029] ..... 3602162.971194: kvm_page_fault: vcpu 4 rip 0xfff0 address 0x2000 error_code 0x184
... qemu-5786 [029] d.... 3602162.971199: kvm_entry: vcpu 4, rip 0xfff0
... ''')
>>> hex(t["kvm_page_fault"]["error_code"][0]), t["kvm_entry"]["vcpu"].tolist(), t.lines
('0x184', [4], 2)

:func:`read` gives a :class:`Trace`: one structured array an event, in the order of the file. :func:`chunks` gives the
same piece by piece, so that a trace of any size needs the memory of one piece. Chapter 2 classifies the faults of
recorded traces with it, chapter 13 reads whole runs.

Every array has the fields of :data:`mmu.records.HEAD` and those that :data:`mmu.records.FORMATS` names for the event:

========= ===== ====================================================================================================
``line``  int64 number of the line in the file, from 1: it orders the events of different arrays
``count`` int64 how often the line stands for itself: the multiplicity in front of a ``uniq -c`` line, else 1
``ns``    int64 the TIMESTAMP column in nanoseconds (the bare number where the trace clock is a counter); -1: none
``cpu``   int32 the CPU column; -1: none
``pid``   int32 the thread; -1: none
``comm``  S16   its name, of which the kernel keeps 15 bytes; b"": none
``flags`` S8    the column of irqs-off, need-resched, hardirq and preempt-depth; b"": none
========= ===== ====================================================================================================

A field that a line did not carry is distinguishable: -1 in signed fields, ``MISSING`` (all ones) in uint64 fields,
``b""`` in texts. ``error_code`` of ``kvm_page_fault`` is raw, as the kernel printed it: the exit qualification on VMX,
EXITINFO1 on SVM, a page-fault error code under shadow paging (facts 3.2, 4); :mod:`mmu.pfec` tells them apart.

Nothing is dropped in silence: a line is an event, or in ``other`` (headers, comments, other subsystems' events,
continuations), or in ``unreadable`` with its number and the reason.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmu import records
from mmu.records import FORMATS, HEAD, LOST, Unreadable, dtype
from mmu.scan import MISSING
from mmu.scan import missing_value as absent

__all__ = ["FORMATS", "HEAD", "LOST", "MISSING", "Trace", "Unreadable", "absent", "chunks", "dtype", "read"]

CHUNK = 1 << 21  # bytes parsed at a time: the arrays of one chunk stay in the processor's caches


class Trace(Mapping[str, NDArray[Any]]):
    """The events of a trace, or of a piece of one: a mapping from an event's name to its structured array.

    ``trace["kvm_page_fault"]`` is an empty array where the trace has none; iteration gives the events that are there.

    Attributes:
        lines: lines of text.
        other: lines that are no event of KVM's.
        unreadable: :class:`Unreadable` lines.
        lost: what the kernel said it lost: (line, cpu, events), -1 where it did not say which or how many.
        complete: False where a gzip stream was damaged or cut off; the last of ``unreadable`` then says so.
    """

    def __init__(
        self,
        events: dict[str, NDArray[Any]],
        lines: int = 0,
        other: int = 0,
        unreadable: list[Unreadable] | None = None,
        lost: NDArray[Any] | None = None,
        complete: bool = True,
    ) -> None:
        self._events = {name: events[name] for name in sorted(events) if len(events[name])}
        self.lines, self.other = lines, other
        self.unreadable = unreadable or []
        self.complete = complete
        self.lost = np.zeros(0, dtype=LOST) if lost is None else lost

    def __getitem__(self, event: str) -> NDArray[Any]:
        if event in self._events:
            return self._events[event]
        if event not in FORMATS and not event.startswith("kvm_") and not event.endswith("_page_fault_ret"):
            raise KeyError(f"{event!r} is no event of KVM; expected one of {', '.join(FORMATS)}")
        return np.zeros(0, dtype=dtype(event))

    def __contains__(self, event: object) -> bool:
        return event in self._events

    def __iter__(self) -> Iterator[str]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        events = ", ".join(f"{name} {n}" for name, n in self.counts().items())
        return (
            f"Trace({self.lines} lines: {events or 'no events'}; {self.other} other, {len(self.unreadable)} unreadable)"
        )

    def counts(self) -> dict[str, int]:
        """How often each event occurred, ``uniq -c`` multiplicities counted in."""
        return {name: int(array["count"].sum()) for name, array in self._events.items()}

    def order(self, *events: str) -> NDArray[Any]:
        """The named events (all, if none is named) in the order of the file: (line, event, row of that event's array).

        >>> t = read(b"kvm_entry: vcpu 1\\nkvm_mmu_set_dirty_bit: gpa 1000\\nkvm_entry: vcpu 2\\n")
        >>> t.order().tolist()
        [(1, b'kvm_entry', 0), (2, b'kvm_mmu_set_dirty_bit', 0), (3, b'kvm_entry', 1)]
        """
        kind = np.dtype([("line", np.int64), ("event", "S64"), ("row", np.int64)])
        merged = np.zeros(sum(len(self[event]) for event in events or self), dtype=kind)
        stop = 0
        for event in events or self:
            array = self[event]
            part = merged[stop : stop + len(array)]
            part["line"], part["event"] = array["line"], event.encode()
            part["row"] = np.arange(len(array), dtype=np.int64)
            stop += len(array)
        return merged[np.argsort(merged["line"], kind="stable")]


Source = str | os.PathLike[str] | bytes | BinaryIO


def read(source: Source) -> Trace:
    """Read a whole trace.

    Args:
        source: a path (``"-"`` is standard input), the text itself as bytes, or an open file; plain or gzipped.

    Raises:
        OSError: the path cannot be opened or read. Nothing in the text raises.
    """
    pieces = list(chunks(source))
    names = {name for piece in pieces for name in piece}
    return Trace(
        {name: np.concatenate([piece[name] for piece in pieces if name in piece]) for name in names},
        sum(piece.lines for piece in pieces),
        sum(piece.other for piece in pieces),
        [line for piece in pieces for line in piece.unreadable],
        np.concatenate([np.zeros(0, dtype=LOST)] + [piece.lost for piece in pieces]),
        all(piece.complete for piece in pieces),
    )


def chunks(source: Source, size: int = CHUNK) -> Iterator[Trace]:
    """Read a trace piece by piece, about ``size`` bytes of text at a time; see :func:`read`.

    Line numbers go on from piece to piece, and where a piece ends does not change what is read.
    """
    held, line, soft = b"", 1, False
    damage = None
    blocks = _blocks(source, size)
    while True:
        block = next(blocks, None)
        if isinstance(block, str):
            damage, block = block, None
        held += block or b""
        end = held.rfind(b"\n") + 1 if block is not None else len(held)
        held = held[
            : end + records.LONGEST_LINE + 1
        ]  # a longer line is still too long, which is all that will be said of it
        if end:
            piece = records.parse(held[:end], line, soft, last=block is None)
            line, soft, held = line + piece.lines, piece.soft, held[piece.taken :]
            if piece.lines:
                yield Trace(piece.events, piece.lines, piece.other, piece.unreadable, piece.lost)
        if block is None:
            break
    if damage:
        yield Trace({}, unreadable=[Unreadable(line, damage)], complete=False)


def _blocks(source: Source, size: int) -> Iterator[bytes | str]:
    """The bytes of a source, unpacked; a damaged gzip stream ends with a sentence that says so."""
    if isinstance(source, bytes | bytearray | memoryview):
        pieces = (bytes(source[i : i + size]) for i in range(0, len(source), size))
        yield from _unpacked(pieces, size)
    elif hasattr(source, "read"):
        pieces = iter(lambda: source.read(size), source.read(0))
        yield from _unpacked((p.encode("utf-8", "replace") if isinstance(p, str) else p for p in pieces), size)
    elif source == "-":
        yield from _unpacked(iter(lambda: sys.stdin.buffer.read(size), b""), size)
    else:
        with open(source, "rb") as file:
            yield from _unpacked(iter(lambda: file.read(size), b""), size)


def _unpacked(pieces: Iterator[bytes], size: int) -> Iterator[bytes | str]:
    first = next(pieces, b"")
    while len(first) == 1:
        more = next(pieces, b"")
        if not more:
            break
        first += more
    if not first.startswith(b"\x1f\x8b"):
        yield first
        yield from pieces
        return
    unpacker = zlib.decompressobj(wbits=31)
    packed = first
    while packed is not None:
        while packed:
            if unpacker.eof:  # gzip files may be appended to one another, with zeros between
                packed = packed.lstrip(b"\0")
                if packed:
                    unpacker = zlib.decompressobj(wbits=31)
            try:
                text = unpacker.decompress(packed, size)
            except zlib.error as error:
                yield f"the gzip stream is damaged here: {error}"
                return
            if text:
                yield text
            packed = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
        packed = next(pieces, None)
    if not unpacker.eof:
        yield "the gzip stream ends before its end: the file was cut off here"
