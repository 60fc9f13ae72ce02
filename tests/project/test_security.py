"""Malicious names, values, checkpoints and addresses are rejected in one line, or stay plain text."""

import ast
import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import numpy as np
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from ldm_lib.__main__ import main
from ldm_lib.autoencoder.third_party import load_autoencoder
from ldm_lib.data import cohort
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError, InputError, WeightsError
from ldm_lib.experiment import path_aliases, runner
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import STAGES, parameters_cell
from ldm_lib.experiment.sweep_file import read_sweep
from ldm_lib.model_io import load_model, read_checkpoint

ROOT = Path(__file__).parents[2]
AUDIT = "01_data_audit"
CODE_AS_NAME = 'x=1\nimport os;os.system("touch PWNED")\ny'
VALUES = {
    "quotes": "a'b\"c'''d\"\"\"e",
    "end of a string": '"; import os; os.system("touch PWNED"); x="',
    "backslashes": '\\"; import os; os.system("touch PWNED") #\\',
    "lines": "a\nimport os\nos.system('touch PWNED')\r\n\tb",
    "unicode": "é ü \u2028 \u202e \U0001f9e0 \x00 \x1b[2J",
    "placeholders": "{run} %(run)s $(touch PWNED) `touch PWNED` ${HOME} {{run}} {% raw %}",
    "magics": "!touch PWNED\n%run x.py\n%%bash\ntouch PWNED",
}
URL = "http://127.0.0.1:9/x"


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    """No test here leaves the file that each malicious text would make if it were executed."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("PWNED"))


@pytest.fixture
def connections(monkeypatch):
    """Names that were looked up and addresses that were connected to; none answers."""
    attempts = []

    def fail(*words):
        attempts.append(words)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return attempts


def error_line(words, capsys):
    """The one line of an error of the command line."""
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ERROR ")
    return lines[0]


# ---- names of parameters


@pytest.mark.parametrize(
    "name", [CODE_AS_NAME, "__import__('os').system('touch PWNED')", "data_dir;x", "__class__", ""]
)
def test_an_unknown_parameter_name_is_rejected_by_every_entry_point(name, outputs, tmp_path, capsys):
    with pytest.raises(ConfigError, match="unknown parameter"):
        runner.run_stages([AUDIT], run="lab", preset="smoke", overrides={name: "1"}, command=[])
    assert "unknown parameter" in error_line(["run", "--set", f"{name}=1"], capsys)
    for part in ({"set": {name: 1}, "runs": [{}]}, {"grid": {name: [1]}}, {"runs": [{name: 1}]}):
        (tmp_path / "grid.yaml").write_text(json.dumps({"name": "a", **part}))  # JSON is YAML
        assert "unknown parameter" in error_line(["sweep", "grid.yaml"], capsys)
    assert not outputs.exists()


def test_every_parameter_is_an_identifier():
    for model in STAGES.values():
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in model.model_fields)


# ---- names of runs and sweeps


@pytest.mark.parametrize("name", ["../../x", "/abs/x", "a/b", "..", "x\n", "a" * 300, "<img src=x onerror=alert(1)>"])
def test_a_run_name_that_is_no_file_name_is_rejected_by_every_entry_point(name, outputs, tmp_path, capsys):
    assert "letters, digits" in error_line(["run", "--run", name], capsys)
    assert "letters, digits" in error_line(["run", "--set", f"run={name}/"], capsys)
    assert "letters, digits" in error_line(["compare", "01", name], capsys)
    (tmp_path / "grid.yaml").write_text(json.dumps({"name": name, "runs": [{}]}))
    assert "letters, digits" in error_line(["sweep", "grid.yaml"], capsys)
    assert not outputs.exists()


def test_the_runs_of_a_sweep_have_safe_names_whatever_their_values(tmp_path):
    values = ["../../x", "/abs/x", "x; touch PWNED", "<img src=x>", "x\n", "é"]
    (tmp_path / "grid.yaml").write_text(json.dumps({"name": "a", "grid": {"show_case": values}}))
    assert all(re.fullmatch(r"a-[A-Za-z0-9._-]+", run.name) for run in read_sweep(tmp_path / "grid.yaml").runs)


# ---- values of parameters


def texts(stage):
    """The parameters of a stage that take any text."""
    return [
        name for name, field in STAGES[stage].model_fields.items() if field.annotation is str and not field.metadata
    ]


def test_there_are_parameters_that_take_any_text():
    assert {name for stage in STAGES for name in texts(stage)} == {
        "data_dir", "conditioning_dir", "brains_dir", "patients_file", "autoencoder_dir", "start_dir", "show_case",
        "allow_change",
    }  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("stage", [stage for stage in STAGES if texts(stage)])
@pytest.mark.parametrize("other_source", ["data_dir", "brains_dir"])
def test_papermill_writes_a_value_as_the_literal_it_is(stage, value, other_source):
    given = dict.fromkeys(set(texts(stage)) - {"allow_change", other_source}, value)
    notebook = load_notebook_node(str(ROOT / "notebooks" / f"{stage}.ipynb"))
    cells = parameterize_notebook(notebook, resolve(overrides=given)[stage].model_dump(), kernel_name="python3").cells
    (injected,) = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", ())]
    statements = ast.parse(injected).body
    assert all(isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) for s in statements)
    found = {s.targets[0].id: ast.literal_eval(s.value) for s in statements}
    assert {name: found[name] for name in given} == given and len(found) == len(STAGES[stage].model_fields)
    assert not [line for line in injected.splitlines() if line.lstrip().startswith(("%", "!"))]


def test_a_kernel_receives_the_exact_text(outputs, tmp_path, monkeypatch):
    """All values at once, as folders' names, through the runner, the environment and a real kernel."""
    value = "\n".join(text.replace("\x00", "") for text in VALUES.values())
    first = nbf.new_code_cell(parameters_cell(STAGES[AUDIT]), metadata={"tags": ["parameters"]})
    then = "import json, pathlib\nfrom ldm_lib.data import cohort\nfrom ldm_lib.experiment.stage import open_stage\n"
    then += "cohort.source_digests = lambda *_: {}\n"  # no such folder exists
    then += "from ldm_lib.files import expand_path\n"
    then += f"stage = open_stage('{AUDIT}', globals())\n"
    then += "found = [str(expand_path(path)) for path in (data_dir, conditioning_dir)]\n"
    then += "pathlib.Path('found.json').write_text(json.dumps(found))\nstage.close({})"
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebook = nbf.new_notebook(cells=[first, nbf.new_code_cell(then)], metadata=kernel)
    nbformat.write(notebook, tmp_path / f"{AUDIT}.ipynb")
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(cohort, "source_digests", lambda *_: {})
    given = {"data_dir": value, "conditioning_dir": f"/{value}"}
    runner.run_stages([AUDIT], run="lab", preset="smoke", overrides=given, command=[])
    expected = path_aliases.absolute_paths(given)
    found = json.loads((outputs / "lab" / "found.json").read_text())
    assert found == [expected["data_dir"], expected["conditioning_dir"]]
    assert expected["data_dir"] == f"{tmp_path}/{os.path.expandvars(value)}", "variables are all that is put in"


# ---- excessive numbers


@pytest.mark.parametrize("words", [
    ["inpaint", "--data", "d", "--output", "o", "--model", "m", "--samples", "1000000000"],
    ["inpaint", "--data", "d", "--output", "o", "--model", "m", "--steps", "1000000000"],
    ["run", "--set", "max_epochs=1000000000"],
    ["run", "--set", "num_workers=1000"],
    ["run", "--set", "devices=5000"],
    ["run", "--set", f"seed={'9' * 4000}"],
])  # fmt: skip
def test_an_excessive_number_is_rejected_at_once(words, outputs, capsys):
    start = time.monotonic()
    assert re.search("allowed: integer from|too large|exceed", error_line(words, capsys))
    assert time.monotonic() - start < 5 and not outputs.exists()


# ---- checkpoints and weights


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("content", [
    {"x": Bomb()}, Bomb(), {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"x": Bomb()}},
    {"state_dict": {"w": np.float64(1)}}, {"path": Path("x")},
], ids=["in it", "all of it", "in its settings", "numpy", "path"])  # fmt: skip
def test_a_checkpoint_with_more_than_tensors_and_plain_values_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"x\.ckpt: unsafe checkpoint, holds more than tensors"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("key", ["_instantiator", "_class_path", "_target_"])
def test_a_checkpoint_that_names_code_is_rejected(tmp_path, key):
    """As lightning's loader would import and call it."""
    settings = {key: "os.system", "command": "touch PWNED"}
    (tmp_path / "x.json").write_text(json.dumps({"_target_": "monai.networks.nets.AutoencoderKL", "spatial_dims": 3}))
    torch.save({"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": settings}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=rf"unsafe checkpoint, names code to build it \({key}\)"):
        load_autoencoder(tmp_path / "x.ckpt", spacing_mm=1.0)


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "builtins.eval", "torch.hub.load"])
def test_the_class_that_a_json_names_is_compared_and_never_imported(tmp_path, target):
    part = {"encoder.blocks.0.conv.weight": torch.zeros(1), "decoder.x": torch.zeros(1)}
    part |= {f"{name}.w": torch.zeros(1) for name in ("quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv")}
    torch.save(part, tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(json.dumps({"_target_": target, "command": "touch PWNED", "args": "touch PWNED"}))
    with pytest.raises(WeightsError, match=f"describes {target.rpartition('.')[2]}, but these are weights of"):
        load_autoencoder(tmp_path / "x.pt", spacing_mm=1.0)


@pytest.mark.parametrize("url", [URL, "https://example.invalid/a.ckpt", "s3://a/b.safetensors", "file:///etc/passwd"])
def test_an_address_is_treated_as_a_missing_file(url, connections, outputs, capsys):
    """No command opens one; the network is not used."""
    inpaint = ["inpaint", "--t1n-voided", f"{url}.nii.gz", "--mask", f"{url}.nii.gz", "--output", "o.nii.gz"]
    for words in ([*inpaint, "--model", url], ["inpaint", "--data", url, "--output", "o", "--model", url],
                  ["validate", url], ["run", "--set", f"data_dir={url}"], ["sweep", url],
                  ["score", *(w for k in ("prediction", "target", "voided", "mask-healthy")
                              for w in (f"--{k}", f"{url}.nii"))]):  # fmt: skip
        assert re.search("no such file|no such folder|No such file", error_line(words, capsys)), words
    for load in (lambda: load_model(url, ADM), lambda: load_autoencoder(url, spacing_mm=1.0)):
        with pytest.raises(WeightsError, match="no such"):
            load()
    with pytest.raises(InputError, match="no such folder"):
        cohort.source_digests(url)
    assert connections == []


# ---- the repository


FORBIDDEN_WORDS = (
    "--allow-" + "root", "token=" + "''", "token=" + '""', "allow_" + "origin", "disable_check_" + "xsrf",
    "0.0." + "0.0", "--disable-security-" + "middleware", "--extra-" + "index-url", "--trusted-" + "host",
    "weights_only=" + "False", "allow_pickle=" + "True",
)  # fmt: skip


def test_nothing_opens_a_server_or_another_index():
    """In no file of the repository, tests and documents included."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in tracked if name and not name.endswith(".png")] or list(ROOT.glob("*"))
    found = {(str(path.relative_to(ROOT)), word) for path in files if path.is_file() and path.suffix != ".safetensors"
            for word in FORBIDDEN_WORDS if word in path.read_text()}  # fmt: skip
    # The lab's message to root names the option, which only its user can give.
    assert found == {("Makefile", FORBIDDEN_WORDS[0])}
    assert ROOT / "Makefile" in files


def test_every_test_that_the_page_on_security_names_exists():
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) > 10 and not [name for name in named if not (ROOT / "tests" / name).is_file()]
