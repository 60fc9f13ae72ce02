"""Reports: no active content, self-contained, complete, atomic."""

from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ldm_lib.experiment import report

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)><p onclick='alert(1)'>kept</p>"
    "<a href='JavaScript:alert(1)'>link</a><a href='data:text/html,<script>alert(1)</script>'>link</a>"
    "<iframe src='https://example.org'></iframe><link rel=stylesheet href='https://example.org/a.css'>"
    "<style>@import url(https://example.org/b.css)</style><svg onload=alert(1)></svg>"
    "<form action='https://example.org'><input></form><script src='https://example.org/c.js'>"
)


class Elements(HTMLParser):
    """All start tags with their attributes, as a browser would meet them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def output(data, **metadata):
    return new_output("display_data", data, metadata=metadata)


def write(tmp_path, *cells, title="A stage"):
    notebook = tmp_path / "notebook.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), notebook)
    return report.write_report(notebook, tmp_path / "report.html", title=title).read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    outputs = [
        output({"text/html": HOSTILE}),
        output({"text/html": HOSTILE}, **{"text/html": {"isolated": True}}),
        output({"text/markdown": HOSTILE}),
        output({"image/svg+xml": f"<svg>{HOSTILE}</svg>"}),
        output({"application/javascript": "alert(1)"}),
        output({"image/png": PIXEL}, **{"image/png": {"width": "1 onerror=alert(1)"}}),
        new_output("stream", name="stdout", text=HOSTILE),
    ]
    cells = (
        new_markdown_cell(HOSTILE + "\n\n![far](https://example.org/d.png)"),
        new_code_cell(HOSTILE, outputs=outputs),
    )
    return Elements(write(tmp_path_factory.mktemp("run"), *cells, title="<script>alert(1)</script>")).found


def test_no_active_content_of_a_notebook_is_kept(hostile):
    assert not {tag for tag, _ in hostile} & {"script", "iframe", "object", "embed", "svg", "form", "input", "base"}
    assert not [name for _, attrs in hostile for name in attrs if name.startswith("on") or name == "style"]
    schemes = {
        attrs["href"].split(":")[0].lower() for tag, attrs in hostile if tag == "a" and ":" in attrs.get("href", "")
    }
    assert schemes <= {"http", "https", "mailto"}


def test_nothing_is_loaded_from_anywhere(hostile):
    sources = [attrs["src"] for _, attrs in hostile if "src" in attrs]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not [tag for tag, _ in hostile if tag == "link"]


def test_the_policy_forbids_scripts_and_network_before_anything_else(hostile):
    position, policy = next(
        (k, attrs["content"])
        for k, (_, attrs) in enumerate(hostile)
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src" not in policy
    assert not [tag for tag, _ in hostile[:position] if tag not in ("html", "head", "meta")]


def test_text_tables_code_and_pictures_survive(tmp_path):
    table = (
        "<style scoped>td {color: red}</style><table><thead><tr><th>SSIM</th></tr></thead><tr><td>0.9</td></tr></table>"
    )
    text = write(
        tmp_path,
        new_markdown_cell("# What it does\n\nSee [the paper](https://arxiv.org/abs/2105.05233), 1 < 2."),
        new_code_cell("x = 'a < b'", outputs=[output({"text/html": table}), output({"image/png": PIXEL})]),
    )
    assert "What it does<a" in text and "<th>SSIM</th>" in text and "<td>0.9</td>" in text
    assert '<a href="https://arxiv.org/abs/2105.05233">the paper</a>, 1 &lt; 2.' in text
    assert (
        "'a &lt; b'" in text
        and 'alt="What it does"' in text
        and f"data:image/png;base64,{PIXEL}" in text
        and "td {color: red}" not in text
    )


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write(tmp_path, new_markdown_cell("old"))

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, new_markdown_cell("new"))
    assert "old" in (tmp_path / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notebook.ipynb", "report.html"]
