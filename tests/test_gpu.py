"""What only a GPU can show; skipped where there is none."""

import pytest
import torch

from ldm_lib.autoencoding import build_autoencoder, train_autoencoder
from ldm_lib.bench import FULL_GRID
from ldm_lib.devices import autocast
from ldm_lib.presets import resolve

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def full_autoencoder():
    """That of the full preset, its silent layers made to speak."""
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
        wanted = autoencoder.decode(autoencoder.encode(volume))
        with autocast(GPU, precision):
            found = autoencoder.to(GPU).decode(autoencoder.encode(volume.to(GPU))).cpu()
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def test_the_full_size_fits_8_gb():
    autoencoder, volume = full_autoencoder().to(GPU), torch.rand(1, 1, *FULL_GRID, device=GPU)
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), autocast(GPU, "bf16"):
        autoencoder.decode(autoencoder.encode(volume))
    assert torch.cuda.max_memory_allocated() < 8e9


@pytest.mark.parametrize("learned", ["none", "decoder"])
def test_whatever_is_learned_ends_on_the_gpu(cases, tmp_path, learned):
    config = resolve("smoke", {"learned": learned, "autoencoder_steps": 2})["02_autoencoder_check"]
    autoencoder = build_autoencoder(config, spacing_mm=8.0)
    train_autoencoder(autoencoder, cases[:2], config, folder=tmp_path, device=GPU, precision="32")
    assert {tensor.device.type for tensor in autoencoder.state_dict().values()} == {"cuda"}
