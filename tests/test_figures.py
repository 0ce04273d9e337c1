"""mmu.figures: pictures state what they show, keep their words apart and inside, and never rely on colour alone."""

import base64
import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch, Rectangle

from mmu import answers, charts, diagrams, figures, pfec, prices
from mmu.figures import BARRIER, FAILED, LOCKS, SUCCEEDED, UNLOCKS, VIOLATED, Step
from mmu.picture import INK
from mmu.spte import LAYOUTS

RACE = [
    Step(0, "reads the spte", state="w=0 id=0 wp=0"),
    Step(0, "sets id 1", state="w=0 id=1 wp=0"),
    Step(0, "smp_mb", BARRIER, "w=0 id=1 wp=0"),
    Step(0, "reads wp: 0", state="w=0 id=1 wp=0"),
    Step(1, "reads the spte (id 1)", state="w=0 id=1 wp=0"),
    Step(2, "takes the mmu-lock", LOCKS, "w=0 id=1 wp=0"),
    Step(2, "sets wp", state="w=0 id=1 wp=1"),
    Step(2, "smp_mb", BARRIER, "w=0 id=1 wp=1"),
    Step(2, "reads the spte (id 1)", state="w=0 id=1 wp=1"),
    Step(2, "clears w and id", state="w=0 id=0 wp=1"),
    Step(1, "sets id 1", state="w=0 id=1 wp=1"),
    Step(0, "cmpxchg (w=0, id=1) to (w=1, id=0)", SUCCEEDED, "w=1 id=0 wp=1"),
    Step(1, "cmpxchg (w=0, id=1) to (w=1, id=0)", FAILED, "w=1 id=0 wp=1"),
    Step(2, "drops the mmu-lock", UNLOCKS, "w=1 id=0 wp=1"),
    Step(0, "the page is write-protected, nobody is at work on it, and it is writable", VIOLATED),
]
ACTORS = ["vCPU 0, faults", "vCPU 1, faults", "vCPU 2, write-protects"]
ONE_EACH = [("", 0x1234_5678_9ABC_DEF0 & form.bits.mask(), name) for name, form in LAYOUTS.items()]

PICTURES = {
    "ribbon": lambda: figures.ribbon([("before", 0x625AE65, "6.1-npt"), ("after", 0x625AE67, "6.1-npt")]),
    "ribbon, all layouts": lambda: figures.ribbon(ONE_EACH),
    "ribbon, six layouts": lambda: figures.ribbon(ONE_EACH[:6]),
    "ribbon, error code": lambda: figures.ribbon([("error code", 0x100000007, pfec.PFEC)]),
    "lanes": lambda: figures.lanes(RACE, ACTORS, state="shared after it"),
    "lanes, timed": lambda: figures.lanes([Step(0, "kvm_exit: npf", when="+12.3 us")], ["vCPU 0"]),
    "wall": lambda: figures.wall({"unique": np.zeros(1260), "shared": np.arange(1260) % 300 == 3}),
    "wall, many": lambda: figures.wall({"shared": np.arange(90_000) % 9000 == 3}),
    "codes": figures.codes,
    "transitions": figures.transitions,
    "three walks": figures.three_walks,
    "outcomes": lambda: diagrams.outcomes({"TSO, one smp_mb": {(0, 0): 3, (0, 1): 1}}, ("a", "b"), (0, 0)),
    "id growth": diagrams.id_growth,
    "price": prices.price_by_vcpus,
    "moved cost": answers.moved_cost,
    "seed points": charts.seed_points,
}


@pytest.fixture(scope="module", params=PICTURES)
def picture(request):
    return PICTURES[request.param]()


@pytest.fixture(scope="module")
def files(picture):
    """A picture as PNG for a page and for a phone, as a cell stores them."""
    shown, about = picture._repr_mimebundle_()
    return shown["image/png"], base64.b64decode(about["image/png"]["narrow"])


def assert_words_keep_apart_and_inside(figure):
    """No two texts overlap by more than a pixel, and none leaves the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    words = [text for axes in figure.axes for text in axes.texts if text.get_text().strip()]
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in words]
    width, height = figure.bbox.size
    assert texts
    for text, box in texts:
        assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1, text
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1.5, (one, other, overlap)


@pytest.mark.parametrize("where", ["figure", "narrow"])
def test_words_keep_apart_and_inside(picture, where):
    """No two texts overlap by more than a pixel, and none leaves the picture."""
    assert_words_keep_apart_and_inside(getattr(picture, where))


def test_a_phone_gets_a_narrow_picture(picture, files):
    """What is drawn for a phone is 360 pixels wide, and another picture than the page's."""
    assert round(100 * picture.narrow.get_size_inches()[0]) == 360
    assert len(set(files)) == 2


@pytest.mark.parametrize("where", ["figure", "narrow"])
def test_the_file_is_opaque_sharp_and_stable(picture, files, where):
    """The PNG is twice the page's size, white at its corners, opaque everywhere and the same each time."""
    narrow = where == "narrow"
    pixels = imread(io.BytesIO(files[narrow]))
    width, height = getattr(picture, where).get_size_inches()
    assert pixels.shape[:2] == (round(200 * height), round(200 * width)) and pixels.shape[2] in (3, 4)
    assert (pixels[..., 3:] == 1).all() and (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    assert picture.png(narrow=narrow) == files[narrow]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_a_ribbon_fills_exactly_the_set_bits(word, name, narrow):
    """As many cells are filled as bits are set, and those that only KVM reads are round."""
    picture = figures.ribbon([("", word, name)])
    axes = (picture.narrow if narrow else picture.figure).axes[0]
    form = LAYOUTS[name]
    software = form.bits.mask(*form.software)
    filled = [patch for patch in axes.patches if patch.get_facecolor() == (*_rgb(INK), 1.0)]
    assert sum(isinstance(patch, Rectangle) for patch in filled) == (word & ~software).bit_count()
    assert sum(isinstance(patch, FancyBboxPatch) for patch in filled) == (word & software).bit_count()
    assert len(axes.patches) == (form.bits.mask() | word).bit_count()


def _rgb(colour):
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_a_ribbon_underlines_what_changed():
    """Between two rows of one layout each bit that differs is underlined; between two layouts none is."""
    before, after = 0x625AE67, 0x625AA65
    axes = figures.ribbon([("", before, "6.1-npt"), ("", after, "6.1-npt"), ("", before, "6.12-npt")]).figure.axes[0]
    assert sum(line.get_linewidth() == 2.5 for line in axes.lines) == (before ^ after).bit_count() == 2


def test_ribbons_in_words():
    """A ribbon's text names what is set, then what differs, with values of wide fields in hexadecimal."""
    rows = [("a", 0x3001, "6.1-npt"), ("b", 0x4003, "6.1-npt"), ("c", 0x4003, "6.1-npt"), ("d", 0, "6.1-npt")]
    assert figures.ribbon(rows).alt == (
        "a 0x3001: set are P, PFN 0x3; b 0x4003: 4 bits differ, W 0 to 1, PFN 0x3 to 0x4; c 0x4003: no bit differs; "
        "d 0x0: 3 bits differ, P 1 to 0, W 1 to 0, PFN 0x4 to 0x0."
    )
    assert figures.ribbon([("nothing", 0, "6.1-ept")]).alt == "nothing 0x0: no bit is set."


def test_lanes_in_words():
    """The text of lanes counts steps by actor and successful cmpxchg, and states the violation."""
    assert figures.lanes(RACE, ACTORS).alt == (
        "14 steps (vCPU 0, faults: 5; vCPU 1, faults: 3; vCPU 2, write-protects: 6); of 2 cmpxchg 1 succeeded; "
        "OOPS: the page is write-protected, nobody is at work on it, and it is writable."
    )
    assert figures.lanes(RACE[:3], ACTORS[:1]).alt == "3 steps (vCPU 0, faults: 3); no invariant is violated."


def test_lanes_have_shapes_for_what_colours_say():
    """Each actor has its own mark, a barrier is a rule, a failed cmpxchg is hollow, a held lock is hatched."""
    axes = figures.lanes(RACE, ACTORS).figure.axes[0]
    marks = [line.get_marker() for line in axes.lines]
    assert {mark: marks.count(mark) for mark in "os^Dx"} == {"o": 4, "s": 3, "^": 6, "D": 2, "x": 1}  # with the heads
    assert sum(line.get_linewidth() == 3 for line in axes.lines) == 2
    hollow = [line.get_markerfacecolor() == "#FFFFFF" for line in axes.lines if line.get_marker() == "D"]
    assert sorted(hollow) == [False, True]
    assert [patch.get_hatch() for patch in axes.patches].count("/////") == 1
    assert "OOPS" in [text.get_text() for text in axes.texts]


def test_a_lock_that_is_never_dropped_is_held_to_the_end():
    """The band of a lock that is still held reaches its lane's last step."""
    axes = figures.lanes([Step(0, "lock", LOCKS), Step(0, "store"), Step(0, "load")], ["vCPU 0"]).figure.axes[0]
    (band,) = axes.patches
    assert band.get_y() + band.get_height() > axes.lines[-1].get_ydata()[0]


def test_walls_cross_out_or_ring_each_bad_schedule():
    """Large cells that end badly are crossed out, small ones are ringed, and both are counted in words."""
    for size, bad, mark in ((70, [3, 4], "x"), (90_000, [5, 70_000], "o")):
        ends = np.zeros(size, dtype=np.bool_)
        ends[bad] = True
        picture = figures.wall({"shared": ends})
        (marks,) = [line for line in picture.figure.axes[0].lines if line.get_marker() == mark]
        assert len(marks.get_xdata()) == 2
        assert picture.alt.startswith(f"shared: 2 of {size:,} schedules end in OOPS (")
    assert figures.wall({"a": [False] * 3}).alt == "a: none of 3 schedules ends in OOPS."


def test_what_cannot_be_drawn_is_refused():
    """More actors than colours, and walls without cells, are refused with what was expected."""
    with pytest.raises(ValueError, match="4 actors; expected 1 to 3"):
        figures.lanes([], ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="expected at least one panel"):
        figures.wall({})
    with pytest.raises(ValueError, match="one entry a schedule"):
        figures.wall({"a": []})
    with pytest.raises(ValueError, match="layout is 'x'"):
        figures.ribbon([("", 0, "x")])
