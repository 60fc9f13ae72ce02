"""Cases as latents, and what the denoiser is shown of them.

ModelCase => voided, target (c x y z), conditioning (4 x y z), hole, loss, share (1 x y z)

With the context "draft" a first guess fills the hole (`draft`), and what is generated is the residual of its latent:

draft (c x y z);   target = (z_target - draft) / residual_std;   voided = 0, as known cells have no residual
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ldm_lib.autoencoder import Autoencoder
from ldm_lib.cases import CaseData
from ldm_lib.conditioning import CONDITIONING_CHANNELS, ModelCase, conditioning, loss_cells, model_case
from ldm_lib.devices import autocast
from ldm_lib.draft import draft_fill
from ldm_lib.geometry import cell_share, latent_mask

SHOWN = {"concat": "voided", "draft": "draft"}  # context -> the latent that is shown beside the noisy one
MEASURED = 48  # training cases that say how much a draft lacks
LEAST_STD = 1e-3  # of a channel, in latents of standard deviation 1
CPU = torch.device("cpu")
MARGIN = 1  # cells around the hole that the denoiser sees at least

Latents = dict[str, Tensor]


@dataclass(frozen=True)
class CellSettings:
    """How voxels become cells; part of a model, kept in its config.

    Attributes:
        growth_threshold: concentrations below it become 0.
        pooling: "area" or "nearest".
        mask_dilation: cells by which the latent mask grows.
        context: "composite", or "concat" to show the undilated latent and each cell's share of hole as well, or "draft"
            to show the latent of a first guess instead, and to generate what it lacks.
        residual_std: of what a draft lacks, one a latent channel; 1 of each where there are none.
    """

    growth_threshold: float = 0.2
    pooling: str = "area"
    mask_dilation: int = 1
    context: str = "composite"
    residual_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """JSON knows no tuples."""
        object.__setattr__(self, "residual_std", tuple(self.residual_std))

    @property
    def refinement(self) -> str:
        """How an atlas map is to be made for it (`segmentation.tissue_from_scan`): a draft reads one method's alone."""
        return "none" if self.context == "draft" else "mixture"

    def residual_scale(self, latent: Tensor) -> Tensor | float:
        """`residual_std` where it can be multiplied with latents (... c x y z)."""
        return torch.tensor(self.residual_std, device=latent.device).view(-1, 1, 1, 1) if self.residual_std else 1.0


def encode_case(
    case: ModelCase, autoencoder: Autoencoder, settings: CellSettings, *, device: torch.device, precision: str
) -> Latents:
    """Encode one case; "target" is there only if the case has one. All float32, on the CPU."""
    factor = autoencoder.factor
    if settings.context == "draft":
        images = {"draft": draft_fill(case.voided, case.mask, case.tissue, spacing_mm=autoencoder.spacing_mm)}
    else:
        images = {"voided": case.voided}
    images |= {} if case.target is None else {"target": case.target}
    latents = {}
    for name, image in images.items():
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.inference_mode(), autocast(device, precision):
            latents[name] = autoencoder.encode(volume)[0].float().cpu().contiguous()
    if settings.context == "draft":
        latents["voided"] = torch.zeros_like(latents["draft"])
        if "target" in latents:
            latents["target"] = (latents["target"] - latents["draft"]) / settings.residual_scale(latents["draft"])
    cells = {
        "conditioning": conditioning(
            case.growth, case.tissue, factor=factor, threshold=settings.growth_threshold, pooling=settings.pooling
        ),
        "hole": latent_mask(case.mask, factor, settings.mask_dilation)[None],
        "loss": loss_cells(case, factor, settings.mask_dilation)[None],
        "share": cell_share(case.mask, factor)[None],
    }
    return latents | {name: torch.from_numpy(array.astype(np.float32)) for name, array in cells.items()}


def measured(settings: CellSettings, cases: Iterable[CaseData], autoencoder: Autoencoder) -> CellSettings:
    """The settings with what drafts lack in the cells that are generated, on the first `MEASURED` cases with a target.

    Runs on the processor in float32. Means are over cells: a large hole counts for more.
    """
    total, count, how = torch.zeros(autoencoder.latent_channels).double(), 0, {"device": CPU, "precision": "32"}
    for data in islice(cases, MEASURED):
        latents = encode_case(model_case(data, autoencoder.factor), autoencoder, settings, **how)
        residual = latents["target"][:, latents["loss"][0] > 0].double()
        total, count = total + residual.square().sum(dim=1), count + residual.shape[1]
    return replace(settings, residual_std=(total / max(count, 1)).sqrt().clamp(min=LEAST_STD).tolist())


def denoiser_input(noisy: Tensor, batch: Latents, settings: CellSettings) -> Tensor:
    """What the denoiser sees: known cells clean, holes noisy, then conditioning, mask and, by `context`, more.

    Args:
        noisy: (b c x y z) latents at some noise level; only its holes are used.
        batch: voided, conditioning, hole, share and, with the context "draft", draft, each (b . x y z).
    """
    channels = [keep_known(noisy, batch), batch["conditioning"], batch["hole"]]
    if settings.context in SHOWN:
        channels += [batch[SHOWN[settings.context]], batch["share"]]
    return torch.cat(channels, dim=1)


def input_channels(latent_channels: int, settings: CellSettings) -> int:
    """Channels of `denoiser_input`."""
    return latent_channels + 5 + (latent_channels + 1 if settings.context in SHOWN else 0)


def conditioning_channels(latent_channels: int) -> tuple[int, int]:
    """Where the conditioning starts and stops among the channels of `denoiser_input`."""
    return latent_channels, latent_channels + len(CONDITIONING_CHANNELS)


def generated(sampled: Tensor, latents: Latents, settings: CellSettings) -> Tensor:
    """The latent of a case, standardised (... c x y z), from what was sampled: that itself, or a draft's residual."""
    if settings.context != "draft":
        return sampled
    return latents["draft"].to(sampled) + sampled * settings.residual_scale(sampled)


def keep_known(latent: Tensor, batch: Latents) -> Tensor:
    """(1 - m) * z_voided + m * z: known cells are the clean z_voided at every t."""
    hole = batch["hole"]
    return (1 - hole) * batch["voided"] + hole * latent


def context_box(hole: np.ndarray, *, edge: int, multiple: int) -> tuple[slice, ...]:
    """The box of cells that is sampled: the hole's, `MARGIN` cells around it, and on from there as in training.

    Args:
        hole: (x, y, z) bool, cells that are generated.
        edge: cells of a training crop, which no axis of the box falls short of where the grid has them.
        multiple: of cells, to which the network would pad the box.
    """
    box = []
    for span, n in zip(ndimage.find_objects(hole.astype(np.uint8))[0], hole.shape, strict=True):
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
