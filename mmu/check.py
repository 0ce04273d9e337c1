"""Recorded answers held against the package's own: what kind of record a file is, and how much of it agrees.

The one idea: one list of kinds, each with a way to recognise its text and a way to compare it. ``python -m mmu check``
prints what comes back; chapters call :func:`check` on a file and look at the disagreements.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmu import codetable


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
    """The content of a file, or of standard input for ``-``; gzip is undone.

    Raises:
        Unusable: it cannot be opened, or its compressed data end or break off too early.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise Unusable(f"{path}: its compressed data cannot be undone ({error}); fetch or compress it again") from None


def _error_codes(path: str, text: str, **_: Any) -> Checked:
    try:
        table = codetable.check_table(text)
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from None
    return Checked(
        path,
        "error-codes",
        {"error-codes": {"agree": int(table.agree.sum()), "of": len(table.agree)}},
        disagreements=table.disagreements(),
        unreadable=[{"line": line, "reason": reason} for line, reason in table.unreadable],
    )


KINDS: dict[str, tuple[Callable[[str], bool], Callable[..., Checked]]] = {
    "error-codes": (codetable.is_table, _error_codes),
}
"""Whether a text's beginning is of a kind, and how that kind is compared, by the kind's name."""


def check(path: str, **options: Any) -> Checked:
    """Recognise one file by its content and compare it.

    Raises:
        Unusable: the file cannot be read or no kind recognises it; the message says which kinds there are.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    for recognises, compare in KINDS.values():
        if recognises(text[:4096]):
            return compare(path, text, **options)
    raise Unusable(f"{path}: not recognised by its content; expected one of: {', '.join(KINDS)}")
