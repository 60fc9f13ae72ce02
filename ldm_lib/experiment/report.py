"""HTML that needs nothing and does nothing: one file, no scripts, no network, images inside."""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import bleach
import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from ldm_lib.errors import RunError
from ldm_lib.files import replacing

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TAGS = frozenset({
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "summary",
    "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
})  # fmt: skip
ATTRIBUTES = {"a": ("href",), "img": ("src", "alt", "width", "height"), "td": ("colspan", "rowspan")}
ATTRIBUTES["th"] = ATTRIBUTES["td"]
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1010px; margin: 2em auto; padding: 0 1em }
pre { font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; margin: 0 }
.input_area { background: #f6f8fa; border-left: 3px solid #d0d7de; padding: .5em .8em; margin: .8em 0 .4em }
.output_stderr { background: #fff8e6 } .output_error { background: #ffebe9 }
img { max-width: 100% } .anchor-link { display: none }
table { border-collapse: collapse; font-size: 13px; margin: .6em 0 }
th, td { padding: .3em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #d8dee4 }
ul.checks { list-style: none; margin: 0; padding: 0 } .failed { color: #b42318; font-weight: 600 }
"""


def write_report(notebook_path: str | Path, html_path: str | Path, *, title: str) -> Path:
    """Turn an executed notebook into one inert HTML file, written atomically.

    Scripts, styles, forms, frames and event handlers in markdown or outputs are removed, and the page's content
    policy forbids them once more. Code stays visible.

    Raises:
        RunError: the notebook is missing or not a notebook, or the page cannot be written.
    """
    notebook_path = Path(notebook_path)
    try:
        notebook = nbformat.read(notebook_path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise RunError(f"is not a readable notebook ({error})", where=notebook_path, fix="run the stage") from error
    _describe_pictures(notebook)
    exporter = HTMLExporter(
        template_name="basic",
        sanitize_html=True,
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"clean_html": inert},
    )
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(notebook_path.parent)}})
    # Once more over the whole body: templates also print metadata, such as a picture's width, as they find it.
    return _write(Path(html_path), _page(title, inert(body)))


def write_index(run_folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write index.html of a run: each stage with its status, seconds, checks and a link to its report.

    Args:
        run_folder: outputs/<run>.
        rows: mappings with `stage` and `status`, and optionally `seconds` and `checks` (as in done.json: mappings
            with `check`, `passed`, `found`).

    Raises:
        RunError: the page cannot be written.
    """
    run_folder = Path(run_folder)
    head = "<tr><th>stage</th><th>status</th><th>seconds</th><th>acceptance checks</th></tr>"
    lines = "\n".join(_stage_row(run_folder, row) for row in rows)
    title = f"Run {run_folder.name}"
    body = f"<h1>{html.escape(title)}</h1>\n<table>\n{head}\n{lines}\n</table>"
    return _write(run_folder / "index.html", _page(title, body))


def inert(element: object) -> str:
    """HTML with text structure, tables, links and embedded images; all else is removed or shown as text."""
    text = element.decode() if isinstance(element, bytes) else str(element)
    text = re.sub(r"<(style|script)\b.*?</\1\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    return bleach.clean(text, TAGS, _allowed, ("http", "https", "mailto", "data"))


def _allowed(tag: str, name: str, value: str) -> bool:
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name == "href":
        return tag == "a" and urlsplit(value.strip()).scheme in ("", "http", "https", "mailto")
    return name in ("class", "id", *ATTRIBUTES.get(tag, ()))


def _write(path: Path, text: str) -> Path:
    """Beside its place first, then renamed: a reader sees the old page or the new one, never half."""
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror})", where=path, fix="check space and rights") from error
    return path


def _page(title: str, body: str) -> str:
    colours = HtmlFormatter().get_style_defs(".highlight")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}{colours}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _describe_pictures(notebook: nbformat.NotebookNode) -> None:
    """Give each picture the heading above it as its alternative text."""
    heading = "figure"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#+\s*(.+)$", cell.source, re.MULTILINE)):
            heading = found.group(1)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                output.setdefault("metadata", {}).setdefault("image/png", {}).setdefault("alt", heading)


def _stage_row(run_folder: Path, row: Mapping[str, Any]) -> str:
    stage, seconds = str(row["stage"]), row.get("seconds")
    name = html.escape(stage)
    if (run_folder / stage / "report.html").exists():
        name = f'<a href="{quote(stage)}/report.html">{name}</a>'
    checks = "".join(_check(check) for check in row.get("checks") or ())
    took = "" if seconds is None else f"{float(seconds):.0f}"
    cells = (name, html.escape(str(row["status"])), took, f'<ul class="checks">{checks}</ul>')
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _check(check: Mapping[str, Any]) -> str:
    word, style = ("passed", "passed") if check["passed"] else ("FAILED", "failed")
    return f'<li class="{style}">{word}: {html.escape(str(check["check"]))} ({html.escape(str(check["found"]))})</li>'
