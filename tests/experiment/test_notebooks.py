"""The form of the notebooks: parsed, never run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from ldm_lib.experiment.stages import STAGES, parameters_cell

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = {stage: nbformat.read(FOLDER / f"{stage}.ipynb", 4) for stage in STAGES}
named = pytest.mark.parametrize("stage", STAGES)


def code(stage):
    return [cell for cell in NOTEBOOKS[stage].cells if cell.cell_type == "code"]


def test_there_is_one_notebook_a_stage():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(STAGES)


@named
def test_committed_without_outputs(stage):
    assert all(not cell.outputs and cell.execution_count is None for cell in code(stage))
    assert not {"papermill", "widgets"} & set(NOTEBOOKS[stage].metadata)


@named
def test_first_cell_asks_and_links_to_its_neighbours(stage):
    title = NOTEBOOKS[stage].cells[0]
    assert title.cell_type == "markdown" and re.match(rf"# {stage[:2]} · .+\?\n", title.source)
    assert all(word in title.source for word in ("**Reads**", "**Writes**", "**Takes**"))
    order = list(STAGES)
    place = order.index(stage)
    for neighbour in order[max(0, place - 1) : place + 2]:
        assert neighbour == stage or f"({neighbour}.ipynb)" in title.source


@named
def test_parameters_cell_is_the_model(stage):
    first = code(stage)[0]
    assert first.metadata.get("tags") == ["parameters"]
    assert first.source == parameters_cell(STAGES[stage])


@named
def test_imports_in_one_cell_then_the_stage_is_opened(stage):
    cells = code(stage)
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cells[1].source).body)
    assert f'open_stage("{stage}", globals()' in cells[2].source
    later = "\n".join(cell.source for cell in cells[2:])
    assert not [n for n in ast.walk(ast.parse(later)) if isinstance(n, ast.Import | ast.ImportFrom)]


@named
def test_imports_few_modules_and_converts_nothing_by_hand(stage):
    """A notebook uses the public interface and at most seven modules; plots take volumes as the files hold them."""
    tree = ast.parse("\n".join(cell.source for cell in code(stage)))
    modules = set()
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("ldm_lib")):
        modules |= {node.module} if node.module.count(".") > 1 else {f"{node.module}.{a.name}" for a in node.names}
    assert len(modules) <= 7
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("lps", "to_lps", "frame_of")]


@named
def test_no_parameter_is_assigned_in_a_later_cell(stage):
    """Or a cell that is run again would open its stage with something else."""
    later = ast.parse("\n".join(cell.source for cell in code(stage)[1:]))
    stored = {n.id for n in ast.walk(later) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not stored & set(STAGES[stage].model_fields)


def names_in(tree, context):
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def names_replaced(tree):
    """Names that a cell gives a new meaning: assigned otherwise than by `x = f(x)` or `x += y`."""
    refined = set()
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AugAssign)):
        before = names_in(node.value, ast.Load) if isinstance(node, ast.Assign) else names_in(node, ast.Store)
        refined |= {n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in before}
    stored = {n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {n.id for n in stored - refined}


@named
def test_what_the_summary_reads_is_assigned_in_one_cell(stage):
    """A cell in between that gives the name another meaning would make the summary's numbers wrong."""
    cells = NOTEBOOKS[stage].cells
    start = next(k for k, cell in enumerate(cells) if cell.source.startswith("## Summary"))
    before = [ast.parse(cell.source) for cell in cells[:start] if cell.cell_type == "code"]
    for tree in (ast.parse(cell.source) for cell in cells[start + 1 :]):
        for read in names_in(tree, ast.Load) - names_in(tree, ast.Store):
            assert sum(read in names_replaced(earlier) for earlier in before) <= 1, read


@named
def test_thin_cells(stage):
    cells = code(stage)
    lengths = [len(cell.source.splitlines()) for cell in cells[2:]]
    assert max(lengths) <= 25 and sorted(lengths)[len(lengths) // 2] <= 15
    tree = ast.parse("\n".join(cell.source for cell in cells))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert not [line for cell in cells for line in cell.source.splitlines() if line.lstrip().startswith(("%", "!"))]


@named
def test_every_code_cell_follows_prose_or_another_step_of_it(stage):
    kinds = [cell.cell_type for cell in NOTEBOOKS[stage].cells]
    assert kinds[0] == "markdown"
    assert "code code code code" not in " ".join(kinds[3:]), "more than three code cells without a word"


@named
def test_last_cell_checks_and_closes(stage):
    last = code(stage)[-1].source
    assert "stage.check(" in last and "stage.close(" in last
    assert "stage.close(" not in "".join(cell.source for cell in code(stage)[:-1])


@named
def test_no_undefined_names(stage):
    """What a cell reads was assigned, imported or given as a parameter in a cell before it."""
    known = set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__) | {"display"}
    for cell in code(stage):
        tree = ast.parse(cell.source)
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.Lambda) for a in n.args.args}
        aliases = (a for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names)
        known |= stored | {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert not read - known, f"{read - known} in: {cell.source[:60]}"
