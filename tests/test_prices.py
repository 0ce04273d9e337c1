"""mmu.prices and the fault player: what they state and quote is what the recording holds."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from test_figures import assert_words_keep_apart_and_inside

from mmu import handling, prices, published, trace
from mmu.widgets import FaultPlayer

B = Path(__file__).parents[1] / "book/data/npt1_tdp1_B.trace.gz"


@pytest.fixture(scope="module")
def recording():
    return trace.read(B)


@pytest.fixture(scope="module")
def faults(recording):
    built = int(np.flatnonzero(recording["kvm_page_fault"]["address"] == 0x1000000)[0])
    first = int(np.searchsorted(recording["kvm_page_fault"]["line"], recording["fast_page_fault"]["line"][0])) - 1
    return {"slow fault": handling.steps(recording, built), "fast fault": handling.steps(recording, first)}


def test_pictures_state_what_they_show(faults):
    """Two faults side by side and the price by vCPUs state their numbers, computed from what they were given."""
    assert prices.side_by_side(faults).alt == (
        "slow fault: 9 recorded events, 5 of them under the mmu-lock; "
        "fast fault: 5 recorded events, none of them under the mmu-lock."
    )
    assert "1.21 to 10.23 µs" in prices.price_by_vcpus().alt
    half = published.SPLIT_ON_FAULT[:3]
    assert prices.price_by_vcpus(half).alt.startswith("From 2 to 8 vCPUs the first write to a page costs, ")


@pytest.mark.parametrize("draw", ["side", "price"])
def test_words_keep_apart_and_inside(faults, draw):
    """No two words of a picture overlap, and none leaves it."""
    picture = prices.side_by_side(faults) if draw == "side" else prices.price_by_vcpus()
    assert_words_keep_apart_and_inside(picture.figure)
    assert_words_keep_apart_and_inside(picture.narrow)


def test_the_player_quotes_the_kernel(faults):
    """Each recorded step of the player carries its line of the trace and its flags; the others carry none."""
    kernel = gzip.open(B, "rt").read().splitlines()
    player = FaultPlayer(faults, kernel)
    for told, steps in zip(player.data["faults"], faults.values(), strict=True):
        for shown, step in zip(told["steps"], steps, strict=True):
            if step.event:
                assert kernel[step.line - 1].replace("\0", "").strip().endswith(shown["quoted"])
                assert shown["quoted"].startswith(f"{step.event}: ")
                assert f"{shown['flags']}  " in kernel[step.line - 1]
            else:
                assert shown["quoted"] == shown["flags"] == ""


def test_names_choose_faults_by_their_first_letter(faults):
    """Two faults whose names begin alike, or with a key that is taken, are refused."""
    story = faults["fast fault"]
    for names in (("slow", "same"), ("undone", "fast")):
        with pytest.raises(ValueError, match="different letters, not U or R"):
            FaultPlayer(dict.fromkeys(names, story), [])
