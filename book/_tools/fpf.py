"""The book's Sphinx extension: players beside the pages, buttons that lead somewhere, citations that read well."""

import hashlib
import json
import os
import re
from base64 import b64decode
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring

from mmu import widgets


def _players(app):
    out = Path(app.doctreedir) / "players"
    out.mkdir(parents=True, exist_ok=True)
    (out / "players.js").write_text(widgets.bundle(), encoding="utf-8")
    (out / "players.css").write_text(widgets.style(), encoding="utf-8")
    app.config.html_static_path.append(str(out))
    app.add_js_file("players.js", loading_method="defer")
    app.add_css_file("players.css")


def _buttons(app, config):
    # repository, Binder and Colab buttons lead somewhere only when _config.yml says where the repository is
    options = config.html_theme_options
    known = bool(options.get("repository_url"))
    options.update(use_repository_button=known, use_issues_button=known)
    if not known:
        options["launch_buttons"] = {}
    if os.environ.get("FPF_BASEURL"):  # the workflow knows where it publishes
        config.html_baseurl = os.environ["FPF_BASEURL"].rstrip("/") + "/"


def _citations(app, page, template, context, doctree):
    # docutils gives list items a role that a list may not hold; screen readers then announce an empty list
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')


def _narrow(app, page, template, context, doctree):
    """Let a phone take the narrow drawing of a picture that has one (`mmu.picture`)."""
    notebook = Path(app.env.doc2path(page)) if page in app.env.found_docs else Path()
    if notebook.suffix != ".ipynb":
        return
    images = Path(app.outdir) / "_images"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        drawn = output.get("metadata", {}).get("image/png", {}).get("narrow")
        if not drawn:
            continue
        wide = hashlib.sha256(b64decode(output["data"]["image/png"])).hexdigest()  # as MyST-NB names it
        images.mkdir(exist_ok=True)
        (images / f"{wide}-narrow.png").write_bytes(b64decode(drawn))
        context["body"] = re.sub(
            rf'<img [^>]*src="([^"]*){wide}\.png"[^>]*>',
            rf'<picture><source media="(max-width: 600px)" srcset="\g<1>{wide}-narrow.png">\g<0></picture>',
            context["body"],
        )


def _names(app, page, template, context, doctree):
    """Let a long name in code break behind a sign between its words, shorter ones in a table; elsewhere none breaks."""

    def joints(found):
        long = rf'(?<=<span class="pre">)[^<]{{{12 if found["cell"] else 24},}}(?=</span>)'
        joint = r"(?<=[_/:=,(])(?=[\w&])|(?<=\.)(?=[a-z])"
        return re.sub(long, lambda name: re.sub(joint, '</span><wbr><span class="pre">', name[0]), found[0])

    places = r"(?P<cell><td\b.*?</td>)|<code [^>]*\bliteral\b.*?</code>"
    context["body"] = re.sub(places, joints, context.get("body", ""), flags=re.DOTALL)


def _plain_value(docstring):
    # napoleon takes what stands before a colon in the first line of a value's docstring for a type; it is text
    return "", docstring._dedent(docstring._consume_to_end())


def setup(app):
    """Register the extension."""
    if os.environ.get("FPF_SITE"):
        app.tags.add("site")  # what only the published site has: the offline copy
    GoogleDocstring._consume_inline_attribute = _plain_value
    app.connect("config-inited", _buttons)
    app.connect("builder-inited", _players)
    app.connect("html-page-context", _citations)
    app.connect("html-page-context", _narrow)
    app.connect("html-page-context", _names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
