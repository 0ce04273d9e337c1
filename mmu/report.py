"""What a kernel trace says: its events, faults by code and vCPU, fast repairs, hottest pages, losses, spte layout.

The one idea: one pass over the pieces of a trace adds up one small :class:`Tally`, which then answers everything, so a
trace of any size can be reported on. ``python -m mmu report`` prints it; chapters 2 and 13 use :func:`report`.

>>> found = report(b"kvm_page_fault: vcpu 1 rip 0xfff0 address 0x5000 error_code 0x182\\n" * 3)
>>> found["faults"], found["hottest"], found["layout"]
({'by_code': {'0x182': 3}, 'by_vcpu': {'1': 3}}, [[5, 3]], None)
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import histories, pfec, progress, report_page, spte, trace
from mmu.infer import infer_layout, infer_mmu, signs_of
from mmu.ledger import WINDOW, Ledger
from mmu.symptoms import Symptoms
from mmu.timeline import Timeline

LAYOUTS = tuple(spte.LAYOUTS)

HOTTEST = 10
PAGES = 1 << 19  # faulting pages that are counted; where there are more, those seldom met are given up
DONE, UNUSABLE, STOPPED = 0, 2, 3


@dataclass
class Tally:
    """What the pieces of a trace add up to; :meth:`add` a piece, then ask."""

    lines: int = 0
    other: int = 0
    unreadable: list[trace.Unreadable] = field(default_factory=list)
    losses: list[tuple[int, int, int]] = field(default_factory=list)  # (line, cpu, events)
    events: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    vcpus: Counter[int] = field(default_factory=Counter)
    pages: Counter[int] = field(default_factory=Counter)  # of the faulting address
    fast: dict[int, Counter[str]] = field(default_factory=dict)  # by vCPU
    signs: Counter[str] = field(default_factory=Counter)  # what tells the layout
    sptes: histories.Histories = field(default_factory=histories.Histories)
    timeline: Timeline = field(default_factory=Timeline)
    symptoms: Symptoms = field(default_factory=lambda: Symptoms(Ledger()))
    times: tuple[int, int] | None = None  # first and last, ns
    complete: bool = True

    def add(self, piece: trace.Trace) -> None:
        """Count one piece."""
        self.lines += piece.lines
        self.other += piece.other
        self.complete &= piece.complete
        self.unreadable += piece.unreadable
        self.losses += piece.lost.tolist()
        self.events.update(piece.counts())
        faults = piece["kvm_page_fault"]
        self.codes.update(_count(faults["error_code"], faults["count"]))
        self.vcpus.update(_count(faults["vcpu"], faults["count"]))
        self.pages.update(_count(faults["address"] >> np.uint64(12), faults["count"]))
        self._add_fast(piece["fast_page_fault"])
        self.signs.update(signs_of(piece))
        rows = self.sptes.add(piece)
        self.timeline.add(piece)
        self.symptoms.ept = infer_mmu(self.signs) == "ept"
        self.symptoms.add(piece, rows, lambda lines: np.zeros(len(lines), dtype=np.int64))
        if len(self.pages) > PAGES:
            self.pages = Counter(dict(self.pages.most_common(PAGES // 2)))
        for event in piece:
            stamps = piece[event]["ns"]
            stamps = stamps[stamps >= 0]
            if stamps.size:
                first, last = self.times or (int(stamps[0]), int(stamps[0]))
                self.times = min(first, int(stamps.min())), max(last, int(stamps.max()))

    def found(self) -> list[dict[str, Any]]:
        """Storms, loops and the like; the symptoms are asked once, at the end."""
        self.symptoms.finish()
        return self.symptoms.ledger.close(np.zeros(0, dtype=WINDOW), 0)["findings"]

    def _add_fast(self, events: NDArray[Any]) -> None:
        # Up to 5.12 "spurious" says that the old spte was writable and "fixed" that the new one is: both can be 1.
        spurious = events["spurious"] == 1
        fixed = ~spurious & (events["fixed"] == 1)
        for outcome, those in (("fixed", fixed), ("not_fixed", ~spurious & ~fixed), ("spurious", spurious)):
            for vcpu, n in _count(events["vcpu"][those], events["count"][those]).items():
                self.fast.setdefault(vcpu, Counter())[outcome] += n


def _count(values: NDArray[Any], multiplicities: NDArray[np.int64]) -> dict[int, int]:
    """How often each value occurs, lines counted with their multiplicity."""
    distinct, which = np.unique(values, return_inverse=True)
    total = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(total, which, multiplicities)
    return dict(zip(distinct.tolist(), total.tolist(), strict=True))


def report(source: trace.Source, layout: str | None = None) -> dict[str, Any]:
    """What one trace says, ready for JSON.

    Args:
        source: as for :func:`mmu.trace.read`.
        layout: the name of the spte layout, where it is known; otherwise it is inferred.

    Returns:
        ``lines``, ``events`` (name to number, multiplicities counted), ``other``, ``unreadable`` (line, reason),
        ``lost`` (how many events the kernel said it lost; where it did not say how many, at least one), ``losses``
        (line, cpu, events), ``layout``, ``layout_reason``, ``mmu`` (``npt``, ``ept``, ``shadow`` or None), ``faults``,
        ``fast``, ``hottest`` (page number, faults; the first ten), ``hottest_of`` (``gfn``; ``gva page`` where the
        fault address is a guest-virtual one, as under shadow paging), ``sptes`` and ``sptes_cut`` (the busiest sptes
        with their histories, ``mmu.histories``), ``over_time``
        (``mmu.timeline``), ``symptoms`` (findings of ``mmu.symptoms``), ``first`` and ``last``
        (TIMESTAMP of the events in seconds), ``complete``. vCPUs of lines that named none are ``"unknown"``.

    Raises:
        OSError: the source cannot be read. ValueError: there is no layout of this name.
    """
    return _answer(_tally(trace.chunks(source)), _known(layout))


def _known(layout: str | None) -> str | None:
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"there is no spte layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    return layout


def _tally(pieces: Iterable[trace.Trace]) -> Tally:
    tally = Tally()
    for piece in pieces:
        tally.add(piece)
    return tally


def _answer(tally: Tally, layout: str | None) -> dict[str, Any]:
    inferred, reason = infer_layout(tally.signs)
    mmu = infer_mmu(tally.signs)
    virtual = mmu == "shadow" and tally.signs["walk"]  # a guest without paging is never walked
    outcomes = ("fixed", "not_fixed", "spurious")
    return {
        "lines": tally.lines,
        "events": dict(sorted(tally.events.items())),
        "other": tally.other,
        "unreadable": [line._asdict() for line in tally.unreadable],
        "lost": sum(events if events > 0 else 1 for _, _, events in tally.losses),
        "losses": [
            {"line": line, "cpu": cpu if cpu >= 0 else None, "events": events if events >= 0 else None}
            for line, cpu, events in tally.losses
        ],
        "layout": layout or inferred,
        "layout_reason": "given" if layout else reason,
        "mmu": mmu,
        "faults": {
            "by_code": {
                f"{code:#x}": n for code, n in sorted(tally.codes.items(), key=lambda item: (-item[1], item[0]))
            },
            "by_vcpu": {_vcpu(vcpu): n for vcpu, n in sorted(tally.vcpus.items())},
        },
        "fast": {
            **{outcome: sum(counts[outcome] for counts in tally.fast.values()) for outcome in outcomes},
            "by_vcpu": {
                _vcpu(vcpu): {outcome: counts[outcome] for outcome in outcomes}
                for vcpu, counts in sorted(tally.fast.items())
            },
        },
        "hottest": [list(item) for item in sorted(tally.pages.items(), key=lambda item: (-item[1], item[0]))[:HOTTEST]],
        "hottest_of": "gva page" if virtual else "gfn",
        **tally.sptes.answer(layout or inferred),
        "over_time": tally.timeline.answer(),
        "symptoms": tally.found(),
        "first": tally.times[0] / 10**9 if tally.times else None,
        "last": tally.times[1] / 10**9 if tally.times else None,
        "complete": tally.complete,
    }


def _vcpu(vcpu: int) -> str:
    return str(vcpu) if vcpu >= 0 else "unknown"


def _code_text(code: str, mmu: str | None) -> str:
    """A code of kvm_page_fault in words: on VMX it is an exit qualification, else a page-fault error code."""
    return (pfec.EPT_QUALIFICATION if mmu == "ept" else pfec.PFEC).text(int(code, 16))


def text(found: dict[str, Any], path: str) -> str:
    """One report for people: a screen of text, what was lost first."""
    lines = [f"{_printable(path)}: {found['lines']:,} lines, {sum(found['events'].values()):,} events"]
    if not found["complete"]:
        lines.append("  PARTIAL    everything here is of the part that was read")
    if found["losses"]:
        at_least = "at least " if any(loss["events"] is None for loss in found["losses"]) else ""
        lines.append(f"  LOST       {at_least}{found['lost']:,} events: what a CPU did around a loss is not known")
        for loss in found["losses"][:5]:
            where = "before the first event" if loss["cpu"] is None else f"on CPU {loss['cpu']}"
            n = "an unknown number" if loss["events"] is None else f"{loss['events']:,}"
            lines.append(f"             line {loss['line']}: {n} {where}")
        lines += _more(found["losses"], 5, "losses")
    lines.append(f"  layout     {found['layout'] or 'not known'}: {found['layout_reason']}")
    if found["first"] is not None:
        lines.append(f"  time       {found['first']:.6f} to {found['last']:.6f} s")
    codes = found["faults"]["by_code"]
    lines.append(f"  faults     {sum(codes.values()):,}{_by_vcpu(found['faults']['by_vcpu'])}")
    lines += [f"    {n:>9,}  {code:<12} {_code_text(code, found['mmu'])}" for code, n in list(codes.items())[:12]]
    lines += _more(codes, 12, "codes")
    fast = found["fast"]
    if fast["by_vcpu"]:
        each = {vcpu: sum(counts.values()) for vcpu, counts in fast["by_vcpu"].items()}
        outcomes = f"{fast['fixed']:,} fixed, {fast['not_fixed']:,} not fixed, {fast['spurious']:,} spurious"
        lines.append(f"  fast       {outcomes}{_by_vcpu(each)}")
    if found["hottest"]:
        hottest = ", ".join(f"{gfn:#x} ({n:,})" for gfn, n in found["hottest"][:5])
        lines.append(f"  hottest    {found['hottest_of']} {hottest}")
    lines += _sptes(found)
    lines += _over_time(found)
    ranked = sorted(found["events"].items(), key=lambda item: (-item[1], item[0]))
    lines.append("  events")
    half = (len(ranked) + 1) // 2
    for left, right in zip_longest(ranked[:half], ranked[half:]):
        lines.append("".join(f"    {n:>9,}  {event:<26}" for event, n in filter(None, (left, right))).rstrip())
    lines.append(f"  other      {found['other']:,} lines that are no event of KVM")
    lines.append(f"  unreadable {len(found['unreadable']):,} lines")
    lines += [f"    line {wrong['line']}: {wrong['reason']}" for wrong in found["unreadable"][:8]]
    lines += _more(found["unreadable"], 8, "lines")
    wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    return "\n".join(row if len(row) <= 100 else wrap.fill(row) for row in lines)


def _over_time(found: dict[str, Any]) -> list[str]:
    """What repeated itself: rounds of the dirty log, repairs a second, MMIO, storms and loops."""
    over = found["over_time"]
    lines = []
    if any(over["fast"]["fixed"]) and over["unit"] == "s":
        peak = max(over["fast"]["fixed"]) / over["width"]
        lines.append(f"  repairs    at most {peak:,.0f} a second without the lock, in slices of {over['width']:.3g} s")
    if over["rounds"]:
        some = ", ".join(
            f"{'?' if one['pages'] is None else one['pages']} pages, {one['repairs']} repaired"
            for one in over["rounds"][:4]
        )
        count = len(over["rounds"]) + over["rounds_cut"]
        lines.append(f"  dirty log  {count:,} rounds: {some}{'; ...' if count > 4 else ''}")
    mmio = [f"{n:,} {name}{'s' if n != 1 else ''}" for name, n in over["mmio"].items() if name != "pages"]
    if mmio:
        lines.append(f"  MMIO       {', '.join(mmio)}")
    for one in found["symptoms"][:4]:
        lines.append(f"  OOPS       {report_page.headline(one['rule'])}: {one['what']}")
    return lines + _more(found["symptoms"], 4, "symptoms")


def _sptes(found: dict[str, Any]) -> list[str]:
    """The busiest three sptes, and the last three changes of each."""
    cut = found["sptes_cut"]
    if not cut["events"]:
        return []
    many = "at least " if cut["sptes"] is None else ""
    lines = [
        f"  sptes      {cut['events']:,} events on {many}{len(found['sptes']) + cut['not_listed']:,} sptes; the busiest"
    ]
    for one in found["sptes"][:3]:
        lines.append(f"    {one['events']:>9,}  {histories.name(one)}")
        for change in one["history"][-3:]:
            values = f"{change['old'] or '?'} -> {change['new'] or '?'}"
            lines.append(
                f"               line {change['line']}: {values}  {change['changed'] or change['state'] or ''}".rstrip()
            )
    return lines


def _by_vcpu(counts: dict[str, int]) -> str:
    each = ", ".join(f"{vcpu}: {n:,}" for vcpu, n in list(counts.items())[:8])
    return f" (by vCPU {each}{', ...' if len(counts) > 8 else ''})" if counts else ""


def _more(items: Any, shown: int, what: str) -> list[str]:
    return [f"    and {len(items) - shown:,} more {what} (all with --json)"] if len(items) > shown else []


def page(reports: list[tuple[str, dict[str, Any]]]) -> str:
    """The reports as one page of HTML that needs nothing else; see :mod:`mmu.report_page`."""
    return report_page.page([(_printable(path), found, text(found, path)) for path, found in reports])


def add_parser(commands: Any) -> None:
    """Add ``report`` to the commands of ``python -m mmu``."""
    parser = commands.add_parser("report", help="say what kernel traces hold")
    parser.add_argument("files", nargs="+", metavar="TRACE", help="plain or gzipped; - is standard input")
    parser.add_argument("--html", metavar="OUT", help="also write the report as one page of HTML")
    parser.add_argument("--layout", choices=LAYOUTS, metavar="NAME", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Report on each file; the return value is the exit code.

    2: a file cannot be read, is damaged, or holds no event of KVM (its report is printed all the same, and the other
    files'); 3: stopped by Ctrl-C, what was read until then is reported.
    """
    reports: list[tuple[str, dict[str, Any]]] = []
    entries: list[dict[str, Any]] = []
    code = DONE
    for path in options.files:
        tally = Tally()
        trouble = None
        try:
            file, bar = (None, path) if path == "-" else progress.opened(path)
            with file or nullcontext():
                for piece in trace.chunks(bar):
                    tally.add(piece)
            if not tally.complete:
                trouble = f"line {tally.unreadable[-1].line}: {tally.unreadable[-1].reason}"
            elif not tally.events:
                trouble = "holds no event of KVM; expected text of ftrace, trace-cmd report or perf script"
        except KeyboardInterrupt:
            tally.complete = False
            code = STOPPED
        except OSError as error:
            trouble = error.strerror or str(error)
        if trouble:
            code = max(code, UNUSABLE)
            print(f"report: {_printable(path)}: {trouble}", file=sys.stderr)
        found = _answer(tally, options.layout)
        if tally.lines or not trouble:
            reports.append((path, found))
        entries.append({"path": path, **found, **({"error": trouble} if trouble else {})})
        if code == STOPPED:
            break
    if options.json:
        print(json.dumps(entries[0] if len(options.files) == 1 else _together(entries), allow_nan=False))
    elif reports:
        print("\n\n".join(text(found, path) for path, found in reports))
    if options.html:
        try:
            with open(options.html, "w", encoding="utf-8") as out:
                out.write(page(reports))
        except OSError as error:
            print(f"report: {_printable(options.html)}: {error.strerror or error}", file=sys.stderr)
            code = max(code, UNUSABLE)
    return code


def _together(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Several reports as one: numbers are added up, and ``files`` has each by itself."""

    def added(values: list[Any]) -> Any:
        if not isinstance(values[0], dict):
            return sum(values)
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: added([value[key] for value in values if key in value]) for key in keys}

    layouts = {entry["layout"] for entry in entries if entry["lines"]}
    pages = added([dict(entry["hottest"]) for entry in entries])
    times = [[entry[key] for entry in entries if entry[key] is not None] for key in ("first", "last")]
    return {
        **{key: added([entry[key] for entry in entries]) for key in ("lines", "events", "other", "lost")},
        "unreadable": [{"path": entry["path"], **line} for entry in entries for line in entry["unreadable"]],
        "layout": layouts.pop() if len(layouts) == 1 else None,
        **{key: added([entry[key] for entry in entries]) for key in ("faults", "fast")},
        "hottest": [list(item) for item in sorted(pages.items(), key=lambda item: (-item[1], item[0]))[:HOTTEST]],
        "first": min(times[0], default=None),
        "last": max(times[1], default=None),
        "complete": all(entry["complete"] for entry in entries),
        "files": entries,
    }


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()
