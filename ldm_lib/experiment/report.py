"""Write HTML reports: one file each, without scripts, network access or external images."""

import html
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
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
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1010px; margin: 1.5em auto; padding: 0 1em;
       overflow-wrap: anywhere }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin: 1.6em 0 .5em }} img {{ max-width: 100%; height: auto }}
table {{ display: block; overflow-x: auto; border-collapse: collapse }}
th:empty {{ padding: 0; border: 0 }}
th, td {{ padding: .35em .8em .35em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8886 }}
td:not(:last-child), th {{ white-space: nowrap }}
td:first-child {{ position: sticky; left: 0; background: Canvas }} li strong {{ color: #d0342c }}
</style>
</head>
<body>
{body}
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


def write_page(path: str | Path, text: str, *, title: str) -> Path:
    """Convert Markdown to one HTML file, written atomically: HTML in it is shown as text, its pictures are embedded."""
    path = Path(path)
    renderer = IPythonRenderer(
        allow_harmful_protocols=False, embed_images=True, path=str(path.parent), exclude_anchor_links=True
    )
    body = MarkdownWithMath(renderer=renderer).render(text)
    return _write(path, PAGE.format(title=html.escape(title), body=body))


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
