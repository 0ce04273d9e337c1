"""A trace's report as one page of HTML that needs nothing else: no other host, no script.

The one idea: every piece of markup is made by :func:`tag`, which escapes whatever is not markup already, so nothing in
a trace can become markup; and the page forbids all scripts and all loading (Content-Security-Policy), so that a
mistake here could not be used. Steppers are groups of radio buttons, which arrow keys move by themselves. Chapter 13.

>>> tag("p", "a < b", tag("b", "c"), title='"')
'<p title="&quot;">a &lt; b<b>c</b></p>'
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from mmu import histories, pfec
from mmu.spte import LAYOUTS, SpteLayout

WORD_BITS = 64
LETTERS = {
    "PWT": "T", "PCD": "C", "PS": "S", "HOST_W": "H", "MMU_W": "M", "MMU_P": "K", "NX": "N", "SVE": "V", "IPAT": "I",
    "SAVED_R": "r", "SAVED_X": "x",
}  # fmt: skip


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; children that are not :class:`Markup` are escaped, attributes are, ``class_`` is class."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{words}>{_inner(children)}</{name}>")


def _inner(children: Any) -> str:
    if isinstance(children, Markup):
        return children
    if isinstance(children, list | tuple):
        return "".join(_inner(child) for child in children)
    return "" if children is None else html.escape(str(children))


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5f6770; --paper: #ffffff; --line: #c4cad1;
  --v0: #1250d2; --lock: #626973; --fast: #0f8152; --oops: #501317; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #a1abb8; --paper: #14181c; --line: #454d56;
  --v0: #67ace2; --lock: #a1abb8; --fast: #67fac2; --oops: #e06d74; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 "DejaVu Sans", system-ui, sans-serif; }
h2 { overflow-wrap: anywhere; border-top: 2px solid var(--ink); padding-top: 1rem; margin-top: 2rem; }
h3 { margin: 2rem 0 .5rem; } p { max-width: 46rem; }
code, .hex, pre { font-family: "DejaVu Sans Mono", monospace; font-size: .9em; }
.faint { color: var(--faint); font-size: .88em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } th { font-weight: 400; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.bar { display: flex; height: 1em; min-width: 5rem; } .bar i { display: block; }
.fixed { background: var(--fast); } .spurious { border: 2px solid var(--fast); }
.slow { border: 1px solid var(--lock);
  background: repeating-linear-gradient(135deg, var(--lock) 0 2px, transparent 2px 5px); }
.row { display: grid; grid-template-columns: 15rem 1fr 6.5rem; gap: 0 .8rem; align-items: end; margin: .35rem 0; }
.row svg { width: 100%; height: 2.6rem; display: block; border-bottom: 1px solid var(--line); }
.row path { fill: var(--lock); } .row.quick path { fill: var(--fast); } .row.mmio path { fill: var(--ink); }
.axis { display: grid; grid-template-columns: 15rem 1fr 6.5rem; gap: 0 .8rem; color: var(--faint); font-size: .8em; }
.axis div { display: flex; justify-content: space-between; }
.oops { border: 3px solid var(--oops); color: var(--oops); padding: .6rem .9rem; margin: 1rem 0; }
.oops ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.player { display: flex; flex-wrap: wrap; gap: .3rem .4rem; border: 1px solid var(--line); padding: .8rem;
  margin: .6rem 0; min-width: 0; position: relative; align-items: center; }
.player > .faint { flex-basis: 100%; margin: 0; }
.player legend { padding: 0 .4rem; } .player input { position: absolute; opacity: 0; }
.player label { border: 1px solid var(--line); border-radius: 4px; padding: .1rem .5rem; cursor: pointer;
  font-size: .85em; }
.player input:checked + label { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.player input:focus-visible + label { outline: 3px solid var(--v0); outline-offset: 2px; }
.player .step { display: none; order: 1; flex-basis: 100%; margin-top: .5rem; }
.player input:checked + label + .step { display: block; }
.ribbon { display: grid; grid-template-columns: repeat(64, minmax(0, 1fr)); gap: 1px; margin: .15rem 0 .5rem;
  font: .66rem/1.5 "DejaVu Sans Mono", monospace; }
.ribbon i { font-style: normal; text-align: center; border: 1px solid var(--line); height: 1.6em; overflow: hidden; }
.ribbon i.on { background: var(--ink); color: var(--paper); border-color: var(--ink); font-weight: 700; }
.ribbon i.soft { border-radius: .6em; }
.ribbon i.moved { box-shadow: 0 3px 0 var(--paper), 0 6px 0 var(--ink); margin-bottom: 6px; }
.ribbon i:nth-child(4n) { margin-right: 2px; }
@media (max-width: 600px) {
  .row, .axis { grid-template-columns: 1fr 5rem; }
  .row > :first-child { grid-column: 1 / -1; } .axis > :first-child { display: none; }
  .ribbon { grid-template-columns: repeat(16, minmax(0, 1fr)); font-size: .75rem; row-gap: 6px; }
  table { font-size: .9em; } th, td { padding-right: .4rem; } th.n { white-space: normal; } .drawn { display: none; }
  dl { grid-template-columns: 1fr; } dt { color: var(--faint); }
}
@media print { .player .step { display: block; } .player label, .player input { display: none; } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(reports: Sequence[tuple[str, dict[str, Any], str]]) -> str:
    """The page of some reports: (name of the file, :func:`mmu.report.report`'s answer, the report as text)."""
    body = [_trace(number, *report) for number, report in enumerate(reports)]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", "Trace report"),
        tag("style", Markup(STYLE)),
    ]
    content = tag("html", tag("head", head), tag("body", tag("h1", "Trace report"), body), lang="en")
    return f"<!doctype html>\n{content}\n"


def _trace(number: int, name: str, found: dict[str, Any], text: str) -> Markup:
    return tag(
        "section",
        tag("h2", name),
        _summary(found),
        _symptoms(found["symptoms"]),
        _faults(found),
        _codes(found),
        _fast(found),
        _rounds(found["over_time"]),
        _hottest(found),
        _sptes(number, found),
        _mmio(found["over_time"]["mmio"]),
        tag("details", tag("summary", "The same as text, with every event's count"), tag("pre", text, class_="wide")),
    )


def _summary(found: dict[str, Any]) -> list[Any]:
    rows = [("lines", f"{found['lines']:,}, of which {sum(found['events'].values()):,} events of KVM")]
    if found["losses"]:
        rows.insert(0, ("lost", f"{found['lost']:,} events: what a CPU did around a loss is not known"))
    if not found["complete"]:
        rows.insert(0, ("PARTIAL", "everything here is of the part that was read"))
    rows.append(("layout", f"{found['layout'] or 'not known'}: {found['layout_reason']}"))
    if found["first"] is not None:
        rows.append(("time", f"{found['first']:.6f} to {found['last']:.6f} s"))
    rows.append(("unreadable", f"{len(found['unreadable']):,} lines"))
    return [tag("dl", [(tag("dt", key), tag("dd", value)) for key, value in rows])]


def _symptoms(symptoms: list[dict[str, Any]]) -> Markup:
    if not symptoms:
        return tag("p", "No spurious storm, no refault loop, no churn of CR0.WP was found.")
    items = [
        tag(
            "li",
            tag("strong", headline(one["rule"])),
            f": {one['what']}",
            tag("span", _lines(one["lines"]), class_="faint"),
        )
        for one in symptoms[:12]
    ]
    more = tag("p", f"and {len(symptoms) - 12:,} more") if len(symptoms) > 12 else None
    return tag("div", tag("strong", "OOPS"), tag("ul", items), more, class_="oops")


def headline(rule: str) -> str:
    """What the break of one of :mod:`mmu.symptoms`' rules is called.

    >>> headline("no storm: a spurious fault is not repeated")
    'storm'
    """
    return rule.split(":")[0].removeprefix("no ")


def _lines(lines: list[int]) -> str:
    shown = ", ".join(f"{line:,}" for line in lines[-4:])
    return f" (line{'s' if len(lines) > 1 else ''} {shown})" if lines else ""


def _drawn(*parts: tuple[str, float]) -> Markup:
    """A cell with a bar of some parts: (class, share of the cell's width)."""
    drawn = [tag("i", class_=kind, style=f"width:{100 * share:.1f}%") for kind, share in parts if share]
    return tag("td", tag("div", drawn, class_="bar"), class_="drawn")


# Over time -----------------------------------------------------------------------------------------------------------


def _bars(counts: list[int], most: int, said: str) -> Markup:
    """Counts over time as one path of bars, whose height is their share of ``most``."""
    path = "".join(
        f"M{i} 100v-{max(100 * n / most, 3):.1f}h.9v{max(100 * n / most, 3):.1f}z" for i, n in enumerate(counts) if n
    )
    drawn = Markup(f'<path d="{path}"/>')
    box = {"viewBox": f"0 0 {max(len(counts), 1)} 100", "preserveAspectRatio": "none"}
    return tag("svg", drawn, role="img", aria_label=said, **box)


def _over_time(rows: list[tuple[str, str, list[int]]], over: dict[str, Any], unit: str) -> list[Any]:
    most = max((max(counts, default=0) for *_, counts in rows), default=0)
    if not most:
        return []
    shown = []
    for name, kind, counts in rows:
        if not sum(counts):
            continue
        peak = counts.index(max(counts))
        at = over["start"] + peak * over["width"]
        when = f"{at:.3f} s" if over["unit"] == "s" else f"line {at:,.0f}"
        said = f"{name}: {sum(counts):,} in all, most at {when}"
        number = tag("span", f"{sum(counts):,}", class_="n")
        shown.append(tag("div", tag("span", name), _bars(counts, most, said), number, class_=f"row {kind}"))
    end = over["start"] + over["width"] * len(rows[0][2])
    digits = 3 if over["width"] > 1e-4 else 6
    ends = [f"{x:.{digits}f} s" if over["unit"] == "s" else f"line {x:,.0f}" for x in (over["start"], end)]
    width = f"{over['width'] * 1000:,.3g} ms" if over["unit"] == "s" else f"{over['width']:,.0f} lines"
    axis = tag("div", tag("span"), tag("div", [tag("span", x) for x in ends]), tag("span"), class_="axis")
    note = tag("p", f"A bar is {width}; the highest is {most:,} {unit}{'s' if most > 1 else ''}.", class_="faint")
    return [*shown, axis, note]


def _faults(found: dict[str, Any]) -> list[Any]:
    over = found["over_time"]
    causes, fast = over["causes"], over["fast"]
    rows = [
        ("page not present", "", causes["not present"]),
        ("write-protected, repaired without the lock", "quick", fast["fixed"]),
        ("spurious: the spte allowed it", "quick", fast["spurious"]),
        ("write-protected, not repaired fast", "", _rest(causes["write-protected"], fast)),
        ("MMIO", "mmio", causes["MMIO"]),
        ("other rights missing", "", causes["other rights"]),
    ]
    drawn = _over_time(rows, over, "fault")
    total = sum(found["faults"]["by_code"].values())
    return [
        tag("h3", "Faults over time, by cause"),
        drawn or tag("p", f"{total:,} faults, and none of them has a time."),
    ]


def _rest(faults: list[int], fast: dict[str, list[int]]) -> list[int]:
    """Faults less those that the fast path settled; its event may stand one slice behind its fault."""
    left, owed = [], 0
    for n, fixed, spurious in zip(reversed(faults), reversed(fast["fixed"]), reversed(fast["spurious"]), strict=True):
        n -= fixed + spurious + owed
        left.append(max(n, 0))
        owed = max(-n, 0)
    return left[::-1]


def _codes(found: dict[str, Any]) -> list[Any]:
    codes = found["faults"]["by_code"]
    if not codes:
        return []
    total, most = sum(codes.values()), max(codes.values())
    layout = pfec.EPT_QUALIFICATION if found["mmu"] == "ept" else pfec.PFEC
    rows = [
        tag(
            "tr",
            tag("td", tag("code", code)),
            tag("td", layout.text(int(code, 16))),
            tag("td", f"{n:,}", class_="n"),
            tag("td", f"{100 * n / total:.1f} %", class_="n drawn"),
            _drawn(("slow", n / most)),
        )
        for code, n in list(codes.items())[:16]
    ]
    more = tag("p", f"and {len(codes) - 16:,} more codes", class_="faint") if len(codes) > 16 else None
    return [tag("h3", "Error codes"), tag("div", tag("table", rows), class_="wide"), more]


def _fast(found: dict[str, Any]) -> list[Any]:
    fast = found["fast"]
    if not fast["by_vcpu"]:
        return [tag("h3", "The fast path"), tag("p", "It was never asked, or its event was not recorded.")]
    rows = []
    for vcpu, counts in list(fast["by_vcpu"].items())[:64]:
        total = max(sum(counts.values()), 1)
        parts = [
            (kind, counts[name] / total)
            for name, kind in (("fixed", "fixed"), ("spurious", "spurious"), ("not_fixed", "slow"))
            if counts[name]
        ]
        numbers = [tag("td", f"{counts[name]:,}", class_="n") for name in ("fixed", "spurious", "not_fixed")]
        rows.append(tag("tr", tag("th", f"vCPU {vcpu}"), numbers, _drawn(*parts)))
    names = ("fixed", "spurious", "not fixed")
    head = tag("tr", tag("th"), [tag("th", name, class_="n") for name in names], tag("th", class_="drawn"))
    over = found["over_time"]
    rate = []
    if over["unit"] == "s" and any(over["fast"]["fixed"]):
        peak = max(over["fast"]["fixed"]) / over["width"]
        span = over["width"] * len(over["fast"]["fixed"])
        mean = sum(over["fast"]["fixed"]) / span
        rate = [
            tag("h3", "Lock-free repairs per second"),
            _over_time([("repairs without the mmu-lock", "quick", over["fast"]["fixed"])], over, "repair"),
            tag("p", f"At most {peak:,.0f} a second, {mean:,.0f} on average over the {span:.3g} s of the trace."),
        ]
    key = "Filled: fixed without the lock. Outlined: spurious, it was repaired already. Hatched: left to the slow path."
    table = tag("div", tag("table", head, rows), class_="wide")
    return [tag("h3", "The fast path, vCPU by vCPU"), table, tag("p", key, class_="faint"), rate]


def _rounds(over: dict[str, Any]) -> list[Any]:
    rounds = over["rounds"]
    if not rounds:
        return []
    most = max((max(one["pages"] or 0, one["repairs"]) for one in rounds), default=0) or 1
    rows = []
    for i, one in enumerate(rounds[:64]):
        pages = "" if one["pages"] is None else f"{one['pages']:,}"
        parts = ("fixed", one["repairs"] / most), ("slow", max((one["pages"] or 0) - one["repairs"], 0) / most)
        at = "" if one["at"] is None else f"{one['at']:.6f} s"
        cells = [tag("td", value, class_="n") for value in (f"{one['line']:,}", pages, f"{one['repairs']:,}")]
        rows.append(tag("tr", tag("th", i + 1), cells, tag("td", at, class_="n drawn"), _drawn(*parts)))
    names = [tag("th", name, class_="n") for name in ("line", "pages protected", "repaired fast")]
    head = tag("tr", tag("th", "round"), names, tag("th", "at", class_="n drawn"), tag("th", class_="drawn"))
    cut = len(rounds) - len(rows) + over["rounds_cut"]
    note = "Filled: pages that were written to and repaired without the lock. Hatched: the rest of the round's pages."
    told = rounds[0]["pages"] is not None
    why = "A round is a sweep that took W away; that it is the dirty log's is inferred." if told else (
        "Rounds are the client's marks: this MMU prints no event when it write-protects."
    )  # fmt: skip
    more = f" And {cut:,} more rounds." if cut else ""
    table = tag("div", tag("table", head, rows), class_="wide")
    return [tag("h3", "Rounds of the dirty log"), table, tag("p", f"{note} {why}{more}", class_="faint")]


# Pages and sptes -----------------------------------------------------------------------------------------------------


def _hottest(found: dict[str, Any]) -> list[Any]:
    if not found["hottest"]:
        return []
    most = found["hottest"][0][1]
    rows = [
        tag(
            "tr",
            tag("td", tag("code", f"{page:#x}")),
            tag("td", f"{n:,}", class_="n"),
            _drawn(("slow", n / most)),
        )
        for page, n in found["hottest"]
    ]
    what = "Pages that fault most, by gfn" if found["hottest_of"] == "gfn" else "Pages that fault most, by virtual page"
    return [tag("h3", what), tag("div", tag("table", rows), class_="wide")]


def _sptes(number: int, found: dict[str, Any]) -> list[Any]:
    cut = found["sptes_cut"]
    if not found["sptes"]:
        return []
    form = LAYOUTS.get(found["layout"])
    players = [_player(f"{number}-{i}", one, form) for i, one in enumerate(found["sptes"])]
    many = len(found["sptes"]) + cut["not_listed"]
    count = f"{'at least ' if cut['sptes'] is None else ''}{many:,}"
    said = f"{cut['events']:,} events on {count} sptes; the last changes of the busiest {len(found['sptes'])}:"
    keys = "Click a change, or Tab to one and use the arrow keys. Filled: the bit is set. Round: only KVM reads it. "
    keys += "Underlined: it differs from before."
    if form is not None:
        single = [name for name, field in form.bits.items() if field.width == 1 and name in LETTERS]
        keys += f" Letters: {', '.join(f'{LETTERS[name]} {name}' for name in single)}."
        keys += " 1: a bit of a longer field, such as the PFN."
    rest = tag("details", tag("summary", f"{len(players) - 3} more"), players[3:]) if players[3:] else None
    return [tag("h3", "Sptes and their histories"), tag("p", said), tag("p", keys, class_="faint"), players[:3], rest]


def _player(name: str, one: dict[str, Any], form: SpteLayout | None) -> Markup:
    parts = [tag("legend", histories.name(one), f": {one['events']:,} events")]
    if one["cut"]:
        parts.append(tag("p", f"{one['cut']:,} earlier events are not listed.", class_="faint"))
    last = len(one["history"]) - 1
    for i, change in enumerate(one["history"]):
        key = f"s{name}-{i}"
        checked = "checked" if i == last else None
        vcpu = "" if change["vcpu"] is None else f", vCPU {change['vcpu']}"
        times = f", {change['count']:,} times" if change["count"] > 1 else ""
        said = f"line {change['line']:,}: {change['event']}{vcpu}{times}: {change['changed'] or 'first seen'}"
        state = f"; now {change['state']}" if change["state"] else ""
        quiet = f" In between, without an event: {change['meanwhile']}." if change["meanwhile"] else ""
        words = [(word, change[word]) for word in ("old", "new") if change[word]]
        before = int(change["old"] or change["new"] or "0", 16)
        ribbons = [
            [tag("div", which, " ", tag("span", value, class_="hex")), _ribbon(int(value, 16), before, form)]
            for which, value in words
        ]
        parts.append(tag("input", type="radio", name=f"s{name}", id=key, checked=checked))
        short = {None: "first seen", "nothing": "seen"}.get(change["changed"], (change["changed"] or "").split(";")[0])
        parts.append(tag("label", short, for_=key))
        parts.append(tag("div", tag("p", said, state, ".", quiet), ribbons, class_="step"))
    return tag("fieldset", parts, class_="player")


def _ribbon(word: int, before: int, form: SpteLayout | None) -> Markup:
    """A word as 64 cells, the highest bit on the left; bits that differ from ``before`` are underlined."""
    name_of = {} if form is None else {bit: f for f in form.bits.values() for bit in range(f.low, f.top + 1)}
    soft = () if form is None else form.software
    cells = []
    for bit in range(WORD_BITS - 1, -1, -1):
        field = name_of.get(bit)
        on = word >> bit & 1
        letter = "1" if field is None or field.width > 1 else LETTERS.get(field.name, field.name[0])
        kinds = (
            ["on"] * on
            + ["soft"] * (field is not None and field.name in soft)
            + ["moved"] * ((word ^ before) >> bit & 1)
        )
        title = f"bit {bit}" + (f" {field.name}" if field else "")
        cells.append(
            tag("i", letter if on else None, class_=" ".join(kinds) or None, title=title if on or kinds else None)
        )
    fields = [] if form is None else [n for n, v in form.bits.unpack(word).items() if v]
    said = f"{word:#x}: set are {', '.join(fields)}" if fields else f"{word:#x}"
    return tag("div", cells, class_="ribbon", role="img", aria_label=said)


def _mmio(mmio: dict[str, Any]) -> list[Any]:
    counts = [(name, n) for name, n in mmio.items() if name != "pages"]
    if not counts:
        return []
    said = ", ".join(f"{n:,} {name}{'s' if n != 1 else ''}" for name, n in counts)
    rows = [
        tag("tr", tag("td", tag("code", f"{page:#x}")), tag("td", f"{n:,}", class_="n")) for page, n in mmio["pages"]
    ]
    table = tag(
        "div", tag("table", tag("tr", tag("th", "gfn"), tag("th", "accesses", class_="n")), rows), class_="wide"
    )
    return [tag("h3", "MMIO"), tag("p", f"{said}."), table if rows else None]
