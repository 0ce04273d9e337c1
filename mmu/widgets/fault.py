"""The player of recorded faults: how each was handled, step by step (chapter 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmu.handling import Step
from mmu.widgets.player import Player


class FaultPlayer(Player):
    """Step through the handling of recorded faults: the kernel's line, what it means, and whether the lock is held.

    Chapter 1.

    Args:
        faults: for each fault's name its :func:`mmu.handling.steps`; two or three, each name with its own first letter.
        kernel: the lines of the trace, from which the recorded ones are quoted.

    Raises:
        ValueError: two names begin with the same letter, which could then not choose between them.
    """

    module = "fault"

    def __init__(self, faults: Mapping[str, Sequence[Step]], kernel: Sequence[str]) -> None:
        letters = [name[:1].lower() for name in faults]
        if len(set(letters)) < len(letters) or {"u", "r", ""} & set(letters):
            raise ValueError(
                f"faults {', '.join(faults)}; expected names that begin with different letters, not U or R"
            )
        told = [
            {"name": name, "key": letter, "steps": [_told(step, kernel) for step in steps]}
            for (name, steps), letter in zip(faults.items(), letters, strict=True)
        ]
        lengths = ", ".join(f"{len(steps)} of the {name}" for name, steps in faults.items())
        super().__init__(
            alt=f"The handling of recorded faults to step through ({lengths} one): for each step the kernel’s line, "
            "what it means, and whether the mmu-lock is held.",
            data={"faults": told},
        )


def _told(step: Step, kernel: Sequence[str]) -> dict[str, object]:
    """One step as the player shows it."""
    quoted = kernel[step.line - 1].split(": ", 1)[1].replace("\0", "").strip() if step.line else ""
    return {
        "label": step.label,
        "flags": step.flags,
        "quoted": quoted,
        "locked": step.locked,
        "spoken": f"{step.part[:1].upper()}{step.part[1:]}: {step.said}",
        "lock": "under the mmu-lock" if step.locked else "without the mmu-lock",
    }
