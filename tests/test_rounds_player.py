"""mmu.widgets.rounds: the player's runs are those of mmu.rounds, stored ones and those that a kernel is asked for."""

import pytest

from mmu import rounds
from mmu.widgets import RoundsPlayer
from mmu.widgets.rounds import MACHINES, SHOWN, asked, told


@pytest.fixture(scope="module")
def player():
    """The player with one stored setting."""
    return RoundsPlayer(intervals=(32,), shares=(0.5,), edits=(0,))


def test_a_live_kernel_runs_any_setting(player):
    """The trait that the module sets is answered by the run of mmu.rounds, its kinds named with it."""
    player.ask = [48, 25, 2]
    run, kinds = player.answer["run"], player.answer["kinds"]
    results = [rounds.run(name, 48, 0.25, edits=2, rounds=SHOWN) for name in MACHINES]
    assert run["asked"] == asked(48, 0.25, 2)
    for machine, result, name in zip(run["machines"], results, MACHINES, strict=True):
        assert machine["told"] == told(name, result)
        assert machine["dirty"] == result.dirty.tolist()
        count = dict.fromkeys((kind["name"] for kind in kinds), 0)
        for kind, _, faults in (part for row in machine["rounds"] for part in row):
            count[kinds[kind]["name"]] += faults
        assert {name: faults for name, faults in count.items() if faults} == result.caused.counts()


@pytest.mark.parametrize("wrong", [[0, 50, 0], [1e9, 50, 0], [32.5, 50, 0], [32, 101, 0], [32, 50, -1], [32, 50, 600]])
def test_a_wrong_setting_is_answered(player, wrong):
    """A setting that no run has is answered by what is expected, and leaves the player as it was."""
    player.ask = wrong
    assert "expected" in player.answer["error"]
    assert "run" not in player.answer


def test_a_page_has_no_kernel(player):
    """The twin for a page without a kernel holds stored runs and no field for others."""
    assert len(player.data["runs"]) == 1
    assert "live" not in player.data
    assert player.live == [list(field) for field in RoundsPlayer.fields]
