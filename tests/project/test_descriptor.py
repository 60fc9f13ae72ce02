"""The Boutiques descriptor and the nipoppy pipeline are those of today's command line, and say what it understands."""

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "nipoppy"
needs_boutiques = pytest.mark.skipif(not find_spec("boutiques"), reason="needs the package boutiques")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_descriptor", ROOT / "docs" / "generate_descriptor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_their_generator_writes(generator):
    written = {name: generator.text(content) for name, content in generator.contents().items()}
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == written, "run docs/generate_descriptor.py"


def test_every_option_is_described_once(generator):
    inputs = generator.descriptor()["inputs"]
    flags = [given["command-line-flag"] for given in inputs]
    assert len({given["id"] for given in inputs}) == len(inputs) == len(set(flags))
    for action in generator.command_parser()._actions:
        assert action.dest == "help" or set(action.option_strings) & set(flags)
    needed = {name for names in generator.NEEDS.values() for name in names} | generator.NEEDS.keys()
    assert needed <= {given["id"] for given in inputs}


@needs_boutiques
def test_boutiques_accepts_the_descriptor_and_the_invocation():
    import boutiques

    boutiques.validate(str(FOLDER / "descriptor.json"))
    boutiques.invocation("--invocation", str(FOLDER / "invocation.json"), str(FOLDER / "descriptor.json"))


VALUES = {
    "t1n_voided": "v.nii.gz", "mask": "m.nii.gz", "output": "o.nii.gz", "sampler": "ddim", "steps": 5, "seed": 7,
    "temperature": 0.5, "guidance": 2.0, "no_make_missing": True, "summary": True, "mask_labels": "1,2",
}  # fmt: skip
UNDERSTOOD = {"steps": ("num_inference_steps", 5), "no_make_missing": ("make_missing", False)}


@needs_boutiques
def test_a_command_line_that_boutiques_makes_means_what_was_invoked(generator, tmp_path, monkeypatch):
    import boutiques

    monkeypatch.chdir(tmp_path)
    for name in ("v.nii.gz", "m.nii.gz"):
        Path(name).touch()
    Path("invocation.json").write_text(json.dumps(VALUES))
    done = boutiques.execute("simulate", str(FOLDER / "descriptor.json"), "-i", "invocation.json")
    words = str(done.shell_command).split()
    assert words[:2] == ["ldm", "inpaint"]
    parser = generator.command_parser()
    options = vars(parser.parse_args(words[2:]))
    given = dict(UNDERSTOOD.get(name, (name, value)) for name, value in VALUES.items())
    assert {name: options[name] for name in given} == given
    defaults = vars(parser.parse_args(["--data", "d", "--output", "o"]))
    assert {name for name in options if options[name] != defaults[name]} == given.keys() | {"data"}


@needs_boutiques
@pytest.mark.parametrize("given", [{"t1n_voided": "v"}, {"t1n_voided": "v", "mask": "m", "data": "."}, {"mask": "m"}])
def test_boutiques_rejects_what_the_command_rejects(given):
    import boutiques

    with pytest.raises(boutiques.InvocationValidationError):
        boutiques.invocation("--invocation", json.dumps(given | {"output": "o"}), str(FOLDER / "descriptor.json"))
