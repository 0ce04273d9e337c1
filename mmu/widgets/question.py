"""A prediction asked of the reader (every chapter)."""

from __future__ import annotations

from mmu.widgets.player import Player


class Question(Player):
    """A prediction asked of the reader: pick an answer, and it tells why it holds or shows the case that breaks it.

    Args:
        question: one sentence.
        choices: answer to what is said once it is picked; at least two.
        right: the answer that holds, one of the keys of ``choices``.
    """

    module = "question"

    def __init__(self, question: str, choices: dict[str, str], right: str) -> None:
        if right not in choices or len(choices) < 2:
            raise ValueError(f"right is {right!r}; expected one of at least two choices: {', '.join(choices)}")
        listed = [{"answer": answer, "because": because} for answer, because in choices.items()]
        super().__init__(
            alt=f"{question} Answers to choose from: {'; '.join(choices)}.",
            data={"question": question, "choices": listed, "right": list(choices).index(right)},
        )
