"""How the package is built: floors, weight, and what its arrays are made of."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmu

PACKAGE = Path(mmu.__file__).parent
LISTED = re.findall(r"``(\w+)``", mmu.__doc__.split("=\n", 1)[1].rsplit("=\n", 1)[0])
MODULES = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"} | {"exercise", "widgets"}


def imported(name):
    """The modules of the package that a module, or any file of a folder of it, imports."""
    path = PACKAGE / name
    found = set()
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmu":
                below = node.module.split(".")[1:2]
                found |= set(below) if below else {alias.name for alias in node.names}
    return found & MODULES - {name}


def test_every_module_has_its_place():
    """Each module stands in the package's table once, and nothing stands there that is no module."""
    assert sorted(LISTED) == sorted(MODULES)


@pytest.mark.parametrize("name", LISTED)
def test_modules_import_only_what_stands_before_them(name):
    """A module imports only modules that stand before it in the package's table."""
    assert imported(name) <= set(LISTED[: LISTED.index(name)])


def test_the_package_is_light():
    """Importing the package, and all of it but the book's pictures and players, needs numpy and nothing else."""
    core = [name for name in LISTED[: LISTED.index("picture")] if name != "explore_cli"]
    lines = [f"import mmu.{name}" for name in core]
    heavy = "{'matplotlib', 'anywidget', 'ipywidgets', 'IPython', 'tqdm', 'dask', 'yaml'}"
    script = "\n".join(["import sys", *lines, f"sys.exit(' '.join({heavy} & set(sys.modules)) or None)"])
    subprocess.run([sys.executable, "-c", script], check=True)


NAKED = re.compile(r"\bnp\.(zeros|ones|empty|full|arange|fromiter|linspace|identity|eye)\(")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_arrays_name_their_dtype(path):
    """Every array that is made from nothing names its dtype, since numpy's default has 32 bits in WebAssembly."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and NAKED.match(ast.unparse(node.func) + "("):
            named = any(word.arg == "dtype" for word in node.keywords)
            positional = len(node.args) >= (3 if node.func.attr == "full" else 2) and node.func.attr != "arange"
            assert named or positional, f"line {node.lineno}: {ast.unparse(node)}"
