"""Write HTML reports: one file each, without scripts, network access or external images."""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors.sanitize import SanitizeHTML

from ldm_lib.files import replacing

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# JupyterLab's page without its scripts; pictures with their heading as alternative text.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%} {%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%} {%- block jupyter_widgets -%}{%- endblock -%}
{%- block data_widget_view -%}{%- endblock -%} {%- block footer -%}</html>{%- endblock -%}
{%- block extra_css -%}<style>main { max-width: 1010px; margin: auto }</style>{%- endblock -%}
{%- block data_png -%}<div class="jp-RenderedImage jp-OutputArea-output">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
     alt="{{ output.metadata.alt | escape_html }}"></div>{%- endblock -%}"""
TAGS = [
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "i", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "summary", "sup",
    "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
]  # fmt: skip
ATTRIBUTES = {"*": ["class", "id"], "a": ["href"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan"]}
INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1010px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} ul {{ list-style: none; margin: 0; padding: 0 }} .failed {{ color: #b42318 }}
th, td {{ padding: .3em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #d8dee4 }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
<tr><th>stage</th><th>seconds</th><th>acceptance checks</th></tr>
{rows}
</table>
</body>
</html>
"""
_SANITISER = SanitizeHTML(tags=TAGS, attributes=ATTRIBUTES, styles=[])


def write_report(notebook_path: str | Path, html_path: str | Path, *, title: str) -> Path:
    """Convert an executed notebook to one HTML file without active content, written atomically.

    Scripts, styles, forms, frames and event handlers in markdown or outputs are removed or shown as text, and the
    page's content security policy forbids them in addition.
    """
    notebook = nbformat.read(notebook_path, as_version=4)
    notebook.metadata = {"title": title}
    heading = "figure"  # the heading above a picture is its alternative text; other metadata are dropped
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "markdown" and (found := re.search(r"^#+\s*(.+)$", cell.source, re.MULTILINE)):
            heading = found.group(1)
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {"alt": heading}
    exporter = HTMLExporter(raw_template=TEMPLATE, sanitize_html=True, embed_images=True, exclude_input_prompt=True,
                            exclude_output_prompt=True, filters={"clean_html": sanitise})  # fmt: skip
    return _write(Path(html_path), exporter.from_notebook_node(notebook)[0])


def write_index(run_folder: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write index.html of a run: the `stage`, `seconds` and `checks` of each record, and links to reports."""
    run_folder = Path(run_folder)
    lines = "\n".join(_stage_row(run_folder, record) for record in records)
    return _write(run_folder / "index.html", INDEX.format(title=f"Run {html.escape(run_folder.name)}", rows=lines))


def sanitise(element: object) -> str:
    """Keep text structure, tables and links of HTML; all else is removed or shown as text."""
    text = element.decode() if isinstance(element, bytes) else str(element)
    text = re.sub(r"<(style|script)\b.*?</\1\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)  # with their content
    return _SANITISER.sanitize_html_tags(text)


def _write(path: Path, page: str) -> Path:
    page = page.replace("<head>", f'<head>\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">', 1)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _stage_row(run_folder: Path, record: Mapping[str, Any]) -> str:
    stage = str(record["stage"])
    name = html.escape(stage)
    if (run_folder / stage / "report.html").exists():
        name = f'<a href="{quote(stage)}/report.html">{name}</a>'
    checks = ""
    for check in record["checks"]:
        word, style = ("passed", "passed") if check["passed"] else ("FAILED", "failed")
        about = f"{word}: {html.escape(str(check['check']))} ({html.escape(str(check['found']))})"
        checks += f'<li class="{style}">{about}</li>'
    return f"<tr><td>{name}</td><td>{record['seconds']:.0f}</td><td><ul>{checks}</ul></td></tr>"
