"""Players: small interactive figures that live in JupyterLab and, from the same module, on a page without a kernel.

Each player is a class in a module of its own, which computes what can be shown, beside a JavaScript module in ``esm/``,
which shows it; :mod:`mmu.widgets.player` is what they share.
"""

from mmu.widgets.codes import CodePlayer
from mmu.widgets.contention import ContentionPlayer
from mmu.widgets.fault import FaultPlayer
from mmu.widgets.idfield import IdFieldPlayer
from mmu.widgets.place import PlacePlayer
from mmu.widgets.player import Player, bundle, style
from mmu.widgets.question import Question
from mmu.widgets.race import RacePlayer, counterexample
from mmu.widgets.rounds import RoundsPlayer
from mmu.widgets.spte import SptePlayer
from mmu.widgets.walk import WalkPlayer

__all__ = [
    "CodePlayer",
    "ContentionPlayer",
    "FaultPlayer",
    "IdFieldPlayer",
    "PlacePlayer",
    "Player",
    "Question",
    "RacePlayer",
    "RoundsPlayer",
    "SptePlayer",
    "WalkPlayer",
    "bundle",
    "counterexample",
    "style",
]
