"""mmu.charts and the contention player: they state what mmu.trials and mmu.cost hold."""

import numpy as np
import pytest

from mmu import charts, trials
from mmu.cost import price
from mmu.widgets import ContentionPlayer
from mmu.widgets.contention import HOLDS, VCPUS, WRITE_SHARES, state

PICTURES = {
    "seed": (charts.seed_points, "Of 8 comparisons 7 have a shorter mean after the patch; 17 of 20 runs"),
    "curves": (charts.curves, "takes 11 times as long"),
    "explained": (charts.explained, "EPT 0.8 to 1.5; soft MMU 4.1 to 8.3"),
    "deals": (lambda: charts.deals(trials.seed("migrate dbench", "EPT")), "of 20 ways to deal them 1 is"),
}


@pytest.mark.parametrize("name", list(PICTURES))
def test_findings(name):
    """Each picture is drawn, and says its finding with the numbers of the package."""
    draw, finding = PICTURES[name]
    picture = draw()
    assert finding in picture.alt
    assert picture.png().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def player():
    """The player with few settings."""
    return ContentionPlayer([1, 8], [0.0, 0.5], [0.1, 1.0], faults=200)


def test_the_player_shows_runs_of_the_core(player):
    """Each state of the player is one run of mmu.cost.price with the same seed."""
    grid = [column.ravel() for column in np.meshgrid([1, 8], [0.0, 0.5], [0.1, 1.0], indexing="ij")]
    found = price(*grid, rng=np.random.default_rng(2012), faults=200)
    rows = list(zip(*(column.tolist() for column in (*grid, *found)), strict=True))
    assert player.data["states"] == [state(*row) for row in rows]


def test_the_published_settings():
    """The published sliders offer the counts of vCPUs up to the limit of 2012, and start in their middle."""
    player = ContentionPlayer(faults=50)
    assert len(player.data["states"]) == len(VCPUS) * len(WRITE_SHARES) * len(HOLDS)
    assert max(VCPUS) == 254
    said = player.data["states"][player.data["start"]]["said"]
    assert said.startswith("16 vCPUs, 10 % writes, the lock held for 0.2 µs")


def test_a_single_setting():
    """With a kernel any setting can be asked for."""
    player = ContentionPlayer([100], [0.3], [0.7], faults=50)
    (only,) = player.data["states"]
    assert only["said"].startswith("100 vCPUs, 30 % writes, the lock held for 0.7 µs")


def test_a_live_kernel_runs_any_setting(player):
    """The trait that the module sets is answered by a run of mmu.cost.price, a wrong setting by what is expected."""
    player.ask = [7, 33, 0.25]
    grid = [np.array([value]) for value in (7, 0.33, 0.25)]
    found = price(*grid, rng=np.random.default_rng(2012), faults=200)
    assert player.answer == {"ask": [7, 33, 0.25], "state": state(7, 0.33, 0.25, *(column.item() for column in found))}
    player.ask = [7.5, 33, 0.25]
    assert "expected a whole number from 1" in player.answer["error"]


@pytest.mark.parametrize("wrong", [[], [2, 1], [1, 1]])
def test_lists_ascend(wrong):
    """A slider's values ascend; anything else is refused."""
    with pytest.raises(ValueError, match="greater than the last"):
        ContentionPlayer(wrong)
