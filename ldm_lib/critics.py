"""The two optional judges of the autoencoder's training: a patch discriminator, and a distance between features.

volumes rebuilt and original (b 1 x y z) => a loss
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ldm_lib.config import JUDGED_CROP_VOX
from ldm_lib.errors import InputError, WeightsError
from ldm_lib.monai_networks import PatchDiscriminator, ResNet
from ldm_lib.values import given_path
from ldm_lib.weights import read_checkpoint

HEADS = ("fc.", "conv_seg.")  # what follows the features in a classifier or in MedicalNet's segmentation
COUNTER = "num_batches_tracked"
STAGES = {"layer1": (1, 1), "layer2": (2, 1), "layer3": (1, 2), "layer4": (1, 4)}  # MedicalNet's stride and dilation
VARIANCE_FLOOR = 1e-4  # of a volume, so that a crop of air stays flat
NORM_FLOOR = 1e-6
OTHER_FILE = "name a file of MedicalNet, such as resnet_10_23dataset.pth, or leave perceptual_file empty"


def patch_discriminator() -> nn.Module:
    """A patch discriminator (Isola et al., arXiv 1611.07004): (b 1 x y z) -> list of maps, the last its answers.

    Each answer judges a patch of 34 voxels an axis by that patch alone. There is no normalisation layer: statistics of
    a batch would tie an answer to the other crops and to how much of them is air or hole, those of an instance hide
    a patch's level and contrast.
    """
    return PatchDiscriminator(spatial_dims=3, channels=16, in_channels=1, num_layers_d=2, norm=None, bias=True)


def generator_loss(discriminator: nn.Module, rebuilt: Tensor) -> Tensor:
    """mean (D(rebuilt) - 1)^2 (least squares GAN: Mao et al., arXiv 1611.04076, labels 0 and 1).

    Gradients reach `rebuilt`, and not the discriminator.

    Raises:
        InputError: crops of fewer than 20 voxels an axis.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return (_answers(partial(functional_call, discriminator, frozen), rebuilt) - 1).square().mean()


def discriminator_loss(discriminator: nn.Module, rebuilt: Tensor, image: Tensor) -> Tensor:
    """(mean D(rebuilt)^2 + mean (D(image) - 1)^2) / 2; gradients reach the discriminator only.

    Raises:
        InputError: crops of fewer than 20 voxels an axis.
    """
    fake, real = _answers(discriminator, rebuilt.detach()), _answers(discriminator, image.detach())
    return (fake.square().mean() + (real - 1).square().mean()) / 2


def _answers(discriminator: Callable[[Tensor], Sequence[Tensor]], volume: Tensor) -> Tensor:
    """Its last map (b 1 x' y' z'), float32; of two answers an axis torch 2.13 takes NaN as bfloat16 weight gradient."""
    if min(volume.shape[-3:]) < JUDGED_CROP_VOX:
        given = f"the discriminator needs {JUDGED_CROP_VOX} voxels an axis, a crop has {list(volume.shape[-3:])}"
        raise InputError(given, fix="enlarge crop, or set adversarial_weight to 0")
    return discriminator(volume.float())[-1].float()


class PerceptualDistance(nn.Module):
    """Squared distance of unit feature vectors, LPIPS without learnt weights (Zhang et al., arXiv 1801.03924, eq. 1).

    The features are those of a 3D ResNet of MedicalNet (Chen et al., arXiv 1904.00625) after its first convolution
    and its four stages; the distance is the mean over batch, places and these five levels. Each volume has zero mean
    and unit variance over all its voxels first, much as in MONAI's PerceptualLoss; MedicalNet's own statistics left
    out the air, and noise filled it, which works only where air is exactly zero.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "PerceptualDistance":
        """From a local file in MedicalNet's format, its depth and widths told by its tensors; nothing is downloaded.

        Raises:
            WeightsError: no such file, not the tensors of a 3D ResNet for one channel, non-finite or unsafe.
        """
        path = given_path(path)
        if not path.is_file():
            raise WeightsError("no such file", where=path, fix=OTHER_FILE)
        try:
            return cls(_build(_read_tensors(path)))
        except WeightsError as error:
            raise WeightsError(error.cause, where=path, fix=OTHER_FILE) from error

    def features(self, volume: Tensor) -> list[Tensor]:
        """(b 1 x y z) -> five maps (b c x' y' z'), float32, every vector over c of unit length or zero."""
        network = self.network
        maps = [network.act(network.bn1(network.conv1(F.instance_norm(volume.float(), eps=VARIANCE_FLOOR))))]
        below = network.maxpool(maps[0])
        for stage in STAGES:
            below = getattr(network, stage)(below)
            maps.append(below)
        return [F.normalize(level.float(), dim=1, eps=NORM_FLOOR) for level in maps]

    def forward(self, rebuilt: Tensor, image: Tensor) -> Tensor:
        """The distance of two batches of normalised volumes (b 1 x y z), 0 to 2; gradients reach `rebuilt` only."""
        with torch.no_grad():
            wanted = self.features(image)
        pairs = zip(self.features(rebuilt), wanted, strict=True)
        return torch.stack([(one - other).square().sum(1).mean() for one, other in pairs]).mean()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under their names in MONAI's ResNet, float32, without counters and heads."""
    content = read_checkpoint(path)
    named = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(named, dict):
        raise WeightsError("holds no state dict")
    tensors = {str(name).removeprefix("module."): value for name, value in named.items() if isinstance(value, Tensor)}
    kept = [name for name in tensors if not name.startswith(HEADS) and not name.endswith(COUNTER)]
    return {name: tensors[name].float() for name in kept}


def _build(tensors: dict[str, Tensor]) -> ResNet:
    """The ResNet that these tensors are of."""
    stem = tensors.get("conv1.weight", torch.empty(0))
    if stem.ndim != 5 or stem.shape[1] != 1:
        shape = f"conv1.weight is {list(stem.shape)}, need [width, 1, k, k, k]"
        raise WeightsError(f"not a 3D ResNet for one channel: {shape}")
    blocks = {stage: {name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")} for stage in STAGES}
    with torch.device("meta"):  # draws no random number and fills no memory
        network = ResNet(
            "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
            [len(found) for found in blocks.values()],
            [len(tensors.get(f"{stage}.0.conv1.weight", stem)) for stage in STAGES],
            n_input_channels=1,
            conv1_t_size=tuple(stem.shape[2:]),
            conv1_t_stride=2,
            shortcut_type="B" if any(".downsample." in name for name in tensors) else "A",
            bias_downsample=False,  # with one, it is MONAI's own kind, whose last stages halve
            feed_forward=False,
        )
    _require_fit(tensors, network)
    network.load_state_dict(tensors, assign=True)
    _dilate(network)
    return network


def _require_fit(tensors: dict[str, Tensor], network: ResNet) -> None:
    shapes = {name: p.shape for name, p in network.state_dict().items() if not name.endswith(COUNTER)}
    shared = shapes.keys() & tensors.keys()
    faults = {
        "missing": shapes.keys() - tensors.keys(),
        "unexpected": tensors.keys() - shapes.keys(),
        "of another shape": {name for name in shared if shapes[name] != tensors[name].shape},
        "not finite": {name for name in shared if not torch.isfinite(tensors[name]).all()},
    }
    told = [f"{len(names)} {fault} ({', '.join(sorted(names)[:3])})" for fault, names in faults.items() if names]
    if told:
        raise WeightsError(f"its tensors do not make a 3D ResNet: {'; '.join(told)}")


def _dilate(network: ResNet) -> None:
    """MedicalNet's geometry: its last two stages dilate where MONAI's halve, under the same names and shapes."""
    for name, (stride, dilation) in STAGES.items():
        stage = getattr(network, name)
        if isinstance(stage[0].downsample, partial):
            stage[0].downsample = partial(_pad_channels, stage[0].downsample.keywords["planes"], stride)
        for layer in stage.modules():
            if isinstance(layer, nn.Conv3d) and dilation > 1:
                layer.stride = (1, 1, 1)
                layer.dilation = (dilation,) * 3
                layer.padding = tuple(dilation * (k // 2) for k in layer.kernel_size)


def _pad_channels(planes: int, stride: int, x: Tensor) -> Tensor:
    """Shortcut of type A: every stride-th voxel, new channels zero; MONAI's own lets no gradient through."""
    return F.pad(x[..., ::stride, ::stride, ::stride], (0,) * 7 + (planes - x.shape[1],))
