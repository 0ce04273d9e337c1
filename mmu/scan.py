"""``sscanf`` over many lines at once: one format, one cursor a line, and numpy moves all the cursors together.

A kernel tracepoint prints with one ``printf`` format, so all lines of one event have one shape; what differs is the
numbers. :class:`Format` turns such a shape into arrays, one a field, without a Python loop over lines
(:mod:`mmu.trace` has the shapes; chapter 13 shows the trick on ten lines).

The language of formats:

=================== ===================================================================================================
``text``            these bytes
a blank             at least one blank here (or just passed); any number of blanks is taken
``[...]``           all of this, or nothing; fields in it are *missing* where it is nothing
``{a:d}``           decimal (hexadecimal after ``0x``), sign allowed: int64, missing is -1
``{a:x}``           hexadecimal, ``0x`` optional: uint64, missing is :data:`MISSING`
``{a:p}``           as ``x``; a pointer that the kernel hid (``(____ptrval____)``, ``(null)``) is missing
``{a:P=1,W=2}``     flag names and ``0x`` numbers joined by ``|``, perhaps none: uint64, their union
``{a:sync|unsync}`` one of these texts, longest first: int8, its position; missing is -1
``{a:s24}``         bytes up to the text that follows in the format, or to the end of the line: S24, missing is ``b""``
``{a:w24}``         bytes up to the next blank, at least one: S24, missing is ``b""``
=================== ===================================================================================================

A field without a name, ``{:x}``, has to be there and is not kept. Blanks are space, tab, NUL and carriage return.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

MISSING = (1 << 64) - 1
"""All ones, which no rip, gfn, spte or error code is; a uint64 field holds it in lines that did not carry the field."""

PADDING = 512
"""Bytes of newline that a :class:`Text` needs behind its last line, so that no cursor can leave it."""

_BLANKS = b" \t\0\r"
_LONGEST_NUMBER = 64  # digits, leading zeros included

Cursors = NDArray[np.intp]


def charset(characters: bytes) -> NDArray[np.bool_]:
    """A table over bytes: which are in the set."""
    table = np.zeros(256, dtype=np.bool_)
    table[np.frombuffer(characters, dtype=np.uint8)] = True
    return table


BLANK = charset(_BLANKS)
_WORD = ~(BLANK | charset(b"\n"))
_DIGIT = np.full(256, 255, dtype=np.uint8)  # the value of a hexadecimal digit, 255 for any other byte
for _value, _characters in enumerate("0 1 2 3 4 5 6 7 8 9 aA bB cC dD eE fF".split()):
    _DIGIT[list(_characters.encode())] = _value


class Text:
    """Lines of text as one array of bytes, with newlines before and behind; positions in it are *cursors*."""

    def __init__(self, lines: bytes) -> None:
        if not lines.endswith(b"\n"):
            lines += b"\n"
        self.raw = b"\n" + lines + b"\n" * PADDING
        self.bytes = np.frombuffer(self.raw, dtype=np.uint8)
        newlines = np.flatnonzero(self.bytes[: len(lines) + 1] == ord("\n")).astype(np.intp)
        self.starts: Cursors = newlines[:-1] + 1  # (line,)
        self.ends: Cursors = newlines[1:]  # (line,) position of each line's newline
        self._found: dict[bytes, Cursors] = {b"\n": self.ends}

    def line_of(self, at: Cursors) -> NDArray[np.intp]:
        """The number, from 0, of the line that each cursor is on."""
        return np.searchsorted(self.starts, at, side="right") - 1

    def skip(self, at: Cursors, table: NDArray[np.bool_], *, step: int = 1, most: int = 256) -> Cursors:
        """Move each cursor over bytes of ``table``, forwards (``step`` 1) or backwards (-1), over ``most`` at most."""
        at = at.copy()
        moving = table[self.bytes[at]]
        while most and 4 * np.count_nonzero(moving) > len(at):  # while many move, whole arrays are the quickest
            at += np.intp(step) * moving
            moving &= table[self.bytes[at]]
            most -= 1
        few = np.flatnonzero(moving)
        while most and few.size:
            at[few] += step
            few = few[table[self.bytes[at[few]]]]
            most -= 1
        return at

    def looking_at(self, at: Cursors, word: bytes) -> NDArray[np.bool_]:
        """Which cursors stand at ``word``."""
        found = self.bytes[at] == word[0]
        for k, byte in enumerate(word[1:], start=1):
            found &= self.bytes[at + k] == byte
        return found

    def next(self, at: Cursors, word: bytes) -> Cursors:
        """Where ``word`` next occurs at or behind each cursor; the end of the text if nowhere."""
        if word not in self._found:
            rare = len(word) - len(word.lstrip())  # blanks are everywhere: look for what follows them
            places = np.flatnonzero(self.bytes[1:-PADDING] == word[rare]).astype(np.intp) + 1 - rare
            places = places[self.looking_at(places, word)]
            self._found[word] = np.append(places, np.intp(len(self.bytes) - 1))
        places = self._found[word]
        return places[np.searchsorted(places, at)]

    def trim(self, at: Cursors, end: Cursors) -> Cursors:
        """Move each ``end`` back over the blanks before it, though not beyond ``at``."""
        return np.maximum(self.skip(end - 1, BLANK, step=-1) + 1, at)

    def cut(self, at: Cursors, end: Cursors, width: int) -> NDArray[np.bytes_]:
        """The text between two cursors without the blanks behind it, at most ``width`` bytes: dtype ``S{width}``."""
        end = self.trim(at, end)
        windows = np.ndarray(len(self.bytes) - width + 1, dtype=f"S{width}", buffer=self.bytes, strides=(1,))
        cut = np.ascontiguousarray(windows[np.minimum(at, len(windows) - 1)])
        cut.view(np.uint8).reshape(len(cut), width)[np.arange(width, dtype=np.intp) >= (end - at)[:, None]] = 0
        return cut

    def number(
        self, at: Cursors, base: int | NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint64], Cursors, NDArray[np.bool_]]:
        """Read the digits under each cursor: value, cursor behind them, and whether the value left 64 bits."""
        at = at.copy()
        value = np.zeros(len(at), dtype=np.uint64)
        over = np.zeros(len(at), dtype=np.bool_)
        factor = np.asarray(base, dtype=np.uint64)
        digit = _DIGIT[self.bytes[at]]
        reading = digit < base
        for k in range(_LONGEST_NUMBER):
            if not reading.any():
                break
            if k >= 15:  # 15 digits fit any base up to 16
                room = (np.uint64(MISSING) - digit) // factor
                over |= reading & (value > room)
            value = np.where(reading, value * factor + digit, value)
            at += reading
            digit = _DIGIT[self.bytes[at]]
            reading &= digit < base
        return value, at, over | reading


class Match:
    """How far a format got with each cursor, and what it found: one entry a cursor in each array.

    Attributes:
        at: where each cursor stands.
        ok: whether everything matched so far.
        columns: the fields, by name.
        expected: index into :attr:`Format.expectations` of the first part that was missed, -1 where none was.
        missed_at: where that was.
    """

    def __init__(self, at: Cursors, ok: NDArray[np.bool_] | None = None) -> None:
        self.at = at
        self.ok = np.ones(len(at), dtype=np.bool_) if ok is None else ok
        self.columns: dict[str, NDArray[np.generic]] = {}
        self.expected = np.full(len(at), -1, dtype=np.int16)
        self.missed_at = at.copy()

    def fail(self, good: NDArray[np.bool_], expectation: int) -> None:
        """Lines that matched so far and are not ``good`` missed the expectation of this number."""
        if good.all():
            return
        missed = self.ok & ~good & (self.missed_at <= self.at)  # an option that got further says more
        self.expected[missed] = expectation
        self.missed_at[missed] = self.at[missed]
        self.ok = self.ok & good

    def option(self, inner: Match) -> None:
        """Take over what an option found, and remember where it failed if it got further than any before."""
        for name, column in inner.columns.items():
            before = self.columns.get(name, np.array(missing_value(column.dtype), dtype=column.dtype))
            self.columns[name] = column if inner.ok.all() else np.where(inner.ok, column, before)
        if not inner.ok.all():
            further = self.ok & ~inner.ok & (inner.missed_at > np.maximum(self.missed_at, self.at + 1))
            self.expected = np.where(further, inner.expected, self.expected)
            self.missed_at = np.where(further, inner.missed_at, self.missed_at)
        self.at = np.where(inner.ok, inner.at, self.at)


class Format:
    """A compiled format; see the module's docstring for the language.

    >>> match = Format("vcpu {vcpu:d}[, rip 0x{rip:x}]").scan(b"vcpu 1, rip 0xfff0\\nvcpu 2\\nvcpu two\\n")
    >>> match["vcpu"].tolist(), [hex(rip) for rip in match["rip"].tolist()]
    ([1, 2], ['0xfff0', '0xffffffffffffffff'])
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.dtypes: dict[str, np.dtype] = {}
        self.expectations: list[str] = []
        self._steps = self._compile(re.findall(r"\{[^}]*\}|[\[\]]|[ ]+|[^{}\[\] ]+", text))
        self._end = self._expect("the end of the line")
        last, *arguments = self._steps[-1]
        self.open = last == self._maybe or (last == self._choice and any(not text for _, text in arguments[1]))

    def __repr__(self) -> str:
        return f"Format({self.text!r})"

    def _expect(self, what: str) -> int:
        self.expectations.append(what)
        return len(self.expectations) - 1

    def _compile(self, tokens: list[str]) -> list[tuple]:
        steps: list[tuple] = []
        while tokens and tokens[0] != "]":
            token = tokens.pop(0)
            if token == "[":
                steps.append((self._maybe, self._compile(tokens)))
                tokens.pop(0)
            elif token[0] == " ":
                steps.append((self._blank, self._expect("a blank")))
            elif token[0] != "{":
                steps.append((self._word, token.encode(), self._expect(repr(token))))
            else:
                name, _, kind = token[1:-1].partition(":")
                steps.append(self._field(name, kind, tokens))
        return steps

    def _field(self, name: str, kind: str, following: list[str]) -> tuple:
        if kind == "d":
            self._declare(name, np.int64)
            return (self._decimal, name, self._expect(f"a number ({name})"), self._expect(f"{name} within 64 bits"))
        if kind in ("x", "p"):
            self._declare(name, np.uint64)
            too_big = self._expect(f"{name} within 64 bits")
            return (self._hexadecimal, name, kind == "p", self._expect(f"a hexadecimal number ({name})"), too_big)
        if "=" in kind:
            self._declare(name, np.uint64)
            flags = {flag.encode(): int(bit, 0) for flag, bit in (part.split("=") for part in kind.split(","))}
            expected = self._expect(f"a flag or a number behind | ({name})")
            return (self._flags, name, flags, expected, self._expect(f"{name} within 64 bits"))
        if "|" in kind:
            self._declare(name, np.int8)
            choices = [choice.encode() for choice in kind.split("|")]
            longest_first = sorted(range(len(choices)), key=lambda i: -len(choices[i]))
            return (
                self._choice,
                name,
                [(i, choices[i]) for i in longest_first],
                self._expect(f"one of {kind} ({name})"),
            )
        width = int(kind[1:])
        self._declare(name, np.dtype(f"S{width}"))
        too_long = self._expect(f"{name} of at most {width} bytes")
        if kind[0] == "w":
            return (self._text, name, width, None, self._expect(f"a word ({name})"), too_long)
        stop = "\n"
        for before, token in zip(["", *following], following, strict=False):
            if token.strip() and token[0] not in "[]{":
                stop = " " * (before.strip() == "") * bool(before) + token
                break
        return (self._text, name, width, stop.encode(), self._expect(f"{stop!r} behind {name}"), too_long)

    def _declare(self, name: str, dtype: type | np.dtype) -> None:
        if name:
            self.dtypes[name] = np.dtype(dtype)

    def match(self, text: Text, at: Cursors) -> Match:
        """Match every cursor; a match has to reach the end of its line."""
        match = Match(at)
        self._run(self._steps, text, match)
        match.at = text.skip(match.at, BLANK)
        match.fail(text.bytes[match.at] == ord("\n"), self._end)
        return match

    def scan(self, lines: bytes) -> dict[str, NDArray[np.generic]]:
        """The fields of those lines that match, for small texts and examples."""
        text = Text(lines)
        match = self.match(text, text.skip(text.starts, BLANK))
        return {name: column[match.ok] for name, column in match.columns.items()}

    def _run(self, steps: list[tuple], text: Text, match: Match) -> None:
        for step, *arguments in steps:
            step(text, match, *arguments)

    def _maybe(self, text: Text, match: Match, steps: list[tuple]) -> None:
        inner = Match(match.at, match.ok)
        self._run(steps, text, inner)
        match.option(inner)

    def _blank(self, text: Text, match: Match, expectation: int) -> None:
        here = BLANK[text.bytes[match.at]]
        if not here.all():
            match.fail(here | BLANK[text.bytes[match.at - 1]], expectation)
        at = match.at + here
        match.at = text.skip(at, BLANK) if BLANK[text.bytes[at]].any() else at  # nearly always one blank

    def _word(self, text: Text, match: Match, word: bytes, expectation: int) -> None:
        found = text.looking_at(match.at, word)
        match.fail(found, expectation)
        match.at = match.at + len(word) * found

    def _decimal(self, text: Text, match: Match, name: str, expectation: int, too_big: int) -> None:
        negative = text.bytes[match.at] == ord("-")
        at = match.at + negative
        hexadecimal = text.looking_at(at, b"0x")
        base = np.where(hexadecimal, np.uint8(16), np.uint8(10)) if hexadecimal.any() else 10
        at += 2 * hexadecimal
        value, end, over = text.number(at, base)
        match.fail(end > at, expectation)
        match.fail(~over & (hexadecimal | (value < np.uint64(1 << 63))), too_big)
        match.at = np.where(end > at, end, match.at)
        if name:
            signed = value.view(np.int64)
            match.columns[name] = np.where(negative, -signed, signed) if negative.any() else signed

    def _hexadecimal(self, text: Text, match: Match, name: str, pointer: bool, expectation: int, too_big: int) -> None:
        at = match.at
        if (text.bytes[at] == ord("0")).any():
            at = at + 2 * (text.looking_at(at, b"0x") | text.looking_at(at, b"0X"))
        value, end, over = text.number(at, 16)
        good = end > at
        if pointer and not good.all():
            close = text.next(at, b")")
            hidden = ~good & (text.bytes[at] == ord("(")) & (close < text.next(at, b"\n"))
            value, end, good = (
                np.where(hidden, np.uint64(MISSING), value),
                np.where(hidden, close + 1, end),
                good | hidden,
            )
        match.fail(good, expectation)
        match.fail(~over, too_big)
        match.at = np.where(good, end, match.at)
        if name:
            match.columns[name] = value

    def _flags(
        self, text: Text, match: Match, name: str, flags: dict[bytes, int], expectation: int, too_big: int
    ) -> None:
        value = np.zeros(len(match.at), dtype=np.uint64)
        at = match.at.copy()
        reading = match.ok.copy()
        over = np.zeros(len(at), dtype=np.bool_)
        broken = np.zeros(len(at), dtype=np.bool_)
        while reading.any():
            taken = np.zeros(len(at), dtype=np.bool_)
            for flag, bit in flags.items():
                here = reading & ~taken & text.looking_at(at, flag)
                value[here] |= np.uint64(bit)
                at += len(flag) * here
                taken |= here
            number = np.flatnonzero(reading & ~taken & text.looking_at(at, b"0x"))
            if number.size:
                bits, end, too_wide = text.number(at[number] + 2, 16)
                value[number] |= bits
                over[number] |= too_wide
                at[number] = end
                taken[number] = True
            broken |= reading & ~taken & (text.bytes[at - 1] == ord("|"))
            reading = taken & (text.bytes[at] == ord("|"))
            at += reading
        match.fail(~broken, expectation)
        match.fail(~over, too_big)
        match.at = at
        if name:
            match.columns[name] = value

    def _choice(self, text: Text, match: Match, name: str, choices: list[tuple[int, bytes]], expectation: int) -> None:
        value = np.full(len(match.at), -1, dtype=np.int8)
        at = match.at.copy()
        for i, choice in choices:
            here = value < 0
            if choice:
                here &= text.looking_at(match.at, choice)
            value[here] = i
            at += len(choice) * here
        match.fail(value >= 0, expectation)
        match.at = at
        if name:
            match.columns[name] = value

    def _text(
        self, text: Text, match: Match, name: str, width: int, stop: bytes | None, expectation: int, too_long: int
    ) -> None:
        line_end = text.next(match.at, b"\n")
        if stop is None:
            end = text.skip(match.at, _WORD, most=width + 1)
            match.fail(end > match.at, expectation)
        else:
            end = line_end if stop == b"\n" else text.next(match.at, stop)
            match.fail(end <= line_end, expectation)
            match.at = text.skip(match.at, BLANK)
            end = np.clip(end, match.at, line_end)
        match.fail(text.trim(match.at, end) - match.at <= width, too_long)
        if name:
            match.columns[name] = text.cut(match.at, end, width)
        match.at = end


def missing_value(dtype: np.dtype) -> int | bytes:
    """What a field of this dtype holds in lines that did not carry it."""
    return {"i": -1, "u": MISSING, "S": b""}[dtype.kind]
