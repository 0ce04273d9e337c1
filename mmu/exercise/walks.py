"""The exercises of chapter 5: protect a walk, know which barrier counts, and say how long a reclaimer waits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from mmu.board import Board, board
from mmu.exercise import Case, Exercise, Result
from mmu.exercise.race import lines
from mmu.program import Program, ProgramError
from mmu.protocols import MODELS, program
from mmu.readers import Readers, Times, stalls

KEPT = {"walk": ("if not entry", "if freed: oops"), "free": ("entry = 0", "freed = 1")}
"""The steps that a repair must leave, once each and in this order: read the entry, use the page; unlink it, free it."""
SCHEMES = ("walk-reader-counter", "walk-mode", "walk-rcu")


def protected(
    memory: str = "TSO", sizes: Iterable[int] = (2, 3), no_shared_writes: bool = False
) -> Callable[[str], Result]:
    """Protect a walk: the answer is a text with the paths ``walk`` and ``free``; no interleaving may use a freed page.

    Args:
        memory: ``"SC"`` or ``"TSO"``.
        sizes: the numbers of vCPUs to try; the last one frees, the others walk.
        no_shared_writes: the walk may not write to memory either.

    The steps in :data:`KEPT` must still be there, the page must be freed in the end, and a wrong answer is given the
    shortest schedule that breaks it.
    """
    sizes = tuple(sizes)

    def answer(text: str) -> Result:
        counted = []
        for n in sizes:
            try:
                game = board(Program(text, [["walk"]] * (n - 1) + [["free"]]), memory)
            except ProgramError as error:
                return Result(False, f"Not yet: the text cannot be read. {error}")
            if missing := _missing(game):
                return Result(False, f"Not yet: {missing}")
            if no_shared_writes and (writes := _writes(game)):
                return Result(False, f"Not yet: the walk still writes to memory: {writes}.")
            if not game.safe:
                return Result(False, f"Not yet: with {n} vCPUs there is a way to OOPS.\n{lines(game.shortest())}")
            for here in game.ends():
                if not game.machine.unpack(game.states[here].shared)["freed"]:
                    stuck = lines(game.path_to(here))
                    return Result(False, f"Not yet: safe, but with {n} vCPUs the page may never be freed.\n{stuck}")
            counted.append(f"{len(game.states):,}")
        return Result(
            True, f"Right: {' and '.join(counted)} states with {' and '.join(map(str, sizes))} vCPUs, no OOPS."
        )

    return answer


def _missing(game: Board) -> str:
    """What a text lacks of the steps it had to keep; empty if nothing."""
    paths = game.machine.program.paths
    for path, steps in {"walk": paths[0]["walk"], "free": paths[-1]["free"]}.items():
        texts = [
            step.text for step in steps if any(word in re.findall(r"\w+", step.text) for word in ("entry", "freed"))
        ]
        kept = KEPT[path]
        if len(texts) != len(kept) or not all(text.startswith(start) for text, start in zip(texts, kept, strict=True)):
            expected = " and ".join(repr(start) for start in kept)
            return f"{path} must touch entry and freed by {expected} alone, in this order; it has {texts}."
    if not any(" reads freed=" in move.text for moves in game.moves for move in moves):
        return "no schedule uses the page any more."
    return ""


def _writes(game: Board) -> str:
    """The first step of the walk that writes a word in memory; a ``mark`` is a state of the CPU, not of memory."""
    for step in game.machine.program.paths[0]["walk"]:
        if step.kind in ("store", "locked"):
            return f"{step.label} {step.text}"
    return ""


def barriers() -> Exercise:
    """Which scheme breaks when which barrier is left out, and where: ``(scheme, left_out, memory)`` to bool."""
    cases = []
    for scheme in SCHEMES:
        for variant in MODELS[scheme].variants:
            for memory in ("SC", "TSO"):
                game = board(program(scheme, variant, 2), memory)
                why = f"none of the {len(game.states)} states is bad"
                if not game.safe:
                    why = "it does: " + " ".join(move.code for move in game.shortest())
                left_out = "nothing" if variant == "seed" else variant
                arguments = {"scheme": scheme, "left_out": left_out, "memory": memory}
                said = f"{scheme}, {left_out} under {memory}"
                cases.append(Case(arguments, not game.safe, said, why))
    return Exercise("verdicts", cases, lambda broken: "it breaks" if broken else "safe")


def wait_law(replicas: int = 6_000) -> Callable[[Callable[[int, float, float], float]], Result]:
    """How likely a reclaimer's wait is over in time: ``(vcpus, busy, left)`` to a probability, held against simulation.

    ``busy`` is the probability that a vCPU is inside a walk, ``left`` that a walk which is met ends in time.
    """
    cases = []
    for fixed in (True, False):
        for vcpus in (1, 2, 8, 32):
            readers = Readers(vcpus, Times(400.0, fixed=fixed), Times(3_600.0))
            waits = stalls(np.random.default_rng(vcpus), readers, replicas, 20 * readers.cycle)
            cases += [(readers, x, float((waits <= x).mean())) for x in (0.0, 200.0, 390.0)]

    def answer(law: Callable[[int, float, float], float]) -> Result:
        for readers, x, seen in cases:
            said = float(law(readers.vcpus, readers.busy, float(readers.walk.rest(x))))
            if not abs(said - seen) < 2.5 / replicas**0.5:
                kind = "fixed" if readers.walk.fixed else "exponential"
                return Result(
                    False,
                    f"Not yet: with {readers.vcpus} vCPUs and {kind} walks of {readers.walk.mean:.0f} ns you say "
                    f"{said:.3f} for {x:.0f} ns; of {replicas:,} simulated reclaimers {seen:.3f} waited no longer.",
                )
        return Result(
            True, f"Right: within what {replicas:,} simulated reclaimers can tell, in all {len(cases)} cases."
        )

    return answer
