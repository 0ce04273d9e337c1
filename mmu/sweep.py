"""Many settings, one answer each, on whatever machines there are.

:func:`sweep` hands settings to any ``concurrent.futures.Executor``: none at all (one after the other, here),
``ProcessPoolExecutor`` for this machine's cores, or the executor of a Dask cluster
(``dask.distributed.Client(...).get_executor()``; ``pip install mmu[dask]``). Each setting has a random generator of its
own, made from the seed and the setting's place, so the answers do not depend on who computed them, or when, or twice.
Chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

S = TypeVar("S")
T = TypeVar("T")


def sweep(
    work: Callable[[S, np.random.Generator], T],
    settings: Iterable[S],
    *,
    seed: int,
    executor: Executor | None = None,
    progress: bool = False,
) -> list[T]:
    """``work(setting, rng)`` for every setting, in the order of the settings.

    Args:
        work: a function of a module, so that it can be sent to another process.
        settings: what it is called with.
        seed: from which every setting's generator is spawned.
        executor: where it runs; here, one after the other, without one.
        progress: show a bar, for long sweeps (needs tqdm).

    >>> sweep(lambda scale, rng: round(scale * rng.random(), 3), [1.0, 10.0], seed=1)
    [0.699, 4.758]
    """
    jobs: Sequence[S] = list(settings)
    seeds = np.random.SeedSequence(seed).spawn(len(jobs))
    if executor is None:
        return [_one(work, job, own) for job, own in _shown(list(zip(jobs, seeds, strict=True)), progress)]
    waiting = [executor.submit(_one, work, job, own) for job, own in zip(jobs, seeds, strict=True)]
    return [future.result() for future in _shown(waiting, progress)]


def _one(work: Callable[[S, np.random.Generator], T], setting: S, seed: np.random.SeedSequence) -> T:
    return work(setting, np.random.default_rng(seed))


def _shown(items: list[S], progress: bool) -> Iterable[S]:
    if not progress:
        return items
    from tqdm.auto import tqdm  # only long sweeps need it

    return tqdm(items, unit=" settings")
