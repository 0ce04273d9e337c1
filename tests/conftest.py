"""The package alone: where the book's packages are missing, the tests of what needs them are left out, and named."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a busy core is no failure
settings.load_profile("shared machine")

LEFT_OUT: dict[str, str] = {}


def pytest_ignore_collect(collection_path: Path):
    """Leave out a test whose imports need a package that is not installed; a fault inside ``mmu`` still fails."""
    if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    for node in ast.parse(collection_path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "mmu")]
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name and error.name.split(".")[0] not in ("mmu", "tests", name.split(".")[0]):
                    LEFT_OUT[collection_path.name] = error.name
                    return True
                if error.name == name and name.split(".")[0] not in ("mmu", "tests"):
                    LEFT_OUT[collection_path.name] = name
                    return True
    return None


def pytest_terminal_summary(terminalreporter):
    """Say what was left out, and for want of what."""
    for name, missing in sorted(LEFT_OUT.items()):
        terminalreporter.write_line(f"left out: {name}, which needs {missing}", yellow=True)
