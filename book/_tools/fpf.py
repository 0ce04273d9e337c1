"""The book's Sphinx extension: the players' script and style sheet beside the pages, and citations that read well."""

from pathlib import Path

from mmu import widgets


def _players(app):
    out = Path(app.doctreedir) / "players"
    out.mkdir(parents=True, exist_ok=True)
    (out / "players.js").write_text(widgets.bundle(), encoding="utf-8")
    (out / "players.css").write_text(widgets.style(), encoding="utf-8")
    app.config.html_static_path.append(str(out))
    app.add_js_file("players.js", loading_method="defer")
    app.add_css_file("players.css")


def _citations(app, page, template, context, doctree):
    # docutils gives list items a role that a list may not hold; screen readers then announce an empty list
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    """Register the extension."""
    app.connect("builder-inited", _players)
    app.connect("html-page-context", _citations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
