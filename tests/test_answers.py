"""The pictures of chapter 12 hold what layouts and published tables hold."""

import pytest

from mmu import answers, published, spte


def test_the_same_entry_in_every_kernel():
    """Every row is the same page, write-protected for the dirty log by its own layout; 2012 cannot say for what."""
    fields = {"R": 1, "X": 1, "MT": 6, "PFN": 0x34D4F, "HOST_W": 1, "MMU_W": 1, "MMU_P": 1}
    rows = answers.same("ept", **fields)
    assert [spte.decode(row.word, row.layout)["PFN"] for row in rows] == [0x34D4F] * 5
    states = [spte.STATES[spte.classify(row.word, row.layout, 1)] for row in rows]
    assert states == ["write-protected", *["write-protected: dirty log"] * 4]
    assert [row.word >> 63 for row in rows] == [0, 0, 0, 0, 1]


def test_where_a_field_lies():
    """The place that is printed is the field's mask in each layout, and a dash where it has none."""
    for table in ("ept", "shadow"):
        for name in answers.layouts(table):
            bits = spte.LAYOUTS[name].bits
            for field in ("ID", "HOST_W", "MMU_W", "MMU_P", "AD_KIND", "SAVED_X"):
                said = answers.where(field, name)
                assert (said == "-") == (field not in bits)
                if said != "-":
                    top, _, low = said.rpartition(":")
                    assert bits[field].mask == (2 << int(top or low)) - (1 << int(low))


def test_another_table_is_refused():
    """A kind of table that does not exist is named in the error."""
    with pytest.raises(ValueError, match="table is 'npt'; expected"):
        answers.layouts("npt")


def test_moved_cost():
    """The picture states the published seconds of both phases of both kernels."""
    said = answers.moved_cost().alt
    for row in published.EAGER_SPLIT:
        assert f"{row['enable']:g} s to switch the log on, {row['write']:g} s for the first writes" in said
