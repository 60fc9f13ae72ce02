"""Hugging Face reads the card of an exported model, and MONAI runs its bundle with the results of `ldm inpaint`."""

import json
import shutil
import sys

import jsonschema
import pytest
from huggingface_hub import ModelCard

from ldm_lib.__main__ import main
from ldm_lib.files import PRETRAINED
from ldm_lib.model_io import read_config
from ldm_lib.training.export import export_model
from ldm_lib.training.publication import FRONT_MATTER

TEXT = {"type": "string"}
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"}, "value_range": {"type": "array", "items": {"type": "number"}},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "is_patch_data": {"type": "boolean"}, "channel_def": {"type": "object"},
        **dict.fromkeys(("type", "format", "dtype"), TEXT),
    },
}  # fmt: skip
TENSORS = {"type": "object", "additionalProperties": TENSOR, "minProperties": 1}
STATED = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
          "copyright"]  # fmt: skip
# What MONAI's schema of 2024-07-25, which `verify_metadata` would download, requires of the entries that are written.
RULES = {
    "type": "object",
    "required": [*STATED, "required_packages_version", "network_data_format"],
    "properties": {
        **dict.fromkeys([*STATED, "data_source", "data_type", "intended_use"], TEXT),
        "changelog": {"type": "object"},
        "required_packages_version": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
    "additionalProperties": False,
}


@pytest.fixture
def stage(tiny_model_folder, tmp_path):
    """A stage 04 as a training leaves it: model, and the log next to it."""
    folder = tmp_path / "04_training"
    shutil.copytree(tiny_model_folder, folder / "model")
    (folder / "metrics.csv").write_text("step,train_loss,val_loss\n1,0.5,0.7\n2,0.25,\n")
    return folder / "model"


@pytest.fixture
def bundle(stage, tmp_path):
    export_model(stage, tmp_path / "bundle", to="monai-bundle")
    return tmp_path / "bundle"


def test_hugging_face_reads_the_front_matter_of_a_card(stage, tmp_path):
    export_model(stage, tmp_path / "weights")
    card, pretrained = (ModelCard.load(folder / "README.md") for folder in (tmp_path / "weights", PRETRAINED))
    assert card.data.library_name == "brain-mri-inpainting" and card.data.pipeline_tag == "image-to-image"
    assert (card.data.license, card.data.datasets, card.data.metrics) == ("unknown", [], ["psnr", "ssim", "mse"])
    own = {"license": "apache-2.0", "datasets": ["OpenNeuro/ds002748"]}
    assert pretrained.data.to_dict() == ModelCard(FRONT_MATTER).data.to_dict() | own


def test_a_card_states_digests_and_the_last_logged_values_and_no_place(stage, tmp_path):
    export_model(stage, tmp_path / "weights")
    card = (tmp_path / "weights" / "README.md").read_text()
    for part in ("", "autoencoder"):
        assert read_config(tmp_path / "weights" / part)["sha256"] in card
    assert "| step | 2 |\n| train_loss | 0.25 |\n| val_loss | 0.7 |\n" in card
    assert str(tmp_path) not in card


def test_a_card_that_was_completed_stays_and_goes_with_its_model(stage, tmp_path):
    export_model(stage, tmp_path / "weights")
    card = tmp_path / "weights" / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: cc0-1.0"))
    completed = card.read_bytes()
    export_model(stage, tmp_path / "weights")
    assert card.read_bytes() == completed
    export_model(tmp_path / "weights", tmp_path / "bundle", to="monai-bundle")
    assert (tmp_path / "bundle" / "docs" / "README.md").read_bytes() == completed


@pytest.fixture
def monai_bundle(monkeypatch):
    """MONAI's commands of bundles; a run adds to the module path and announces that it evaluates its config."""
    from monai import bundle as commands

    monkeypatch.setattr(sys, "path", [*sys.path])
    # What MONAI imports where it is started alone; `autoencoder._monai` hides it while a test process imports MONAI.
    monkeypatch.setattr(commands.scripts, "validate", jsonschema.validate)
    monkeypatch.setattr(commands.scripts, "ValidationError", jsonschema.ValidationError)
    return commands


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_run_of_the_bundle_writes_the_bytes_of_ldm_inpaint(bundle, cases, tmp_path, monai_bundle):
    """Of its own arguments and of the options of reading alike."""
    made = []
    for number, orientation in enumerate(("", "RAS")):  # which the header contradicts
        given = {"t1n_voided": str(cases[0].t1n_voided), "mask": str(cases[0].mask), "seed": 3, "device": "cpu"}
        given |= {"assume_orientation": orientation}
        ours, theirs = (tmp_path / f"{number}-{name}.nii.gz" for name in ("ldm", "monai"))
        monai_bundle.run(config_file=str(bundle / "configs" / "inference.json"), bundle_root=str(bundle),
                         output=str(theirs), num_inference_steps=2, **given)  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        words += ["--output", str(ours), "--steps", "2", "--model", str(bundle / "models")]
        assert main(["inpaint", *words]) == 0
        assert ours.read_bytes() == theirs.read_bytes()
        made.append(ours.read_bytes())
    assert made[0] != made[1]


@pytest.mark.filterwarnings("ignore:No hash value:UserWarning")
def test_its_metadata_are_verified_by_monai_against_the_schemas_rules(bundle, tmp_path, monai_bundle):
    rules, metadata = tmp_path / "rules.json", bundle / "configs" / "metadata.json"
    rules.write_text(json.dumps(RULES))  # a schema that is there is not downloaded
    monai_bundle.verify_metadata(meta_file=str(metadata), filepath=str(rules))
    metadata.write_text(metadata.read_text().replace('"num_channels": 1', '"num_channels": "one"'))
    with pytest.raises(ValueError, match="'one' is not of type 'integer'"):
        monai_bundle.verify_metadata(meta_file=str(metadata), filepath=str(rules))
