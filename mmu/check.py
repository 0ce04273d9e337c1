"""Recorded answers held against the package's own: what kind of record a file is, and how much of it agrees.

The one idea: one list of kinds, each with a way to recognise its text and a way to compare it. ``python -m mmu check``
prints what comes back; chapters call :func:`check` on a file and look at the disagreements.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmu import codetable, conform, litmus, replay, trace, walks
from mmu import scenario as scenarios

_HEAD = 1 << 20
_BETWEEN = re.compile(r"[\s,:]*")  # the members of a JSON list or object
NO_SCENARIO = "none"
"""Passed as a scenario: do not look for one, hold the trace against itself alone."""


class Unusable(ValueError):
    """A file that cannot be read or is no record of a known kind."""


@dataclass
class Checked:
    """How one file fared: per kind ``{"agree": n, "of": m}``, and each disagreement with its line."""

    path: str
    kind: str
    counts: dict[str, dict[str, int]]
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    scenario: str | None = None
    layout: str | None = None
    rules: str = ""
    not_applied: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True

    @property
    def agree(self) -> int:
        """How many of :attr:`of` agree."""
        return sum(count["agree"] for count in self.counts.values())

    @property
    def of(self) -> int:
        """How many were compared."""
        return sum(count["of"] for count in self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """The record in the words of the command line's JSON."""
        return {**vars(self), "agree": self.agree, "of": self.of}


def read_bytes(path: str) -> bytes:
    """The content of a file, or of standard input for ``-``; gzip is undone, a byte order mark left out.

    Raises:
        Unusable: it cannot be opened, or its compressed data end or break off too early.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise Unusable(f"{path}: its compressed data cannot be undone ({error}); fetch or compress it again") from None


def scenario_of(path: str) -> str | None:
    """The scenario that lies beside a trace: ``NAME.json`` or ``NAME.json.gz`` for ``NAME.trace``, ``.txt`` or ``.gz``.

    >>> scenario_of("no/such.trace.gz") is None
    True
    """
    if path == "-":
        return None
    trace_path = Path(path)
    stem = trace_path.name.removesuffix(".gz").removesuffix(".trace").removesuffix(".txt")
    beside = [trace_path.with_name(f"{stem}{ending}") for ending in (".json", ".json.gz")]
    return next((str(found) for found in beside if found.exists() and found != trace_path), None)


def _error_codes(path: str, raw: bytes, **_: Any) -> Checked:
    try:
        table = codetable.check_table(raw.decode("utf-8", errors="replace"))
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from None
    return Checked(
        path,
        "error-codes",
        {"error-codes": {"agree": int(table.agree.sum()), "of": len(table.agree)}},
        disagreements=table.disagreements(),
        unreadable=[{"line": line, "reason": reason} for line, reason in table.unreadable],
        rules="the rules of a page walk",
    )


def _is_litmus(raw: bytes) -> bool:
    return raw.lstrip()[:1] == b"{" and b'"tests"' in raw


def _members(text: str, at: int) -> dict[Any, int]:
    """Where in a JSON text the members of the list or object at ``at`` begin, by their number or name.

    >>> _members('{"sc": [1, 2]}', 0), _members('{"sc": [1, 2]}', 7)
    ({'sc': 7}, {0: 8, 1: 11})
    """
    decode, named, begins = json.JSONDecoder().raw_decode, text[at] == "{", {}
    at = _BETWEEN.match(text, at + 1).end()
    while text[at] not in "]}":
        name, at = decode(text, at) if named else (len(begins), at)
        begins[name] = at = _BETWEEN.match(text, at).end()
        at = _BETWEEN.match(text, decode(text, at)[1]).end()
    return begins


def _litmus(path: str, raw: bytes, **_: Any) -> Checked:
    try:
        text = raw.decode()
        tests = json.loads(text)["tests"]
        if not isinstance(tests, list):
            raise TypeError(f"'tests' is a {type(tests).__name__}")
        bad = {}
        try:
            verdicts = litmus.check({"tests": tests})  # all tests as one batch
        except litmus.LitmusError:
            for number, test in enumerate(tests):
                try:
                    litmus.validate(test)
                except litmus.LitmusError as error:
                    bad[number] = str(error)
            verdicts = litmus.check({"tests": [test for number, test in enumerate(tests) if number not in bad]})
        begins = _members(text, _members(text, text.index("{"))["tests"])
        recorded_at = [
            _members(text, begins[number])[model]
            for number, test in enumerate(tests)
            if number not in bad
            for model in litmus.MODELS
            if test.get(model) is not None
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise Unusable(f"{path}: {error}; expected an object whose 'tests' is a list of litmus tests") from None
    except RecursionError:
        raise Unusable(f"{path}: its lists are nested too deeply; expected conditions of a few levels") from None
    return Checked(
        path,
        "litmus",
        {"litmus": {"agree": sum(said == recorded for _, _, said, recorded in verdicts), "of": len(verdicts)}},
        disagreements=[
            {
                "line": text.count("\n", 0, at) + 1,
                "kind": "litmus",
                "predicted": said,
                "recorded": recorded,
                "reason": f"{name} under {model}",
            }
            for (name, model, said, recorded), at in zip(verdicts, recorded_at, strict=True)
            if said != recorded
        ],
        unreadable=[
            {"line": text.count("\n", 0, begins[number]) + 1, "reason": f"test {number + 1}: {reason}"}
            for number, reason in bad.items()
        ],
        rules="every interleaving, under SC and x86-TSO",
        complete=all(said != litmus.UNKNOWN for _, _, said, _ in verdicts),
    )


def _trace(path: str, raw: bytes, *, scenario: str | None = None, layout: str | None = None) -> Checked:
    found = None if scenario == NO_SCENARIO else scenario or scenario_of(path)
    if found is None:
        return _conform(path, raw, layout)
    try:
        scene = scenarios.parse(read_bytes(found).decode("utf-8", errors="replace"))
        said = replay.check(raw, scene, layout)
        walked = walks.check_walks(trace.read(raw), scene)
        judged = conform.conform(raw, layout)
    except Unusable:
        raise
    except ValueError as error:
        raise Unusable(f"{path} with {found}: {error}") from None
    return Checked(
        path,
        "trace",
        {"walks": {"agree": walked.agree, "of": walked.of}, **said["counts"]},
        disagreements=sorted([*walked.disagreements, *said["disagreements"]], key=lambda wrong: wrong["line"] or 0),
        findings=[*said["findings"], *judged["findings"]],
        unreadable=said["unreadable"],
        scenario=found,
        layout=said["layout"],
        rules="prediction from the scenario alone, and replay rules",
        not_applied=judged["not_applied"],
    )


def _conform(path: str, source: str | bytes, layout: str | None) -> Checked:
    """A trace held against itself alone."""
    judged = conform.conform(source, layout)
    if judged["damage"]:
        raise Unusable(f"{path}: {judged['damage']}")
    return Checked(
        path,
        "trace",
        {"events": {"agree": judged["agree"], "of": judged["of"]}},
        findings=judged["findings"],
        unreadable=judged["unreadable"],
        layout=judged["layout"],
        rules=f"replay rules alone; layout {judged['layout'] or 'not known'}: {judged['layout_reason']}",
        not_applied=judged["not_applied"],
        complete=judged["complete"],
    )


def _begins_as_trace(path: str) -> bool:
    """Whether the first megabyte of a file is of a trace and of no other kind."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if head[:2] == b"\x1f\x8b":
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    except (OSError, zlib.error):
        return False  # the reader of the whole file says what is wrong
    return next((kind for kind, (recognises, _) in KINDS.items() if recognises(head)), None) == "trace"


KINDS: dict[str, tuple[Callable[[bytes], bool], Callable[..., Checked]]] = {
    "error-codes": (lambda raw: codetable.is_table(raw[:_HEAD].decode("utf-8", errors="replace")), _error_codes),
    "litmus": (_is_litmus, _litmus),
    "trace": (lambda raw: len(trace.read(raw[:_HEAD])) > 0, _trace),
}
"""Whether a file's content is of a kind, and how that kind is compared, by the kind's name."""


def check(path: str, **options: Any) -> Checked:
    """Recognise one file by its content and compare it.

    Args:
        path: the file, plain or gzipped; ``-`` is standard input.
        options: for traces, ``scenario`` (a path, or :data:`NO_SCENARIO`) and ``layout``.

    Raises:
        Unusable: the file cannot be read or no kind recognises it; the message says which kinds there are.
    """
    scenario = options.get("scenario")
    alone = scenario == NO_SCENARIO or (scenario is None and scenario_of(path) is None)
    if alone and path != "-" and _begins_as_trace(path):
        try:
            return _conform(path, path, options.get("layout"))  # however long it is
        except OSError as error:
            raise Unusable(f"{path}: {error.strerror or error}") from None
    raw = read_bytes(path)
    for recognises, compare in KINDS.values():
        if recognises(raw):
            return compare(path, raw, **options)
    raise Unusable(f"{path}: not recognised by its content; expected one of: {', '.join(KINDS)}")
