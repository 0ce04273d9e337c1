"""mmu.sweep: the same answers wherever the settings are computed."""

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from mmu.queueing import simulate
from mmu.sweep import sweep

SETTINGS = [(vcpus, hold) for vcpus in (1, 4, 16) for hold in (0.1, 1.0)]


def rate(setting, rng):
    """The rate of faults of one setting."""
    vcpus, hold = setting
    return float(simulate(vcpus, 2.0, hold, rng=rng, faults=200).rate[0])


def slow_rate(setting, rng):
    """The same, late enough to be interrupted."""
    time.sleep(0.5)
    return rate(setting, rng)


def test_serial_is_the_reference():
    """Each setting gets the generator spawned for its place, and the answers come in order."""
    seeds = np.random.SeedSequence(5).spawn(len(SETTINGS))
    expected = [rate(s, np.random.default_rng(own)) for s, own in zip(SETTINGS, seeds, strict=True)]
    assert sweep(rate, SETTINGS, seed=5) == expected
    assert sweep(rate, SETTINGS, seed=6) != expected


def test_processes_give_the_same():
    """Two worker processes give what one process gives."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        assert sweep(rate, SETTINGS, seed=5, executor=executor) == sweep(rate, SETTINGS, seed=5)


def test_threads_give_the_same():
    """Any other executor will do."""
    with ThreadPoolExecutor(3) as executor:
        assert sweep(rate, SETTINGS, seed=5, executor=executor) == sweep(rate, SETTINGS, seed=5)


def test_an_error_is_not_swallowed():
    """What a setting raises is raised to the caller."""
    with pytest.raises(ValueError, match="out of range"):
        sweep(rate, [(0, 1.0)], seed=5)


def test_progress(capsys):
    """A bar counts the settings on standard error, and changes nothing else."""
    pytest.importorskip("tqdm", reason="tqdm is not installed; it comes with the book's requirements")
    assert sweep(rate, SETTINGS, seed=5, progress=True) == sweep(rate, SETTINGS, seed=5)
    assert f"{len(SETTINGS)}/{len(SETTINGS)}" in capsys.readouterr().err


def test_dask_survives_the_death_of_a_worker():
    """On a local Dask cluster of two workers, one killed midway, nothing is lost and the answers are the same."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; pip install mmu[dask]")
    settings = SETTINGS * 3
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        victim = next(iter(client.run(os.getpid).values()))
        with client.get_executor() as executor, ThreadPoolExecutor(1) as killer:
            killing = killer.submit(lambda: (time.sleep(1.2), os.kill(victim, signal.SIGKILL)))
            answers = sweep(slow_rate, settings, seed=5, executor=executor)
            killing.result()
    assert answers == sweep(rate, settings, seed=5)
