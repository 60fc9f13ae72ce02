"""README and docs: links, commands and names that they mention exist, and pages stay short."""

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *DOCS]
GENERATED = ROOT / "docs" / "parameters.md"
RESULTS = ROOT / "docs" / "results.md"
OLD_NAMES = ROOT / "docs" / "migrating.md"
CURRENT = [page for page in PAGES if page not in (OLD_NAMES, ROOT / "CHANGELOG.md")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as both the repository's web page and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_their_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


def test_readme_links_every_page_of_the_docs():
    linked = set(re.findall(r"\]\(docs/([\w.]+)", (ROOT / "README.md").read_text()))
    assert {page.name for page in DOCS} - {"index.md"} <= linked


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=name)
def test_pages_are_short(page):
    most = {ROOT / "README.md": 170, GENERATED: 400}.get(page, 150)
    assert len(page.read_text().splitlines()) <= most


def score_tables(text: str) -> list[dict[str, list[str]]]:
    """Tables with PSNR in a section: the name in the first cell of a row -> the numbers in its other cells."""
    tables = [[line for line in table.splitlines() if line.startswith("| ")] for table in re.split(r"\n\n+", text)]
    return [
        {row.split(" | ")[0]: re.findall(r"[-+]?\d+\.\d+", row.partition(" | ")[2]) for row in table[1:]}
        for table in tables if table and re.match(r"\| method ", table[0])
    ]  # fmt: skip


def section(page: Path, heading: str) -> str:
    return page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page, heading", [("README.md", "Results"), ("ldm_lib/pretrained/README.md", "Scores")])
def test_summaries_of_scores_repeat_those_of_the_results_page(page, heading):
    people, patients, synthetic = score_tables(section(RESULTS, "Pretrained weights"))
    (summary,) = score_tables(section(ROOT / page, heading))
    assert len(summary) > 5
    for method, numbers in summary.items():
        all_numbers = iter(people[method] + patients[method] + synthetic.get(method, []))
        assert all(number in all_numbers for number in numbers), method  # in this order


def test_decibels_above_harmonic_are_differences_of_the_scores():
    people, _, synthetic = score_tables(section(RESULTS, "Pretrained weights"))
    for table in (people, synthetic):
        harmonic = float(table["| harmonic inpainting"][0])
        above = {method: (float(n[0]) - harmonic, float(n[6])) for method, n in table.items() if len(n) == 9}
        assert len(above) == len(table) - 1
        for method, (difference, stated) in above.items():
            assert abs(difference - stated) < 0.011, method


def test_the_parameters_page_is_what_its_generator_writes():
    spec = importlib.util.spec_from_file_location("generate_parameters", ROOT / "docs" / "generate_parameters.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert GENERATED.read_text() == generator.page(), "run python docs/generate_parameters.py"


MAKE = re.compile(r"(?:`|^ {4})make ([a-z0-9][a-z0-9-]*)", re.M)


def commands(page: Path) -> list[str]:
    """The `ldm ...` commands of a page, in code blocks and in the text, without comments."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(?:\.venv/bin/)?ldm ([^#\n]+)", text, re.M)
    return blocks + re.findall(r"`ldm ((?!COMMAND|\.\.\.)[^`]+)`", text)


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_and_their_options_exist(page):
    from ldm_lib.cli.arguments import ARGUMENTS
    from ldm_lib.cli.commands import COMMANDS
    from ldm_lib.cli.options import build_parser

    parser = build_parser(COMMANDS, ARGUMENTS)
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command in commands(page):
        first, *rest = command.split()
        if first.startswith("-"):
            assert first in parser._option_string_actions, command
            continue
        known = subparsers[first]._option_string_actions
        assert not {word.partition("=")[0] for word in rest if word.startswith("--")} - set(known), command


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_make_targets_and_parameters_exist(page):
    from ldm_lib.experiment.stages import STAGES

    text = page.read_text().replace("\\\n", " ")
    rules = re.findall(r"^([a-z0-9][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    assert set(MAKE.findall(text)) <= targets
    assert page.name != "README.md" or {"run", "test", "lab", "docs"} <= set(MAKE.findall(text))
    parameters = {parameter for model in STAGES.values() for parameter in model.model_fields}
    settings = re.findall(r'SET="([^"]*)"', text) + re.findall(r"--set (\S+)", text)
    given = {pair.partition("=")[0] for setting in settings for pair in setting.split() if "=" in pair}
    assert given <= parameters


def test_every_renamed_parameter_is_in_the_migration_guide():
    from ldm_lib.options import RENAMED

    text = OLD_NAMES.read_text()
    missing = [
        old for old, new in RENAMED.items() if f"`{old}`" not in text or (" " not in new and f"`{new}`" not in text)
    ]
    assert not missing


def test_the_security_page_names_tests_that_exist():
    files = re.findall(r"`(\w+/test_\w+\.py)`", (ROOT / "docs" / "security.md").read_text())
    assert len(files) > 20 and not [file for file in files if not (ROOT / "tests" / file).is_file()]


PRIVATE_WORDS = re.compile(
    r"\b(told|untold|tells?|holes?|ceilings?|obedience|obeys?|seams?|mend(?:ed|s)?|anew|likewise|altogether|shipped|ships?"
    r"|beside|brought|bent|peek(?:ed|s)?|drafts?|wanted|rooms)\b",
    re.I,
)


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_pages_use_the_words_of_the_field(page):
    """CONTRIBUTING.md has the table of terms; its second column is what not to write."""
    text = re.sub(r"`[^`]*`", "", page.read_text())
    if page.name == "CONTRIBUTING.md":
        text = re.sub(r"^\|.*\|$", "", text, flags=re.M)
    found = PRIVATE_WORDS.findall(text)
    assert not found


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=name)
def test_the_text_of_notebooks_uses_the_words_of_the_field(path):
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not PRIVATE_WORDS.findall(re.sub(r"`[^`]*`", "", text))


def test_docstrings_use_the_words_of_the_field():
    found = []
    for path in sorted((ROOT / "ldm_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"`[^`]*`", "", ast.get_docstring(node) or "")
                found += [(name(path), getattr(node, "name", ""), word) for word in PRIVATE_WORDS.findall(text)]
    assert not found


def test_messages_in_the_troubleshooting_table_are_those_of_the_code():
    """The longest part without numbers and dots of each message is searched in the sources."""
    code = "\n".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "ldm_lib").rglob("*.py")])
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    parts = [max(re.split(r"\d+|\.\.\.|\bpid\b", row), key=len).strip() for row in rows]
    assert len(parts) > 8
    assert not [part for part in parts if part not in code]


def test_the_api_page_lists_the_public_names():
    import ldm_lib

    text = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|.*\|$", text, re.M))))
    assert listed == set(ldm_lib.__all__)
