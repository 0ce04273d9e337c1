"""``make bench``: the package beside its peers, as a table and as ``_build/bench.json``.

Each module of this folder has ``rows()``; each row runs both sides in one go, takes the median of several runs, and has
first checked that both computed the same. A peer that is not installed is a row that says so. Name modules to run only
those: ``python -m tests.bench spte``.
"""

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "_build/bench.json"
KEYS = ("name", "ours", "peer", "peer_value", "unit", "ratio", "target", "met")


def say(value):
    """A number with three significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(wanted):
    """Run the wanted modules, or all."""
    modules = wanted or sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    rows = []
    for module in modules:
        for row in importlib.import_module(f"tests.bench.{module}").rows():
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
    print(f"\nwritten to {OUT.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    main(sys.argv[1:])
