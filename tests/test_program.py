"""mmu.program: what the language says, and what it refuses."""

import numpy as np
import pytest

from mmu.program import Program, ProgramError, edit, expression
from mmu.protocols import MODELS, SEED_2012, program, text

HEAD = "word spte: w, id(vcpu)\nword wp\nword lock\n"


def only(line, more="", path="p"):
    """The one step of a program that has this line alone."""
    return Program(f"{HEAD}{path}:\n    A  {line}\n{more}", [[path]]).paths[0][path][0]


@pytest.mark.parametrize(
    ("line", "kind", "reads", "drains"),
    [
        ("if spte.w: done", "read", True, False),
        ("x = spte", "read", True, False),
        ("x = spte.id; if x == me: done", "read", True, False),
        ("wait not wp", "read", True, False),
        ("spte.id = me", "store", False, False),
        ("spte = (w=0, id=me)", "store", False, False),
        ("wp = 1", "store", False, False),
        ("release lock", "store", False, False),
        ("mark wp = 1", "mark", False, False),
        ("smp_mb", "fence", False, True),
        ("cmpxchg spte: (w=0, id=me) -> (w=1, id=0)", "locked", True, True),
        ("cmpxchg wp: 0 -> 1 else done", "locked", True, True),
        ("x = xchg spte: (w=0); if x.w: done", "locked", True, True),
        ("xchg wp: 0", "locked", True, True),
        ("atomic_inc wp", "locked", True, True),
        ("take lock", "locked", True, True),
    ],
)
def test_each_form_of_step(line, kind, reads, drains):
    """Every form of step is read as what it is: an access that may wait in a buffer, or one that drains it."""
    step = only(line)
    assert (step.kind, step.reads, step.drains, step.following) == (kind, reads, drains, "done")


def test_steps_are_linked():
    """A step leads to the next line, a branch to its label, and the last step ends the path."""
    steps = {step.label: step for step in Program(SEED_2012, [["protect"]]).paths[0]["protect"]}
    assert (steps["W0"].following, steps["W3"].following, steps["W3"].target, steps["W5"].following) == (
        "W1",
        "W4",
        "W5",
        "done",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("if spte.w and wp: done", "one step is one access"),
        ("wp = spte.w", "read it in a step of its own"),
        ("spte.id = old", "neither a word nor a local"),
        ("if spte.x: done", "no part of the word spte"),
        ("if me: done", "branches without reading a word"),
        ("wait me", "waits for no word"),
        ("cmpxchg spte: (w=0, q=1) -> (w=1)", "no field 'q'"),
        ("xchg spte: (old)", "was not read from spte"),
        ("xchg spte: 1", "expected (FIELD=VALUE, ...) or (LOCAL)"),
        ("take spte", "a lock is a word without"),
        ("x = spte + 1", "a read copies it as it is"),
        ("pte.w = 1", "no declared word"),
        ("jump W0", "is no step"),
        ("if wp: nowhere", "leads to nowhere"),
        ("x = spte; goto A", "cannot follow"),
        ("if print(wp): done", "expected names"),
        ("if wp ==: done", "is no condition"),
    ],
)
def test_what_is_refused(line, message):
    """A line that is no single atomic step is refused with its label and what was expected."""
    with pytest.raises(ProgramError, match=r"A ") as error:
        only(line)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ("p:\n    A  smp_mb\n", "at least one `word NAME`"),
        ("word w(x)\np:\n    A  smp_mb\n", "declares no word"),
        ("word w\nword w\np:\n    A  smp_mb\n", "declared twice"),
        ("word w = 2\np:\n    A  smp_mb\n", "starts at 2"),
        ("word w\np:\n    A  smp_mb\n    A  smp_mb\n", "stands twice"),
        ("word w\np:\n    done  smp_mb\n", "is reserved"),
        ("word w\np:\n    A  smp_mb\np:\n    A  smp_mb\n", "two paths"),
        ("word w\np:\n    A  smp_mb\noops: v\n", "names 'v'"),
        ("word w\nA smp_mb\n", "neither a word"),
        ("word w\np:\nq:\n    A  smp_mb\n", "has no steps"),
        ("word w\nq:\n    A  smp_mb\n", "there is no path 'p'"),
    ],
)
def test_texts_that_are_refused(whole, message):
    """A text with a broken declaration, path or invariant is refused by a message that quotes it."""
    with pytest.raises(ProgramError) as error:
        Program(whole, [["p"]])
    assert message in str(error.value)


def test_actors_that_are_refused():
    """Marks must be one for each actor and none of them 0, which means nobody."""
    for actors, marks in (([], None), ([[]], None), ([["fault"]], [1, 2]), ([["fault"]], [0])):
        with pytest.raises(ProgramError):
            Program(SEED_2012, actors, marks=marks)


def test_dead_locals_are_forgotten():
    """A local, and each field of it, is kept only on the way to a step that still reads it."""
    read, *later = Program(text("one-shot", "cmpxchg-id"), [["fault"]]).paths[0]["fault"]
    assert read.live("F1") == {"old.id", "old.w"} and read.live("done") == set()
    assert not any(names for step in later for _, names in step.keeps)
    read = Program(text("one-shot", "rmw-id"), [["fault"]]).paths[0]["fault"][0]
    assert read.live("F1") == {"old.w"} and read.live("done") == set()


def test_each_actor_has_its_own_copy():
    """A word declared for each vCPU is reached by its owner's index, and a step labelled with [r] is repeated."""
    freer = program("walk-mode", "seed", 3)
    assert [word.name for word in freer.words] == ["entry", "freed", "mode[0]", "mode[1]", "mode[2]"]
    assert [step.label for step in freer.paths[2]["free"]] == ["Z0", "Z1", "Z2[0]", "Z2[1]", "Z3"]
    assert freer.paths[1]["walk"][0].text == "mode[1] = 1"


def test_expressions_take_arrays():
    """One condition serves an int and an array of states alike."""
    oops = expression("wp and not lock and spte.w >= 1")
    wp, lock, w = np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij")
    many = oops.value({"wp": wp, "lock": lock, "spte.w": w})
    one = [[[bool(oops.value({"wp": a, "lock": b, "spte.w": c})) for c in (0, 1)] for b in (0, 1)] for a in (0, 1)]
    assert many.tolist() == one


def test_edits_are_lines():
    """Leaving a step out sends jumps to it on to the next step, and only named steps change."""
    before, after = text("walk-mode"), text("walk-mode", "no-end-mb")
    gone = [line for line in before.splitlines() if line not in after.splitlines()]
    come = [line for line in after.splitlines() if line not in before.splitlines()]
    assert (gone, come) == (["    R2  if not entry: RE", "    RE  smp_mb"], ["    R2  if not entry: R4"])
    with pytest.raises(ProgramError, match="no step is labelled Q7"):
        edit(SEED_2012, {"Q7": None})


@pytest.mark.parametrize("model", list(MODELS))
def test_every_variant_can_be_bound(model):
    """Every variant of every model is a program for two vCPUs, or says how many it takes."""
    for variant in MODELS[model].variants:
        try:
            assert program(model, variant, 2).paths
        except ValueError as error:
            assert str(error) == f"{model} {variant} with 2 vCPUs: it takes 3 at least"


def test_what_has_no_variant():
    """An unknown model, a variant that means nothing for a model and too few vCPUs are told apart."""
    for arguments, message in (
        (("two-shot", "seed", 2), "no model 'two-shot'"),
        (("zap", "no-mb", 2), "means nothing for the model zap"),
        (("one-shot", "seed", 1), "it takes 2 at least"),
    ):
        with pytest.raises(ValueError, match=message):
            program(*arguments)
