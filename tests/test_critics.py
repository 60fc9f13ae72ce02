"""Laws of the training's judges: least squares, whom the gradients reach, and a distance checked by brute force."""

import os
import pickle

import pytest
import torch
from monai.losses import PatchAdversarialLoss
from torch import nn
from torch.nn import functional as F

from ldm_lib.critics import PerceptualDistance, discriminator_loss, generator_loss, patch_discriminator
from ldm_lib.errors import InputError, WeightsError


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(volume):
    """What a blurry autoencoder returns: means of 3 x 3 x 3 voxels."""
    return F.avg_pool3d(volume, 3, stride=1, padding=1)


def fresh_discriminator():
    torch.manual_seed(0)
    discriminator = patch_discriminator()
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.1)  # answers far from zero, on both sides
    return discriminator


class MeanOfInput(nn.Module):
    """Its answers, the last of its maps, are the mean of what it sees."""

    def forward(self, volume):
        return [100 * volume, volume.mean().expand(len(volume), 1, 3, 3, 3)]


@pytest.mark.parametrize(("fake", "real"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.8), (-0.5, -2.0), (3.0, 2.0)])
def test_the_losses_are_those_of_least_squares(fake, real):
    rebuilt, image = torch.full((2, 1, 20, 20, 20), fake), torch.full((2, 1, 20, 20, 20), real)
    judge = MeanOfInput()
    assert generator_loss(judge, rebuilt).item() == pytest.approx((fake - 1) ** 2, abs=1e-6)
    oracle = 0.5 * (fake**2 + (real - 1) ** 2)
    assert discriminator_loss(judge, rebuilt, image).item() == pytest.approx(oracle, abs=1e-6)


def test_the_losses_are_monais_without_its_activation():
    judge, oracle = fresh_discriminator(), PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
    rebuilt, image = noise(2, 1, 28, 24, 20), noise(2, 1, 28, 24, 20, seed=1)
    fake, real = judge(rebuilt)[-1], judge(image)[-1]
    assert fake.min() < -0.01 and fake.numel() == 2 * 5 * 4 * 3
    halves = [oracle(fake, target_is_real=False, for_discriminator=True), oracle(real, True, True)]
    assert torch.allclose(discriminator_loss(judge, rebuilt, image), sum(halves) / 2)
    assert torch.allclose(generator_loss(judge, rebuilt), oracle(fake, target_is_real=True, for_discriminator=False))


def test_the_discriminators_loss_trains_the_discriminator_alone():
    judge, rebuilt = fresh_discriminator(), noise(1, 1, 20, 20, 20).requires_grad_()
    image = noise(1, 1, 20, 20, 20, seed=1).requires_grad_()
    discriminator_loss(judge, rebuilt, image).backward()
    assert rebuilt.grad is None and image.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in judge.parameters())


def test_the_generators_loss_trains_the_generator_alone():
    """And its gradient is the one that a discriminator with gradients gives."""
    judge, rebuilt = fresh_discriminator(), noise(1, 1, 20, 20, 20).requires_grad_()
    (oracle,) = torch.autograd.grad((judge(rebuilt)[-1] - 1).square().mean(), rebuilt)
    generator_loss(judge, rebuilt).backward()
    assert torch.allclose(rebuilt.grad, oracle) and oracle.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in judge.parameters())


def test_a_discriminator_learns_to_tell_blurred_from_sharp():
    """Better than 1/4, the least that an answer which ignores its input can have, on crops it has not seen."""
    torch.manual_seed(0)
    judge = patch_discriminator().train()
    optimiser = torch.optim.Adam(judge.parameters(), lr=5e-4)

    def loss(seed):
        image = noise(2, 1, 20, 20, 20, seed=seed)
        return discriminator_loss(judge, smooth(image), image)

    for step in range(60):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    assert loss(1000).item() < 0.05


def test_an_answer_depends_on_no_other_crop_of_the_batch():
    judge, image = fresh_discriminator().train(), noise(3, 1, 16, 16, 16)
    alone = judge(image[:1])[-1]
    image[1] = 0
    image[2] *= 10
    assert torch.allclose(judge(image)[-1][:1], alone, atol=1e-6)
    assert not list(judge.buffers())  # no running statistics either


def test_an_answer_depends_on_its_patch_of_34_voxels_alone():
    judge, image = fresh_discriminator().train(), noise(1, 1, 48, 48, 48).requires_grad_()
    answers = judge(image)[-1]
    answers[0, 0, 5, 5, 5].backward()
    for axes in ((1, 2), (0, 2), (0, 1)):
        seen = image.grad[0, 0].abs().amax(dim=axes).nonzero()
        assert seen.max() - seen.min() + 1 == 34
    crop = judge(image[..., 4:, 4:, 4:])[-1]  # four voxels are one answer; those at the cut see its padding
    assert torch.allclose(crop[..., 4:-4, 4:-4, 4:-4], answers[..., 5:-4, 5:-4, 5:-4], atol=1e-5)


@pytest.mark.parametrize("edge", [20, 24, 32])
def test_bfloat16_gives_the_same_loss_and_gradient(edge):
    judge, rebuilt, image = fresh_discriminator(), noise(1, 1, edge, edge, edge), noise(1, 1, edge, edge, edge, seed=1)

    def gradient():
        loss = discriminator_loss(judge, rebuilt, image)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, list(judge.parameters()))
        return loss.item(), torch.cat([one.flatten() for one in found])

    loss, exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half = gradient()
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert discriminator_loss(judge, rebuilt.bfloat16(), image).item() == pytest.approx(loss, rel=0.03)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_crops_too_small_to_judge_are_refused():
    with pytest.raises(InputError, match=r"needs 20 voxels an axis, a crop has \[24, 19, 24\]"):
        generator_loss(patch_discriminator(), noise(1, 1, 24, 19, 24))


STRIDES, DILATIONS = (1, 2, 1, 1), (1, 1, 2, 4)  # of MedicalNet's four stages
KINDS = {
    "basic, B": {},
    "basic, A": {"shortcut": "A", "depths": (2, 1, 1, 2)},
    "bottleneck, B": {"expansion": 4, "depths": (1, 2, 1, 1)},
}


def medicalnet(widths=(4, 6, 8, 10), depths=(1, 1, 1, 1), shortcut="B", expansion=1):
    """Random tensors under MedicalNet's names, written out here without any network class."""
    tensors, draw = {}, torch.Generator().manual_seed(7)

    def layer(conv, norm, out, given, k):
        tensors[f"{conv}.weight"] = torch.randn(out, given, k, k, k, generator=draw) * (2 / given / k**3) ** 0.5
        for name, low in {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}.items():
            tensors[f"{norm}.{name}"] = low + torch.rand(out, generator=draw)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(9)

    layer("conv1", "bn1", widths[0], 1, 7)
    given = widths[0]
    for stage, (width, depth, stride) in enumerate(zip(widths, depths, STRIDES, strict=True), start=1):
        for block in range(depth):
            place, sizes = f"layer{stage}.{block}", [(given, width, 3), (width, width, 3)]
            if expansion > 1:
                sizes = [(given, width, 1), (width, width, 3), (width, expansion * width, 1)]
            for k, (into, out, size) in enumerate(sizes, start=1):
                layer(f"{place}.conv{k}", f"{place}.bn{k}", out, into, size)
            if shortcut == "B" and block == 0 and (stride > 1 or given != expansion * width):
                layer(f"{place}.downsample.0", f"{place}.downsample.1", expansion * width, given, 1)
            given = expansion * width
    return tensors


def brute_force(tensors, volume):
    """Unit features of one standardised volume, every operation spelt out."""

    def convolved(x, conv, norm, stride, dilation):
        weight = tensors[f"{conv}.weight"]
        x = F.conv3d(x, weight, stride=stride, dilation=dilation, padding=dilation * (weight.shape[-1] // 2))
        w, b, mean, var = (
            tensors[f"{norm}.{name}"].view(1, -1, 1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    x = (volume - volume.mean()) / (volume.var(correction=0) + 1e-4).sqrt()
    x = convolved(x, "conv1", "bn1", 2, 1).clamp(min=0)
    maps, x = [x], F.max_pool3d(x, 3, 2, 1)
    for stage, (stride, dilation) in enumerate(zip(STRIDES, DILATIONS, strict=True), start=1):
        for block in range(len({name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}")})):
            place, step = f"layer{stage}.{block}", stride if block == 0 else 1
            last = 3 if f"{place}.conv3.weight" in tensors else 2
            below = x
            for k in range(1, last + 1):
                x = convolved(x, f"{place}.conv{k}", f"{place}.bn{k}", step if k == last - 1 else 1, dilation)
                x = x.clamp(min=0) if k < last else x
            if f"{place}.downsample.0.weight" in tensors:
                below = convolved(below, f"{place}.downsample.0", f"{place}.downsample.1", step, 1)
            else:
                below = below[:, :, ::step, ::step, ::step]
                below = torch.cat([below, torch.zeros(1, x.shape[1] - below.shape[1], *x.shape[2:])], dim=1)
            x = (x + below).clamp(min=0)
        maps.append(x)
    return [level / level.square().sum(1, keepdim=True).sqrt().clamp(min=1e-6) for level in maps]


@pytest.fixture
def write(tmp_path):
    """Writes what it is given into a file as MedicalNet has it, and returns the path."""

    def write(content, **options):
        torch.save(content, tmp_path / "resnet_10_23dataset.pth", **options)
        return tmp_path / "resnet_10_23dataset.pth"

    return write


@pytest.fixture
def distance(write):
    return PerceptualDistance.load(write(wrapped(medicalnet())))


def wrapped(tensors):
    return {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_and_its_gradient_are_those_of_brute_force(write, kind):
    tensors = medicalnet(**KINDS[kind])
    distance = PerceptualDistance.load(write(wrapped(tensors)))
    image, rebuilt = noise(2, 1, 24, 20, 28), noise(2, 1, 24, 20, 28, seed=1).requires_grad_()
    pairs = [
        (one - other).square().sum(1).mean()
        for k in range(2)
        for one, other in zip(
            brute_force(tensors, rebuilt[k : k + 1]), brute_force(tensors, image[k : k + 1]), strict=True
        )
    ]
    oracle = sum(pairs) / len(pairs)
    found = distance(rebuilt, image)
    assert len(pairs) == 10 and found.item() == pytest.approx(oracle.item(), rel=1e-4)
    one, other = (torch.autograd.grad(loss, rebuilt)[0] for loss in (found, oracle))
    assert (one - other).norm() < 1e-3 * other.norm()


def test_it_is_a_distance(distance):
    image, rebuilt = noise(2, 1, 24, 24, 24), noise(2, 1, 24, 24, 24, seed=1)
    assert distance(image, image.clone()) == 0
    assert torch.allclose(distance(image, rebuilt), distance(rebuilt, image))
    near, far = (distance(image + share * (rebuilt - image), image).item() for share in (0.1, 1.0))
    assert 0 < near < far <= 2


def test_it_is_the_mean_over_a_batch_whatever_else_is_in_it(distance):
    image, rebuilt = noise(2, 1, 24, 24, 24), torch.stack([noise(1, 24, 24, 24, seed=1), torch.zeros(1, 24, 24, 24)])
    singles = [distance(rebuilt[k : k + 1], image[k : k + 1]) for k in range(2)]
    assert torch.allclose(distance(rebuilt, image), sum(singles) / 2, rtol=1e-4)


def test_gain_and_offset_do_not_count(distance):
    image, rebuilt = noise(1, 1, 24, 24, 24), smooth(noise(1, 1, 24, 24, 24))
    plain = distance(rebuilt, image).item()
    assert distance(1.5 * rebuilt + 0.2, image).item() == pytest.approx(plain, rel=0.02)
    assert distance(rebuilt, 0.7 * image).item() == pytest.approx(plain, rel=0.02)


def test_air_stays_flat(distance):
    """The faint error of a rebuilt crop of air is not blown up to unit variance, and its gradient is finite."""
    air, faint = torch.zeros(1, 1, 24, 24, 24), 1e-4 * noise(1, 1, 24, 24, 24)
    assert distance(faint, air) < 1e-3 * distance(noise(1, 1, 24, 24, 24), air)
    rebuilt = air.clone().requires_grad_()
    distance(rebuilt, air).backward()
    assert torch.isfinite(rebuilt.grad).all()


def test_gradients_reach_the_rebuilt_volume_alone(distance):
    image, rebuilt = noise(1, 1, 16, 16, 16).requires_grad_(), noise(1, 1, 16, 16, 16, seed=1).requires_grad_()
    distance(rebuilt, image).backward()
    assert rebuilt.grad.abs().sum() > 0 and image.grad is None
    assert not distance.training and not any(parameter.requires_grad for parameter in distance.parameters())


def test_bfloat16_gives_nearly_the_same_distance(distance):
    image, rebuilt = noise(1, 1, 24, 24, 24), noise(1, 1, 24, 24, 24, seed=1)
    exact = distance(rebuilt, image).item()
    with torch.autocast("cpu", torch.bfloat16):
        half = distance(rebuilt, image)
        assert distance(image, image) == 0
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact, rel=0.03)
    assert distance(rebuilt.bfloat16(), image).item() == pytest.approx(exact, rel=0.03)  # as an autoencoder returns it


@pytest.mark.parametrize(("content", "options"), [
    (medicalnet(), {}),
    ({"state_dict": medicalnet()}, {}),
    (wrapped(medicalnet()), {"_use_new_zipfile_serialization": False}),  # as torch 0.4 wrote them
    (wrapped(medicalnet() | {"fc.weight": torch.zeros(2, 10), "conv_seg.0.bias": torch.full((2,), torch.nan)}), {}),
    (wrapped({name: value for name, value in medicalnet().items() if "num_batches" not in name}), {}),
], ids=["bare", "unwrapped", "old", "heads", "no counters"])  # fmt: skip
def test_every_spelling_of_a_file_gives_the_same_network(write, distance, content, options):
    image, rebuilt = noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1)
    expected, state = distance(rebuilt, image), torch.get_rng_state()
    again = PerceptualDistance.load(write(content, **options))
    assert torch.equal(torch.get_rng_state(), state)  # a training with it draws what one without it draws
    assert again(rebuilt, image) == expected


def changed(**tensors):
    return wrapped(medicalnet() | {name.replace("__", "."): value for name, value in tensors.items()})


@pytest.mark.parametrize(("content", "reason"), [
    (changed(bn1__weight=torch.full((4,), torch.nan)), r"1 not finite \(bn1\.weight\)"),
    (changed(layer2__0__bn1__bias=torch.full((6,), torch.inf)), r"1 not finite \(layer2\.0\.bn1\.bias\)"),
    (changed(bn1__weight=torch.ones(5)), r"1 of another shape \(bn1\.weight\)"),
    (changed(backdoor=torch.ones(1)), r"1 unexpected \(backdoor\)"),
    (changed(layer2__0__downsample__0__bias=torch.ones(6)), r"1 unexpected \(layer2\.0\.downsample\.0\.bias\)"),
    (wrapped({k: v for k, v in medicalnet().items() if not k.startswith("layer3")}), r"15 missing \(layer3\.0"),
    (wrapped({k: v for k, v in medicalnet().items() if k != "bn1.running_var"}), r"1 missing \(bn1\.running_var\)"),
    (changed(conv1__weight=torch.ones(4, 3, 7, 7, 7)), r"one channel: conv1\.weight is \[4, 3, 7, 7, 7\]"),
    (changed(conv1__weight=torch.ones(4, 1, 7, 7)), r"not a 3D ResNet.*is \[4, 1, 7, 7\]"),
    ({"state_dict": {"encoder.weight": torch.ones(1)}}, r"not a 3D ResNet.*conv1\.weight is \[0\]"),
    ({"state_dict": [torch.ones(1)]}, "holds no state dict"),
    (torch.ones(3), "holds no state dict"),
    ({}, "not a 3D ResNet"),
])  # fmt: skip
def test_wrong_weights_are_refused(write, content, reason):
    with pytest.raises(WeightsError, match=rf"resnet_10_23dataset\.pth: .*(?:{reason}).*leave perceptual_file empty"):
        PerceptualDistance.load(write(content))


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [
    lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    lambda bomb, path: torch.save({"state_dict": medicalnet() | {"bn1.weight": bomb}}, path),
], ids=["pickle", "torch.save"])  # fmt: skip
def test_a_pickle_is_never_executed(tmp_path, save):
    save(Bomb(tmp_path / "executed"), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"net\.pth: .*unsafe.*leave perceptual_file empty"):
        PerceptualDistance.load(tmp_path / "net.pth")
    assert not (tmp_path / "executed").exists()


def test_an_absent_or_broken_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"net\.pth: no such file\..*leave perceptual_file empty"):
        PerceptualDistance.load(tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"net\.pth: damaged.*leave perceptual_file empty"):
        PerceptualDistance.load(str(tmp_path / "net.pth"))
