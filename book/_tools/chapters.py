"""Chapters: execute them and store what they print, or turn them into text and back.

    chapters.py run book/*.ipynb     execute, normalise, store
    chapters.py text book/*.ipynb    write _build/text/NAME.md (MyST), to edit or to review
    chapters.py fold book/*.ipynb    take those texts back into the chapters (new ones too) and run the changed ones

Stored outputs are the pages' source and the tests' expectation, so they must not change unless their meaning does:
no timings, no interpreter version, no random widget ids, and each picture's alternative text where the page finds it.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TEXT = Path("_build/text")
VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path):
    """Run one chapter in its own folder and store its normalised outputs."""
    notebook = nbformat.read(path, 4)
    options = {"timeout": 120, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **options).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                data.pop(VIEW, None)  # the twin says it all; the view's random id says nothing
            if "image/png" in data:
                size = output["metadata"]["image/png"]
                cell.metadata.setdefault("mystnb", {})["image"] = {
                    "alt": data["text/plain"],
                    "width": f"{size['width']}px",
                }
    nbformat.write(notebook, path)
    print(f"{path}: executed and stored")


def written(path):
    """What an author wrote in a chapter: its cells without what they printed and what :func:`execute` added."""
    cells = jupytext.read(path).cells
    kept = [{key: value for key, value in cell.metadata.items() if key in ("tags", "mystnb")} for cell in cells]
    for metadata in kept:
        metadata.get("mystnb", {}).pop("image", None)
    return [(cell.cell_type, cell.source, metadata) for cell, metadata in zip(cells, kept, strict=True)]


def main(command, *paths):
    """Do ``command`` to each chapter."""
    for path in map(Path, paths):
        text = TEXT / f"{path.stem}.md"
        if command == "fold" and not text.exists():
            continue
        if command == "run":
            execute(path)
        elif command == "text":
            text.parent.mkdir(parents=True, exist_ok=True)
            notebook = jupytext.read(path)
            for cell in notebook.cells:
                cell.metadata.get("mystnb", {}).pop("image", None)  # `run` computes it
            jupytext.write(notebook, text, fmt="md:myst")
            print(text)
        elif command == "fold":
            if not path.exists() or written(text) != written(path):
                nbformat.write(jupytext.read(text), path)
                execute(path)
        else:
            sys.exit(f"{command!r} is no command; expected run, text or fold")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
