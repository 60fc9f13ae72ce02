"""Cases as latents: encoded once, kept on disk, never served stale.

    ModelCase => voided, target (c x y z), conditioning (4 x y z), hole, loss, share (1 x y z)

An entry is found by a key over everything it was made from: bytes of the sources, weights of the autoencoder,
settings, augmentation, precision and the version of this code. It carries the digest of its own tensors.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_lib.augmentation import Augmentation
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.cases import Case, load_case
from ldm_lib.conditioning import ModelCase, conditioning, loss_cells, model_case
from ldm_lib.devices import autocast
from ldm_lib.files import fingerprint, replacing, sha256
from ldm_lib.geometry import cell_share, latent_mask

log = logging.getLogger("ldm_lib")

CODE_VERSION = 1  # raise it when encoding or conditioning change their meaning
Latents = dict[str, Tensor]


@dataclass(frozen=True)
class CellSettings:
    """How voxels become cells; part of a model, kept in its config.

    Attributes:
        growth_threshold: concentrations below it become 0.
        pooling: "area" or "nearest".
        mask_dilation: cells by which the latent mask grows.
        context: "composite", or "concat" to show the undilated latent and each cell's share of hole as well.
    """

    growth_threshold: float = 0.2
    pooling: str = "area"
    mask_dilation: int = 1
    context: str = "composite"


def encode_case(
    case: ModelCase, autoencoder: Autoencoder, settings: CellSettings, *, device: torch.device, precision: str
) -> Latents:
    """Encode one case; "target" is there only if the case has one. All float32, on the CPU."""
    factor = autoencoder.factor
    images = {"voided": case.voided} | ({} if case.target is None else {"target": case.target})
    latents = {}
    for name, image in images.items():
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.inference_mode(), autocast(device, precision):
            latents[name] = autoencoder.encode(volume)[0].float().cpu().clone()
    cells = {
        "conditioning": conditioning(
            case.growth, case.tissue, factor=factor, threshold=settings.growth_threshold, pooling=settings.pooling
        ),
        "hole": latent_mask(case.mask, factor, settings.mask_dilation)[None],
        "loss": loss_cells(case, factor, settings.mask_dilation)[None],
        "share": cell_share(case.mask, factor)[None],
    }
    return latents | {name: torch.from_numpy(array.astype(np.float32)) for name, array in cells.items()}


class LatentCache:
    """Encoded training samples in one folder; several processes may fill it at once.

    Args:
        folder: created if needed.
        autoencoder: frozen, on `device`.
        weights_sha256: identifies the autoencoder's weights.
        variants: encodings per case; the first is as it is, the others are augmented.
        seed: of the augmentations.
    """

    def __init__(
        self,
        folder: Path,
        autoencoder: Autoencoder,
        weights_sha256: str,
        settings: CellSettings,
        *,
        device: torch.device,
        precision: str,
        augmentation: Augmentation | None = None,
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        self.folder, self.autoencoder, self.settings = folder, autoencoder, settings
        self.device, self.precision, self.variants, self.seed = device, precision, variants, seed
        self.augmentation = augmentation or Augmentation()
        self._about = {
            "code": CODE_VERSION,
            "weights": weights_sha256,
            "settings": asdict(settings),
            "precision": precision,
        }
        folder.mkdir(parents=True, exist_ok=True)

    def fill(self, cases: Sequence[Case]) -> Iterator[tuple[Case, list[Latents]]]:
        """Yield each case with its variants, encoding what is missing, stale or damaged."""
        for case in cases:
            digests = {role: sha256(path) for role, path in case.files().items()}
            paths = [self._path(case, digests, variant) for variant in range(self.variants)]
            found = [_read(path) for path in paths]
            if any(entry is None for entry in found):
                plain = model_case(load_case(case), self.autoencoder.factor)
                found = [entry or self._encode(path, plain, case, k)
                         for k, (path, entry) in enumerate(zip(paths, found, strict=True))]  # fmt: skip
            yield case, found

    def _path(self, case: Case, digests: dict[str, str], variant: int) -> Path:
        about = self._about | {"files": digests, "variant": variant}
        if variant:
            about |= {"augmentation": asdict(self.augmentation), "seed": self.seed, "case": case.key}
        return self.folder / f"{case.key}-{variant}-{fingerprint(about)[:16]}.safetensors"

    def _encode(self, path: Path, plain: ModelCase, case: Case, variant: int) -> Latents:
        if variant:
            digest = hashlib.sha256(case.key.encode()).digest()[:4]
            rng = np.random.default_rng([self.seed, variant, int.from_bytes(digest, "big")])
            plain = self.augmentation(plain, rng, spacing_mm=self.autoencoder.spacing_mm)
        entry = encode_case(plain, self.autoencoder, self.settings, device=self.device, precision=self.precision)
        with replacing(path) as partial:
            save_file(entry, partial, {"digest": _digest(entry)})
        return entry


def denoiser_input(noisy: Tensor, batch: Latents, settings: CellSettings) -> Tensor:
    """What the denoiser sees: known cells clean, holes noisy, then conditioning, mask and, by `context`, more.

    Args:
        noisy: (b c x y z) latents at some noise level; only its holes are used.
        batch: voided, conditioning, hole, share, each (b . x y z).
    """
    channels = [keep_known(noisy, batch), batch["conditioning"], batch["hole"]]
    if settings.context == "concat":
        channels += [batch["voided"], batch["share"]]
    return torch.cat(channels, dim=1)


def input_channels(latent_channels: int, settings: CellSettings) -> int:
    """Channels of `denoiser_input`."""
    return latent_channels + 5 + (latent_channels + 1 if settings.context == "concat" else 0)


def keep_known(latent: Tensor, batch: Latents) -> Tensor:
    """(1 - m) * z_voided + m * z: known cells are the clean z_voided at every t."""
    hole = batch["hole"]
    return (1 - hole) * batch["voided"] + hole * latent


def collate(samples: Sequence[Latents]) -> Latents:
    """Stack samples to (b . x y z); smaller grids are padded behind with zeros, which no loss sees."""
    shape = [max(s["voided"].shape[axis] for s in samples) for axis in (1, 2, 3)]

    def padded(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        missing = [n - have for n, have in zip(shape, tensor.shape[1:], strict=True)]
        return torch.nn.functional.pad(tensor, [side for m in reversed(missing) for side in (0, m)])

    return {name: torch.stack([padded(s[name]) for s in samples]) for name in samples[0]}


def _read(path: Path) -> Latents | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stream:
            entry = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            recorded = (stream.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s); encoded again", path.name, error)
        return None
    if recorded != _digest(entry):
        log.warning("%s is not what was written; encoded again", path.name)
        return None
    return entry


def _digest(entry: Latents) -> str:
    digest = hashlib.sha256()
    for name in sorted(entry):
        digest.update(json.dumps([name, str(entry[name].dtype), list(entry[name].shape)]).encode())
        digest.update(entry[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
