"""The capture kit, as far as it goes without an emulator: its scripts, its client, its boots and what comes back."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scenarios
from hypothesis import given, settings
from hypothesis import strategies as st

import capture
from mmu import scenario

KIT = Path(capture.__file__).parent
RECORDED = sorted((Path(__file__).parent / "data" / "kvm-traces").glob("*.json.gz"))
LETTERED = [path for path in RECORDED if "random" not in path.name]
ACTIONS = {"run", *re.findall(r'\{ "(\w+)", do_\w+ \}', (KIT / "client.c").read_text(encoding="utf-8"))}
NAMES = sorted(
    set(scenarios.names("npt0")) | {f"random{n}{mode}" for n in range(3) for mode in ("", "-flat32", "-pae32")}
)


def steps(text):
    """What a script asks for, as (what, numbers and names); runs hold their accesses."""
    mode, found, run = text.split()[3], [], []
    for line in text.splitlines()[1:]:
        word, *rest = line.split()
        if word == "run":
            run = []
            found.append((word, int(rest[0], 16), rest[1], run))
        elif word not in ACTIONS:
            run.append((word, int(rest[0], 16), int(rest[1], 16)))
        elif word in ("phase", "ring"):
            found.append((word, rest[-1]))
        elif word == "clear":
            found.append((word, *(int(number, 16) for number in rest[:3]), rest[3]))
        elif word == "large":
            found.append(("map", *(int(number, 16) for number in rest), 2))
        elif word in ("slot", "map", "vcpu", "get", "cap", "host") and not (word == "map" and mode == "flat32"):
            count = {"slot": 4, "map": 5, "vcpu": 2, "get": 1, "cap": 2, "host": 2}[word]
            numbers = [int(number, 16) for number in rest[word == "host" :][:count]]
            found.append(
                (word, *(numbers if (word, mode) != ("vcpu", "flat32") else [numbers[0], 0]), *[1] * (word == "map"))
            )
    return found


def recorded_steps(data):
    """The same of a recording."""

    def numbers(event, *names):
        return [scenario.number(event[name]) for name in names]

    found = []
    for event in data["events"]:
        match event["t"]:
            case "memslot":
                found.append(("slot", *numbers(event, "slot", "gpa", "size", "flags")))
            case "gmap" | "gmap_range":
                found.append(
                    ("map", *numbers({"n": 1, "level": 1} | event, "root", "gva", "gpa", "n", "flags", "level"))
                )
            case "vcpu":
                found.append(("vcpu", *numbers(event, "vcpu", "cr3")))
            case "phase":
                found.append(("phase", event["name"]))
            case "run":
                accesses = [(op, int(gva, 16), int(value, 16)) for op, gva, value, *_ in event["accesses"]]
                found.append(("run", event["vcpu"], event["phase"], accesses))
            case "dirty_get":
                found.append(("get", event["slot"]))
            case "dirty_clear":
                found.append(("clear", *numbers(event, "slot", "first_page", "num_pages"), event["bitmap"]))
            case "enable_cap":
                found.append(("cap", event["cap"], event["arg0"]))
            case "host":
                found.append(("host", *numbers(event, "gpa", "len")))
            case "dirty_ring" if event["why"] != "ring_full_exit":
                found.append(("ring", event["why"]))
    return found


@pytest.mark.parametrize("path", LETTERED, ids=lambda path: path.name.split(".")[0])
def test_scripts_ask_for_what_was_recorded(path):
    """A script has the slots, tables, accesses, logs and host actions of its scenario's recording, in order."""
    data = json.loads(gzip.decompress(path.read_bytes()))
    asked = steps(scenarios.script(data["scenario"], data["prefix"], "qemu"))
    recorded = recorded_steps(data)
    if data["scenario"].startswith("H"):  # the older recordings do not say when the second child went
        reaped = ("host", 0, 0)
        asked, recorded = ([step for step in part if step != reaped] for part in (asked, recorded))
    if data["scenario"].startswith("G"):  # two vCPUs' runs end in any order, and G fetches the log as often as it can
        free = data["scenario"].split("-")[0] == "G"
        asked, recorded = (
            sorted(str(step) for step in part if not (free and step[0] == "get")) for part in (asked, recorded)
        )
    assert asked == recorded


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_script_is_known_to_the_client(name):
    """Each line of a script is an action that the client carries out, or an access of the run before it."""
    first, *lines = scenarios.script(name, "npt0", "qemu", seed=3).splitlines()
    assert first.startswith(f"scenario {name} npt0 ")
    ops = {user + op for user in ("", "u") for op in scenario.OPS}
    words = [line.split()[0] for line in lines]
    assert set(words) <= ACTIONS | ops
    inside = False
    for word in words:
        assert inside or word not in ops
        inside = word == "run" or (inside and word in ops)


@settings(max_examples=20, deadline=None)
@given(
    mode=st.sampled_from(["long64", "pae32", "leg32"]),
    gvas=st.lists(st.integers(0, (1 << 20) - 1), min_size=1, max_size=8, unique=True),
)
def test_entries_lie_where_the_scenario_reader_says(mode, gvas):
    """A script's own idea of where a leaf entry lies is that of the reader of recordings, in all guest modes."""
    root, s = 0x10000, scenarios.Script("x", mode, "head")
    control = {"long64": (0x20, 0xD01), "pae32": (0x20, 0x800), "leg32": (0, 0)}[mode]
    registers = {"cr0": 0x80010033, "cr3": root, "cr4": control[0], "efer": control[1]}
    events = [{"t": "vcpu", "vcpu": 0, "gmode": mode, **registers}]
    for gva in gvas:
        s.map(root, gva << 12, 0x1000000, 1, 0x67)
        events.append({"t": "gmap", "root": root, "gva": gva << 12, "gpa": 0x1000000, "flags": 0x67})
    writes = scenario.table_writes(scenario.parse(json.dumps({"events": events})))
    leaves = writes.gpa[writes.entry == np.uint64(0x1000067)].tolist()
    assert [s.leaf(root, gva << 12) for gva in gvas] == leaves


def test_drawn_scripts_follow_their_seed():
    """One seed and number always draw the same script, another seed or number another one."""
    drawn = [scenarios.script(f"random{n}", "npt1_tdp1", "qemu", seed) for seed, n in ((1, 1), (1, 1), (1, 2), (2, 1))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


@pytest.mark.parametrize("name", ["Z", "B-pae64", "E-flat32", "random", "randomx", ""])
def test_unknown_scenarios_are_named(name):
    """A scenario or guest mode that does not exist is an error which names it and says what there is."""
    with pytest.raises(ValueError, match=f"scenario '{name}'; expected A, B"):
        scenarios.script(name, "npt0", "qemu")


def needs(tool, package):
    """Skip a test where a tool is missing; never where CI is set."""
    reason = f"no {tool} on this machine; on Debian: apt-get install {package}"
    return pytest.mark.skipif(not shutil.which(tool) and not os.environ.get("CI"), reason=reason)


@needs("gcc", "gcc libc6-dev")
def test_the_client_compiles_without_a_warning(tmp_path, monkeypatch):
    """The client and its guest compile and link statically, all of gcc's usual warnings being errors."""
    monkeypatch.setattr(capture, "BUILD", tmp_path)
    assert capture.client()[:4] == b"\x7fELF"
    alone = subprocess.run([str(tmp_path / "client")], capture_output=True, text=True)
    assert alone.returncode == 1 and "client SCRIPT OUT.json" in alone.stderr


def test_a_missing_tool_is_named_with_its_package(monkeypatch, tmp_path):
    """Without QEMU and gcc the kit stops with one line that says which Debian packages to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(capture.Missing, match=r"apt-get install .*gcc libc6-dev.*qemu-system-x86$") as error:
        capture.require()
    assert "\n" not in str(error.value)


def test_the_emulator_is_never_given_kvm():
    """A boot is software emulation with a thread for each CPU, an SVM of its own, and nothing of the host's devices."""
    command = capture.command(*(Path(name) for name in ("kernel", "disk", "console", "results")))
    assert command[command.index("-accel") + 1] == "tcg,thread=multi"
    assert "+svm" in command[command.index("-cpu") + 1]
    assert not [word for word in command if "kvm" in word or word.startswith("/dev")]


@pytest.mark.parametrize("kernel", capture.KERNELS)
def test_kernels_are_told_from_their_companions(kernel):
    """Of all packages of a kernel series, the newest signed image is taken, and no debug, cloud or real-time one."""
    wanted = {"6.1": "linux-image-6.1.0-56-amd64", "6.12": "linux-image-6.12.117+deb12-amd64"}[kernel]
    older = {"6.1": "linux-image-6.1.0-9-amd64", "6.12": "linux-image-6.12.99+deb12-amd64"}[kernel]
    others = [wanted + "-dbg", wanted + "-unsigned", wanted.replace("amd64", "rt-amd64"), "linux-image-amd64"]
    listing = "\n".join(f"{name} - Linux for 64-bit PCs (signed)" for name in [older, wanted, *others])
    assert capture.newest(capture.of_series(kernel, listing)) == wanted


@needs("cpio", "cpio")
def test_the_archive_is_one_that_cpio_reads(tmp_path):
    """The root file system's archive is unpacked by cpio: names, folders, contents and rights are those put in."""
    files = {"bin/": b"", "bin/odd": b"abc", "init": b"#!x\n" * 77, "empty": b""}
    unpack = ["cpio", "-id", "--quiet", "--no-preserve-owner"]
    subprocess.run(unpack, input=capture.cpio(files), cwd=tmp_path, check=True)
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*")}
    assert set(found) == {name.rstrip("/") for name in files}
    assert all(found[name].read_bytes() == data for name, data in files.items() if not name.endswith("/"))
    assert os.access(found["init"], os.X_OK)


def line_of(names):
    """What the recording kernel sends: an archive for each scenario, one after the other."""
    out = io.BytesIO()
    for name in names:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for kind in ("json", "trace"):
                data = gzip.compress(f"{kind} of {name}".encode() * 99, mtime=0)
                entry = tarfile.TarInfo(f"{name}.{kind}.gz")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_a_line_cut_off_gives_its_whole_recordings(cut, tmp_path_factory):
    """Wherever the line breaks off, the whole pairs before that are taken from it as they were sent, and no more."""
    line = line_of(["a", "b", "c"])
    path = tmp_path_factory.mktemp("line") / "results"
    path.write_bytes(line[: int(cut * len(line))])
    found = capture.received(path)
    assert set(found) in [
        {f"{name}.{kind}.gz" for name in names for kind in ("json", "trace")} for names in ("", "a", "ab", "abc")
    ]
    assert all(gzip.decompress(data).startswith(name.split(".")[1].encode()) for name, data in found.items())
    assert len(found) // 2 >= int(cut * 3)


FAKE = """
import pathlib, sys, time
results, log = map(pathlib.Path, sys.argv[1:3])
log.open("a").write("boot\\n")
results.write_bytes(pathlib.Path(sys.argv[3]).read_bytes())
if sys.argv[4] == "hang":
    time.sleep(600)
sys.exit(int(sys.argv[4] == "crash"))
"""


@pytest.mark.parametrize(
    "behaviour, trouble", [("end", ""), ("crash", "QEMU ended with 1"), ("hang", "no sign of life")]
)
def test_a_boot_that_hangs_is_ended(tmp_path, behaviour, trouble):
    """An emulator that gives no sign of life is ended, and the reason said; one that ends by itself is waited for."""
    fake, line, results, log = (tmp_path / name for name in ("fake.py", "line", "results", "log"))
    fake.write_text(FAKE, encoding="utf-8")
    line.write_bytes(b"x")
    said = capture.boot([sys.executable, *map(str, (fake, results, log, line, behaviour))], (results,), stall=1.5)
    assert said.startswith(trouble) and bool(said) == bool(trouble)
    assert log.read_text(encoding="utf-8") == "boot\n"


def test_a_boot_is_ended_after_its_time(tmp_path):
    """An emulator that goes on and on is ended when its time is over, whatever signs of life it gives."""
    busy = f"import time\nwhile True: open({str(tmp_path / 'results')!r}, 'a').write('x'); time.sleep(0.05)"
    assert capture.boot([sys.executable, "-c", busy], (tmp_path / "results",), limit=1.5) == "not done after 1.5 s"


@pytest.mark.parametrize("good, boots, left", [(["a", "b"], 1, []), (["a"], 3, ["c_b"]), ([], 3, ["c_b", "c_a"])])
def test_boots_are_tried_again_for_what_is_missing(tmp_path, monkeypatch, good, boots, left):
    """Scenarios that a boot did not record are tried again, at most three times; those recorded are kept."""
    fake, line, log = (tmp_path / name for name in ("fake.py", "line", "log"))
    fake.write_text(FAKE, encoding="utf-8")
    line.write_bytes(line_of(f"c_{name}" for name in good))
    asked = []
    monkeypatch.setattr(capture, "BUILD", tmp_path)
    monkeypatch.setattr(capture, "kernel", lambda series: (tmp_path / "kernel", {}))
    monkeypatch.setattr(capture, "client", lambda: b"")
    monkeypatch.setattr(capture, "initramfs", lambda *words: asked.append(list(words[-1])) or b"")
    monkeypatch.setattr(
        capture, "command",
        lambda image, ramdisk, console, results: [sys.executable, *map(str, (fake, results, log, line, "crash"))],
    )  # fmt: skip
    missing = capture.record("6.1", "c", {"c_a": "", "c_b": ""}, tmp_path / "out", say=lambda text: None)
    assert sorted(missing) == sorted(left)
    assert len(log.read_text(encoding="utf-8").split()) == len(asked) == boots
    assert all(set(again) <= set(before) for before, again in itertools.pairwise(asked))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json.gz")) == [f"c_{name}.json.gz" for name in good]
