"""Fixtures of several test files: a synthetic cohort, tiny networks, stages without notebooks."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much on a shared machine

SCHEDULE = {"steps": 1000, "beta_start": 1e-4, "beta_end": 0.002}  # mild, so that untrained networks stay finite
SETTINGS = {"growth_threshold": 0.2, "pooling": "area", "mask_dilation": 1, "context": "composite"}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the tissue maps that are made in tests out of the user's cache."""
    before = os.environ.get("LDM_CACHE")
    os.environ["LDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("LDM_CACHE") if before is None else os.environ.update(LDM_CACHE=before)


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """The outputs folder of the test; the handler of SIGTERM is restored."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("LDM_OUTPUTS", str(tmp_path / "outputs"))
    yield tmp_path / "outputs"
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory) -> Path:
    """Three synthetic patients with two masks each, 8 mm voxels (30 30 20), in the training layout."""
    from ldm_lib.data.synthetic_cohort import make_synthetic_cohort

    folder = tmp_path_factory.mktemp("cohort")
    make_synthetic_cohort(folder, 3, first=0, spacing_mm=8.0, masks=2)
    return folder / "data"


@pytest.fixture(scope="session")
def cases(cohort_folder) -> list:
    """Its six cases, patient by patient."""
    from ldm_lib.data.cohort import find_cases

    return find_cases(cohort_folder)


@pytest.fixture(scope="session")
def made_tissue(cases):
    """The tissue map of the first case, made from its voided scan with full registration: 2 seconds, so once."""
    from ldm_lib.anatomy.tissue_segmentation import tissue_from_scan
    from ldm_lib.data.case import load_case

    data = load_case(cases[0])
    return tissue_from_scan(data.voided / data.scale, data.source.affine, data.mask)


@pytest.fixture(scope="session")
def fast_registration():
    """Registrations of half a second, for properties that hold for every one: `with fast_registration(): ...`."""
    from unittest import mock

    from ldm_lib.anatomy import affine_alignment, deformation

    @contextmanager
    def fast():
        affine = mock.patch.object(affine_alignment, "ITERATIONS", 5)
        with affine, mock.patch.object(deformation, "ITERATIONS", (0, 0, 3)):
            yield

    return fast


@pytest.fixture(scope="session")
def coarse(tmp_path_factory, cases) -> Path:
    """An untrained autoencoder, four voxels per latent voxel and three channels: latents of (8 8 5), for trainings."""
    from ldm_lib.autoencoder.fitting import latent_statistics
    from ldm_lib.autoencoder.model import Autoencoder
    from ldm_lib.model_io import save_model

    torch.manual_seed(1)
    build = {"channels": (4, 4, 4), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    autoencoder = Autoencoder.of(**build).freeze()
    autoencoder.standardise(*latent_statistics(autoencoder, cases[:4], device=torch.device("cpu"), precision="32"))
    folder = tmp_path_factory.mktemp("coarse")
    save_model(folder, autoencoder)
    return folder


@pytest.fixture(scope="session")
def tiny_autoencoder_folder(tmp_path_factory, cases) -> Path:
    """An untrained autoencoder, two voxels per latent voxel and three channels, with standardised latents."""

    from ldm_lib.autoencoder.fitting import latent_statistics
    from ldm_lib.autoencoder.model import Autoencoder
    from ldm_lib.model_io import save_model

    torch.manual_seed(1)
    build = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    autoencoder = Autoencoder.of(**build).freeze()
    autoencoder.network.decoder.blocks[-1].conv.bias.fill_(1.0)  # most voxels above 0: pasting cuts negative ones
    autoencoder.standardise(*latent_statistics(autoencoder, cases[:4], device=torch.device("cpu"), precision="32"))
    folder = tmp_path_factory.mktemp("autoencoder")
    save_model(folder, autoencoder)
    return folder


def tiny_model(folder, autoencoder_folder, settings, in_channels) -> Path:
    """A model folder as training writes it, with random weights in every layer of the denoiser."""
    import shutil

    from ldm_lib.diffusion.unet import ADM
    from ldm_lib.model_io import read_config, save_model

    torch.manual_seed(2)
    denoiser = ADM(in_channels=in_channels, out_channels=3, base_width=8, multipliers=(1, 2), blocks_per_level=1,
                   attention_rates=(2,), head_channels=8)  # fmt: skip
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    shutil.copytree(autoencoder_folder, folder / "autoencoder")
    save_model(folder, denoiser, schedule=SCHEDULE, settings=settings, prediction="noise",
               autoencoder_sha256=read_config(autoencoder_folder)["sha256"])  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_autoencoder_folder) -> Path:
    """A model without initial estimates."""
    return tiny_model(tmp_path_factory.mktemp("model"), tiny_autoencoder_folder, SETTINGS, 8)


@pytest.fixture(scope="session")
def tiny_initial_estimate_folder(tmp_path_factory, tiny_autoencoder_folder) -> Path:
    """A model that refines initial estimates."""
    settings = SETTINGS | {"context": "initial_estimate", "residual_std": [0.5, 1.0, 2.0]}
    return tiny_model(tmp_path_factory.mktemp("initial_estimate"), tiny_autoencoder_folder, settings, 12)


@pytest.fixture
def executed(monkeypatch):
    """The stages that ran, each a stand-in that writes a notebook and one result, and closes its stage."""
    import nbformat

    from ldm_lib.experiment import runner
    from ldm_lib.experiment.stage import open_stage, stage_inputs

    done = []

    def execute(stage, config, folder):
        done.append(stage)
        opened = open_stage(stage, config.model_dump(), inputs=stage_inputs(stage, config, folder.parent))
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {stage}")]), folder / "notebook.ipynb"
        )
        (folder / "result.txt").write_text(f"seed {config.seed}")
        opened.check("made", True, "result.txt")
        opened.check("liked", False, "no", required=False)
        opened.close({})

    monkeypatch.setattr(runner, "_execute", execute)
    return done


@pytest.fixture
def browser():
    """A headless Chromium."""
    import shutil

    drivers = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    path = shutil.which("chromium") or pytest.skip("needs a browser: apt install chromium")
    drawn_by_cpu = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with drivers.sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=drawn_by_cpu) as opened:
        yield opened
