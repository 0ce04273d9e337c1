"""A protocol as readable steps on shared words: one line is one atomic step, and the text is all there is.

The same text is what a chapter prints, what a variant edits, what :mod:`mmu.explore` searches and what a game plays.
Chapter 6 introduces the language with store buffering; chapters 7 to 10 write the protocol of 2012 in it, chapter 5 a
page walk against its freeing, chapter 12 the design that Linux merged. :mod:`mmu.protocols` holds those texts.

A text declares words, then paths, then what must never be seen::

    word spte: w, id(vcpu)                  # fields of one 64-bit word; id is 0 or the mark of a vCPU
    word wp                                 # a word of one bit
    word lock

    fault:
        F0  if spte.w: done                 # read a word, and branch on what was read
        F1  spte.id = me                    # a plain store, here of one byte
        F2  smp_mb
        F3  if wp: done
        F4  cmpxchg spte: (w=0, id=me) -> (w=1, id=0)

    oops: wp and not lock and spte.w

====================================  ==============================================================================
``x = spte`` or ``x = spte.w``        read into a local; ``; if COND: LABEL`` may follow and sees the local
``if COND: LABEL``                    read the one word that COND names, and branch
``wait COND``                         the same, but the actor is blocked until COND holds
``spte = (w=0, id=me)``, ``wp = 1``   a plain store: of the named fields, into the store buffer where there is one
``smp_mb``                            a full barrier
``cmpxchg spte: OLD -> NEW``          locked; compares and writes the fields that are named; ``else LABEL`` may follow
``xchg spte: NEW``                    locked; ``x = xchg spte: NEW; if COND: LABEL`` keeps and judges the old value
``atomic_inc w``, ``atomic_dec w``    locked
``take lock``, ``release lock``       blocked until it is 0, then locked to 1; a plain store of 0
``mark w = 1``                        acts at once and drains nothing: a state of the CPU itself, not of memory
====================================  ==============================================================================

OLD and NEW are ``(field=value, ...)``, ``(x)`` for all the fields that the local ``x`` was read with, ``(x, w=1)`` for
those with one replaced, or a plain value for a word without fields. ``me`` is the actor's own mark. ``word mode[vcpu]``
declares one word for each actor: ``mode[me]`` is its own, and a step labelled ``Z2[r]`` is repeated with ``mode[r]``
for every other actor ``r``. ``done`` ends the path, ``oops`` says that the invariant is broken.

One step is one access to one shared word: what is decided by locals alone belongs to the step that read them, and a
step that would read two words is refused. Guards block, so there are no busy-wait states.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DONE, OOPS = "done", "oops"
VCPU = "vcpu"

_PART = re.compile(r"(?P<name>\w+(?:\[vcpu\])?)\s*(?:\((?P<domain>vcpu|\d+)\))?\s*(?:=\s*(?P<start>\d+))?")
_PATH = re.compile(r"(\w+):$")
_STEP = re.compile(r"(?P<label>\w+(?:\[r\])?)\s+(?P<body>\S.*)$")
_PLACE = r"[A-Za-z_]\w*(?:\[\d+\])?"


class ProgramError(ValueError):
    """A protocol's text cannot be read; the message quotes the line and says what was expected."""


# --- expressions: a little of Python, on ints and on whole arrays alike ---


@dataclass(frozen=True)
class Expression:
    """A condition or value: its text, the names it reads, and a function of ``{name: int or array}``."""

    text: str
    names: frozenset[str]
    value: Callable[[Mapping[str, Any]], Any] = field(compare=False, repr=False)


_COMPARE = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_ARITHMETIC = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b}


@functools.cache
def expression(text: str) -> Expression:
    """Compile a condition such as ``wp and not lock and spte.w``; it then takes ints or arrays by name.

    >>> oops = expression("wp and not lock")
    >>> sorted(oops.names), int(oops.value({"wp": 1, "lock": 0}))
    (['lock', 'wp'], 1)

    Raises:
        ProgramError: anything but names, fields, integers, comparisons, ``and or not``, ``+ -`` and ``done(path)``.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ProgramError(f"{text!r} is no condition or value; expected for example `wp and not spte.w`") from None
    names: set[str] = set()

    def name_of(node: ast.AST) -> str | None:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                return f"{name}[{index}]"
            case ast.Attribute(value=inner, attr=part) if (base := name_of(inner)) is not None:
                return f"{base}.{part}"
            case ast.Call(func=ast.Name(id="done"), args=[ast.Name(id=path)], keywords=[]):
                return f"done({path})"
        return None

    def build(node: ast.AST) -> Callable[[Mapping[str, Any]], Any]:
        if (name := name_of(node)) is not None:
            names.add(name)
            return lambda env: env[name]
        match node:
            case ast.Constant(value=int(number)):
                return lambda env: int(number)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                part = build(inner)
                return lambda env: part(env) == 0
            case ast.BoolOp(op=op, values=values):
                parts = [build(value) for value in values]
                both = (lambda a, b: a & b) if isinstance(op, ast.And) else (lambda a, b: a | b)
                return lambda env: functools.reduce(both, (part(env) != 0 for part in parts))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                a, b, compare = build(left), build(right), _COMPARE[type(op)]
                return lambda env: compare(a(env), b(env))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                a, b, combine = build(left), build(right), _ARITHMETIC[type(op)]
                return lambda env: combine(a(env), b(env))
        raise ProgramError(
            f"{text!r} uses {ast.unparse(node)!r}; expected names, fields, integers, comparisons, and/or/not, + and -"
        )

    value = build(tree)
    return Expression(text.strip(), frozenset(names), value)


# --- words ---


@dataclass(frozen=True)
class Part:
    """One field of a word, or a whole word without fields: full name, how many values, the value at the start."""

    name: str
    size: int | str  # VCPU: as many as there are marks, and 0
    start: int = 0


@dataclass(frozen=True)
class Word:
    """A shared word: one step touches at most one, and a locked step reads and writes it at once."""

    name: str
    parts: tuple[Part, ...]

    @property
    def fields(self) -> bool:
        """Whether the word has named fields."""
        return self.parts[0].name != self.name

    def part(self, short: str) -> str:
        """The full name of a field, ``w`` -> ``spte.w``; an empty name is the word without fields itself."""
        return f"{self.name}.{short}" if short else self.name

    def short(self, name: str) -> str:
        """The other way: ``spte.w`` -> ``w``."""
        return name[len(self.name) + 1 :]

    def show(self, values: Mapping[str, int]) -> str:
        """``spte(w=0, id=1)`` or ``wp=1``."""
        if not self.fields:
            return f"{self.name}={values[self.name]}"
        return f"{self.name}({', '.join(f'{self.short(part.name)}={values[part.name]}' for part in self.parts)})"


def _declare(line: str) -> Word:
    name, colon, fields = (text.strip() for text in line.removeprefix("word ").partition(":"))
    parts = []
    for spec in fields.split(",") if colon else [name]:
        found = _PART.fullmatch(spec.strip())
        if not found or (colon and not _PART.fullmatch(name)):
            raise ProgramError(
                f"{line!r} declares no word; expected `word NAME` or `word NAME: FIELD, FIELD(vcpu), FIELD(3) = 1`"
            )
        domain = found["domain"] or "2"
        full = f"{name}.{found['name']}" if colon else found["name"]
        parts.append(Part(full, domain if domain == VCPU else int(domain), int(found["start"] or 0)))
    return Word(name if colon else parts[0].name, tuple(parts))


# --- steps ---

Record = tuple[tuple[str, Expression], ...]  # ((full name of a part, its value), ...)


@dataclass(frozen=True)
class Step:
    """One atomic step: at most one access to one shared word, and the branch that the access decides.

    ``kind`` is ``read``, ``store``, ``mark``, ``fence`` or ``locked``. A store is buffered where the memory model has
    buffers; a fence and a locked step need the actor's own buffer to be empty.
    """

    label: str
    text: str
    kind: str
    word: Word | None = None
    old: Record = ()
    new: Record = ()
    into: tuple[tuple[str, str], ...] = ()  # ((local, part it is read from), ...)
    guard: Expression | None = None
    condition: Expression | None = None
    target: str = ""  # where the condition leads
    otherwise: str = ""  # where a failed cmpxchg leads
    following: str = DONE
    keeps: tuple[
        tuple[str, frozenset[str]], ...
    ] = ()  # ((label that may come next, locals still read from there), ...)

    @property
    def reads(self) -> bool:
        """Whether what the step does depends on the word's value."""
        return self.kind in ("read", "locked")

    def live(self, label: str) -> frozenset[str]:
        """The locals that are still read once the step has led to this label; the others are forgotten."""
        return dict(self.keeps)[label]

    @property
    def drains(self) -> bool:
        """Whether the step waits for the actor's own store buffer to be empty."""
        return self.kind in ("fence", "locked")

    def act(self, local: Mapping[str, int], seen: Mapping[str, int]) -> Outcome | None:
        """What the step does to the word and where it leads, given locals (``me`` among them) and the word as read.

        Returns None where the step's guard blocks.
        """
        env = {**local, **seen}
        if self.guard is not None and not self.guard.value(env):
            return None
        failed = any(seen[name] != value.value(env) for name, value in self.old)
        writes = {} if failed else {name: int(value.value(env)) for name, value in self.new}
        env.update((name, seen[part]) for name, part in self.into)
        if failed and self.otherwise:
            label = self.otherwise
        elif self.condition is not None and self.condition.value(env):
            label = self.target
        else:
            label = self.following
        return Outcome(writes, failed, label, env)

    def tell(self, seen: Mapping[str, int], outcome: Outcome) -> str:
        """The step in words, with the values that it met: ``F3 reads wp=0``."""
        return f"{self.label} {self._tell(seen, outcome)}"

    def _tell(self, seen: Mapping[str, int], outcome: Outcome) -> str:
        word = self.word
        verb = self.text.split()[0]
        if word is None:
            return self.text
        if verb in ("take", "release"):
            return f"{verb}s {word.name}"
        if self.kind == "read":
            return f"{'waits until' if self.guard else 'reads'} {word.show(seen)}"
        values = {name: value.value(outcome.env) for name, value in self.new}
        new = _show(word, values)
        if self.old:
            old = _show(word, {name: value.value(outcome.env) for name, value in self.old})
            verdict = f"fails on {word.show(seen)}" if outcome.failed else "succeeds"
            return f"cmpxchg {word.name} {old} -> {new} {verdict}"
        if self.kind == "locked":
            return f"{'xchg' if 'xchg' in self.text else verb} {word.name} = {new}, was {word.show(seen)}"
        if len(values) == 1:
            ((name, value),) = values.items()
            return f"sets {name} = {value}"
        return f"stores {word.name} = {new}"


@dataclass(frozen=True)
class Outcome:
    """What one step did: the parts it wrote, whether its cmpxchg failed, the next label, and every name's value."""

    writes: dict[str, int]
    failed: bool
    label: str
    env: Mapping[str, int] = field(repr=False)


def _show(word: Word, values: Mapping[str, int]) -> str:
    if not word.fields:
        return str(values[word.name])
    return f"({', '.join(f'{word.short(name)}={value}' for name, value in values.items())})"


class _Reader:
    """Turns the body of one step into a :class:`Step`; knows the words and which local was read from which word."""

    def __init__(self, words: Mapping[str, Word]) -> None:
        self.words = words
        self.sources: dict[str, Word | None] = {}  # local -> the word it is a copy of, None for a single value

    def word_in(self, names: Iterable[str]) -> Word | None:
        """The one word that these names belong to; two are an error, because one step is one access."""
        words = {name.split(".")[0] for name in names} & set(self.words)
        if len(words) > 1:
            raise ProgramError(
                f"reads {' and '.join(sorted(words))}; one step is one access, so write one step for each"
            )
        return self.words[words.pop()] if words else None

    def check(self, value: Expression, word: Word | None = None) -> Expression:
        """Every name is ``me``, a local that some step reads, or a part of ``word``."""
        known = {"me"} | ({part.name for part in word.parts} if word else set())
        for name in value.names - known:
            base, _, short = name.partition(".")
            if base in self.words:
                here = self.words[base]
                parts = ", ".join(part.name for part in here.parts)
                if name not in {part.name for part in here.parts}:
                    raise ProgramError(f"{name!r} is no part of the word {base}; it has {parts}")
                raise ProgramError(f"{value.text!r} reads the word {base}; read it in a step of its own first")
            if base not in self.sources:
                raise ProgramError(f"{name!r} is neither a word nor a local that was read before")
            source = self.sources[base]
            if short and (source is None or source.part(short) not in {part.name for part in source.parts}):
                raise ProgramError(f"the local {base} has no field {short!r}")
            if not short and source is not None:
                raise ProgramError(f"the local {base} holds a whole word; name one of its fields")
        return value

    def record(self, text: str, word: Word) -> Record:
        """``(w=0, id=me)``, ``(old)``, ``(old, w=1)``, or a plain value for a word without fields."""
        if not word.fields:
            return ((word.name, self.check(expression(text))),)
        try:
            call = ast.parse(f"f{text.strip()}" if text.strip().startswith("(") else "", mode="eval").body
        except SyntaxError:
            call = None
        if (
            not isinstance(call, ast.Call)
            or len(call.args) > 1
            or any(keyword.arg is None for keyword in call.keywords)
        ):
            raise ProgramError(f"{text.strip()!r} is no value of {word.name}; expected (FIELD=VALUE, ...) or (LOCAL)")
        values: dict[str, Expression] = {}
        if call.args:
            local = ast.unparse(call.args[0])
            if self.sources.get(local) != word:
                raise ProgramError(f"{local!r} was not read from {word.name}, so it cannot stand for all its fields")
            values = {part.name: expression(f"{local}.{word.short(part.name)}") for part in word.parts}
        for keyword in call.keywords:
            name = word.part(str(keyword.arg))
            if name not in {part.name for part in word.parts}:
                raise ProgramError(f"{word.name} has no field {keyword.arg!r}")
            values[name] = self.check(expression(ast.unparse(keyword.value)))
        return tuple(values.items())

    def known(self, name: str) -> Word:
        if name not in self.words:
            raise ProgramError(f"{name!r} is no declared word; there are {', '.join(self.words)}")
        return self.words[name]

    def bind(self, local: str, place: str) -> tuple[Word, tuple[tuple[str, str], ...]]:
        """What ``local = place`` copies: ``((local's name, part), ...)``."""
        word = self.known(place.split(".")[0])
        if local in self.words or local in ("me", DONE, OOPS):
            raise ProgramError(f"{local!r} is taken; choose another name for the local")
        if place == word.name and word.fields:
            source, into = word, tuple((f"{local}.{word.short(part.name)}", part.name) for part in word.parts)
        else:
            self.check(expression(place), word)
            source, into = None, ((local, place),)
        if self.sources.setdefault(local, source) != source:
            raise ProgramError(f"the local {local} is read from two different words; use two names")
        return word, into

    def step(self, label: str, text: str) -> Step:
        body, _, tail = (part.strip() for part in text.partition(";"))
        step = self.body(label, text, body)
        if tail:
            match = re.fullmatch(r"if (.+):\s*(\w+)", tail)
            if not match or step.condition is not None:
                raise ProgramError(f"{tail!r} cannot follow; expected `if COND: LABEL`")
            step = replace(step, condition=self.check(expression(match[1])), target=match[2])
        return step

    def body(self, label: str, text: str, body: str) -> Step:
        def match(pattern: str) -> re.Match[str] | None:
            return re.fullmatch(pattern, body)

        if body == "smp_mb":
            return Step(label, text, "fence")
        if found := match(rf"(take|release) ({_PLACE})"):
            word = self.known(found[2])
            if word.fields:
                raise ProgramError(f"{word.name} has fields; a lock is a word without")
            if found[1] == "release":
                return Step(label, text, "store", word, new=((word.name, expression("0")),))
            return Step(
                label, text, "locked", word, new=((word.name, expression("1")),), guard=expression(f"not {word.name}")
            )
        if found := match(r"if (.+):\s*(\w+)"):
            condition = expression(found[1])
            word = self.word_in(condition.names)
            if word is None:
                raise ProgramError(
                    "branches without reading a word; put `; if COND: LABEL` behind the step that read it"
                )
            return Step(label, text, "read", word, condition=self.check(condition, word), target=found[2])
        if found := match(r"wait (.+)"):
            guard = expression(found[1])
            word = self.word_in(guard.names)
            if word is None:
                raise ProgramError("waits for no word; expected `wait COND` on one shared word")
            return Step(label, text, "read", word, guard=self.check(guard, word))
        if found := match(rf"cmpxchg ({_PLACE}):\s*(.+?)\s*->\s*(.+?)(?:\s+else (\w+))?"):
            word = self.known(found[1])
            old, new = self.record(found[2], word), self.record(found[3], word)
            return Step(label, text, "locked", word, old=old, new=new, otherwise=found[4] or "")
        if found := match(rf"(?:(\w+) = )?xchg ({_PLACE}):\s*(.+)"):
            word, into = self.bind(found[1], found[2]) if found[1] else (self.known(found[2]), ())
            return Step(label, text, "locked", word, new=self.record(found[3], word), into=into)
        if found := match(rf"atomic_(inc|dec) ({_PLACE}(?:\.\w+)?)"):
            word = self.known(found[2].split(".")[0])
            sum_ = expression(f"{found[2]} {'+' if found[1] == 'inc' else '-'} 1")
            return Step(label, text, "locked", word, new=((found[2], self.check(sum_, word)),))
        if found := match(rf"(mark )?({_PLACE})(\.\w+)?\s*=\s*([^=].*)"):
            kind, place, part, value = "mark" if found[1] else "store", found[2], found[3] or "", found[4]
            if place in self.words:
                word = self.words[place]
                if part:
                    self.check(expression(place + part), word)
                    new = ((place + part, self.check(expression(value))),)
                else:
                    new = self.record(value, word)
                return Step(label, text, kind, word, new=new)
            if not part and kind == "store":
                if not re.fullmatch(rf"{_PLACE}(?:\.\w+)?", value):
                    raise ProgramError(f"{value!r} is not one word or one field of one; a read copies it as it is")
                word, into = self.bind(place, value)
                return Step(label, text, "read", word, into=into)
            raise ProgramError(f"{place!r} is no declared word; there are {', '.join(self.words)}")
        raise ProgramError("is no step; the module's docstring lists what a step can be")


def _names(record: Record) -> set[str]:
    return {name for _, value in record for name in value.names}


def _keep_live(steps: list[Step], observed: frozenset[str]) -> list[Step]:
    """Give each step the locals that are still read where it leads; whatever else it knew is forgotten there."""
    place = {step.label: number for number, step in enumerate(steps)}
    live = [frozenset[str]()] * len(steps)

    def after(step: Step) -> dict[str, frozenset[str]]:
        labels = {step.following, step.target, step.otherwise} - {""}
        return {label: live[place[label]] if label in place else observed for label in sorted(labels)}

    while True:
        before = list(live)
        for number in reversed(range(len(steps))):
            step = steps[number]
            uses = step.condition.names if step.condition else frozenset()
            defined = {name for name, _ in step.into}
            needed = _names(step.old) | _names(step.new) | (step.guard.names if step.guard else set())
            shared = {part.name for part in step.word.parts} if step.word else set()
            later = frozenset().union(*after(step).values())
            live[number] = frozenset((needed | ((uses | later) - defined)) - shared - {"me"})
        if live == before:
            return [replace(step, keeps=tuple(after(step).items())) for step in steps]


# --- the program ---


@functools.lru_cache(maxsize=256)
def _lines(text: str) -> tuple[tuple[Word, ...], dict[str, tuple[tuple[str, str], ...]], str]:
    """Words, paths as (label, body) lines, and the invariant's text."""
    words: list[Word] = []
    paths: dict[str, list[tuple[str, str]]] = {}
    bad = ""
    path = None
    for raw in text.splitlines():
        line = raw.partition("#")[0].rstrip()
        if not line.strip():
            continue
        if line.startswith("word"):
            word = _declare(line)
            if word.name in {other.name for other in words}:
                raise ProgramError(f"{line!r}: the word {word.name} is declared twice")
            words.append(word)
        elif line.startswith("oops:"):
            bad = line.removeprefix("oops:").strip()
        elif found := _PATH.match(line):
            if found[1] in paths:
                raise ProgramError(f"{line!r}: there are two paths of this name")
            path = paths.setdefault(found[1], [])
        elif line[0].isspace() and path is not None and (found := _STEP.match(line.strip())):
            path.append((found["label"], found["body"]))
        else:
            raise ProgramError(
                f"{line!r} is neither a word, nor `path:`, nor an indented `LABEL STEP`, nor `oops: COND`"
            )
    if not words or not paths:
        raise ProgramError("a protocol needs at least one `word NAME` and one `path:` with steps")
    return tuple(words), {name: tuple(steps) for name, steps in paths.items()}, bad


@functools.lru_cache(maxsize=1024)
def _path(
    words: tuple[Word, ...], name: str, lines: tuple[tuple[str, str], ...], observed: frozenset[str]
) -> tuple[Step, ...]:
    """The steps of one path of one actor, linked."""
    reader = _Reader({word.name: word for word in words})
    if not lines:
        raise ProgramError(f"the path {name} has no steps")
    steps: list[Step] = []
    for label, body in lines:
        try:
            steps.append(reader.step(label, body))
        except ProgramError as error:
            raise ProgramError(f"{name}: `{label} {body}` {error}") from None
    labels = [step.label for step in steps]
    for label in labels:
        if labels.count(label) > 1 or label in (DONE, OOPS):
            raise ProgramError(
                f"{name}: the label {label} {'is reserved' if label in (DONE, OOPS) else 'stands twice'}"
            )
    first = {label.partition("[")[0]: label for label in reversed(labels)}  # a repeated step is entered at its first

    def resolve(step: Step, label: str) -> str:
        if label in ("", DONE, OOPS):
            return label
        if label not in first:
            raise ProgramError(
                f"{name}: `{step.label} {step.text}` leads to {label}; there are {', '.join(first)}, done, oops"
            )
        return first[label]

    linked = [
        replace(step, target=resolve(step, step.target), otherwise=resolve(step, step.otherwise), following=following)
        for step, following in zip(steps, [*labels[1:], DONE], strict=True)
    ]
    return tuple(_keep_live(linked, observed))


class Program:
    """A protocol's text, and who runs which of its paths.

    Args:
        text: words, paths and invariant, in the language of this module.
        actors: for each vCPU the names of the paths that it may run.
        forever: each actor chooses one of its paths again and again; otherwise each runs one path once.
        marks: each vCPU's own mark, ``me`` in the text; 1, 2, 3, ... unless given. Equal marks are not unique ones.
        observe: locals whose last value counts when a path is done (litmus tests look at their registers).
        name: what to call it.

    Raises:
        ProgramError: the text cannot be read; the message quotes the line.

    >>> program = Program('''
    ... word flag
    ... set:
    ...     S0  flag = 1
    ... see:
    ...     L0  if flag: oops
    ... ''', actors=[["set"], ["see"]])
    >>> [step.kind for step in program.paths[1]["see"]]
    ['read']
    """

    def __init__(
        self,
        text: str,
        actors: Sequence[Sequence[str]],
        *,
        forever: bool = False,
        marks: Sequence[int] | None = None,
        observe: Iterable[str] = (),
        name: str = "",
    ) -> None:
        declared, lines, bad = _lines(text)
        self.text, self.name, self.forever = text, name, forever
        self.actors = tuple(tuple(paths) for paths in actors)
        self.marks = tuple(marks) if marks is not None else tuple(range(1, len(self.actors) + 1))
        self.observe = frozenset(observe)
        if not self.actors or not all(self.actors):
            raise ProgramError("every actor needs a path to run, and there must be one actor at least")
        if len(self.marks) != len(self.actors) or min(self.marks) < 1:
            raise ProgramError(
                f"marks are {self.marks}; expected one for each of {len(self.actors)} actors, none below 1"
            )
        self.words = tuple(
            Word(each(word.name), tuple(Part(each(part.name), self._size(part), part.start) for part in word.parts))
            for word in declared
            for each in self._copies(word)
        )
        self.marked = frozenset(  # parts that hold a vCPU's mark
            each(part.name)
            for word in declared
            for each in self._copies(word)
            for part in word.parts
            if part.size == VCPU
        )
        for part in self.parts:
            if not 0 <= part.start < part.size:
                raise ProgramError(f"{part.name} starts at {part.start}; its values are 0 to {part.size - 1}")
        self.paths: tuple[dict[str, tuple[Step, ...]], ...] = tuple(
            {path: self._bind(path, lines, vcpu) for path in paths} for vcpu, paths in enumerate(self.actors)
        )
        self.oops = expression(bad) if bad else expression("0")
        known = {part.name for part in self.parts} | {f"done({path})" for path in lines}
        for unknown in sorted(self.oops.names - known):
            raise ProgramError(f"oops: {bad!r} names {unknown!r}; there are {', '.join(sorted(known))}")

    def _copies(self, word: Word) -> list[Callable[[str], str]]:
        """How the names of a word are spelled: as they are, or once for each vCPU."""
        if "[vcpu]" not in word.name:
            return [str]
        return [lambda name, vcpu=vcpu: name.replace("[vcpu]", f"[{vcpu}]") for vcpu in range(len(self.actors))]

    def _size(self, part: Part) -> int:
        return max(self.marks) + 1 if part.size == VCPU else int(part.size)

    def _bind(self, path: str, lines: Mapping[str, tuple[tuple[str, str], ...]], vcpu: int) -> tuple[Step, ...]:
        if path not in lines:
            raise ProgramError(f"there is no path {path!r}; the text has {', '.join(lines)}")
        bound = []
        for label, body in lines[path]:
            mine = body.replace("[me]", f"[{vcpu}]")
            if label.endswith("[r]"):
                others = [other for other in range(len(self.actors)) if other != vcpu]
                bound += [(label.replace("[r]", f"[{other}]"), mine.replace("[r]", f"[{other}]")) for other in others]
            else:
                bound.append((label, mine))
        return _path(self.words, path, tuple(bound), self.observe)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part of every word, in the order of the text."""
        return tuple(part for word in self.words for part in word.parts)

    @property
    def unique(self) -> bool:
        """Whether no two vCPUs share a mark."""
        return len(set(self.marks)) == len(self.marks)


def edit(text: str, changes: Mapping[str, str | None]) -> str:
    """A variant of a protocol: the step of each named label replaced by another, by several lines, or left out (None).

    Where a step is left out, jumps to it lead to the step after it.

    >>> print(edit("word w\\npath:\\n    A  w = 1\\n    B  smp_mb   # drain\\n", {"B": None, "A": "w = 0"}))
    word w
    path:
        A  w = 0

    Raises:
        ProgramError: no step of that label.
    """
    left, lines = dict(changes), []
    gone: list[str] = []  # steps left out, since the last one kept: jumps to them go to the next one kept
    for line in text.splitlines():
        found = re.match(r"(\s+)(\w+(?:\[r\])?)(\s+)\S", line)
        if not found and line.strip():  # the path is over
            lines, gone = _redirect(lines, gone, DONE), []
        if not found or found[2] not in left:
            lines.append(line)
        elif (body := left.pop(found[2])) is None:
            gone.append(found[2])
            continue
        else:
            first, *more = body.split("\n")
            lines += [f"{found[1]}{found[2]}{found[3]}{first}", *(found[1] + step for step in more)]
        if found:
            lines, gone = _redirect(lines, gone, found[2].removesuffix("[r]")), []
    if left:
        raise ProgramError(f"no step is labelled {', '.join(left)}")
    return "\n".join(_redirect(lines, gone, DONE))


def _redirect(lines: list[str], gone: Iterable[str], label: str) -> list[str]:
    for old in gone:
        lines = [re.sub(rf"(: |else ){old}(?=\s*(#|$))", rf"\g<1>{label}", line) for line in lines]
    return lines
