"""``make bench``: the package beside its peers, as a table and as ``_build/bench.json``.

Each module of this folder has ``rows()``; each row runs both sides in one go, takes the median of several runs, and has
first checked that both computed the same. A peer that is not installed is a row that says so. Name modules to run only
those: ``python -m tests.bench spte``.

``make measure``, ``python -m tests.bench --measure``: how cost grows, the modules' ``growth()``, written to
``book/data/measured.json``, which chapters draw; with module names, only their charts are replaced.
"""

import importlib
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT, MEASURED = ROOT / "_build/bench.json", ROOT / "book/data/measured.json"
KEYS = ("name", "ours", "peer", "peer_value", "unit", "ratio", "target", "met")


def say(value):
    """A number with three significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bench(modules):
    """Run each module's rows, print them as a table and write them down."""
    rows = []
    for module in modules:
        for row in module.rows():
            assert set(row) == set(KEYS), sorted(row)
            rows.append(row)
            print(
                f"{row['name']}: {say(row['ours'])} against {say(row['peer_value'])} {row['unit']} of {row['peer']}",
                flush=True,
            )
    table = [KEYS, *([say(row[key]) for key in KEYS] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(KEYS))]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nwritten to {OUT.relative_to(ROOT)}")


def machine():
    """The CPU's name and how many of them there are, as far as the system tells."""
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def measure(modules):
    """Run each module's growth and put its charts into the chapters' data, each with where and when it was measured."""
    kept = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for module in modules:
        if not hasattr(module, "growth"):
            continue
        for name, chart in module.growth().items():
            for panel in chart["panels"]:
                lines = {peer: [(x, float(f"{y:.3g}")) for x, y in line] for peer, line in panel["lines"].items()}
                panel["lines"] = {peer: line for peer, line in lines.items() if line}
            kept[name] = {
                "machine": machine(),
                "with": f"Python {platform.python_version()}, numpy {np.__version__}",
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "command": "make measure",
                **chart,
            }
            print(f"{name}: measured", flush=True)
    MEASURED.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    print(f"written to {MEASURED.relative_to(ROOT)}; `make chapters` draws it")


def main(wanted):
    """Measure or bench with the wanted modules, or with all."""
    names = [name for name in wanted if name != "--measure"]
    names = names or sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    modules = [importlib.import_module(f"tests.bench.{name}") for name in names]
    (measure if "--measure" in wanted else bench)(modules)


if __name__ == "__main__":
    main(sys.argv[1:])
