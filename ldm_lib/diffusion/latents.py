"""Encode cases into latents, and compose the input of the denoiser.

GridCase => voided, target (c x y z), conditioning (4 x y z), mask, loss, mask_fraction (1 x y z)

With the context "initial_estimate" the denoiser generates the residual of the latent of an initial estimate:
target = (z_target - initial_estimate) / residual_std;   voided = 0
contralateral = (z_mirrored - initial_estimate) / residual_std, with `contralateral_known` of each latent voxel
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ldm_lib.anatomy.contralateral import contralateral_image
from ldm_lib.anatomy.initial_estimate import initial_estimate
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import Case, CaseData
from ldm_lib.data.model_grid import CONDITIONING_CHANNELS, GridCase, conditioning, grid_case, loss_mask
from ldm_lib.devices import autocast
from ldm_lib.diffusion.options import LatentOptions
from ldm_lib.geometry import block_mean, bounding_box, latent_mask

CONCATENATED = {"concat": "voided", "initial_estimate": "initial_estimate"}  # context -> latent added to the input
SIGNED = ("voided", "target", "initial_estimate", "contralateral")  # latents, whose signs change in a mirror image
RESIDUAL_CASES = 48  # training cases on which `residual_std` is measured
LEAST_STD = 1e-3  # of a channel, in latents of standard deviation 1
CPU = torch.device("cpu")
LEFT_RIGHT = -3  # axis of latents (... c x y z) in LPS
MARGIN = 1  # latent voxels around the mask that the denoiser sees at least

Latents = dict[str, Tensor]


class LatentSpec(LatentOptions):
    """Describe how voxels become latents and conditioning; part of a model, kept in its config.json.

    Attributes:
        residual_std: standard deviation of the residual of initial estimates, one per latent channel; empty means 1.
    """

    residual_std: tuple[Annotated[float, Field(gt=0)], ...] = ()

    @property
    def refinement(self) -> str:
        """Name the refinement of atlas maps that the model was trained with, see `tissue_from_scan`."""
        return "none" if self.context == "initial_estimate" else "mixture"

    def residual_scale(self, latent: Tensor) -> Tensor | float:
        """Return `residual_std` so that it broadcasts over latents (... c x y z)."""
        return torch.tensor(self.residual_std, device=latent.device).view(-1, 1, 1, 1) if self.residual_std else 1.0


def encode_case(
    case: GridCase, autoencoder: Autoencoder, spec: LatentSpec, *, device: torch.device, precision: str
) -> Latents:
    """Encode one case, all float32 on the CPU.

    Returns:
        voided, conditioning, mask, loss, mask_fraction; target if the case has one; initial_estimate in that context;
        contralateral and contralateral_known if the model sees them.
    """
    factor, residual = autoencoder.factor, spec.context == "initial_estimate"
    images = {"voided": case.voided}
    if residual:
        estimate = initial_estimate(case.voided, case.mask, case.tissue, spacing_mm=autoencoder.spacing_mm)
        images = {"initial_estimate": estimate}
    if spec.contralateral:
        mirrored, known = contralateral_image(estimate, case.mask, spacing_mm=autoencoder.spacing_mm)
        images["contralateral"] = mirrored
    images |= {} if case.target is None else {"target": case.target}
    latents = {}
    for name, image in images.items():
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.inference_mode(), autocast(device, precision):
            latents[name] = autoencoder.encode(volume)[0].float().cpu().contiguous()
    if residual:
        start = latents["initial_estimate"]
        latents["voided"] = torch.zeros_like(start)
        for name in latents.keys() & {"target", "contralateral"}:
            latents[name] = (latents[name] - start) / spec.residual_scale(start)
    pooled = {"factor": factor, "threshold": spec.growth_threshold, "pooling": spec.pooling}
    on_grid = {
        "conditioning": conditioning(case.growth, case.tissue, **pooled),
        "mask": latent_mask(case.mask, factor, spec.mask_dilation)[None],
        "loss": loss_mask(case, factor, spec.mask_dilation)[None],
        "mask_fraction": block_mean(case.mask, factor)[None],
    }
    if spec.contralateral:
        on_grid["contralateral_known"] = block_mean(known, factor)[None]
    return latents | {name: torch.from_numpy(array.astype(np.float32)) for name, array in on_grid.items()}


def case_seed(case: Case) -> int:
    """Return a number made of a case's name, for random numbers that depend on no other case."""
    return int.from_bytes(hashlib.sha256(case.key.encode()).digest()[:4], "big")


def measure_residual_std(spec: LatentSpec, cases: Iterable[CaseData], autoencoder: Autoencoder) -> LatentSpec:
    """Measure the standard deviation of the residual in the masked region, and return the spec with it.

    Uses the first 48 of the training cases, on the CPU in float32; a large mask counts for more.
    """
    total, count = torch.zeros(autoencoder.latent_channels).double(), 0
    for data in islice(cases, RESIDUAL_CASES):
        case = grid_case(data, autoencoder.factor, bias_field_correction=spec.bias_field_correction)
        latents = encode_case(case, autoencoder, spec, device=CPU, precision="32")
        residual = latents["target"][:, latents["loss"][0] > 0].double()
        total, count = total + residual.square().sum(dim=1), count + residual.shape[1]
    return spec.model_copy(update={"residual_std": tuple((total / max(count, 1)).sqrt().clamp(min=LEAST_STD).tolist())})


def denoiser_input(noisy: Tensor, batch: Latents, spec: LatentSpec) -> Tensor:
    """Compose the input of the denoiser: known voxels clean, masked ones noisy, then conditioning, mask and context."""
    channels = [keep_known(noisy, batch), batch["conditioning"], batch["mask"]]
    if spec.context in CONCATENATED:
        channels += [batch[CONCATENATED[spec.context]], batch["mask_fraction"]]
    if spec.contralateral:
        channels += [batch["contralateral"], batch["contralateral_known"]]
    return torch.cat(channels, dim=1)


def input_channels(latent_channels: int, spec: LatentSpec) -> int:
    """Count the channels of `denoiser_input`."""
    more = (spec.context in CONCATENATED) + spec.contralateral
    return latent_channels + 5 + more * (latent_channels + 1)


def conditioning_channels(latent_channels: int) -> tuple[int, int]:
    """Return start and stop of the conditioning among the channels of `denoiser_input`."""
    return latent_channels, latent_channels + len(CONDITIONING_CHANNELS)


def add_initial_estimate(sampled: Tensor, latents: Latents, spec: LatentSpec) -> Tensor:
    """Turn a sample (... c x y z) into a standardised latent: a residual is added to its initial estimate."""
    if spec.context != "initial_estimate":
        return sampled
    return latents["initial_estimate"].to(sampled) + sampled * spec.residual_scale(sampled)


def keep_known(latent: Tensor, batch: Latents) -> Tensor:
    """Return (1 - m) * z_voided + m * z: known voxels are the clean z_voided at every t."""
    mask = batch["mask"]
    return (1 - mask) * batch["voided"] + mask * latent


def mirror_image(latents: Latents, signs: Tensor) -> Latents:
    """Return the latents (... c x y z) of the mirror image of a case, left and right exchanged.

    Args:
        signs: (c,) of `Autoencoder.mirror`.
    """
    signs = signs.view(-1, 1, 1, 1)
    return {name: part.flip(LEFT_RIGHT) * (signs.to(part) if name in SIGNED else 1) for name, part in latents.items()}


def context_box(mask: np.ndarray, *, edge: int, multiple: int) -> tuple[slice, ...]:
    """Return the box of latent voxels to sample: the mask, a margin, and at least the size of a training crop.

    Args:
        edge: of a training crop, latent voxels; the smallest size of each axis, as far as the grid goes.
        multiple: the size is rounded up to a multiple of it, to which the network would pad anyway.
    """
    box = []
    for span, n in zip(bounding_box(mask), mask.shape, strict=True):
        least = max(span.stop - span.start + 2 * MARGIN, edge)
        size = min(n, -(-least // multiple) * multiple)
        start = min(max((span.start + span.stop - size) // 2, 0), n - size)
        box.append(slice(start, start + size))
    return tuple(box)


def collate(samples: Sequence[Latents]) -> Latents:
    """Stack samples to (b . x y z); smaller grids are padded at the end with zeros, which leave the loss."""
    shape = [max(s["voided"].shape[axis] for s in samples) for axis in (1, 2, 3)]

    def padded(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        missing = [n - have for n, have in zip(shape, tensor.shape[1:], strict=True)]
        return torch.nn.functional.pad(tensor, [side for m in reversed(missing) for side in (0, m)])

    return {name: torch.stack([padded(s[name]) for s in samples]) for name in samples[0]}


def on_device(batch: Latents, device: torch.device) -> Latents:
    """Move a batch to a device, asynchronously from pinned memory."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
