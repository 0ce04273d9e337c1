"""mmu.bits against plain Python ints."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu.bits import Field, Layout, as_words

WORDS = st.integers(0, 2**64 - 1)


@st.composite
def layouts(draw):
    cuts = sorted(draw(st.sets(st.integers(0, 64), min_size=2, max_size=20)))
    spans = [span for span in itertools.pairwise(cuts) if draw(st.booleans())]
    return Layout("drawn", *(Field(f"f{low}", low, high - low) for low, high in spans or [(0, 64)]))


@given(layouts(), WORDS)
def test_round_trip(layout, word):
    """Packing what was unpacked gives the word back, less its unnamed bits."""
    assert layout.pack(**layout.unpack(word)) | layout.unnamed(word) == word


@given(layouts(), st.lists(WORDS, min_size=1))
def test_arrays_equal_scalars(layout, words):
    """An array's fields are, entry by entry, the fields of its words taken alone."""
    columns = layout.unpack(np.array(words, dtype=np.uint64))
    for name, column in columns.items():
        field = layout[name]
        assert column.dtype == np.uint64
        assert column.tolist() == [word >> field.low & (1 << field.width) - 1 for word in words]


@given(layouts(), WORDS)
def test_text_parses_back(layout, word):
    """Single-bit fields and unnamed bits survive the way through text."""
    flags = layout.pack(**{name: value for name, value in layout.unpack(word).items() if layout[name].width == 1})
    word = flags | layout.unnamed(word)
    assert layout.parse(layout.text(word)) == word


def test_sixty_four_bit_edges():
    """A field may fill the whole word and the top bit stays a bit."""
    whole = Layout("whole", Field("ALL", 0, 64))
    assert whole.pack(ALL=2**64 - 1) == whole.field(2**64 - 1, "ALL") == 2**64 - 1
    assert Layout("top", Field("NX", 63)).field(np.array([1 << 63, 1], dtype=np.uint64), "NX").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([Field("A", 0, 4), Field("B", 3)], "A and B overlap at bit 3"),
        ([Field("A", 60, 5)], "A takes bits 60 to 64"),
        ([Field("A", 0, 0)], "at least one bit"),
        ([Field("A", -1)], "within 0 to 63"),
        ([Field("A", 0), Field("A", 1)], "two fields are called A"),
    ],
)
def test_impossible_layouts_are_refused_when_made(fields, words):
    """Overlapping, empty, too wide or twice-named fields never become a layout."""
    with pytest.raises(ValueError, match=words):
        Layout("bad", *fields)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-1, ValueError, "-0x1"),
        (2**64, ValueError, "0x10000000000000000"),
        (np.array([3, -7], dtype=np.int64), ValueError, "-7"),
        (np.array([1.5]), TypeError, "float64"),
        (1.0, TypeError, "1.0"),
        ("7", TypeError, "'7'"),
        (None, TypeError, "None"),
        ([1, 2**64], ValueError, "0x10000000000000000"),
        ([1, True], TypeError, "True"),
    ],
)
def test_words_that_are_none(value, error, words):
    """What is no unsigned 64-bit word is refused by name, never wrapped."""
    with pytest.raises(error, match=words):
        as_words(value, "entry")


def test_lists_keep_every_bit():
    """A list of small and huge ints keeps its low bits, which float64 would lose."""
    assert as_words([1, 2**63 + 1]).tolist() == [1, 2**63 + 1]


def test_values_too_wide_for_a_field():
    """A value wider than its field is refused with the largest that fits."""
    with pytest.raises(ValueError, match="W is 0x2; its 1 bits hold at most 0x1"):
        Layout("demo", Field("W", 1)).pack(W=2)


def test_unknown_names_are_answered_with_the_known():
    """A misspelt field is answered with the names that exist."""
    with pytest.raises(KeyError, match="no field 'X'; it has P, W"):
        Layout("demo", Field("P", 0), Field("W", 1)).field(0, "X")


@given(st.text())
def test_parse_reads_or_refuses(text):
    """Any text is a word or a ValueError."""
    demo = Layout("demo", Field("P", 0), Field("W", 1))
    try:
        assert 0 <= demo.parse(text) < 2**64
    except ValueError as error:
        assert "demo" in str(error)
