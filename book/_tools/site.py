"""Make exactly what is to be published from freshly built pages: ``site.py HTML SITE``.

Adds to the pages a sitemap, a page for wrong addresses, an offline copy of everything as one archive, and the file that
keeps GitHub Pages from dropping folders that begin with an underscore. Fails when a page of the table of contents is
missing, has no description or no canonical address, or when something asks another host.
"""

import html
import re
import shutil
import sys
import zipfile
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, SoupStrainer

ROOT = Path(__file__).parents[2]
ARCHIVE = "fast-page-fault.zip"
LOADS = ["script", "link", "img", "iframe", "source"]
LOADING = SoupStrainer(["meta", *LOADS])  # a page has a hundred times as many other elements
EPOCH = (2012, 3, 29, 9, 20, 16)  # archives carry a date; the message's makes each build the same


def pages():
    """The pages of the table of contents, as paths below the site."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    below = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    files = [toc["root"]] + [entry["file"] for chapter in below for entry in (chapter, *chapter.get("sections", ()))]
    return [f"{name}.html" for name in files]


def faults(site, base):
    """What must not be published, one sentence each."""
    for name in pages():
        if not (site / name).exists():
            yield f"{name} is missing"
            continue
        soup = BeautifulSoup((site / name).read_text(encoding="utf-8"), "html.parser", parse_only=LOADING)
        if not soup.find("meta", attrs={"name": "description"}):
            yield f"{name} has no description; give it myst: html_meta: description"
        canonical = soup.find("link", rel="canonical")
        if not canonical or canonical["href"] != base + name:
            yield f"{name} names {canonical and canonical['href']} as its address; expected {base + name}"
        for tag in soup.find_all(LOADS):
            address = tag.get("src") or (tag.get("href") if tag.get("rel") != ["canonical"] else None) or ""
            if re.match(r"(https?:)?//", address):
                yield f"{name} loads {address} from another host"


def wrong_address(base):
    """A page for addresses that lead nowhere; it stands at any depth, so it needs no other file."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Not present - Fast Page Fault</title>
<style>body{{font:1.1rem/1.5 sans-serif;max-width:36rem;margin:4rem auto;padding:0 1rem;color:#1b1f24;background:#fff}}
@media(prefers-color-scheme:dark){{body{{color:#e6e9ec;background:#14181c}}a{{color:#67ace2}}}}</style>
<h1>P=0: not present</h1><p>No page is mapped at this address.</p>
<p><a href="{html.escape(base)}">Start of the book</a></p></html>
"""


def main(built, site):
    """Copy the pages, add what belongs to them, and check the whole."""
    built, site = Path(built), Path(site)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(built, site, ignore=shutil.ignore_patterns(".buildinfo*", "*.map", "objects.inv"))
    first = BeautifulSoup((site / pages()[0]).read_text(encoding="utf-8"), "html.parser")
    base = first.find("link", rel="canonical")["href"].removesuffix(pages()[0])
    wrong = list(faults(site, base))
    if wrong:
        sys.exit("Not fit to be published:\n  " + "\n  ".join(wrong))
    (site / ".nojekyll").touch()
    (site / "404.html").write_text(wrong_address(base), encoding="utf-8")
    places = "".join(f"  <url><loc>{html.escape(base + name)}</loc></url>\n" for name in pages())
    (site / "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{places}</urlset>\n',
        encoding="utf-8",
    )
    (site / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base}sitemap.xml\n", encoding="utf-8")
    files = sorted(path for path in site.rglob("*") if path.is_file())
    with zipfile.ZipFile(site / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(f"fast-page-fault/{path.relative_to(site)}", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    if "example.org" in base:
        print(
            f"note: the site calls itself {base}; set html.baseurl in _config.yml before publishing it", file=sys.stderr
        )
    print(f"The site is made. Serve: {site}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
