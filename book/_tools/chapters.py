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
import yaml
from nbclient import NotebookClient

TEXT = Path("_build/text")
VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path):
    """Run one chapter in its own folder and store its normalised outputs."""
    notebook = nbformat.read(path, 4)
    options = {"timeout": 120, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **options).execute()
    _fetch(notebook)
    notebook.metadata = {
        **{key: value for key, value in notebook.metadata.items() if key == "myst"},  # the page's description
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


def _fetch(notebook):
    """Where the repository is known, begin with a cell that fetches it on machines that have only the notebook."""
    cells = [cell for cell in notebook.cells if "fetch" not in cell.metadata.get("tags", [])]
    repository = yaml.safe_load(Path("_config.yml").read_text())["repository"]
    if repository["url"]:
        source = (
            "import importlib.util\n"
            "if importlib.util.find_spec('mmu') is None:  # as on Colab\n"
            f"    !git clone --quiet --depth 1 --branch {repository['branch']} {repository['url']} fast-page-fault\n"
            "    %pip install --quiet ./fast-page-fault[book] myst-nb\n"
            "    %cd -q fast-page-fault/book"
        )
        cells.insert(0, nbformat.v4.new_code_cell(source, metadata={"tags": ["remove-cell", "fetch"]}))
    notebook.cells = cells


def written(path):
    """What an author wrote in a chapter: its cells without what they printed and what :func:`execute` added."""
    notebook = jupytext.read(path)
    cells = notebook.cells
    kept = [{key: value for key, value in cell.metadata.items() if key in ("tags", "mystnb")} for cell in cells]
    for metadata in kept:
        metadata.get("mystnb", {}).pop("image", None)
    parts = [(cell.cell_type, cell.source, metadata) for cell, metadata in zip(cells, kept, strict=True)]
    return notebook.metadata.get("myst"), parts


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
            notebook.metadata["jupytext"] = {"notebook_metadata_filter": "kernelspec,jupytext,myst"}
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
