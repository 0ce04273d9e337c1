"""mmu.graces: the pictures of chapter 5 state numbers that a count by hand gives."""

import re

import numpy as np
import pytest

from mmu import graces
from mmu.graces import Curve
from mmu.readers import Freeing, Walks

WALKS = Walks(
    begin=np.array([[[-50.0, 900.0, 5000.0], [950.0, 1300.0, 5000.0], [100.0, 1700.0, 5000.0]]]),
    end=np.array([[[10.0, 1400.0, 6000.0], [1200.0, 1350.0, 6000.0], [300.0, 1800.0, 6000.0]]]),
    span=4000.0,
)


def test_grace_period():
    """Of three vCPUs two are inside at 1000 ns, the later one until 1400; one walk begins in between."""
    alt = graces.grace_period(WALKS, 1000.0, 500.0, 500.0).alt
    assert alt == (
        "3 vCPUs walk; when the page is unlinked, 2 of them are inside a walk. The last of these ends 400 ns later, "
        "and then the page is freed. Not waited for: walks that began in between, 1 in all."
    )


def test_pages_waiting():
    """Three pages of which two wait at a time."""
    freeing = Freeing(np.array([[1e5, 2e5, 9e5]]), np.array([[5e5, 4e5, np.inf]]))
    assert graces.pages_waiting({"a scheme": freeing}, 1e6).alt == (
        "Pages that wait to be freed, over 1 ms. a scheme: at most 2 waiting at a time."
    )


def test_curves():
    """The ends of each curve are told, and how far simulation and formula lie apart."""
    picture = graces.curves(
        {"ns": [Curve("both", [1, 2], [10.0, 20.0], [11.0, 20.0]), Curve("dots", [1, 2], dots=[0.5, 1234.0])]}, "vCPUs"
    )
    assert picture.alt == (
        "ns: both, 10 at vCPUs 1, 20 at 2; dots, 0.5 at vCPUs 1, 1,234 at 2. "
        "Simulation and formula differ by 10.0 % at most."
    )
    assert picture.png()[:4] == b"\x89PNG"
    shown = [text.get_text() for text in picture.figure.axes[0].texts]
    assert shown == ["both", "dots"]


@pytest.mark.parametrize("at", [1000.0, 1250.0])
def test_the_picture_names_what_it_draws(at):
    """Unlinked, freed and the grace period's length stand in the picture."""
    axes = graces.grace_period(WALKS, at, 500.0, 500.0).figure.axes[0]
    texts = " ".join(text.get_text() for text in axes.texts)
    assert {"unlinked", "freed"} <= set(texts.split())
    assert re.search(r"grace period\s+\d+ ns", texts)
