"""The command line: one JSON object on stdout, diagnostics on stderr, exit codes that mean one thing each."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import pfec, spte
from mmu.__main__ import main

TABLE = Path(__file__).parent / "data/page-fault-error-codes.csv.gz"


def run(capsys, *arguments):
    """Run a command; return its exit code, its JSON, and what it said on stderr."""
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


@pytest.mark.parametrize("kind", ["pfec", "ept", "npf", "spte"])
def test_decode_has_its_keys(capsys, kind):
    """Every kind of decode prints one JSON object with the keys that were promised."""
    code, record, err = run(capsys, "decode", kind, "0x185")
    assert code == 0 and err == ""
    promised = {"kind", "value", "layout", "fields", "state", "verdict", "reason", "text"}
    assert promised <= set(record)
    assert (record["kind"], record["value"], record["layout"]) == (kind, "0x185", "6.1-npt")


@pytest.mark.parametrize("value", ["7", "0x7", "P|W|U", "U|P|W"])
def test_decode_reads_codes_in_each_form(capsys, value):
    """A code may be given in hexadecimal with or without 0x, or as flags in any order."""
    _, record, _ = run(capsys, "decode", "pfec", value)
    assert record["value"] == "0x7"
    assert set(record["verdict"].values()) == {"fast"}
    assert set(record["verdict"]) == set(record["reason"]) == set(pfec.SOURCES)


@given(st.integers(0, 2**64 - 1), st.sampled_from(["pfec", "ept", "npf"]), st.sampled_from(list(spte.LAYOUTS)))
def test_every_word_decodes(value, kind, layout):
    """Any 64-bit word of any kind decodes under any layout, in text as in JSON."""
    assert main(["decode", kind, f"{value:x}", "--layout", layout]) == 0
    assert main(["decode", "spte", f"{value:x}", "--layout", layout, "--json"]) == 0


@pytest.mark.parametrize("value", ["0x8", "RSVD", "W|F", "PK"])
def test_impossible_codes_are_called_so(capsys, value):
    """RSVD without P, W with F and PK without P are impossible by every rule."""
    _, record, _ = run(capsys, "decode", "pfec", value)
    assert record["state"] == "impossible"
    assert set(record["verdict"].values()) == {"impossible"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decode", "pfec", "P|Q"), "'Q' is neither a flag"),
        (("decode", "ept", "zz"), "'zz' is no 64-bit hexadecimal number"),
        (("decode", "npf", "1" + "0" * 16), "no 64-bit hexadecimal number"),
        (("check", "no/such/file"), "no/such/file"),
    ],
)
def test_unusable_input(capsys, arguments, words):
    """Unusable input exits with 2, names the value on stderr, and never raises."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err


def test_check_agrees_on_the_recorded_table(capsys):
    """All 7,680 recorded rows agree, and the last line of the text says so."""
    assert main(["check", str(TABLE)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "agree 7680 of 7680"


def test_check_finds_a_changed_row(capsys, tmp_path):
    """A table with one changed code exits with 1 and names that line alone."""
    lines = gzip.decompress(TABLE.read_bytes()).decode().splitlines()
    cells = lines[9].split(",")
    cells[13] = "1f"  # W with F: no access has this code
    changed = tmp_path / "table.csv"
    changed.write_text("\n".join([*lines[:9], ",".join(cells), *lines[10:]]))
    code, record, _ = run(capsys, "check", str(changed))
    assert code == 1
    assert (record["agree"], record["of"], record["complete"]) == (7679, 7680, True)
    [file] = record["files"]
    assert [wrong["line"] for wrong in file["disagreements"]] == [10]
    assert {"path", "kind", "scenario", "layout", "counts", "findings", "unreadable"} <= set(file)


def test_one_bad_file_does_not_stop_the_others(capsys, tmp_path):
    """With several files the others are still compared, and the exit code is the highest."""
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x1f\x8bnot gzip at all")
    code, record, err = run(capsys, "check", str(junk), str(TABLE))
    assert code == 2
    assert str(junk) in err
    assert (record["agree"], record["of"]) == (7680, 7680)


LITMUS = Path(__file__).parent / "data/x86-tso.json"


def test_check_litmus(capsys):
    """All 93 litmus tests agree under both memory models: 186 of 186."""
    code, record, _ = run(capsys, "check", str(LITMUS))
    assert code == 0
    assert record["files"][0]["counts"] == {"litmus": {"agree": 186, "of": 186}}


def test_check_litmus_names_what_it_cannot_read(capsys, tmp_path):
    """A test in another form is named with its reason, and the others are still compared; a wrong verdict is found."""
    data = json.loads(LITMUS.read_text())
    data["tests"] = data["tests"][:5]
    data["tests"][1]["threads"][0][0][0] = "TELEPORT"
    data["tests"][2]["sc"] = {"allowed": "forbidden", "forbidden": "allowed"}[data["tests"][2]["sc"]]
    changed = tmp_path / "litmus.json"
    changed.write_text(json.dumps(data))
    code, record, _ = run(capsys, "check", str(changed))
    assert code == 1
    assert (record["agree"], record["of"]) == (7, 8)
    assert "TELEPORT" in record["files"][0]["unreadable"][0]["reason"]


TRACES = Path(__file__).parent / "data/kvm-traces"


def test_check_finds_the_scenario_beside_a_trace(capsys):
    """A trace is held against the scenario that lies beside it, and every walk, fault, value and bitmap agrees."""
    code, record, _ = run(capsys, "check", str(TRACES / "npt0_E.trace.gz"))
    [file] = record["files"]
    assert code == 0
    assert file["scenario"].endswith("npt0_E.json.gz")
    assert set(file["counts"]) == {"walks", "faults", "fast", "returns", "injected", "values", "bitmaps"}
    assert file["agree"] == file["of"] > 3000


def test_nothing_to_compare(capsys, tmp_path):
    """A table without a row compares nothing and exits with 2."""
    header = [line for line in gzip.decompress(TABLE.read_bytes()).decode().splitlines()[:2]]
    empty = tmp_path / "empty.csv"
    empty.write_text("\n".join(header))
    code, record, _ = run(capsys, "check", str(empty))
    assert code == 2
    assert record["of"] == 0
