"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.__main__ import FULL_GRID
from ldm_lib.anatomy.deformation import deform
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.training import build_autoencoder, fit_autoencoder
from ldm_lib.devices import autocast
from ldm_lib.diffusion.latents import LatentSpec, collate, input_channels, on_device
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.experiment.presets import resolve
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples
from ldm_lib.training.distributed import Processes
from ldm_lib.training.initialise import build_denoiser
from ldm_lib.training.step import Trainer

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def full_autoencoder():
    """That of the full preset, its zero-initialised layers made random."""
    autoencoder = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze()
    torch.manual_seed(0)
    for parameter in autoencoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return autoencoder


@pytest.mark.parametrize(("precision", "tolerance"), [("32", 2e-3), ("bf16", 5e-2), ("16", 1e-2)])
def test_a_gpu_codes_as_a_cpu_does(precision, tolerance):
    autoencoder, volume = full_autoencoder(), torch.rand(1, 1, 64, 64, 64)
    with torch.inference_mode():
        expected = autoencoder.decode(autoencoder.encode(volume))
        with autocast(GPU, precision):
            found = autoencoder.to(GPU).decode(autoencoder.encode(volume.to(GPU))).cpu()
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_the_full_size_fits_8_gb():
    autoencoder, volume = full_autoencoder().to(GPU), torch.rand(1, 1, *FULL_GRID, device=GPU)
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), autocast(GPU, "bf16"):
        autoencoder.decode(autoencoder.encode(volume))
    assert torch.cuda.max_memory_allocated() < 8e9


def test_a_gpu_registers_as_a_cpu_does():
    rng, shape = np.random.default_rng(0), (40, 48, 44)
    smooth = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 2, 2, 2)).astype(np.float32)
    static, moving = smooth / smooth.std() / 4 + 0.5
    moving = (moving + 2 * static) / 3
    mask = np.zeros(shape, bool)
    mask[10:20, 12:24, 14:30] = True
    expected, found = (deform(static, mask, moving, np.eye(4), device=name).cpu() for name in ("cpu", "cuda"))
    assert (found - expected).abs().mean() < 0.02 and expected.abs().mean() > 0.1, "voxels"


@pytest.mark.parametrize("learned", ["none", "decoder"])
def test_whatever_is_learned_ends_on_the_gpu(cases, tmp_path, learned):
    config = resolve("smoke", {"learned": learned, "autoencoder_steps": 2})["02_autoencoder_check"]
    autoencoder = build_autoencoder(config, spacing_mm=8.0)
    fit_autoencoder(autoencoder, cases[:2], config, folder=tmp_path, device=GPU, precision="32")
    assert {tensor.device.type for tensor in autoencoder.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}], ids=["plain", "dropout"])
def test_no_step_waits_for_the_gpu(precision, changes):
    """Torch raises where the processor would wait; batches are made on the CPU and copied from pinned memory."""
    config = resolve("smoke", {"latent_crop": 0} | changes)["04_training"]
    autoencoder = Autoencoder.of(channels=(4, 4), latent_channels=3, blocks=1, spacing_mm=8.0, linear_start=False)
    denoiser = build_denoiser(config, in_channels=input_channels(3, LatentSpec()), out_channels=3).to(GPU)
    schedule = noise_schedule(**config.process)
    model = LatentDiffusion(autoencoder, denoiser, schedule, LatentSpec(), GPU, precision, config.prediction)
    mask = torch.zeros(1, 8, 8, 8)
    mask[:, 2:6, 2:6, 2:6] = 1
    latents = {"target": torch.randn(3, 8, 8, 8), "voided": torch.randn(3, 8, 8, 8), "mask": mask, "loss": mask,
               "mask_fraction": mask, "conditioning": torch.rand(4, 8, 8, 8)}  # fmt: skip
    plan = BatchPlan(2, config)
    trainer = Trainer(model, config, plan, Processes(GPU, precision))
    samples = TrainingSamples([[latents]] * 2, config, schedule.steps, global_batch=plan.global_batch)
    steps = [collate([samples[index] for index in plan.sample_indices(step)]) for step in range(4)]
    batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in steps]
    trainer.advance([on_device(batches[0], GPU)])  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trainer.advance([on_device(batch, GPU)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.bad_step() is None
