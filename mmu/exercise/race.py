"""The exercises of chapters 6 to 10: schedules that break a protocol, repairs of one, outcomes of a litmus test."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from mmu import spte
from mmu.board import Board, Move, ScheduleError, board
from mmu.exercise import Case, Exercise, Result
from mmu.program import Program, ProgramError


def schedule(program: Program, memory: str) -> Callable[[str], Result]:
    """Break a program: the answer is a schedule such as ``"0 0 1 2d"``.

    A wrong one is told which move is not possible, or after which move OOPS is out of reach, and what to play there.
    """
    game = board(program, memory)

    def answer(codes: str) -> Result:
        try:
            moves = game.play(codes)
        except ScheduleError as error:
            return Result(False, f"Not yet: {error}.")
        here, least = 0, int(game.left[0])
        for number, move in enumerate(moves, 1):
            if game.oops[move.target]:
                least_said = "no schedule is shorter" if number == least else f"the shortest takes {least}"
                return Result(True, f"Right: OOPS after {number} moves; {least_said}.")
            if game.left[move.target] < 0 <= game.left[here]:
                other = next(other for other in game.moves[here] if game.left[other.target] >= 0)
                more = int(game.left[other.target])
                then = f"left {more} {'move' if more == 1 else 'moves'} to go" if more else "been OOPS"
                return Result(
                    False,
                    f"Not yet. After move {number} ({_said(move)}) OOPS is out of reach. "
                    f'Playing "{other.code}" there instead ({_said(other)}) would have {then}.',
                )
            here = move.target
        more = int(game.left[here])
        return Result(
            False,
            f"Not yet: {len(moves)} moves and no OOPS; it is still {more} {'move' if more == 1 else 'moves'} away.",
        )

    return answer


def repair(
    actors: Callable[[int], list[list[str]]],
    memory: str = "TSO",
    sizes: Iterable[int] = (2, 3),
    useful: str = "spte.w",
    always: str | None = "wp",
    oops: str | None = None,
) -> Callable[[str], Result]:
    """Repair a protocol: the answer is its text; every interleaving of it must be safe, and it must still do its work.

    Args:
        actors: for a number of vCPUs, the paths that each runs.
        memory: ``"SC"`` or ``"TSO"``.
        sizes: the numbers of vCPUs to try, from few to many.
        useful: the part that some interleaving must set; a protocol that never does anything is safe as well.
        always: the part that every interleaving must have set in the end, for the same reason; None asks for none.
        oops: the invariant that the text must keep; it may be any when None.

    A wrong repair is answered with the shortest schedule that breaks it.
    """
    sizes = tuple(sizes)

    def answer(text: str) -> Result:
        counted = []
        for n in sizes:
            try:
                game = board(Program(text, actors(n)), memory)
            except ProgramError as error:
                return Result(False, f"Not yet: the text cannot be read. {error}")
            if oops and game.machine.program.oops.text != oops:
                return Result(False, f"Not yet: the text must keep its last line, oops: {oops}")
            if not game.safe:
                return Result(False, f"Not yet: with {n} vCPUs there is a way to OOPS.\n{lines(game.shortest())}")
            values = [game.machine.unpack(state.shared)[useful] for state in game.states]
            if not any(values):
                return Result(False, f"Not yet: safe, but with {n} vCPUs no schedule ever sets {useful}.")
            ended = [game.machine.unpack(game.states[here].shared)[always] for here in game.ends()] if always else []
            if not all(ended):
                return Result(False, f"Not yet: safe, but with {n} vCPUs some schedule ends without {always}.")
            counted.append(f"{len(game.states):,}")
        return Result(
            True, f"Right: {' and '.join(counted)} states with {' and '.join(map(str, sizes))} vCPUs, no OOPS."
        )

    return answer


def marks(run: Callable[[tuple[int, ...]], Program], sizes: Iterable[int], memory: str = "SC") -> Callable[..., Result]:
    """Give out marks: the answer maps a number of vCPUs to their marks; ``run`` makes a program of them."""
    sizes = tuple(sizes)

    def answer(give: Callable[[int], Iterable[int]]) -> Result:
        for n in sizes:
            given = tuple(give(n))
            try:
                game = board(run(given), memory)
            except ProgramError as error:
                return Result(False, f"Not yet: {n} vCPUs get {given}. {error}")
            if not game.safe:
                return Result(
                    False, f"Not yet: {n} vCPUs get {given}, and there is a way to OOPS.\n{lines(game.shortest())}"
                )
        return Result(True, f"Right: safe with {', '.join(map(str, sizes[:-1]))} and {sizes[-1]} vCPUs.")

    return answer


def outcomes(program: Program, memory: str, names: tuple[str, str]) -> Callable[[Iterable[tuple[int, int]]], Result]:
    """Which values two locals can end with; the answer is a set of pairs."""
    game = board(program, memory)
    found: dict[tuple[int, int], int] = {}
    for here in game.ends():
        values = game.ending(here)
        found.setdefault((values[names[0]], values[names[1]]), here)

    def answer(pairs: Iterable[tuple[int, int]]) -> Result:
        given = set(pairs)
        if given == set(found):
            return Result(True, f"Right: {len(found)} of 4 outcomes, by all {len(game.states)} states.")
        for pair in sorted(set(found) - given):
            moves = game.path_to(found[pair])
            return Result(False, f"Not yet: {names[0]}, {names[1]} = {pair} can happen.\n{lines(moves)}")
        wrong = min(given - set(found))
        return Result(False, f"Not yet: {wrong} never happens: none of the {len(game.states)} states ends so.")

    return answer


def lines(moves: Iterable[Move]) -> str:
    """Moves for people, one a line: number, vCPU and what it did."""
    return "\n".join(f"{number:>4}  vCPU {move.actor}  {move.text}" for number, move in enumerate(moves, 1))


def count(game: Board) -> Callable[[int], Result]:
    """How many schedules of a board end in OOPS; a wrong number is told the direction, and one schedule that does."""
    right, total = game.count()

    def answer(guess: int) -> Result:
        if guess == right:
            return Result(True, f"Right: {right:,} of {total:,} schedules end in OOPS.")
        hint = f"One that does: {' '.join(move.code for move in game.shortest())}." if right else "There is none."
        return Result(False, f"Not yet: {guess:,} is too {'few' if guess < right else 'many'}. {hint}")

    return answer


def usable_ids(widest: int = 10) -> Exercise:
    """How many ids a field of ``width`` bits from bit ``low`` up has in an EPT spte of 2012; the answer takes both."""
    form = spte.LAYOUTS["2012-ept"]
    leaf = np.uint64(sum(form.bits[name].mask for name in ("R", "W", "X")))
    cases = []
    for width in range(1, widest + 1):
        ids = np.arange(1, 1 << width, dtype=np.uint64)  # (id,)
        for low in range(form.bits["PFN"].low + form.bits["PFN"].width, 65 - width):
            lost = int(spte.is_mmio(leaf | ids << np.uint64(low), form).sum())
            why = f"{lost} would make a writable, executable entry read as MMIO" if lost else ""
            cases.append(Case({"low": low, "width": width}, len(ids) - lost, f"{width} bits from bit {low} up", why))
    return Exercise("fields", cases)


def slow_vcpus() -> Exercise:
    """How many of so many vCPUs have no id of their own; the answer takes ``table`` (ept, shadow) and ``vcpus``."""
    return Exercise(
        "virtual machines",
        [
            Case({"table": table, "vcpus": vcpus}, max(0, vcpus - spte.LAYOUTS[f"2012-{table}"].usable_ids), said)
            for table in ("ept", "shadow")
            for vcpus in (1, 2, 64, 126, 127, 128, 129, 160, 253, 254)
            for said in [f"{vcpus} vCPUs on {table}"]
        ],
    )


def _said(move: Move) -> str:
    return f"vCPU {move.actor}: {move.text}"
