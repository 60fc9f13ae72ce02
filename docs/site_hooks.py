"""Complete the documentation site: pages from the repository's root, and one API page per room.

The Markdown files link to each other by relative paths that work on the repository's web page. MkDocs knows only the
files in docs/, so that README, CHANGELOG and so on are added here under other names, and links to them are rewritten.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import ldm_lib

ROOT = Path(__file__).parents[1]
# Page of the site -> file of the repository.
ADDED = {
    "readme.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security_policy.md": "SECURITY.md",
    "model_card.md": "ldm_lib/pretrained/README.md",
}
ROOMS = ["anatomy", "plots", "data", "autoencoder", "diffusion", "inpainting", "evaluation", "training", "experiment"]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def for_the_site(text: str, folder: str) -> str:
    """Rewrite the links of a file of `folder`; a link to a file that the site does not have becomes plain text."""
    pages = {name: page for page, name in ADDED.items()}

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if path not in pages and not path.startswith("docs/"):
            return link[1]
        return f"[{link[1]}]({pages.get(path, path.removeprefix('docs/'))}{link[3] or ''})"

    return LINK.sub(rewritten, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the repository's root and one API page per room."""
    for page, name in ADDED.items():
        text = for_the_site((ROOT / name).read_text(), posixpath.dirname(name))
        files.append(File.generated(config, page, content=text))
    for room in ROOMS:
        modules = sorted(path.stem for path in (ROOT / "ldm_lib" / room).glob("*.py") if path.stem[0] != "_")
        text = "\n\n".join([f"# {room}", *(f"::: ldm_lib.{room}.{module}" for module in modules)])
        files.append(File.generated(config, f"rooms/{room}.md", content=text + "\n"))
    return files


def public_names() -> str:
    """Return the API reference of the names that `import ldm_lib` offers, each from the module that defines it."""
    blocks = ["## Reference"]
    for name in sorted(ldm_lib.__all__):
        value = getattr(ldm_lib, name)
        options = f"    options:\n      heading: {name}\n      toc_label: {name}\n      heading_level: 3"
        blocks.append(f"::: {value.__module__}.{value.__qualname__}\n{options}")
    return "\n\n".join(blocks)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Rewrite the links of the pages in docs/ (those of added pages are rewritten already), and complete api.md."""
    if page.file.generated_by:
        return markdown
    text = for_the_site(markdown, "docs")
    return f"{text}\n\n{public_names()}\n" if page.file.src_uri == "api.md" else text
