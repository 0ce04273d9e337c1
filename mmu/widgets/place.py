"""The player of chapter 5: place a walk's begin and end, and the reclaimer's look, so that no order is bad."""

from __future__ import annotations

from typing import Any

from mmu.board import KINDS, Board, board
from mmu.placing import ALL, LOOKS, NOWHERE, PLACES, Placing
from mmu.widgets.player import Player

_MEMORIES = ("SC", "TSO")


class PlacePlayer(Player):
    """Choose where begin, end, look and barriers stand; every choice has been explored, and answers with its verdict.

    Args:
        start: the choice shown first.

    Chapter 5.
    """

    module = "place"

    def __init__(self, start: Placing = ALL[0]) -> None:
        says: dict[str, int] = {}
        states = [_state(placing, says) for placing in ALL]
        safe = sum(all(verdict["left"] < 0 for verdict in state["verdicts"]) for state in states)
        super().__init__(
            alt=f"A page walk and a reclaimer, step by step; you choose where begin, end, the reclaimer's look and two "
            f"barriers stand. Of {len(ALL)} choices {safe} is safe under {' and '.join(_MEMORIES)}; each other one is "
            "answered with a shortest schedule that breaks it.",
            data={
                "rows": [
                    {"name": "begin", "options": [NOWHERE, *PLACES]},
                    {"name": "end", "options": [NOWHERE, *PLACES]},
                    {"name": "barrier after begin", "options": ["no", "yes"]},
                    {"name": "reclaimer looks", "options": list(LOOKS)},
                    {"name": "reclaimer's barrier", "options": ["no", "yes"]},
                ],
                "memories": list(_MEMORIES),
                "keys": [_choice(placing) for placing in ALL],
                "states": states,
                "kinds": list(KINDS),
                "says": list(says),
                "start": list(ALL).index(start),
            },
        )


def _choice(placing: Placing) -> list[int]:
    """A placing as the number of the option chosen in each row."""
    places = [NOWHERE, *PLACES]
    begin, end, looks = places.index(placing.begin), places.index(placing.end), LOOKS.index(placing.looks)
    return [begin, end, int(placing.reader_mb), looks, int(placing.reclaimer_mb)]


def _state(placing: Placing, says: dict[str, int]) -> dict[str, Any]:
    games = [board(placing.program(), memory) for memory in _MEMORIES]
    broken = next((game for game in games if not game.safe), None)
    return {
        "walk": placing.walk(),
        "free": [step.replace("[r]", "") for step in placing.free()],
        "verdicts": [{"states": len(game.states), "left": int(game.left[0])} for game in games],
        "memory": broken.machine.memory if broken else "",
        "moves": _moves(broken, says) if broken else [],
    }


def _moves(game: Board, says: dict[str, int]) -> list[int]:
    """A shortest way to OOPS, flat: actor, kind, words; for each move."""
    flat: list[int] = []
    for move in game.shortest():
        flat += [move.actor, KINDS.index(move.kind), says.setdefault(move.text, len(says))]
    return flat
