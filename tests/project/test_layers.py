"""The structure of the library, checked on its syntax trees: imports, sizes, docstrings, forbidden calls."""

import ast
import os
import re
from itertools import chain
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "ldm_lib"
# In the order of the data flow: a module imports from its own room, from earlier rooms, and from the top level.
ROOMS = ["", "images", "anatomy", "plots", "data", "autoencoder", "diffusion", "inpainting", "evaluation", "training",
         "experiment", "cli"]  # fmt: skip
# Third-party package -> where it may be imported.
DOORS = {
    "monai": {"autoencoder/_monai"},
    "lightning": {"training/distributed"},
    "wandb": {"training/trackers"},
    "mlflow": {"training/trackers"},
    "trackio": {"training/trackers"},
    "papermill": {"experiment"},
    "nbconvert": {"experiment"},
    "jupyter_client": {"experiment", "cli/doctor"},
    "nibabel": {"images", "data", "geometry", "anatomy/atlas"},
    "deepbet": {"images/skull_strip"},
    "pandas": {"experiment", "evaluation/evaluate", "evaluation/summary"},
}
NOTHING_HEAVY = {"torch", "monai", "lightning", "mlflow", "wandb", "trackio", "papermill", "nilearn", "dipy"}
PATHS = {path.relative_to(LIBRARY).with_suffix("").as_posix(): path for path in sorted(LIBRARY.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
BENCHMARKS = {f"benchmarks/{path.stem}": ast.parse(path.read_text()) for path in (ROOT / "benchmarks").glob("*.py")}
NOTEBOOKS = {
    path.stem: ast.parse("\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")
           if not path.name.startswith("test_")}  # fmt: skip


def imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """All modules imported anywhere below a node, each with its statement."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import would hide its room"
            module = (node.module or "").replace("ldm_lib.", "")
            inner = [f"{module}/{alias.name}".removeprefix("ldm_lib/") for alias in node.names]
            known = [f"ldm_lib.{name.replace('/', '.')}" for name in inner if name in PATHS]
            found += [(name, node) for name in known or [node.module or ""]]
    return found


def own(tree: ast.AST) -> set[str]:
    """The modules of the library that a module imports, such as "data/case"."""
    return {name.removeprefix("ldm_lib.").replace(".", "/") for name, _ in imports(tree) if name.startswith("ldm_lib.")}


def room(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


INNER = [name for name in TREES if name not in ("__init__", "__main__")]


def test_imports_follow_the_order_of_the_rooms_without_cycles():
    order = {name: k for k, name in enumerate(ROOMS)}
    arrows = {name: own(TREES[name]) for name in INNER}
    backward = [f"{a} -> {b}" for a, found in arrows.items() for b in found if order[room(a)] < order[room(b)]]
    assert not backward
    while free := [name for name, found in arrows.items() if not found & set(arrows)]:
        for name in free:
            del arrows[name]
    assert not arrows, f"import cycle: {sorted(arrows)}"


@pytest.mark.parametrize("package", DOORS)
def test_third_party_packages_have_one_door_each(package):
    users = {name for name in INNER for module, _ in imports(TREES[name]) if module.split(".")[0] == package}
    assert users and not {name for name in users if not {name, room(name)} & DOORS[package]}


def test_plots_import_no_data_and_are_imported_where_results_are_shown():
    inside = {b for name in INNER if room(name) == "plots" for b in own(TREES[name])}
    assert {name for name in inside if room(name) != "plots"} <= {
        "errors",
        "files",
        "geometry",
        "locking",
        "images/nifti",
    }
    users = {room(name) for name in INNER for b in own(TREES[name]) if room(b) == "plots"}
    assert users <= {"plots", "inpainting", "evaluation", "training", "experiment", "cli"}


def test_rooms_are_small_and_their_init_files_are_empty():
    for name in ROOMS[1:]:
        assert not imports(TREES[f"{name}/__init__"])
        assert len([module for module in PATHS if room(module) == name]) - 1 <= 14
    assert not {"utils", "helpers", "common", "misc"} & {Path(name).name for name in PATHS}


LIGHT = ["data/cohort", "data/case", "images/volume", "evaluation/metrics", "evaluation/boundary",
         "evaluation/calibration", "evaluation/memorisation", "evaluation/case_scores", "inpainting/baselines",
         "experiment/stages", "experiment/run_folder", "experiment/sweep"]  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name):
    """Help, validate, score, sweeps and notebook 06 start at once."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        top_level = [n for n in TREES[module].body if isinstance(n, ast.Import | ast.ImportFrom)]
        for imported, _ in chain.from_iterable(imports(node) for node in top_level):
            assert imported.split(".")[0] not in NOTHING_HEAVY, f"{name} loads {imported} through {module}"
            waiting += [imported.removeprefix("ldm_lib.").replace(".", "/")] if imported.startswith("ldm_lib.") else []


@pytest.mark.parametrize("name", TREES)
def test_files_and_functions_are_small(name):
    assert len(PATHS[name].read_text().splitlines()) <= 300
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if code_lines(f) > 40}
    assert not long, f"over 40 lines without docstring: {long}"


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("name", TREES)
def test_public_names_have_docstrings(name):
    tree = TREES[name]
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    missing = [n.name for n in public if not ast.get_docstring(n)]
    assert (ast.get_docstring(tree) or not tree.body) and not missing, missing


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.reload", "np.load",
                   "numpy.load", "runpy.run_path", "runpy.run_module"}  # fmt: skip
# They unpickle, execute text, download or unpack; no part of this project needs them.
FORBIDDEN_MODULES = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "requests", "httpx",
                     "urllib.request", "huggingface_hub", "torch.hub", "monai.bundle", "monai.apps.auto3dseg",
                     "monai.apps.nnunet", "mlflow.pytorch", "mlflow.pyfunc", "tarfile", "yaml"}  # fmt: skip
FORBIDDEN_METHODS = {"read_pickle", "extract", "extractall", "unpack_archive", "load_state_dict_from_url",
                     "load_from_checkpoint", "log_model", "from_pretrained", "hf_hub_download"}  # fmt: skip
YAML_READERS = {"experiment/sweep_file": {"yaml"}}
YAML_AS_TEXT = {"yaml.parse", "yaml.load"}  # with BaseLoader every scalar is text, and tags build nothing
EXECUTED = TREES | BENCHMARKS | NOTEBOOKS | SCRIPTS


def test_every_notebook_and_script_is_checked():
    assert len(NOTEBOOKS) == 6 and {"conftest", "forked"} <= set(SCRIPTS)
    assert len(EXECUTED) == len(TREES) + len(BENCHMARKS) + len(NOTEBOOKS) + len(SCRIPTS), "two of one name"


@pytest.mark.parametrize("name", EXECUTED)
def test_nothing_executes_its_input(name):
    """No eval or pickle, no shell, no archive; torch.load with weights_only=True; np.load never; yaml as text only."""
    tree = EXECUTED[name]
    found = imports(tree)
    modules = {module for module, _ in found}
    modules |= {".".join(module.split(".")[:depth]) for module in modules for depth in (1, 2, 3)}
    assert not (FORBIDDEN_MODULES - YAML_READERS.get(name, set())) & modules
    assert not [node for module, node in found if module == "yaml" and isinstance(node, ast.ImportFrom)]
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in FORBIDDEN_CALLS, f"line {call.lineno}"
        assert called.rpartition(".")[2] not in FORBIDDEN_METHODS, f"line {call.lineno}"
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert not {"shell", "allow_pickle"} & set(options), f"line {call.lineno}"
        if called.startswith("yaml."):
            assert called in YAML_AS_TEXT and options.get("Loader") == "yaml.BaseLoader", f"line {call.lineno}"
        if called.endswith("torch.load"):
            assert options.get("weights_only") == "True", f"line {call.lineno}"


def test_tensors_are_read_in_one_place():
    """`torch.load` under another name would escape the test above."""
    nodes = [(name, node) for name, tree in EXECUTED.items() for node in ast.walk(tree)]
    used = {name for name, node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"}
    renamed = {name for name, node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch")
               and "load" in {alias.name for alias in node.names}}  # fmt: skip
    assert used == {"model_io"} and not renamed


# A tracker may fail with any exception and never stops a training; nothing else may catch that much.
CATCHES_ALL = {"training/trackers"}


@pytest.mark.parametrize("name", TREES)
def test_no_assert_and_no_blanket_except(name):
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and name not in CATCHES_ALL:
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"line {node.lineno}"


def test_the_library_is_thin():
    """Lines of code: without docstrings, comments and blank lines."""
    total = 0
    for name, tree in TREES.items():
        lines = [line.strip() for line in PATHS[name].read_text().splitlines()]
        documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)]
        spans = [n.body[0] for n in documented if ast.get_docstring(n)]
        skipped = set(chain.from_iterable(range(s.lineno - 1, s.end_lineno) for s in spans))
        total += sum(bool(line) and not line.startswith("#") for k, line in enumerate(lines) if k not in skipped)
    assert total < 12640, f"{total} lines of code"


def test_no_path_of_a_machine_in_the_tree():
    pattern = re.compile(r"/(?:home|Users|root|wor[k]|mnt)/\w")
    suffixes = {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".cff", ""}
    excluded = {
        ".git",
        ".venv",
        ".mypy_cache",
        "site",
        "build",
        ".hypothesis",
        "outputs",
        "__pycache__",
        ".pytest_cache",
        ".ruff_cache",
    }
    paths = []
    for folder, inner, files in os.walk(ROOT):
        inner[:] = set(inner) - excluded  # not entered: an environment holds many files
        paths += [Path(folder, name) for name in files if Path(name).suffix in suffixes]
    found = [str(p.relative_to(ROOT)) for p in paths if pattern.search(p.read_text(errors="ignore"))]
    assert len(paths) > 100 and not found
