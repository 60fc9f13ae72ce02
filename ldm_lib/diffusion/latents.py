"""Cases as latents, and what the denoiser is shown of them.

ModelCase => voided, target (c x y z), conditioning (4 x y z), hole, loss, share (1 x y z)

With the context "initial_estimate" a first guess fills the hole (`draft`), and what is generated is the residual of its latent:

draft (c x y z);   target = (z_target - draft) / residual_std;   voided = 0, as known cells have no residual
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ldm_lib.anatomy.initial_estimate import initial_estimate
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import CaseData
from ldm_lib.data.model_grid import CONDITIONING_CHANNELS, GridCase, conditioning, grid_case, loss_cells
from ldm_lib.devices import autocast
from ldm_lib.diffusion.options import LatentOptions
from ldm_lib.geometry import block_mean, bounding_box, latent_mask

SHOWN = {
    "concat": "voided",
    "initial_estimate": "initial_estimate",
}  # context -> the latent that is shown beside the noisy one
MEASURED = 48  # training cases that say how much a draft lacks
LEAST_STD = 1e-3  # of a channel, in latents of standard deviation 1
CPU = torch.device("cpu")
MARGIN = 1  # cells around the hole that the denoiser sees at least

Latents = dict[str, Tensor]


class LatentSpec(LatentOptions):
    """Describe how voxels become latents and conditioning; part of a model, kept in its config.json.

    Attributes:
        residual_std: standard deviation of what initial estimates lack, one a latent channel; empty stands for 1.
    """

    residual_std: tuple[Annotated[float, Field(gt=0)], ...] = ()

    @property
    def refinement(self) -> str:
        """How an atlas map is to be made for it (`segmentation.tissue_from_scan`): a draft reads one method's alone."""
        return "none" if self.context == "initial_estimate" else "mixture"

    def residual_scale(self, latent: Tensor) -> Tensor | float:
        """`residual_std` where it can be multiplied with latents (... c x y z)."""
        return torch.tensor(self.residual_std, device=latent.device).view(-1, 1, 1, 1) if self.residual_std else 1.0


def encode_case(
    case: GridCase, autoencoder: Autoencoder, spec: LatentSpec, *, device: torch.device, precision: str
) -> Latents:
    """Encode one case; "target" is there only if the case has one. All float32, on the CPU."""
    factor = autoencoder.factor
    if spec.context == "initial_estimate":
        images = {
            "initial_estimate": initial_estimate(case.voided, case.mask, case.tissue, spacing_mm=autoencoder.spacing_mm)
        }
    else:
        images = {"voided": case.voided}
    images |= {} if case.target is None else {"target": case.target}
    latents = {}
    for name, image in images.items():
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.inference_mode(), autocast(device, precision):
            latents[name] = autoencoder.encode(volume)[0].float().cpu().contiguous()
    if spec.context == "initial_estimate":
        latents["voided"] = torch.zeros_like(latents["initial_estimate"])
        if "target" in latents:
            latents["target"] = (latents["target"] - latents["initial_estimate"]) / spec.residual_scale(
                latents["initial_estimate"]
            )
    cells = {
        "conditioning": conditioning(
            case.growth, case.tissue, factor=factor, threshold=spec.growth_threshold, pooling=spec.pooling
        ),
        "mask": latent_mask(case.mask, factor, spec.mask_dilation)[None],
        "loss": loss_cells(case, factor, spec.mask_dilation)[None],
        "mask_fraction": block_mean(case.mask, factor)[None],
    }
    return latents | {name: torch.from_numpy(array.astype(np.float32)) for name, array in cells.items()}


def measure_residual_std(spec: LatentSpec, cases: Iterable[CaseData], autoencoder: Autoencoder) -> LatentSpec:
    """The settings with what drafts lack in the cells that are generated, on the first `MEASURED` cases with a target.

    Runs on the processor in float32. Means are over cells: a large hole counts for more.
    """
    total, count, how = torch.zeros(autoencoder.latent_channels).double(), 0, {"device": CPU, "precision": "32"}
    for data in islice(cases, MEASURED):
        latents = encode_case(grid_case(data, autoencoder.factor), autoencoder, spec, **how)
        residual = latents["target"][:, latents["loss"][0] > 0].double()
        total, count = total + residual.square().sum(dim=1), count + residual.shape[1]
    return spec.model_copy(update={"residual_std": tuple((total / max(count, 1)).sqrt().clamp(min=LEAST_STD).tolist())})


def denoiser_input(noisy: Tensor, batch: Latents, spec: LatentSpec) -> Tensor:
    """What the denoiser sees: known cells clean, holes noisy, then conditioning, mask and, by `context`, more.

    Args:
        noisy: (b c x y z) latents at some noise level; only its holes are used.
        batch: voided, conditioning, hole, share and, with the context "initial_estimate", draft, each (b . x y z).
    """
    channels = [keep_known(noisy, batch), batch["conditioning"], batch["mask"]]
    if spec.context in SHOWN:
        channels += [batch[SHOWN[spec.context]], batch["mask_fraction"]]
    return torch.cat(channels, dim=1)


def input_channels(latent_channels: int, spec: LatentSpec) -> int:
    """Channels of `denoiser_input`."""
    return latent_channels + 5 + (latent_channels + 1 if spec.context in SHOWN else 0)


def conditioning_channels(latent_channels: int) -> tuple[int, int]:
    """Where the conditioning starts and stops among the channels of `denoiser_input`."""
    return latent_channels, latent_channels + len(CONDITIONING_CHANNELS)


def add_initial_estimate(sampled: Tensor, latents: Latents, spec: LatentSpec) -> Tensor:
    """The latent of a case, standardised (... c x y z), from what was sampled: that itself, or a draft's residual."""
    if spec.context != "initial_estimate":
        return sampled
    return latents["initial_estimate"].to(sampled) + sampled * spec.residual_scale(sampled)


def keep_known(latent: Tensor, batch: Latents) -> Tensor:
    """(1 - m) * z_voided + m * z: known cells are the clean z_voided at every t."""
    hole = batch["mask"]
    return (1 - hole) * batch["voided"] + hole * latent


def context_box(hole: np.ndarray, *, edge: int, multiple: int) -> tuple[slice, ...]:
    """The box of cells that is sampled: the hole's, `MARGIN` cells around it, and on from there as in training.

    Args:
        hole: (x, y, z) bool, cells that are generated.
        edge: cells of a training crop, which no axis of the box falls short of where the grid has them.
        multiple: of cells, to which the network would pad the box.
    """
    box = []
    for span, n in zip(bounding_box(hole), hole.shape, strict=True):
        wanted = max(span.stop - span.start + 2 * MARGIN, edge)
        size = min(n, -(-wanted // multiple) * multiple)
        start = min(max((span.start + span.stop - size) // 2, 0), n - size)
        box.append(slice(start, start + size))
    return tuple(box)


def collate(samples: Sequence[Latents]) -> Latents:
    """Stack samples to (b . x y z); smaller grids are padded behind with zeros, which no loss sees."""
    shape = [max(s["voided"].shape[axis] for s in samples) for axis in (1, 2, 3)]

    def padded(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        missing = [n - have for n, have in zip(shape, tensor.shape[1:], strict=True)]
        return torch.nn.functional.pad(tensor, [side for m in reversed(missing) for side in (0, m)])

    return {name: torch.stack([padded(s[name]) for s in samples]) for name in samples[0]}


def on_device(batch: Latents, device: torch.device) -> Latents:
    """A batch where the denoiser is; a copy from pinned memory does not keep the processor waiting."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
