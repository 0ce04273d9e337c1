"""The race game: the reader is the scheduler, the board is the program's own state graph (chapters 6 to 10)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmu.board import KINDS, Board, board
from mmu.machine import Local
from mmu.program import DONE, OOPS, Program, Step
from mmu.widgets.player import Player


class RacePlayer(Player):
    """Schedule the vCPUs of a program, one atomic step at a time, until its invariant breaks, or see why it cannot.

    Args:
        program: what is run; of up to three actors.
        memory: ``"SC"`` or ``"TSO"``.
        name: short and unique in the book: links that replay a schedule read ``#race-NAME=0,0,1``.
        title: what the level is called.
        oops: what the broken invariant means, as the end of "OOPS: ...".
        actors: what each actor does, in a word or two; the names of its paths unless given.
        schedule: a line of moves that the arrow keys play, as in the gallery; the reader may leave it at any point.

    Chapters 6 to 10.
    """

    module = "race"

    def __init__(
        self,
        program: Program,
        memory: str,
        name: str,
        title: str,
        *,
        oops: str = "the page is write-protected, nobody is at work on it, and it is writable",
        actors: Sequence[str] = (),
        schedule: str = "",
    ) -> None:
        game = board(program, memory)
        if len(program.actors) > 3:
            raise ValueError(f"{len(program.actors)} actors; a race is played with at most 3, keys 0, 1 and 2")
        roles = list(actors) or [" or ".join(paths) for paths in program.actors]
        line = [move.code for move in game.play(schedule)]
        end = "no schedule breaks it" if game.safe else f"the shortest way to OOPS takes {len(game.shortest())} moves"
        super().__init__(
            alt=f"A game: schedule {len(roles)} vCPUs ({', '.join(roles)}) step by step under {memory}. "
            f"Its board has {len(game.states)} states; {end}.",
            data={
                "name": name,
                "title": title,
                "memory": memory,
                "actors": roles,
                "broken": oops,
                "invariant": program.oops.text,
                "program": _listing(program),
                "line": line,
                **_graph(game),
            },
        )


def counterexample(
    program: Program, memory: str, name: str, title: str, *, oops: str = "", actors: Sequence[str] = ()
) -> RacePlayer:
    """A race with its shortest way to OOPS loaded: the right arrow key plays it (gallery).

    Raises:
        ValueError: the program is safe.
    """
    game = board(program, memory)
    if game.safe:
        raise ValueError(
            f"{program.name or title} is safe under {memory}; expected a program that some schedule breaks"
        )
    line = " ".join(move.code for move in game.shortest())
    words = {"oops": oops} if oops else {}
    return RacePlayer(program, memory, name, title, actors=actors, schedule=line, **words)


def _listing(program: Program) -> str:
    """The program's text with its comments, without the paths that nobody here runs."""
    run = {f"{path}:" for paths in program.actors for path in paths}
    kept = []
    for block in re.split(r"\n\s*\n", program.text.strip("\n")):
        head = re.match(r"\w+:(?=\s*(#.*)?$)", block.partition("\n")[0])
        if not head or head[0] in run:
            kept.append(block.rstrip())
    return "\n\n".join(kept)


def _graph(game: Board) -> dict[str, Any]:
    """The board as flat lists: states by number, each move as actor, code, kind, words and target."""
    machine = game.machine
    says: dict[str, int] = {}
    codes: dict[str, int] = {}
    moves, first = [], [0]
    for options in game.moves:
        for move in options:
            say, code = says.setdefault(move.text, len(says)), codes.setdefault(move.code, len(codes))
            moves += [move.actor, code, KINDS.index(move.kind), say, move.target]
        first.append(len(moves))
    here: list[list[int]] = []
    locals_: list[list[dict[str, Any]]] = []
    for vcpu, actor in enumerate(machine.actors):
        numbers = [state.locals[vcpu] for state in game.states]
        used = sorted(set(numbers))
        here.append([used.index(number) for number in numbers])
        steps = {(path, step.label): step for path, steps in machine.program.paths[vcpu].items() for step in steps}
        starts = {path: steps[0] for path, steps in machine.program.paths[vcpu].items()}
        locals_.append([_local(actor.locals[number], steps, starts) for number in used])
    return {
        "words": [
            {"name": word.name, "parts": [[part.name, *machine.place[part.name]] for part in word.parts]}
            for word in machine.program.words
        ],
        "shared": [state.shared for state in game.states],
        "here": here,
        "locals": locals_,
        "kinds": list(KINDS),
        "says": list(says),
        "codes": list(codes),
        "first": first,
        "moves": moves,
        "left": game.left.tolist(),
        "paths": [list(paths) for paths in machine.program.actors],
    }


def _local(local: Local, steps: dict[tuple[str, str], Step], starts: dict[str, Step]) -> dict[str, Any]:
    """What one actor shows: the step it is at, what it remembers, what waits in its store buffer."""
    ended = local.label in (DONE, OOPS)
    if ended:
        following = ""
    elif not local.label and len(starts) > 1:
        following = f"chooses {', '.join(starts)}"
    else:
        step = steps[local.path, local.label] if local.label else next(iter(starts.values()))
        following = f"{step.label}  {step.text}"
    return {
        "next": following,
        "end": local.label if ended else "",
        "knows": ", ".join(f"{name} = {value}" for name, value in local.values),
        "buffer": [", ".join(f"{name} = {value}" for name, value in entry) for entry in local.buffer],
    }
