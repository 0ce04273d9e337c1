"""Litmus tests: small programs with a question, and the answer under x86-TSO and sequential consistency.

A test asks whether some final state that satisfies its condition can be reached. :func:`run` answers thousands of
tests as one batch, all their states in one array; :func:`check` holds the answers against recorded ones;
:func:`program` makes a test a :class:`mmu.program.Program`, so that a game can play it. Chapter 6 is about the test SB.

The neutral form of a test is a dict::

    {"name": "SB", "threads": [[["W", "x", 1], ["R", "rax", "y"]], [["W", "y", 1], ["R", "rax", "x"]]], "init": {},
     "exists": ["and", ["eq", "0:rax", 0], ["eq", "1:rax", 0]], "tso": "allowed", "sc": "forbidden"}

``["W", var, value]`` is a plain store, ``["R", reg, var]`` a load, ``["F"]`` an MFENCE, ``["X", reg, var, value]`` a
locked XCHG. ``exists`` nests ``and``, ``or`` and ``not`` over ``["eq", "thread:reg" or var, value]``; what the test
does not name is 0. ``init`` gives other values to start with. A state is final when every thread has finished and every
store buffer is drained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.hashset import HashSet
from mmu.program import Program

ALLOWED, FORBIDDEN, UNKNOWN = "allowed", "forbidden", "unknown"
MODELS = ("sc", "tso")
MAX_STATES = 20_000_000
_CHUNK = 1 << 15

_END, _W, _R, _F, _X = range(5)
_FORMS = {"W": "['W', var, value]", "R": "['R', reg, var]", "F": "['F']", "X": "['X', reg, var, value]"}
_EQ, _AND, _OR, _NOT = range(4)


class LitmusError(ValueError):
    """A litmus test is not in the neutral form; the message names the test and what was expected."""


@dataclass
class Answers:
    """What the tests allow; every array is (test, model), the models in the order asked for."""

    verdicts: NDArray[np.object_]  # "allowed", "forbidden", or "unknown" where a bound stopped the search
    finals: NDArray[np.int64]  # different final states
    states: NDArray[np.int64]  # different states


# --- reading a test ---


def _int(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LitmusError(f"{what} is {value!r}; expected an integer")
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise LitmusError(f"{what} is {value!r}; expected a name")
    return value


@dataclass
class _Test:
    """One test with its names numbered: variables, registers and values each have a place of their own."""

    vars: dict[str, int] = field(default_factory=dict)
    regs: dict[str, int] = field(default_factory=dict)  # "thread:reg" -> column
    values: dict[int, int] = field(default_factory=lambda: {0: 0})
    ops: list[list[tuple[int, int, int, int]]] = field(default_factory=list)  # (kind, var, value, reg) of each thread
    init: list[tuple[str, int]] = field(default_factory=list)
    question: list[tuple[int, str, int]] = field(
        default_factory=list
    )  # postfix: (_EQ, name, value) or (operator, "", 0)

    def var(self, name: Any) -> int:
        return self.vars.setdefault(_name(name, "a variable"), len(self.vars))

    def value(self, value: Any) -> int:
        return self.values.setdefault(_int(value, "a value"), len(self.values))

    def op(self, thread: int, op: Any) -> tuple[int, int, int, int]:
        """Number one instruction."""
        match op:
            case ["W", var, value]:
                return _W, self.var(var), self.value(value), 0
            case ["R", reg, var]:
                return _R, self.var(var), 0, self.reg(thread, reg)
            case ["F"]:
                return _F, 0, 0, 0
            case ["X", reg, var, value]:
                return _X, self.var(var), self.value(value), self.reg(thread, reg)
        kind = op[0] if isinstance(op, Sequence) and not isinstance(op, str) and op else op
        form = _FORMS.get(kind) if isinstance(kind, str) else None
        raise LitmusError(f"thread {thread}: {op!r} is no instruction; expected {form or ' or '.join(_FORMS.values())}")

    def reg(self, thread: int, name: Any) -> int:
        return self.regs.setdefault(f"{thread}:{_name(name, 'a register')}", len(self.regs))

    def ask(self, condition: Any) -> None:
        """Append a condition, turned into postfix so that all tests' conditions can be judged in step."""
        match condition:
            case ["eq", name, value]:
                self.question.append((_EQ, _name(name, "the name in eq"), _int(value, "the value in eq")))
            case ["not", inner]:
                self.ask(inner)
                self.question.append((_NOT, "", 0))
            case ["and" | "or" as how, *parts]:
                if not parts:  # nothing to satisfy, or no way to: a missing name is 0, so this is a constant
                    self.question.append((_EQ, "", 0 if how == "and" else 1))
                for number, part in enumerate(parts):
                    self.ask(part)
                    if number:
                        self.question.append((_AND if how == "and" else _OR, "", 0))
            case _:
                raise LitmusError(
                    f"exists: {condition!r} is no condition; expected ['eq', name, value], 'and', 'or' or 'not'"
                )


def _read(test: Any) -> _Test:
    name = test.get("name", "?") if isinstance(test, Mapping) else "?"
    try:
        if not isinstance(test, Mapping):
            raise LitmusError("is no object")
        for key in ("threads", "exists"):
            if key not in test:
                raise LitmusError(f"has no {key!r}")
        if not isinstance(test["threads"], list) or not all(isinstance(thread, list) for thread in test["threads"]):
            raise LitmusError("'threads' is no list of lists of instructions")
        if not isinstance(test.get("init") or {}, Mapping):
            raise LitmusError("'init' is no object of names and values")
        read = _Test()
        for place, value in (test.get("init") or {}).items():
            if ":" in place:
                read.regs.setdefault(place, len(read.regs))
            else:
                read.var(place)
            read.init.append((place, read.value(value)))
        for number, thread in enumerate(test["threads"]):
            read.ops.append([read.op(number, op) for op in thread])
        read.ask(test["exists"])
        return read
    except LitmusError as error:
        raise LitmusError(f"litmus test {name!r}: {error}") from None


# --- all tests at once ---


class _Batch:
    """Every state of every test under every model as one row of bytes: run, then thread by thread how many instructions
    are done and how many stores are drained, then registers, then memory. A run is one test under one model.

    A store buffer needs no column: it holds the stores that are done and not drained, and what they write is constant.
    """

    def __init__(self, tests: Sequence[_Test], models: Sequence[str]) -> None:
        self.runs, self.threads = len(tests) * len(models), max((len(test.ops) for test in tests), default=0)
        self.buffered = np.tile(np.array([model == "tso" for model in models], dtype=np.bool_), len(tests))  # (run,)
        longest = max((len(ops) for test in tests for ops in test.ops), default=0)
        regs = max((len(test.regs) for test in tests), default=0)
        mems = max((len(test.vars) for test in tests), default=0)
        top = max(longest, mems, regs, max((len(test.values) for test in tests), default=0))
        self.dtype = np.dtype(np.uint8 if top < 256 else np.uint16)
        self.done, self.drained = 0, self.threads  # first column of each kind
        self.reg = 2 * self.threads
        self.mem = self.reg + regs
        self.zero = self.mem + mems  # a column that stays 0, for names that no instruction names
        per_word, run_columns = 8 // self.dtype.itemsize, 4 // self.dtype.itemsize
        self.width = -(-(self.zero + 1 + run_columns) // per_word) * per_word
        self.run = self.width - run_columns
        shape = (self.runs, self.threads, longest + 1)
        tables = np.zeros((7, *shape), dtype=np.int32)
        kind, var, value, reg, stores, newest, _ = tables  # (run, thread, instruction)
        self.final = np.zeros((self.runs, self.threads), dtype=np.int32)  # (run, thread)
        self.start = np.zeros((self.runs, self.width), dtype=self.dtype)
        sent = np.zeros((2, *shape), dtype=np.int32)  # of a thread's n-th store, variable and value
        for number, test in enumerate(tests):
            here = slice(number * len(models), (number + 1) * len(models))
            for place, at in test.init:
                column = self.reg + test.regs[place] if ":" in place else self.mem + test.vars[place]
                self.start[here, column] = at
            for thread, ops in enumerate(test.ops):
                self.final[here, thread] = len(ops)
                count, last = 0, {}
                for step, (what, v, x, r) in enumerate(ops):
                    kind[here, thread, step], var[here, thread, step] = what, v
                    value[here, thread, step], reg[here, thread, step] = x, r
                    newest[here, thread, step] = last.get(v, -1)  # the newest own store to the variable, if any
                    if what == _W:
                        sent[:, here, thread, count] = np.array([[v], [x]], dtype=np.int32)
                        last[v] = count
                        count += 1
                    stores[here, thread, step + 1] = count
        self.kind, self.var, self.value, self.reg_of = kind, var, value, reg
        self.stores, self.newest, (self.sent_var, self.sent_value) = stores, newest, sent
        self._questions(tests, len(models))

    def _questions(self, tests: Sequence[_Test], models: int) -> None:
        """The tests' conditions, padded to one length: operator, column, value of each step of each run."""
        longest = max((len(test.question) for test in tests), default=1)
        table = np.full((3, len(tests), longest), -1, dtype=np.int32)
        for number, test in enumerate(tests):
            columns = {name: self.reg + place for name, place in test.regs.items()}
            columns |= {name: self.mem + place for name, place in test.vars.items()}
            for step, (what, name, value) in enumerate(test.question):
                table[:, number, step] = what, columns.get(name, self.zero), test.values.get(value, -1)
        self.question = table.repeat(models, axis=1)  # (what, run, step)

    def search(
        self, max_states: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """For each run: whether a final state satisfies it, whether all was searched, final states, states."""
        seen = HashSet(self.width * self.dtype.itemsize // 8)
        runs = np.arange(self.runs, dtype=np.int32)
        frontier = self.start.copy()
        frontier[:, self.run :] = runs.view(self.dtype).reshape(self.runs, -1)
        seen.add(frontier.view(np.uint64))
        met, finals, states = (np.zeros(self.runs, dtype=kind) for kind in (np.bool_, np.int64, np.int64))
        finished = np.ones(self.runs, dtype=np.bool_)
        while len(frontier):
            run = self._run(frontier)
            states += np.bincount(run, minlength=self.runs)
            final = np.flatnonzero(self._is_final(frontier, run))
            finals += np.bincount(run[final], minlength=self.runs)
            met[run[final[self._satisfies(frontier[final], run[final])]]] = True
            if seen.size > max_states:
                finished[run] = False
                break
            fresh = [frontier[:0]]
            for at in range(0, len(frontier), _CHUNK):
                rows = self._successors(frontier[at : at + _CHUNK], run[at : at + _CHUNK])
                fresh.append(rows[seen.add(rows.view(np.uint64))])
            frontier = np.concatenate(fresh)
        return met, finished, finals, states

    def _run(self, rows: NDArray[Any]) -> NDArray[np.int32]:
        return np.ascontiguousarray(rows[:, self.run :]).view(np.int32).ravel()

    def _is_final(self, rows: NDArray[Any], run: NDArray[np.int32]) -> NDArray[np.bool_]:
        done = rows[:, self.done : self.done + self.threads].astype(np.int32)
        drained = rows[:, self.drained : self.drained + self.threads]
        ends = self.final[run]
        sent = self.stores[run[:, None], np.arange(self.threads, dtype=np.intp), done]
        return ((done == ends) & (drained == sent)).all(axis=1)

    def _successors(self, rows: NDArray[Any], run: NDArray[np.int32]) -> NDArray[Any]:
        """One move after each state: of each thread the next instruction, and the draining of its oldest store."""
        found = [rows[:0]]
        for thread in range(self.threads):
            done, drained = (rows[:, at + thread].astype(np.intp) for at in (self.done, self.drained))
            kind = self.kind[run, thread, done]
            pending = self.stores[run, thread, done] > drained
            blocked = (kind == _END) | (pending & ((kind == _F) | (kind == _X)))
            at = np.flatnonzero(~blocked)
            found.append(self._instruction(rows[at], run[at], thread, kind[at], done[at], drained[at]))
            at = np.flatnonzero(pending)
            found.append(self._drain(rows[at], run[at], thread, drained[at]))
        return np.concatenate(found)

    def _instruction(self, rows: Any, run: Any, thread: int, kind: Any, done: Any, drained: Any) -> NDArray[Any]:
        """These states after one instruction of a thread; ``rows`` is a copy, and is written to."""
        here, each = (run, thread, done), np.arange(len(rows), dtype=np.intp)
        var, newest = self.mem + self.var[here], self.newest[here]
        rows[:, self.done + thread] += 1
        own = (newest >= drained) & (kind == _R)  # the newest store to the variable is still in the own buffer
        value = np.where(own, self.sent_value[run, thread, newest], rows[each, var])
        loads = np.flatnonzero((kind == _R) | (kind == _X))
        rows[loads, (self.reg + self.reg_of[here])[loads]] = value[loads]
        at_once = (kind == _W) & ~self.buffered[run]
        writes = np.flatnonzero(at_once | (kind == _X))
        rows[writes, var[writes]] = self.value[here][writes]
        rows[at_once, self.drained + thread] += 1
        return rows

    def _drain(self, rows: Any, run: Any, thread: int, drained: Any) -> NDArray[Any]:
        """These states after a thread's oldest store has reached memory; ``rows`` is a copy, and is written to."""
        oldest, each = (run, thread, drained), np.arange(len(rows), dtype=np.intp)
        rows[each, self.mem + self.sent_var[oldest]] = self.sent_value[oldest]
        rows[:, self.drained + thread] += 1
        return rows

    def _satisfies(self, rows: NDArray[Any], run: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each final state satisfies its test's condition: one stack machine, all states in step."""
        each = np.arange(len(rows), dtype=np.intp)
        what, column, value = self.question[:, run]  # (state, step)
        stack = np.zeros((len(rows), what.shape[1] + 1), dtype=np.bool_)
        top = np.zeros(len(rows), dtype=np.intp)
        for step in range(what.shape[1]):
            act = what[:, step]
            held = stack[each, top]
            under = stack[each, np.maximum(top - 1, 0)]
            equal = rows[each, np.maximum(column[:, step], 0)] == value[:, step]
            result = np.select(
                [act == _EQ, act == _AND, act == _OR, act == _NOT], [equal, held & under, held | under, ~held], held
            )
            top += np.select([act == _EQ, (act == _AND) | (act == _OR)], [1, -1], 0)
            stack[each, top] = result
        return stack[each, top]


def run(tests: Sequence[Mapping[str, Any]], models: Sequence[str] = MODELS, max_states: int = MAX_STATES) -> Answers:
    """Answer every test under every model, as one batch.

    >>> sb = {"name": "SB", "threads": [[["W", "x", 1], ["R", "a", "y"]], [["W", "y", 1], ["R", "a", "x"]]],
    ...       "exists": ["and", ["eq", "0:a", 0], ["eq", "1:a", 0]]}
    >>> run([sb]).verdicts.tolist()
    [['forbidden', 'allowed']]

    Raises:
        LitmusError: a test is not in the neutral form, or a model is neither ``sc`` nor ``tso``.
    """
    for model in models:
        if model not in MODELS:
            raise LitmusError(f"memory model {model!r}; expected one of {', '.join(MODELS)}")
    shape = (len(tests), len(models))
    if not len(tests):
        return Answers(np.zeros(shape, dtype=object), *(np.zeros(shape, dtype=np.int64) for _ in range(2)))
    met, finished, finals, states = _Batch([_read(test) for test in tests], models).search(max_states)
    verdicts = np.where(met, ALLOWED, np.where(finished, FORBIDDEN, UNKNOWN)).astype(object)
    return Answers(verdicts.reshape(shape), finals.reshape(shape), states.reshape(shape))


def validate(test: Mapping[str, Any]) -> None:
    """Raise :class:`LitmusError` where a test is not in the neutral form."""
    _read(test)


def program(test: Mapping[str, Any]) -> tuple[Program, Callable[[Any], NDArray[np.bool_]]]:
    """A test as a program, and the predicate on :class:`mmu.explore.States` that is true where its condition is met.

    Values must lie in 0 to 255, and names must be identifiers; that holds for every published test.

    Raises:
        LitmusError: the test is not in the neutral form, or has other names or values.
    """
    read = _read(test)
    if not all(0 <= value < 256 for value in read.values):
        raise LitmusError(f"litmus test {test.get('name', '?')!r}: has values outside 0 to 255")
    if any(":" in place for place, _ in read.init):
        raise LitmusError(f"litmus test {test.get('name', '?')!r}: starts with values in registers")
    if not all(name.split(":")[-1].isidentifier() for name in [*read.vars, *read.regs]):
        raise LitmusError(f"litmus test {test.get('name', '?')!r}: has names that are no identifiers")
    values = list(read.values)
    start = {var: 0 for var in read.vars} | (test.get("init") or {})
    lines = [f"word {var}({max(2, *(value + 1 for value in values))}) = {start[var]}" for var in read.vars]
    forms = {"W": "{1} = {2}", "R": "{1} = {2}", "F": "smp_mb", "X": "{1} = xchg {2}: {3}"}
    for number, ops in enumerate(test["threads"]):
        lines.append(f"t{number}:")
        lines += [f"    {chr(ord('A') + number)}{step}  {forms[op[0]].format(*op)}" for step, op in enumerate(ops)]
    observed = {name.split(":")[1] for name in read.regs}
    threads = [number for number, ops in enumerate(test["threads"]) if ops]
    return (
        Program(
            "\n".join(lines), [[f"t{number}"] for number in threads], observe=observed, name=str(test.get("name", ""))
        ),
        lambda states: _final(states, threads) & _holds(test["exists"], states, threads, read),
    )


def _final(states: Any, threads: Sequence[int]) -> NDArray[np.bool_]:
    return np.logical_and.reduce([states["drained"], *(states[f"done(t{number})"] for number in threads)])


def _holds(condition: Any, states: Any, threads: Sequence[int], read: _Test) -> Any:
    match condition:
        case ["eq", name, value]:
            if name in read.regs:
                thread, _, reg = name.partition(":")
                return states[f"{threads.index(int(thread))}:{reg}"] == value
            return (states[name] if name in read.vars else np.zeros(len(states["oops"]), dtype=np.int64)) == value
        case ["not", inner]:
            return ~_holds(inner, states, threads, read)
        case [how, *parts]:
            combine = np.logical_and if how == "and" else np.logical_or
            return combine.reduce([_holds(part, states, threads, read) for part in parts])
    raise AssertionError(condition)  # _read has refused anything else


def check(data: Mapping[str, Any], max_states: int = MAX_STATES) -> list[tuple[str, str, str, str]]:
    """Each recorded verdict of ``{"tests": [...]}`` beside the package's: ``(name, model, predicted, recorded)``.

    A test counts once for each model that it records a verdict for.

    Raises:
        LitmusError: there is no list of tests, or a test is not in the neutral form.
    """
    tests = data.get("tests") if isinstance(data, Mapping) else None
    if not isinstance(tests, list):
        raise LitmusError("expected an object whose 'tests' is a list of litmus tests")
    answers = run(tests, MODELS, max_states)
    return [
        (str(test.get("name", "?")), model, str(answers.verdicts[number, place]), str(test[model]))
        for number, test in enumerate(tests)
        for place, model in enumerate(MODELS)
        if test.get(model) is not None
    ]
