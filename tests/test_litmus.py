"""mmu.litmus against recorded verdicts, against a plain interpreter, and against what is no litmus test."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu.explore import explore
from mmu.litmus import LitmusError, check, program, run, validate
from tests import interpreter

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "x86-tso.json.gz").read_bytes()))
SB = {
    "name": "SB",
    "threads": [[["W", "x", 1], ["R", "rax", "y"]], [["W", "y", 1], ["R", "rax", "x"]]],
    "init": {},
    "exists": ["and", ["eq", "0:rax", 0], ["eq", "1:rax", 0]],
}


def asking(exists, **changes):
    """Store buffering with another question."""
    return {**SB, "exists": exists, **changes}


def plain(test):
    """Verdicts, numbers of final states and of states under SC and x86-TSO, by a loop over states."""
    verdicts, finals, states = [], [], []
    for model in ("sc", "tso"):
        start = (tuple(sorted((test.get("init") or {}).items())), tuple((0, (), ()) for _ in test["threads"]))
        seen, todo, ends = {start}, [start], []
        while todo:
            memory, threads = todo.pop()
            values = dict(memory)
            if all(
                pc == len(ops) and not buffer for (pc, _, buffer), ops in zip(threads, test["threads"], strict=True)
            ):
                regs = {f"{t}:{reg}": value for t, (_, regs, _) in enumerate(threads) for reg, value in regs}
                ends.append({**values, **regs})
            for t, (pc, regs, buffer) in enumerate(threads):
                known, nexts = dict(regs), []
                if buffer:
                    nexts.append((pc, regs, buffer[1:], dict(buffer[:1])))
                match test["threads"][t][pc] if pc < len(test["threads"][t]) else None:
                    case ["W", var, value] if model == "tso":
                        nexts.append((pc + 1, regs, (*buffer, (var, value)), {}))
                    case ["W", var, value]:
                        nexts.append((pc + 1, regs, (), {var: value}))
                    case ["R", reg, var]:
                        known[reg] = {**values, **dict(buffer)}.get(var, 0)
                        nexts.append((pc + 1, tuple(sorted(known.items())), buffer, {}))
                    case ["F"] if not buffer:
                        nexts.append((pc + 1, regs, (), {}))
                    case ["X", reg, var, value] if not buffer:
                        known[reg] = values.get(var, 0)
                        nexts.append((pc + 1, tuple(sorted(known.items())), (), {var: value}))
                for after, kept, pending, writes in nexts:
                    row = (*threads[:t], (after, kept, pending), *threads[t + 1 :])
                    state = (tuple(sorted({**values, **writes}.items())), row)
                    if state not in seen:
                        seen.add(state)
                        todo.append(state)
        verdicts.append("allowed" if any(holds(test["exists"], end) for end in ends) else "forbidden")
        finals.append(len({tuple(sorted((k, v) for k, v in end.items() if v)) for end in ends}))
        states.append(len(seen))
    return verdicts, finals, states


def holds(condition, end):
    """A condition, one final state at a time."""
    match condition:
        case ["eq", name, value]:
            return end.get(name, 0) == value
        case ["not", inner]:
            return not holds(inner, end)
        case ["and", *parts]:
            return all(holds(part, end) for part in parts)
        case ["or", *parts]:
            return any(holds(part, end) for part in parts)


def test_every_recorded_verdict():
    """All 93 tests have the recorded verdict under both models, which herd7 confirms."""
    answers = check(RECORDED)
    assert len(answers) == 186
    assert [answer for answer in answers if answer[2] != answer[3]] == []


def test_every_recorded_count():
    """Final states and states of each test are as many as recorded."""
    answers = run(RECORDED["tests"])
    for place, model in enumerate(("sc", "tso")):
        for name, counts in (("finals", answers.finals), ("states", answers.states)):
            assert counts[:, place].tolist() == [test[f"{model}_{name}"] for test in RECORDED["tests"]]


NAMES = st.sampled_from(["x", "y", "z"])
REGS = st.sampled_from(["rax", "rbx"])
VALUES = st.sampled_from([0, 1, 2, 300, -1])
OPS = st.one_of(
    st.tuples(st.just("W"), NAMES, VALUES),
    st.tuples(st.just("R"), REGS, NAMES),
    st.tuples(st.just("F")),
    st.tuples(st.just("X"), REGS, NAMES, VALUES),
).map(list)
ATOMS = st.tuples(st.just("eq"), st.sampled_from(["x", "y", "z", "nowhere", "0:rax", "1:rbx", "7:rax"]), VALUES).map(
    list
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: ["and", *parts]),
        st.lists(inner, max_size=3).map(lambda parts: ["or", *parts]),
        inner.map(lambda part: ["not", part]),
    ),
    max_leaves=6,
)
TESTS = st.fixed_dictionaries(
    {
        "threads": st.lists(st.lists(OPS, max_size=3), max_size=3),
        "init": st.dictionaries(NAMES, VALUES, max_size=2),
        "exists": CONDITIONS,
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(TESTS, min_size=1, max_size=6))
def test_random_batches(tests):
    """A batch of tests of any shape is answered as each of them by itself in plain Python."""
    answers = run(tests)
    for number, test in enumerate(tests):
        verdicts, _, states = plain(test)
        assert answers.verdicts[number].tolist() == verdicts
        assert (answers.states[number] <= states).all()  # plain Python tells an unset register from one that is 0


def test_both_engines_agree():
    """A test as a program, searched by the explorer and by the plain interpreter, gives the batch's answers."""
    answers = run(RECORDED["tests"])
    for number, test in enumerate(RECORDED["tests"]):
        here, predicate = program(test)
        for place, memory in enumerate(("SC", "TSO")):
            found = explore(here, memory, bad=predicate)
            assert (found.verdict == "OOPS") == (answers.verdicts[number, place] == "allowed")
            if answers.states[number, place] < 100:
                assert interpreter.search(here, memory)[:3] == (found.states, found.transitions, found.depth)


@pytest.mark.parametrize(
    ("exists", "verdict"),
    [
        (["eq", "0:rbx", 0], "allowed"),  # a register that no instruction names is 0
        (["eq", "5:rax", 1], "forbidden"),
        (["eq", "z", 0], "allowed"),
        (["eq", "x", 7], "forbidden"),  # a value that nobody writes
        (["not", ["eq", "x", 1]], "forbidden"),
        (["or", ["eq", "x", 0], ["eq", "0:rax", 1]], "allowed"),
        (["and"], "allowed"),
        (["or"], "forbidden"),
    ],
)
def test_conditions(exists, verdict):
    """Conditions nest, and what a test does not name is 0."""
    assert run([asking(exists)]).verdicts.tolist() == [[verdict, verdict]]


def test_initial_values():
    """A variable, or a register, may start with another value than 0."""
    test = {
        "threads": [[["R", "a", "x"]]],
        "init": {"x": 5, "0:b": 3},
        "exists": ["and", ["eq", "0:a", 5], ["eq", "0:b", 3]],
    }
    assert run([test]).verdicts.tolist() == [["allowed", "allowed"]]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            asking(["eq", "x", 1], threads=[[["CAS", "x", 0, 1]]]),
            "['CAS', 'x', 0, 1] is no instruction; expected ['W', var",
        ),
        (asking(["eq", "x", 1], threads=[[["W", "x"]]]), "expected ['W', var, value]"),
        (asking(["eq", "x", 1], threads=[[["W", "x", "1"]]]), "a value is '1'; expected an integer"),
        (asking(["eq", "x", 1], threads=[[["R", 3, "x"]]]), "a register is 3; expected a name"),
        (asking(["eq", "x", 1], threads=[[7]]), "7 is no instruction"),
        (asking(["eq", "x", 1], threads="W"), "no list of lists"),
        (asking(["forall", "x"]), "['forall', 'x'] is no condition"),
        (asking(["eq", "x", True]), "the value in eq is True"),
        (asking(["not"]), "['not'] is no condition"),
        ({"name": "SB", "threads": []}, "has no 'exists'"),
    ],
)
def test_what_is_refused(test, message):
    """An unknown instruction, condition or shape is refused with the test's name, never guessed at."""
    for read in (validate, lambda test: run([SB, test])):
        with pytest.raises(LitmusError, match="SB") as error:
            read(test)
        assert message in str(error.value)


def test_check_refuses_what_holds_no_tests():
    """A file without a list of tests, and a memory model that is not known, are errors."""
    for data in ({}, [], {"tests": 3}, None):
        with pytest.raises(LitmusError, match="list of litmus tests"):
            check(data)
    with pytest.raises(LitmusError, match="one of sc, tso"):
        run([SB], ["arm"])


def test_check_counts_recorded_verdicts_only():
    """A test that records one model counts once, and a wrong record is told from a right one."""
    answers = check({"tests": [{**SB, "tso": "forbidden"}, {**SB, "sc": "forbidden", "tso": None}]})
    assert answers == [("SB", "tso", "allowed", "forbidden"), ("SB", "sc", "forbidden", "forbidden")]
    assert check({"tests": []}) == []


def test_a_bound_gives_no_verdict():
    """A test that was not searched to the end is unknown, unless what it asks for was already found."""
    verdicts = run([SB, asking(["and"], threads=[])], max_states=5).verdicts
    assert verdicts.tolist() == [["unknown", "unknown"], ["allowed", "allowed"]]


def test_programs_of_tests():
    """A test becomes a program that can be read; what cannot is refused."""
    here, _ = program(SB)
    assert here.text.splitlines()[2:5] == ["t0:", "    A0  x = 1", "    A1  rax = y"]
    for test, message in (
        (asking(["and"], init={"0:a": 1}), "registers"),
        (asking(["and"], init={"x": -1}), "0 to 255"),
        (asking(["and"], threads=[[["W", "x y", 1]]]), "identifiers"),
    ):
        with pytest.raises(LitmusError, match=message):
            program(test)


def test_wide_values():
    """More than 255 different values widen every column of the batch and change no answer."""
    many = {"threads": [[["W", "x", value] for value in range(300)], [["R", "a", "x"]]], "exists": ["eq", "1:a", 299]}
    answers = run([many, SB], ["sc"])
    assert (answers.verdicts.ravel().tolist(), int(answers.finals[0, 0])) == (["allowed", "forbidden"], 300)
    assert answers.finals.dtype == np.int64
