"""What `make site` makes, and the buttons that appear once the repository's address is known."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BASE = "https://kvm.example.org/book/"
SHORT = ["book/02-pfec", "book/07-cmpxchg", "book/glossary", "book/bibliography"]  # beside the first page
REPOSITORY = "https://github.com/example/fast-page-fault"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of a short book, made as a publisher would who set both addresses."""
    folder = tmp_path_factory.mktemp("site") / "copy"
    left_out = shutil.ignore_patterns(".*", "_build", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    config = yaml.safe_load((folder / "_config.yml").read_text())
    config["repository"]["url"] = REPOSITORY
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    contents = yaml.safe_load((folder / "_toc.yml").read_text())
    for part in contents["parts"]:
        part["chapters"] = [page for page in part["chapters"] if page["file"] in SHORT]
    (folder / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))
    environment = {**os.environ, "FPF_SITE": "1", "FPF_BASEURL": BASE.rstrip("/")}
    book = Path(sys.executable).parent / "jupyter-book"
    run = {"cwd": folder, "env": environment, "check": True, "capture_output": True}
    subprocess.run([book, "build", ".", "--all", "-q"], **run)  # no -W: links to what is left out lead nowhere
    subprocess.run([sys.executable, "book/_tools/site.py", "_build/html", "published"], **run)
    return folder / "published"


@pytest.fixture(scope="module")
def names(site):
    """The pages of the table of contents, the first page first."""
    return re.findall(r"(?:root|file): (\S+)", (site.parent / "_toc.yml").read_text())


def test_sitemap_lists_every_page(site, names):
    """The sitemap holds the canonical address of each page of the table of contents, and of nothing else."""
    listed = re.findall(r"<loc>(.*?)</loc>", (site / "sitemap.xml").read_text())
    assert listed == [f"{BASE}{name}.html" for name in names]
    for name in names:
        assert f'<link rel="canonical" href="{BASE}{name}.html"' in (site / f"{name}.html").read_text()


def test_offline_copy_is_the_site(site, names):
    """The archive that the first page links to holds every published file but itself."""
    first = (site / f"{names[0]}.html").read_text()
    link = re.search(r'href="(\S+\.zip)"', first)[1]
    archive = (site / names[0]).parent / link
    inside = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    outside = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert outside - inside == {archive.resolve().name}


def test_every_page_of_the_book_could_be_published():
    """No page of the book, the API's too, is missing, lacks a description or loads anything from another host."""
    tool = runpy.run_path(str(ROOT / "book/_tools/site.py"))
    base = yaml.safe_load((ROOT / "_config.yml").read_text())["html"]["baseurl"]
    assert len(tool["pages"]()) > 30
    assert list(tool["faults"](ROOT / "_build/html", base)) == []


def test_wrong_addresses_lead_home(site):
    """The page for wrong addresses needs no other file and links to the start."""
    page = (site / "404.html").read_text()
    assert f'<a href="{BASE}">' in page
    assert not re.search(r"(src|stylesheet)=", page)


def test_notebooks_can_be_downloaded(site, names):
    """Each chapter's page offers its notebook, and the notebook is there."""
    for name in names:
        if (ROOT / f"{name}.ipynb").exists():
            target = re.search(
                r'href="([^"]+\.ipynb)"[^>]*download|download[^>]*href="([^"]+\.ipynb)"', page_of(site, name)
            )
            assert target, name
            assert (site / name).parent.joinpath(target[1] or target[2]).exists()


def page_of(site, name):
    return (site / f"{name}.html").read_text()


def test_buttons_lead_to_the_repository(site):
    """With a repository set, a chapter offers it, Binder and Colab, each naming the repository and the notebook."""
    page = page_of(site, "book/02-pfec")
    where = REPOSITORY.removeprefix("https://github.com/")
    assert f'href="{REPOSITORY}"' in page
    assert re.search(rf"https://mybinder\.org/v2/gh/{where}/main\?urlpath=lab/tree/book/02-pfec\.ipynb", page)
    assert f"https://colab.research.google.com/github/{where}/blob/main/book/02-pfec.ipynb" in page


def test_no_buttons_without_a_repository():
    """With no repository set, the pages built by `make book` offer no button that would lead nowhere."""
    page = (ROOT / "_build/html/book/02-pfec.html").read_text()
    assert not re.search(r"mybinder|colab\.research|github\.com/[^/]+/[^/]+\"", page)


def test_a_missing_page_is_not_published(site, tmp_path):
    """When a page of the table of contents is missing, no site is made and the page is named."""
    broken = tmp_path / "html"
    subprocess.run(["cp", "-r", site, broken], check=True)
    (broken / "book/glossary.html").unlink()
    made = [sys.executable, "book/_tools/site.py", broken, tmp_path / "published"]
    done = subprocess.run(made, cwd=site.parent, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[1:] == ["  book/glossary.html is missing"]
