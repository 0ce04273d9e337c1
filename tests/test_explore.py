"""mmu.explore against recorded counts, against a plain interpreter, and against what a store buffer is."""

import gzip
import itertools
import json
import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import space
from mmu.__main__ import main
from mmu.explore import States, explore
from mmu.machine import Machine, State
from mmu.program import Program, ProgramError
from mmu.protocols import MODELS, ZAP_JUNK, looping, one_shot, program
from mmu.quotient import network
from tests import interpreter

COUNTS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "state-counts.json.gz").read_bytes()))
BUILD = {"one_shot": one_shot, "looping": looping}


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize("model", ["one_shot", "looping"])
def test_recorded_counts(model, memory):
    """States, transitions and depth are those that five other tools counted."""
    for vcpus, recorded in COUNTS[model][memory].items():
        result = explore(BUILD[model](int(vcpus)), memory)
        assert [result.states, result.transitions, result.depth] == recorded
        assert (result.verdict, result.complete, result.counterexample) == ("safe", True, None)


@pytest.mark.parametrize("memory", ["SC", "TSO"])
def test_recorded_counts_modulo_symmetry(memory):
    """Classes of states are as many as recorded, and hold together as many states as the full search finds."""
    for vcpus, recorded in COUNTS["looping_canonical"][memory].items():
        result = explore(looping(int(vcpus)), memory, canonical=True)
        assert (result.states, result.transitions) == (recorded, None)
        full = explore(looping(int(vcpus)), memory)
        assert (result.full_states, result.depth, result.verdict) == (full.states, full.depth, full.verdict)


# steps of the shortest counterexample, 0 where it is safe: SC n=2, SC n=3, TSO n=2, TSO n=3
VARIANTS = {
    "seed": (0, 0, 0, 0),
    "no-id": (8, 8, 10, 10),
    "shared-id": (0, 13, 0, 17),
    "protector-w-only": (10, 10, 13, 13),
    "no-fault-mb": (0, 0, 12, 12),
    "no-protect-mb": (0, 0, 12, 12),
    "no-mb": (0, 0, 11, 11),
    "cmpxchg-id": (0, 0, 0, 0),
    "cmpxchg-id-no-fault-mb": (0, 0, 0, 0),
    "cmpxchg-id-no-protect-mb": (0, 0, 11, 11),
    "cmpxchg-shared-id": (0, 13, 0, 15),
    "rmw-id": (0, 0, 0, 0),
    "rmw-shared-id": (0, 13, 0, 17),
    "plain-clear": (0, 0, 0, 0),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_one_shot_model(variant):
    """Each variant is safe, or breaks in exactly as many steps as is known."""
    for (memory, vcpus), length in zip(itertools.product(("SC", "TSO"), (2, 3)), VARIANTS[variant], strict=True):
        result = explore(one_shot(vcpus, variant), memory)
        assert (result.verdict, len(result.lines())) == ("OOPS" if length else "safe", length)


def test_the_race_of_the_message_step_for_step():
    """With marks that are not unique the search finds the message's own three-vCPU race, in its order."""
    steps = [(event.actor, event.label) for event in explore(one_shot(3, "shared-id"), "SC").counterexample]
    v0, v1, v2 = (
        [(vcpu, label) for label in labels.split()]
        for vcpu, labels in enumerate(("F0 F1 F2 F3", "F0", "W0 W1 W2 W3 W4"))
    )
    assert steps == [*v0, *v1, *v2, (1, "F1"), (0, "F4"), (2, "W5")]


@pytest.mark.parametrize(("memory", "length"), [("SC", 13), ("TSO", 17)])
def test_two_looping_vcpus_suffice(memory, length):
    """The race of three vCPUs needs only two once they loop, at the same length."""
    assert len(explore(looping(2, "shared-id"), memory).lines()) == length


@pytest.mark.parametrize(
    ("model", "variant", "verdict"),
    [
        ("gfn-aba", "seed", "OOPS"),
        ("gfn-aba", "gfn-after", "safe"),
        ("gfn-aba", "merged", "OOPS"),
        ("zap", "seed", "safe"),
        ("zap", "rmw-id", "OOPS"),
        ("zap", "cmpxchg-id", "safe"),
        ("flush", "seed", "OOPS"),
        ("flush", "merged", "OOPS"),
        ("flush", "flush-if-cleared", "safe"),
        ("flush", "flush-on-xchg", "safe"),
        ("flush", "merged-on-xchg", "safe"),
        ("one-shot", "wrapped-id", "OOPS"),
        ("one-shot", "slow-past-limit", "safe"),
        ("looping", "slow-past-limit", "safe"),
        ("merged", "seed", "safe"),
        ("merged", "no-cmpxchg", "OOPS"),
        ("walk-none", "seed", "OOPS"),
        ("walk-reader-counter", "seed", "safe"),
        ("walk-mode", "seed", "safe"),
        ("walk-rcu", "seed", "safe"),
    ],
)
def test_findings_under_both_models(model, variant, verdict):
    """What the book finds beyond the message holds under both memory models."""
    assert [explore(program(model, variant, 3), memory).verdict for memory in ("SC", "TSO")] == [verdict] * 2


@pytest.mark.parametrize(
    ("model", "variant", "tso"),
    [
        ("walk-mode", "no-fault-mb", "OOPS"),
        ("walk-mode", "no-protect-mb", "OOPS"),
        ("walk-mode", "no-mb", "OOPS"),
        ("walk-mode", "no-end-mb", "safe"),
        ("walk-reader-counter", "no-fault-mb", "safe"),  # a locked increment is a full barrier on x86
        ("walk-reader-counter", "no-protect-mb", "OOPS"),
        ("walk-rcu", "no-protect-mb", "OOPS"),
    ],
)
def test_barriers_of_the_walk(model, variant, tso):
    """No barrier of a walk matters under SC; on x86-TSO those matter that stand between a store and a load."""
    assert explore(program(model, variant, 3), "SC").verdict == "safe"
    assert explore(program(model, variant, 3), "TSO").verdict == tso


def test_marks_left_behind():
    """A byte store leaves a mark in a spte that is gone, a locked cmpxchg does not."""
    verdicts = {v: explore(program("zap", v, 2), "SC", bad=ZAP_JUNK).verdict for v in ("seed", "cmpxchg-id")}
    assert verdicts == {"seed": "OOPS", "cmpxchg-id": "safe"}


SMALL = [(model, variant) for model in MODELS for variant in MODELS[model].variants]


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize(("model", "variant"), SMALL)
def test_equal_to_the_plain_interpreter(model, variant, memory):
    """Counts, depth, nearest bad state and full count modulo symmetry are those of a plain-Python search."""
    for vcpus in (2, 3):
        try:
            here = program(model, variant, vcpus)
        except ValueError:
            continue
        if Machine(here, memory).bounded or (model, vcpus, memory) == ("looping", 3, "TSO"):
            continue  # endless, or too slow in plain Python
        states, transitions, depth, nearest, _ = interpreter.search(here, memory)
        found = explore(here, memory)
        assert (found.states, found.transitions, found.depth) == (states, transitions, depth)
        assert (len(found.lines()) or None, found.complete) == (nearest, True)
        small = explore(here, memory, canonical=True)
        assert (small.full_states, small.depth, small.lines()) == (states, depth, found.lines())


STEPS = """
if a.x: {label} | if b: {label} | t = a; if t.y: {label} | t = a | u = b | a.x = 1 | a.y = 0 | a = (x=1, y=1) | b = 1
b = 0 | smp_mb | wait b | wait not a.x | xchg b: 1 | t = xchg a: (x=0) | cmpxchg b: 0 -> 1 | take c | release c
cmpxchg a: (x=0, y=1) -> (x=1, y=0) else {label} | mark b = 0 | a.y = u | m.id = me | cmpxchg m: (id=0) -> (id=me)
if m.id == me: {label} | q = m.id; if q > 1: {label} | m.id = q | cmpxchg m: (id=q) -> (id=me) else {label}
xchg m: (id=0)"""
STEPS = [step.strip() for step in STEPS.replace("\n", "|").split("|") if step.strip()]


@st.composite
def programs(draw):
    """A random program of two or three actors, each with a path of its own or a shared one."""
    paths = []
    for name in ("p", "q"):
        size = draw(st.integers(1, 5))
        lines = ["t = a", "u = b", "q = m.id"] if draw(st.booleans()) else []
        for place in range(size):
            label = draw(st.sampled_from([*(f"{name}{later}" for later in range(place + 1, size)), "done", "oops"]))
            lines.append(draw(st.sampled_from(STEPS)).format(label=label))
        free = len(lines) - size
        labels = [*(f"{name}r{place}" for place in range(free)), *(f"{name}{place}" for place in range(size))]
        body = "".join(f"    {label}  {line}\n" for label, line in zip(labels, lines, strict=True))
        paths.append(f"{name}:\n{body}")
    text = "word a: x, y\nword b\nword c\nword m: id(vcpu)\n" + "".join(paths) + "oops: a.x and b and not c\n"
    actors = draw(st.lists(st.sampled_from([["p"], ["q"], ["p", "q"]]), min_size=2, max_size=3))
    marks = draw(st.sampled_from([None, [1] * len(actors)]))
    return text, actors, draw(st.booleans()), marks


@settings(max_examples=150, deadline=None)
@given(programs(), st.sampled_from(["SC", "TSO"]), st.sampled_from([0, space.SMALL]))
def test_random_programs(drawn, memory, small):
    """Any program of the language has the same states, transitions, depth and verdict in plain Python.

    The search looks everything up beforehand or, as in large programs, only when it is met.
    """
    with mock.patch.object(space, "SMALL", small):
        same_as_plain(*drawn, memory)


def same_as_plain(text, actors, forever, marks, memory):
    try:
        here = Program(text, actors, forever=forever, marks=marks)
    except ProgramError:  # a local that no step reads first
        return
    if Machine(here, memory).bounded:
        return
    found = explore(here, memory)
    if found.states > 3000:
        return
    states, transitions, depth, nearest, _ = interpreter.search(here, memory)
    assert (found.states, found.transitions, found.depth) == (states, transitions, depth)
    assert (None if found.counterexample is None else len(found.lines())) == nearest
    small = explore(here, memory, canonical=True)
    assert (small.full_states, small.depth, small.lines()) == (states, depth, found.lines())


# --- what a store buffer is ---

FORWARD = """
word x(3)
word y
one:
    A0  x = 1
    A1  x = 2
    A2  u = x
    A3  v = y
two:
    B0  y = 1
    B1  w = x
"""


def outcomes(text, actors, memory, names, observe):
    """Every combination of final values of locals and words, with all buffers drained."""
    found = set()

    def bad(states):
        done = states["drained"] & np.logical_and.reduce([states[name] for name in states if name.startswith("done(")])
        found.update(zip(*(states[name][done].tolist() for name in names), strict=True))
        return np.zeros(done.shape, dtype=np.bool_)

    explore(Program(text, actors, observe=observe), memory, bad=bad)
    return found


def test_a_load_sees_the_newest_own_store():
    """Whether or not it has left the buffer, a vCPU's own newest store is what its next load of the word returns."""
    finals = outcomes(FORWARD, [["one"], ["two"]], "TSO", ["0:u"], ["u", "v", "w"])
    assert finals == {(2,)}


def test_a_load_may_pass_an_older_store():
    """Both vCPUs can miss each other's store on x86-TSO, and never under SC."""
    names = ["0:v", "1:w"]
    assert (0, 0) in outcomes(FORWARD, [["one"], ["two"]], "TSO", names, ["u", "v", "w"])
    assert (0, 0) not in outcomes(FORWARD, [["one"], ["two"]], "SC", names, ["u", "v", "w"])


def test_stores_leave_in_order():
    """Nobody sees a vCPU's later store before its earlier one."""
    text = "word x\nword y\none:\n    A0  x = 1\n    A1  y = 1\ntwo:\n    B0  u = y\n    B1  v = x\n"
    assert (1, 0) not in outcomes(text, [["one"], ["two"]], "TSO", ["1:u", "1:v"], ["u", "v"])


@pytest.mark.parametrize("between", ["smp_mb", "xchg z: 1", "cmpxchg z: 1 -> 0", "atomic_inc z"])
def test_fences_and_locked_operations_drain(between):
    """With a barrier or any locked operation between store and load on both sides, one of them sees the other."""
    lines = "word x\nword y\nword z(3)\n"
    for path, mine, other in (("one", "x", "y"), ("two", "y", "x")):
        lines += f"{path}:\n    {path}0  {mine} = 1\n    {path}1  {between}\n    {path}2  u = {other}\n"
    finals = outcomes(lines, [["one"], ["two"]], "TSO", ["0:u", "1:u"], ["u"])
    assert finals == {(0, 1), (1, 0), (1, 1)}


def test_a_byte_store_leaves_the_other_fields_alone():
    """A buffered store of one field does not bring back what another vCPU took from the field beside it."""
    text = "word s: w = 1, id\none:\n    A0  s.id = 1\ntwo:\n    B0  xchg s: (w=0)\n"
    assert outcomes(text, [["one"], ["two"]], "TSO", ["s.w", "s.id"], []) == {(0, 1)}
    whole = text.replace("s.id = 1", "s = (w=1, id=1)")
    assert outcomes(whole, [["one"], ["two"]], "TSO", ["s.w", "s.id"], []) == {(0, 1), (1, 1)}


def test_a_guard_waits_for_the_buffer_of_its_own():
    """Taking a lock is a locked operation: it waits until the own stores have reached memory."""
    machine = Machine(Program("word l\nword x\np:\n    A  x = 1\n    B  take l\n", [["p"]]), "TSO")
    (store,) = machine.events(machine.start)
    (only,) = machine.events(store.target)
    assert (only.kind, only.text) == ("flush", "drains x = 1")


def test_an_endless_buffer_is_no_proof():
    """A loop that never drains is cut off at a full buffer: what is bad there is bad, but safe is not said."""
    broken = explore(looping(2, "no-fault-mb"), "TSO")
    assert (broken.verdict, len(broken.lines()), broken.complete) == ("OOPS", 12, False)
    endless = explore(Program("word x\np:\n    A  x = 1\n", [["p"]], forever=True), "TSO")
    assert (endless.verdict, endless.complete) == ("unknown", False)
    assert "store buffer was full" in endless.stopped


# --- the engine ---


def test_more_vcpus():
    """Five looping vCPUs on x86-TSO have 1,310,187 states, as SPIN counts them too, whichever way they are counted."""
    full, small = explore(looping(5), "TSO"), explore(looping(5), "TSO", canonical=True)
    assert (full.states, full.transitions, full.depth) == (1310187, 7208900, 42)
    assert (small.full_states, small.depth, small.states) == (1310187, 42, 20272)


def test_marks_of_others_remembered():
    """Where vCPUs remember each other's marks, classes are found by trying all permutations; the sum stays exact."""
    small = explore(looping(4, "cmpxchg-id"), "SC", canonical=True)
    assert small.full_states == explore(looping(4, "cmpxchg-id"), "SC").states > small.states
    with pytest.raises(ProgramError, match="5040 permutations"):
        explore(looping(7, "cmpxchg-id"), "SC", canonical=True)


STEPS_UP = "".join(f"    G{k}  a = {k}\n" for k in range(1, 9))
LOOKING = ("".join(f"    L{v}_{k}  wait a >= {k}\n" for k in range(1, 9)) for v in (0, 1))
GROWING = Program(
    f"word a(9)\ngo:\n    G0  smp_mb\n{STEPS_UP}" + "".join(f"look{v}:\n{steps}" for v, steps in enumerate(LOOKING)),
    [["go"], ["look0"], ["look1"], ["look0"]],
)


def test_a_half_that_grows(monkeypatch):
    """Joint states that a half cannot reach by itself are met later, and widen every key on the way."""
    monkeypatch.setattr(space, "SMALL", 0)
    for memory in ("SC", "TSO"):
        states, transitions, depth, _, _ = interpreter.search(GROWING, memory)
        found = explore(GROWING, memory)
        assert (found.states, found.transitions, found.depth) == (states, transitions, depth)


def test_every_edge():
    """The edges of a frontier are the moves of its states, one by one."""
    machine = Machine(looping(2), "TSO")
    every = space.Space(machine)
    levels = [every.begin()]
    while levels[-1].size:
        levels.append(every.advance(levels[-1])[0])
    keys = np.concatenate(levels)
    source, target = every.edges(keys)
    columns = every.locals(keys)
    for at in range(0, len(keys), 7):
        state = State(int(every.shared(keys)[at]), tuple(int(column[at]) for column in columns))
        assert every.code(state).tolist() == [[keys[at]]]
        after = [every.code(event.target).item() for event in machine.events(state)]
        assert sorted(target[source == at, 0].tolist()) == sorted(after)


def test_more_vcpus_than_a_word_holds():
    """States of two dozen identical vCPUs take several words, and their classes hold more states than 64 bits count."""
    text = "word x\np:\n    A  x = 1\n    B  smp_mb\n    C  if x: done\n"
    result = explore(Program(text, [["p"]] * 24), "SC", canonical=True)
    assert (result.states, result.full_states) == (math.comb(27, 3), 4**24)


@pytest.mark.parametrize("size", range(9))
def test_the_network_sorts(size):
    """Every vector of zeros and ones comes out sorted, so everything does (Knuth's 0-1 principle)."""
    for values in itertools.product((0, 1), repeat=size):
        row = list(values)
        for low, high in network(size):
            row[low], row[high] = min(row[low], row[high]), max(row[low], row[high])
        assert row == sorted(row)


def test_predicates_on_arrays():
    """An invariant may be a function of arrays of states; it agrees with the same condition in words."""

    def bad(states: States):
        return (states["wp"] == 1) & (states["lock"] == 0) & (states["spte.w"] == 1)

    for canonical in (False, True):
        mine = explore(one_shot(3, "no-mb"), "TSO", bad=bad, canonical=canonical)
        assert mine.lines() == explore(one_shot(3, "no-mb"), "TSO").lines()
    with pytest.raises(KeyError, match="states have no 'pw'"):
        explore(one_shot(2), "SC", bad=lambda states: states["pw"])


def test_values_that_do_not_fit():
    """A field that is too small for a value is an error where a reachable step stores it, and only there."""
    reachable = Program("word n\np:\n    A  atomic_inc n\n", [["p"], ["p"]])
    with pytest.raises(ProgramError, match=r"`A atomic_inc n` puts 2 into n, which holds 0 to 1"):
        explore(reachable, "SC")
    assert explore(Program("word n(3)\np:\n    A  atomic_inc n\n", [["p"], ["p"]]), "SC").verdict == "safe"


def test_bounds_leave_a_partial_result():
    """A bound on states or bytes stops the search with what it knows, and never with a verdict of safe."""
    for bound in ({"max_states": 5000}, {"max_bytes": 300_000}):
        for canonical in (False, True):
            partial = explore(looping(5), "TSO", canonical=canonical, **bound)
            assert (partial.complete, partial.verdict) == (False, "unknown")
            assert 0 < partial.states < 1310187 and partial.stopped
    early = explore(looping(4, "shared-id"), "SC", max_states=10_000)
    assert (early.complete, early.verdict, len(early.lines())) == (False, "OOPS", 13)
    assert explore(looping(40), "TSO").stopped.startswith("20 actors have")


@pytest.mark.parametrize("small", [0, space.SMALL])
def test_a_hash_set_takes_over(monkeypatch, small):
    """When the seen-bytes outgrow their bound a hash set takes over in mid-search, and all counts stay the same."""
    monkeypatch.setattr(space, "SMALL", small)
    for here in (looping(4), one_shot(5, "shared-id"), GROWING):
        machine, counts = Machine(here, "TSO"), []
        for share in (None, 3):
            every = space.Space(machine)
            every.max_map = len(counts[0][2]) // share if share else every.max_map
            frontier, states, transitions = every.begin(), 0, 0
            while frontier.size:
                states += len(frontier)
                frontier, moves = every.advance(frontier)
                transitions += moves
            counts.append((states, transitions, every.seen, every.hash is not None))
        assert counts[0][:2] == counts[1][:2]
        assert [hashed for *_, hashed in counts] == [False, True]


def test_an_interrupt_leaves_a_partial_result():
    """Ctrl-C in the middle of a search keeps what whole levels have shown."""

    def interrupt(result):
        if result.depth == 9:
            raise KeyboardInterrupt

    partial = explore(looping(3), "TSO", progress=interrupt)
    assert (partial.complete, partial.verdict, partial.depth, partial.stopped) == (False, "unknown", 9, "interrupted")


# --- the command line ---


def run(capsys, *arguments):
    code = main(["explore", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_on_the_command_line(capsys):
    """The JSON object has every key that is promised, and one step a line of the counterexample."""
    code, out, err = run(capsys, "--variant", "shared-id", "--memory", "SC", "--vcpus", "3", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    keys = "model variant memory vcpus canonical states full_states transitions depth verdict"
    assert {*keys.split(), "counterexample", "seconds", "complete"} <= set(record)
    assert (record["verdict"], record["states"], record["transitions"], record["complete"]) == ("OOPS", 380, 876, True)
    assert len(record["counterexample"]) == 13
    assert record["counterexample"][11] == {
        "actor": 0,
        "step": "F4 cmpxchg spte (w=0, id=1) -> (w=1, id=0) succeeds",
        "state": "spte(w=1, id=0) wp=1 lock=1",
    }


def test_canonical_on_the_command_line(capsys):
    """Modulo symmetry transitions are null and the full count is given beside the classes."""
    code, out, _ = run(capsys, "--model", "looping", "--memory", "TSO", "--vcpus", "4", "--canonical", "--json")
    record = json.loads(out)
    assert (code, record["states"], record["full_states"], record["transitions"]) == (0, 8207, 146117, None)


def test_text_on_the_command_line(capsys):
    """For people there are the verdict, the counts and the schedule."""
    code, out, _ = run(capsys, "--variant", "no-id", "--memory", "SC", "--vcpus", "2")
    assert code == 0
    assert out.startswith("one-shot no-id, SC, 2 vCPUs: OOPS\n")
    assert "cmpxchg spte (w=0, id=0) -> (w=1, id=0) succeeds" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "zap", "--variant", "no-mb"], "means nothing for the model zap"),
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--vcpus", "1"], "it takes 2 at least"),
        (["--vcpus", "999999999"], "it takes 64 at most"),
        (["--model", "looping", "--variant", "cmpxchg-id", "--vcpus", "7", "--canonical"], "5040 permutations"),
    ],
)
def test_unusable_on_the_command_line(capsys, arguments, message):
    """What cannot be explored ends with exit code 2 and a reason on stderr; stdout has it too, or stays empty."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    code, out, err = run(capsys, *arguments, "--json")
    record = json.loads(out)
    assert code == 2 and message in err and message in record["error"]
    assert (record["states"], record["verdict"], record["complete"]) == (0, "unknown", False)


def test_stopped_on_the_command_line(capsys):
    """A search that was stopped early says so, labels its counts, and ends with exit code 3."""
    code, out, _ = run(capsys, "--model", "looping", "--vcpus", "4", "--max-states", "1000")
    assert code == 3
    assert "unknown" in out and "so far" in out and "partial: more than 1000 states" in out
    code, out, _ = run(capsys, "--model", "looping", "--vcpus", "4", "--max-states", "1000", "--json")
    assert (code, json.loads(out)["complete"], json.loads(out)["verdict"]) == (3, False, "unknown")


def test_ctrl_c_on_the_command_line():
    """Ctrl-C ends a long search with exit code 3 and one JSON object with what was found by then."""
    search = "explore --model looping --vcpus 24 --canonical --json"  # minutes, in steps that fit into memory
    command = [sys.executable, "-m", "mmu", *search.split()]
    root = Path(__file__).parents[1]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background of a shell tests would be deaf
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, preexec_fn=hears, **pipes) as search:
        assert "states" in search.stderr.read(30)  # the progress line, which comes after a second
        search.send_signal(signal.SIGINT)
        out, _ = search.communicate(timeout=60)
    record = json.loads(out)
    assert (search.returncode, record["complete"], record["verdict"]) == (3, False, "unknown")
    assert (record["stopped"], record["states"] > 0) == ("interrupted", True)


def test_programs_that_tell_vcpus_apart():
    """Comparing a mark with a number, or using one as a number, leaves no two vCPUs identical; the sum stays exact."""
    numbers = [
        "word m: id(vcpu)\nword n(4)\np:\n    A  m.id = me\n    B  q = m.id; if q > 1: D\n    C  n = 1\n    D  n = 2\n",
        "word n(4)\np:\n    A  n = me\n    B  if n == 2: done\n    C  smp_mb\n",
        "word m: id(vcpu) = 2\np:\n    A  if m.id == me: done\n    B  m.id = me\n",
        "word m: id(vcpu)\np:\n    A  m.id = 2\n    B  if m.id == me: done\n    C  smp_mb\n",
    ]
    for text, memory in itertools.product(numbers, ("SC", "TSO")):
        here = Program(text, [["p"]] * 3)
        small, full = explore(here, memory, canonical=True), explore(here, memory)
        assert small.full_states == full.states
    with pytest.raises(ProgramError, match="tells vCPUs apart"):
        explore(looping(2), "SC", canonical=True, bad="spte.id == 2")


@pytest.mark.parametrize(
    ("variant", "sc", "tso"),
    [
        ("cmpxchg-id", (505, 1213, 14), (650, 1594, 16)),
        ("cmpxchg-shared-id", (431, 1019, 15), (563, 1361, 17)),
        ("rmw-id", (431, 1029, 14), (690, 1709, 18)),
        ("rmw-shared-id", (357, 835, 15), (603, 1476, 19)),
    ],
)
def test_variants_that_read_before_they_mark(variant, sc, tso):
    """Variants with a local have the states that an enumerator without this language finds: dead locals are one."""
    found = [explore(program("one-shot", variant, 3), memory) for memory in ("SC", "TSO")]
    assert [(result.states, result.transitions, result.depth) for result in found] == [sc, tso]
