"""Record what a real KVM does, on a machine without KVM hardware: ``make capture``.

A Debian kernel runs under QEMU's software emulation, with an AMD SVM that QEMU emulates too. In it kvm-amd is loaded,
and the client (``client.c``, ``guest.S``) carries out the scripts of :mod:`scenarios`. ``NAME.trace.gz`` and
``NAME.json.gz`` come back over a serial line. All that is fetched and built lies in ``_build/capture``; the host's own
/dev/kvm is never opened. ``python -m mmu check NAME.trace.gz`` says how much of a recording follows from its input.
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import scenarios

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "_build" / "capture"
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "gcc": "gcc libc6-dev",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
}
"""What must be there, and the Debian package that holds it."""

KERNELS = {"6.1": r"linux-image-6\.1\.0-\d+-amd64", "6.12": r"linux-image-6\.12\.\d+\+deb12-amd64"}
MODULES = ("irqbypass", "ccp", "kvm", "kvm-amd")
CONFIGS = {  # parameters of kvm, of kvm_amd
    "npt1_tdp1": ("tdp_mmu=1", "npt=1"),
    "npt1_tdp0": ("tdp_mmu=0", "npt=1"),
    "npt0": ("tdp_mmu=1", "npt=0"),
    "npt0_nxhp": ("tdp_mmu=1 nx_huge_pages=force", "npt=0"),
    "npt1_tdp1_nxhp": ("tdp_mmu=1 nx_huge_pages=force", "npt=1"),
    "npt1_tdp0_nxhp": ("tdp_mmu=0 nx_huge_pages=force", "npt=1"),
    "npt1_tdp1_noeager": ("tdp_mmu=1 eager_page_split=0", "npt=1"),
    "npt1_tdp0_noeager": ("tdp_mmu=0 eager_page_split=0", "npt=1"),
}
EVENTS = (
    "entry exit page_fault userspace_exit mmio emulate_insn inj_exception dirty_ring_push dirty_ring_reset "
    "dirty_ring_exit unmap_hva_range set_spte_hva"
)
RETURNS = {
    "6.1": "direct_page_fault paging64_page_fault paging32_page_fault",
    "6.12": "kvm_tdp_page_fault nonpaging_page_fault paging64_page_fault paging32_page_fault fast_page_fault",
}
"""The functions whose return values are recorded: each fault passes through one (6.12: and the fast path's own)."""

ATTEMPTS, STALL, LIMIT = 3, 90.0, 600.0
"""Boots that are tried, seconds without a sign of life, seconds in all; a boot beyond them is ended."""


class Missing(Exception):
    """Something that the host lacks; the message says what to install."""


def require(tools: Iterable[str] = TOOLS) -> None:
    """Raises Missing with one line when a tool is not installed."""
    if packages := sorted({TOOLS[tool] for tool in tools if shutil.which(tool) is None}):
        raise Missing(
            f"make capture needs {' and '.join(packages)}; install with: apt-get install {' '.join(packages)}"
        )


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; raises Missing with its own words when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def qemu_version() -> str:
    """The version of QEMU, as ``7.2.22``."""
    return re.search(r"version (\S+)", output("qemu-system-x86_64", "--version"))[1]


def newest(names: Iterable[str]) -> str:
    """The package name with the highest numbers in it."""
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def fetch(package: str) -> Path:
    """Download a Debian package into the build folder and unpack it there; returns where."""
    target = BUILD / "packages" / package
    if not target.exists():
        partial = BUILD / "packages" / f"{package}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        output("apt-get", "download", package, cwd=partial)
        (deb,) = partial.glob("*.deb")
        output("dpkg-deb", "-x", str(deb), str(partial / "root"))
        deb.unlink()
        (partial / "root").rename(target)
        partial.rmdir()
    return target


def of_series(series: str, listing: str) -> list[str]:
    """The kernel packages of a series in what ``apt-cache search`` lists."""
    return re.findall(rf"^{KERNELS[series]}(?= )", listing, re.MULTILINE)


def kernel(series: str) -> tuple[Path, dict[str, bytes]]:
    """Fetch the newest kernel of a series; returns its image and the modules' contents."""
    names = of_series(series, output("apt-cache", "search", "linux-image-"))
    if not names:
        raise Missing(
            f"no package like {KERNELS[series]} is known; add bookworm-security to apt's sources, apt-get update"
        )
    root = fetch(newest(names))
    (image,) = (root / "boot").glob("vmlinuz-*")
    files = {path.name.split(".")[0]: path for path in sorted(root.glob("**/*.ko*"))}
    return image, {
        name: lzma.decompress(files[name].read_bytes()) if files[name].suffix == ".xz" else files[name].read_bytes()
        for name in MODULES
    }


def client() -> bytes:
    """Compile the client and its guest."""
    target = BUILD / "client"
    sources = [str(HERE / "client.c"), str(HERE / "guest.S")]
    output("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", str(target), *sources)
    return target.read_bytes()


def cpio(files: dict[str, bytes]) -> bytes:
    """An archive in the ``newc`` format that the kernel unpacks: folders (empty names end in /) and programs."""
    out = io.BytesIO()
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        kind = 0o040755 if name.endswith("/") else 0o100755
        text = name.rstrip("/").encode() + b"\0"
        fields = (number, kind, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
        out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + text)
        out.write(b"\0" * (-out.tell() % 4) + data)
        out.write(b"\0" * (-out.tell() % 4))
    return out.getvalue()


def initramfs(series: str, config: str, modules: dict[str, bytes], program: bytes, scripts: dict[str, str]) -> bytes:
    """The root file system of one boot: busybox, the init script, KVM, the client and its scripts."""
    busybox = (fetch("busybox-static") / "bin" / "busybox").read_bytes()
    kvm, amd = CONFIGS[config]
    events = " ".join([*(f"kvm/kvm_{event}" for event in EVENTS.split()), "kvm/vcpu_match_mmio"])
    parameters = f"KVM='{kvm}'\nKVM_AMD='{amd}'\nEVENTS='{events}'\nRETURNS='{RETURNS[series]}'\n"
    folders = ("bin", "proc", "sys", "dev", "out", "scripts")
    return gzip.compress(
        cpio(
            {f"{folder}/": b"" for folder in folders}
            | {"bin/busybox": busybox, "init": (HERE / "init").read_bytes(), "client": program}
            | {"parameters": parameters.encode()}
            | {f"{name}.ko": data for name, data in modules.items()}
            | {f"scripts/{n:03}.{name}": text.encode() for n, (name, text) in enumerate(scripts.items())}
        ),
        compresslevel=1,
    )


def command(image: Path, ramdisk: Path, console: Path, results: Path) -> list[str]:
    """The command line of one boot; multi-threaded TCG: single-threaded, a locked increment faults twice."""
    line = (
        "console=ttyS0 panic=-1 nokaslr no_hash_pointers mitigations=off nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
    )
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-smp", "2", "-m", "1024",
        "-cpu", "qemu64,+svm,+npt,+nx,+pdpe1gb", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", str(image), "-initrd", str(ramdisk), "-append", line,
        "-serial", f"file:{console}", "-serial", f"file:{results}",
    ]  # fmt: skip


def boot(arguments: Sequence[str], watched: Sequence[Path], stall: float = STALL, limit: float = LIMIT) -> str:
    """Run QEMU until it ends or hangs; returns "" or why it was ended. A child that hangs is killed by its pid."""
    begun = alive = time.monotonic()
    size = 0
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        try:
            while child.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                grown = sum(path.stat().st_size for path in watched if path.exists())
                alive, size = (now, grown) if grown != size else (alive, size)
                if now - alive > stall:
                    return f"no sign of life for {stall:g} s"
                if now - begun > limit:
                    return f"not done after {limit:g} s"
        finally:
            child.kill()
    return "" if child.returncode == 0 else f"QEMU ended with {child.returncode}"


def received(archive: Path) -> dict[str, bytes]:
    """The files that came over the line, whole ones only."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:", ignore_zeros=True) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                gzip.decompress(data)
                files[member.name] = data
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass  # cut off: the kernel crashed, or was ended
    return {
        name: data
        for name, data in files.items()
        if {name.replace(".json.", ".trace."), name.replace(".trace.", ".json.")} <= set(files)
    }


def record(series: str, config: str, scripts: dict[str, str], target: Path, say=print) -> list[str]:
    """Record scripts under one configuration; returns the names of those that could not be recorded.

    A boot that crashes or hangs is tried again with what is still missing, :data:`ATTEMPTS` times in all.
    """
    image, modules = kernel(series)
    program = client()
    missing = dict(scripts)
    target.mkdir(parents=True, exist_ok=True)
    work = BUILD / "boot" / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        ramdisk, console, results = (work / f"{config}.{attempt}.{kind}" for kind in ("initrd", "console", "tar"))
        ramdisk.write_bytes(initramfs(series, config, modules, program, missing))
        begun = time.monotonic()
        trouble = boot(command(image, ramdisk, console, results), (console, results))
        files = received(results)
        for name, data in files.items():
            (target / name).write_bytes(data)
            missing.pop(name.split(".")[0], None)
        say(
            f"{config}: {len(files) // 2} recorded in {time.monotonic() - begun:.0f} s" + f"; {trouble}" * bool(trouble)
        )
        if not missing:
            shutil.rmtree(work)
            break
        say(f"{config}: boot {attempt} of {ATTEMPTS} left out {' '.join(missing)}; its console: {console}")
        first = next(iter(missing))
        missing[first] = missing.pop(first)  # it may be what brought the kernel down: the others go before it
    return list(missing)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, default="6.1")
    parser.add_argument("--config", default="npt1_tdp1", help=f"one or more of {' '.join(CONFIGS)}, or all")
    parser.add_argument("--scenarios", default="all", help="such as 'A B-pae32 random3'; all: what the config can show")
    parser.add_argument("--seed", type=int, default=1, help="of the random scenarios")
    parser.add_argument("--out", type=Path, default=BUILD / "traces", help="where the recordings go")
    parser.add_argument("--check", action="store_true", help="hold them against their prediction afterwards")
    options = parser.parse_args(arguments)
    configs = list(CONFIGS) if options.config == "all" else options.config.split()
    if unknown := [config for config in configs if config not in CONFIGS]:
        parser.error(f"configuration {unknown[0]!r}; expected one of {', '.join(CONFIGS)}, or all")
    recorded, left = [], []
    try:
        require()
        host = f"qemu {qemu_version()} TCG emulated AMD SVM"
        for config in configs:
            prefix = ("k612_" if options.kernel == "6.12" else "") + config
            names = scenarios.names(config) if options.scenarios == "all" else options.scenarios.split()
            scripts = {f"{prefix}_{name}": scenarios.script(name, prefix, host, options.seed) for name in names}
            missing = record(options.kernel, config, scripts, options.out)
            left += missing
            recorded += [str(options.out / f"{name}.trace.gz") for name in scripts if name not in missing]
    except (Missing, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if left:
        print(f"not recorded: {' '.join(left)}", file=sys.stderr)
    if options.check and recorded:
        return subprocess.run([sys.executable, "-m", "mmu", "check", *recorded], cwd=HERE.parent).returncode or bool(
            left
        )
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
