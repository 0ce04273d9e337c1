"""``python -m mmu explore``: search every interleaving of a protocol, and say what was found.

Exit codes: 0 searched to the end, whatever the verdict; 2 no such model, variant or size; 3 stopped at a bound or by
Ctrl-C, with what is known by then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from mmu import protocols
from mmu.explore import Result, explore
from mmu.machine import MEMORY_MODELS, TSO

DONE, UNUSABLE, STOPPED = 0, 2, 3


def add_parser(commands: Any) -> None:
    """Add the command ``explore`` to the subparsers of ``python -m mmu``."""
    parser = commands.add_parser("explore", help="search every interleaving of a protocol")
    models = ", ".join(protocols.MODELS)
    variants = dict.fromkeys(variant for model in protocols.MODELS.values() for variant in model.variants)
    parser.add_argument("--model", default="one-shot", metavar="NAME", help=f"one of {models}; default one-shot")
    parser.add_argument("--variant", default="seed", metavar="NAME", help=f"of {', '.join(variants)}; default seed")
    parser.add_argument(
        "--memory", choices=MEMORY_MODELS, default=TSO, help="memory model; default TSO, that is x86-TSO"
    )
    parser.add_argument("--vcpus", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--canonical", action="store_true", help="count states modulo a permutation of identical vCPUs")
    parser.add_argument("--max-states", type=int, metavar="N", help="stop when more states than these are known")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run one search; the return value is the exit code."""
    started = time.perf_counter()
    progress = _Progress(started)
    try:
        program = protocols.program(options.model, options.variant, options.vcpus)
        result = explore(
            program,
            options.memory,
            canonical=options.canonical,
            max_states=options.max_states,
            progress=progress,
        )
    except ValueError as error:
        print(f"explore: {error}", file=sys.stderr)
        if options.json:
            nothing = Result(options.memory, options.canonical, transitions=None)
            print(json.dumps({**_record(options, nothing, 0.0), "error": str(error)}, allow_nan=False))
        return UNUSABLE
    except KeyboardInterrupt:  # before the search began, or as it ended
        result = Result(options.memory, options.canonical, stopped="interrupted")
    seconds = time.perf_counter() - started
    progress.end()
    if options.json:
        print(json.dumps(_record(options, result, seconds), allow_nan=False))
    else:
        _print(options, result, seconds)
    return DONE if result.complete else STOPPED


def _record(options: argparse.Namespace, result: Result, seconds: float) -> dict[str, Any]:
    steps = None
    if result.counterexample is not None and result.machine is not None:
        show = result.machine.show
        steps = [
            {"actor": event.actor, "step": event.text, "state": show(event.target)} for event in result.counterexample
        ]
    return {
        "model": options.model,
        "variant": options.variant,
        "memory": options.memory,
        "vcpus": options.vcpus,
        "canonical": options.canonical,
        "states": result.states,
        "full_states": result.full_states,
        "transitions": result.transitions,
        "depth": result.depth,
        "verdict": result.verdict,
        "counterexample": steps,
        "seconds": round(seconds, 6),
        "complete": result.complete,
        "stopped": result.stopped,
    }


def _print(options: argparse.Namespace, result: Result, seconds: float) -> None:
    record = _record(options, result, seconds)
    print(f"{options.model} {options.variant}, {options.memory}, {options.vcpus} vCPUs: {result.verdict}")
    so_far = "" if result.complete else " so far"
    print(f"  states       {result.states:,}{so_far}")
    if options.canonical:
        print(f"  full states  {result.full_states:,}{so_far}")
    else:
        print(f"  transitions  {result.transitions:,}{so_far}")
    print(f"  depth        {result.depth}{so_far}")
    print(f"  seconds      {seconds:.3f}")
    if not result.complete:
        print(f"  partial: {result.stopped}")
    for number, step in enumerate(record["counterexample"] or [], 1):
        print(f"  {number:3}  v{step['actor']}  {step['step']:<64}  {step['state']}")


class _Progress:
    """One line on stderr, rewritten each second, once a search has taken a second."""

    def __init__(self, started: float) -> None:
        self.started = self.last = started
        self.shown = False

    def __call__(self, result: Result) -> None:
        now = time.perf_counter()
        if now - self.last < 1:
            return
        self.last, self.shown = now, True
        rate = result.states / (now - self.started)
        print(
            f"\rdepth {result.depth}: {result.states:,} states, {rate:,.0f} a second",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self.shown:
            print(file=sys.stderr)
