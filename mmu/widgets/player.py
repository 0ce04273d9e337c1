"""Players: small interactive figures that live in JupyterLab and, from the same module, on a page without a kernel.

The one idea: Python computes every state a player can show and hands it over as data; the player's JavaScript module
only chooses and draws. So the data can be compared by a test, and the page needs nothing but the page.

A player's cell output holds two things: the live widget for JupyterLab, and a ``text/html`` twin for everyone else. The
twin is a paragraph that says what the player shows, and its data; the host (``esm/host.js``) mounts the same module on
it. No package that hosts such modules without a kernel was found in a kept state, hence the host of about 60 lines.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets

_ESM = Path(__file__).parent / "esm"


@cache
def _source(name: str) -> str:
    return (_ESM / name).read_text(encoding="utf-8")


def style() -> str:
    """The players' style sheet, for pages and for JupyterLab alike."""
    return _source("players.css")


def bundle() -> str:
    """One script for a static page: every player's module as text, and the host that mounts them."""
    names = sorted(path.stem for path in _ESM.glob("*.js") if path.stem not in ("host", "kit"))
    modules = {name: _source("kit.js") + _source(f"{name}.js") for name in names}
    return f"window.MMU_PLAYERS = {_json(modules)};\n{_source('host.js')}"


def _json(value: Any) -> str:
    """JSON that is the same on each run and may stand inside a script element."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


class Player(anywidget.AnyWidget):
    """A player: its ``data`` from Python, and a sentence ``alt`` that says what it shows and how it is used.

    Subclasses name their module below ``esm/`` and build ``data`` in ``__init__``; they are tested against the package.

    A player with settings has ``fields``, each a name and a first value, and :meth:`run`. With a kernel its module asks
    for any setting by the trait ``ask``, and ``answer`` is the run, or the ``error`` that says what is expected; on a
    page there is no kernel, no ``live`` field, and only what is stored is offered.
    """

    module: ClassVar[str]
    alt = traitlets.Unicode().tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    ask = traitlets.List(traitlets.Float()).tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    fields: ClassVar[Sequence[tuple[str, float]]] = ()
    live = traitlets.List().tag(sync=True)

    def __init_subclass__(cls, **options: Any) -> None:
        if "module" in cls.__dict__:  # not for the subclass that traitlets itself makes
            cls._esm = _source("kit.js") + _source(f"{cls.module}.js")
            cls._css = style()
        super().__init_subclass__(**options)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits, live=[list(field) for field in self.fields])

    def run(self, *setting: float) -> dict[str, Any]:
        """What the player shows at a setting, a value for each of ``fields``, computed now."""
        raise NotImplementedError(f"{type(self).__name__} has no settings")

    @traitlets.observe("ask")
    def _asked(self, change: Any) -> None:
        try:
            self.answer = {"ask": change.new, **self.run(*change.new)}
        except (ValueError, TypeError) as error:
            self.answer = {"ask": change.new, "error": str(error)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.alt}"

    def twin(self) -> str:
        """The player as HTML for a page without a kernel: its sentence and its data."""
        return (
            f'<div class="mmu-player" data-player="{self.module}"><p class="mmu-fallback">{html.escape(self.alt)}</p>'
            f'<script type="application/json">{_json(self.data)}</script></div>'
        )

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live = super()._repr_mimebundle_(**options)
        data, metadata = live if isinstance(live, tuple) else (live or {}, {})
        return {**data, "text/plain": repr(self), "text/html": self.twin()}, metadata
