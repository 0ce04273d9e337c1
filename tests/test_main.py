"""The command line: one JSON object on stdout, diagnostics on stderr, exit codes that mean one thing each."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import check as checking
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


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_check_litmus_names_what_it_cannot_read(capsys, tmp_path, indent):
    """A test in another form is named with its line, the others are compared, a wrong verdict is named with its own."""
    data = json.loads(LITMUS.read_text())
    data["tests"] = data["tests"][:5]
    data["tests"][1]["threads"][0][0][0] = "TELEPORT"
    data["tests"][2]["sc"] = {"allowed": "forbidden", "forbidden": "allowed"}[data["tests"][2]["sc"]]
    changed = tmp_path / "litmus.json"
    changed.write_text(text := "\n" + json.dumps(data, indent=indent))
    code, record, _ = run(capsys, "check", str(changed))
    assert code == 1
    assert (record["agree"], record["of"]) == (7, 8)
    [unread], [wrong] = record["files"][0]["unreadable"], record["files"][0]["disagreements"]
    assert "TELEPORT" in unread["reason"]
    _, second, third, *_ = (text.index(f'"{test["name"]}"') for test in data["tests"])
    begins, verdict = text.rindex("{", 0, second), text.index('"sc": ', third)
    assert [unread["line"], wrong["line"]] == [text.count("\n", 0, at) + 1 for at in (begins, verdict)]


@pytest.mark.parametrize("tests", ["3", '"SB"', '{"SB": {}}', "null", "[[]"])
def test_check_litmus_wants_a_list(capsys, tmp_path, tests):
    """What stands where the list of tests is expected, and is none, makes the file unusable."""
    (odd := tmp_path / "odd.json").write_text(f'{{"tests": {tests}}}')
    code, _, err = run(capsys, "check", str(odd))
    assert code == 2 and "expected an object whose 'tests' is a list" in err


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "pfec", ""),
        ("decode", "pfec", "P||W"),
        ("decode", "ept", "1_0"),
        ("decode", "npf", "+5"),
        ("decode", "spte", "５"),
        ("decode", "ept", "P|W"),
        ("decode", "bogus", "7"),
        ("check", "no/such/file"),
        ("check",),
        ("report", "no/such/file"),
        ("explore", "--vcpus", "0"),
        ("explore", "--vcpus", "1000000000"),
        ("explore", "--model", "merged", "--variant", "no-id"),
        ("explore", "--memory", "PSO"),
    ],
)
def test_json_even_of_errors(capsys, arguments):
    """Arguments that cannot be used exit with 2, say why on stderr, and leave one JSON object on stdout."""
    code, record, err = run(capsys, *arguments)
    assert code == 2 and err
    assert isinstance(record, dict)


@pytest.mark.parametrize(("kind", "value"), [("pfec", " P | W "), ("pfec", "P|W|0x100000000"), ("npf", " 0X1Aa ")])
def test_blanks_and_high_bits_in_a_value(capsys, kind, value):
    """Blanks around a value or a flag mean nothing, and flags go together with a number, as KVM prints them."""
    code, record, _ = run(capsys, "decode", kind, value)
    assert code == 0
    assert record["value"] == {" P | W ": "0x3", "P|W|0x100000000": "0x100000003", " 0X1Aa ": "0x1aa"}[value]


def test_check_names_bad_files_in_json(capsys, tmp_path):
    """A file that cannot be used is named in the JSON with its reason, beside the files that can."""
    code, record, _ = run(capsys, "check", str(tmp_path), str(LITMUS))
    assert code == 2
    assert [file["path"] for file in record["files"]] == [str(LITMUS)]
    assert [(wrong["path"], str(tmp_path) in wrong["reason"]) for wrong in record["errors"]] == [(str(tmp_path), True)]


def test_ctrl_c_leaves_what_was_compared(capsys, monkeypatch):
    """Ctrl-C in the second file exits with 3, and the JSON has the first file and says that it is not complete."""
    whole = checking.check

    def interrupted(path, **options):
        if path == "second":
            raise KeyboardInterrupt
        return whole(path, **options)

    monkeypatch.setattr(checking, "check", interrupted)
    code, record, err = run(capsys, "check", str(LITMUS), "second", "third")
    assert code == 3 and "PARTIAL" in err
    assert (record["agree"], record["of"], record["complete"]) == (186, 186, False)


def test_litmus_files_that_are_none(capsys, tmp_path):
    """A start without names, and lists nested without end, are named as unreadable and unusable."""
    start = tmp_path / "start.json"
    start.write_text('{"tests": [{"threads": [], "exists": ["and"], "init": [1], "sc": "allowed"}]}')
    code, record, _ = run(capsys, "check", str(start))
    assert code == 2 and "'init' is no object" in record["files"][0]["unreadable"][0]["reason"]
    deep = tmp_path / "deep.json"
    deep.write_text('{"tests": [' + "[" * 9999 + "]" * 9999 + "]}")
    code, record, err = run(capsys, "check", str(deep))
    assert code == 2 and "nested too deeply" in err and record["files"] == []


def test_a_litmus_search_that_was_stopped(capsys, monkeypatch):
    """Where the bound on states stops a search, check exits with 3 and says that it is not complete."""
    whole = checking.litmus.check
    monkeypatch.setattr(checking.litmus, "check", lambda data: whole(data, max_states=100))
    code, record, _ = run(capsys, "check", str(LITMUS))
    assert code == 3
    assert record["complete"] is False and record["files"][0]["complete"] is False


def test_a_byte_order_mark(capsys, tmp_path):
    """A byte order mark in front of a file changes nothing."""
    marked = tmp_path / "table.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + gzip.decompress(TABLE.read_bytes()))
    code, record, _ = run(capsys, "check", str(marked))
    assert (code, record["agree"], record["of"]) == (0, 7680, 7680)


def test_several_reports_are_added_up(capsys):
    """Of several traces the JSON has the sums under a report's own keys, and each report under files."""
    trace = str(TRACES / "npt0_E.trace.gz")
    _, one, _ = run(capsys, "report", trace)
    code, both, _ = run(capsys, "report", trace, trace)
    assert code == 0
    assert set(one) >= set(both) - {"files"}
    assert both["lines"] == 2 * one["lines"] and both["layout"] == one["layout"]
    assert both["faults"]["by_code"] == {code: 2 * n for code, n in one["faults"]["by_code"].items()}
    assert both["hottest"] == [[page, 2 * n] for page, n in one["hottest"]]
    assert both["files"] == [one, one]


def test_output_that_nobody_takes(tmp_path):
    """A reader that leaves early is no error, a full disk is, and neither leaves a traceback or a warning behind."""
    command = [sys.executable, "-W", "error", "-m", "mmu", "decode", "pfec", "100000007"]
    left, right = os.pipe()
    os.close(left)
    with open(right, "wb") as broken, open("/dev/full", "wb") as full:
        early = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, check=False)
        late = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (early.returncode, early.stderr) == (0, "")
    assert (late.returncode, late.stderr) == (2, "python -m mmu: No space left on device\n")


def test_output_in_ascii(tmp_path):
    """Where the terminal knows ASCII alone, and a path holds a byte that is no text, what is printed is escaped."""
    odd = os.fsencode(tmp_path) + b"/\xff.json"
    with open(odd, "wb") as file:
        file.write(LITMUS.read_bytes())
    said = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mmu", "check", odd],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, b"")
    assert said.stdout.splitlines()[-1] == b"agree 186 of 186"
