"""Measure how fast a training step is: ours and a plain loop around MONAI's network, on the same latents.

Both take their steps in turn in one process, so that other work on the machine slows both.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.reference_models import standard_autoencoder, standard_denoiser
from ldm_lib.autoencoder.training import build_autoencoder
from ldm_lib.devices import pick_device, pick_precision, timed
from ldm_lib.diffusion.latents import Latents, LatentSpec, collate, denoiser_input, input_channels, on_device
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.schedule import NoiseSchedule, noise_schedule
from ldm_lib.diffusion.unet import count_parameters
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import TrainingConfig
from ldm_lib.options import integers
from ldm_lib.progress import report
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples
from ldm_lib.training.distributed import Processes
from ldm_lib.training.initialise import build_denoiser
from ldm_lib.training.step import Trainer

LATENT_VOXEL_VOX = 8  # voxels along an edge of a latent voxel, at full size
BATCH_SIZE = {"cpu": 1, "cuda": 2}
BATCH_NOTE = {"cpu": "1, since the 2 of `full` take twice the minutes and more memory", "cuda": "as in `full`"}
WARM_UPS = {"cpu": 1, "cuda": 3}  # from the second on, the optimiser's state counts to a GPU's peak of memory
ROUNDS, BUDGET_S = (2, 50), 60.0  # least and most steps of each; seconds after which none is begun
CASES = 2
SPEC = LatentSpec()


@dataclass
class Contestant:
    """Hold a way to train a denoiser step by step, and its measurements."""

    advance: Callable[[Latents], Any]
    network: nn.Module
    precision: str
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def row(self, device: torch.device) -> dict[str, Any]:
        """Return the row of the results."""
        timing = {"s": statistics.median(self.seconds), "least_s": min(self.seconds), "most_s": max(self.seconds)}
        about = {"steps": len(self.seconds), "parameters": count_parameters(self.network), "precision": self.precision}
        return timing | about | ({"peak_memory_gb": self.peak_bytes / 1e9} if device.type == "cuda" else {})


class PlainLoop:
    """Train a denoiser in float32 with Adam and a moving average, as it is usually written."""

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, config: TrainingConfig) -> None:
        self.network, self.schedule, self.config = network, schedule, config
        self.multiple = 2 ** (len(integers(config.multipliers)) - 1)
        self.average = deepcopy(network).requires_grad_(False).eval()
        self.optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate)

    def advance(self, batch: Latents) -> float:
        """Train on one batch, padded to whole multiples of latent voxels, and return its loss."""
        batch = {name: _padded(tensor, self.multiple) for name, tensor in batch.items()}
        noisy = self.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
        prediction = self.network(denoiser_input(noisy, batch, SPEC), batch["t"])
        error = F.mse_loss(prediction, batch["noise"], reduction="none") * batch["loss"]
        loss = error.sum() / (batch["loss"].sum() * prediction.shape[1])
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(self.config.ema_decay).add_(new, alpha=1 - self.config.ema_decay)
        return loss.item()


def bench_training(
    shape: Sequence[int],
    *,
    encode_s: float | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time training steps of preset `full`.

    Args:
        shape: voxels of a volume, divisible by 8; a latent has an eighth of them along each axis.
        encode_s: seconds in which `standard_autoencoder` encodes a volume, if that was measured already.
        changes: parameters that differ from preset `full`.

    Returns:
        "training", rows of ours, the plain loop and encoding every step; "ratios"; "grid", "batch_size" and
        "batch_note", the reason for it.
    """
    device, grid = pick_device("auto"), [n // LATENT_VOXEL_VOX for n in shape]
    config = resolve("full", {"batch_size": BATCH_SIZE[device.type], **(changes or {})})["04_training"]
    precision = pick_precision(config.precision, device)
    model = untrained_model(config, device, precision)
    batches = training_batches(grid, config, model)
    rows = _measure_in_turn(model, config, batches)
    if encode_s is None:
        encode_s = _encoding_seconds(shape, device)
    rows["encode_every_step"] = _with_encoding(rows["plain_loop"], encode_s, config.batch_size)
    note = BATCH_NOTE[device.type]
    found = {"batch_size": config.batch_size, "batch_note": note, "grid": grid, "training": rows}
    found["ratios"] = {
        "train_step_speedup_vs_plain_loop": rows["plain_loop"]["s"] / rows["ours"]["s"],
        "train_step_speedup_vs_encode_every_step": rows["encode_every_step"]["s"] / rows["ours"]["s"],
    }
    _report(found)
    return found


def random_latents(grid: Sequence[int], channels: int, seed: int) -> Latents:
    """Return an encoded case (c x y z) of noise, with a mask in its middle."""
    draw = torch.Generator().manual_seed(seed)
    images = {name: torch.randn(channels, *grid, generator=draw) for name in ("voided", "target")}
    mask = torch.zeros(1, *grid)
    mask[:, *(slice(n // 4, n - n // 4) for n in grid)] = 1
    return images | {
        "conditioning": torch.rand(4, *grid, generator=draw),
        "mask": mask,
        "loss": mask,
        "mask_fraction": mask,
    }


def untrained_model(config: TrainingConfig, device: torch.device, precision: str) -> LatentDiffusion:
    """Return an untrained denoiser with an autoencoder that no step uses."""
    autoencoder = build_autoencoder(resolve("smoke")["02_autoencoder_check"], spacing_mm=1.0).freeze()
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, SPEC), out_channels=channels)
    how = SPEC, device, precision, config.prediction
    return LatentDiffusion(autoencoder, denoiser, noise_schedule(**config.process), *how)


def training_batches(
    grid: Sequence[int], config: TrainingConfig, model: LatentDiffusion, cases: int = CASES
) -> list[Latents]:
    """Return the batches of one epoch as a training makes them, on the device of the denoiser."""
    channels = model.autoencoder.latent_channels
    variants = [[random_latents(grid, channels, seed)] for seed in range(cases)]
    plan = BatchPlan(len(variants), config)
    samples = TrainingSamples(variants, config, model.schedule.steps, global_batch=plan.global_batch)
    steps = [plan.batches(step)[0] for step in range(plan.steps_per_epoch)]
    return [on_device(collate([samples[index] for index in indices]), model.device) for indices in steps]


def _measure_in_turn(
    model: LatentDiffusion, config: TrainingConfig, batches: Sequence[Latents]
) -> dict[str, dict[str, Any]]:
    """Return rows of ours and of the plain loop, from steps taken in turn on the same batches."""
    device, precision = model.device, model.precision

    def ours() -> Contestant:
        model.denoiser.to(device)  # only now, so that its weights count to its memory
        trainer = Trainer(model, config, BatchPlan(CASES, config), Processes(device, precision))
        return Contestant(lambda batch: trainer.advance([batch]), trainer.denoiser, precision)

    def plain() -> Contestant:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = standard_denoiser(model.denoiser).to(device)
        return Contestant(PlainLoop(network, model.schedule, config).advance, network, "32")

    both = {"ours": _warm_up(ours, batches[0], device), "plain_loop": _warm_up(plain, batches[0], device)}
    report("training: warm, now steps in turn")
    started = time.perf_counter()
    for k in range(ROUNDS[1]):
        if k >= ROUNDS[0] and time.perf_counter() - started > BUDGET_S:
            break
        for contestant in both.values():
            contestant.seconds.append(timed(partial(contestant.advance, batches[k % len(batches)]), device)[0])
    return {name: contestant.row(device) for name, contestant in both.items()}


def _warm_up(make: Callable[[], Contestant], batch: Latents, device: torch.device) -> Contestant:
    """Return a contestant after its first steps, in which one-time set-up is done; its memory is what it added."""
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    reset_peak_memory(device)
    contestant = make()
    for _ in range(WARM_UPS[device.type]):
        contestant.advance(batch)
    contestant.peak_bytes = peak_memory(device) - held
    return contestant


def _encoding_seconds(shape: Sequence[int], device: torch.device) -> float:
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    network = standard_autoencoder().eval().to(device)
    with torch.inference_mode():
        network.encode(volume[..., :32, :32, :32])
        return timed(lambda: network.encode(volume), device)[0]


def _with_encoding(plain: dict[str, Any], encode_s: float, batch_size: int) -> dict[str, Any]:
    """Return the row of a step that encodes t1n and voided of every sample first: a sum of two measurements."""
    parts = {"plain_loop_s": plain["s"], "volumes": 2 * batch_size, "encode_s": encode_s}
    return {"s": plain["s"] + parts["volumes"] * encode_s, "sum_of": parts}


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """Pad (b c x y z) with zeros behind each axis, up to a multiple; leave a number per sample unchanged."""
    if tensor.ndim != 5:
        return tensor
    return F.pad(tensor, [side for size in reversed(tensor.shape[2:]) for side in (0, -size % multiple)])


def _report(found: dict[str, Any]) -> None:
    for name, row in found["training"].items():
        texts = {key: f"{value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()}
        report(f"training, {name}: " + ", ".join(f"{key} {text}" for key, text in texts.items() if key != "sum_of"))
