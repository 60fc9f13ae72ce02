"""Laws of volume in, volume out: nothing outside the mask, no peeking, exact inverses, samples that seeds determine."""

import gzip
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from einops import rearrange
from models import changed
from scipy.spatial.transform import Rotation
from torch import nn

from ldm_lib.data.case import case_of_files, load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.model_grid import grid_case, resample_case, resampling_to
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.diffusion import model as model_module
from ldm_lib.diffusion.latents import LatentSpec, context_box, encode_case
from ldm_lib.diffusion.model import CaseNoise, LatentDiffusion
from ldm_lib.diffusion.parameterisation import prediction_target
from ldm_lib.diffusion.samplers import samplers_for
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.images.volume import read_volume, write_map
from ldm_lib.inpainting import single_file
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.preprocess import CaseGrid
from ldm_lib.inpainting.result import Inpainting
from ldm_lib.inpainting.single_file import inpaint

CPU = torch.device("cpu")
FAST = {"num_inference_steps": 3, "device": "cpu"}
every_sampler = pytest.mark.parametrize("sampler", samplers_for(noise_schedule()))


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu", precision="32")


@pytest.fixture(scope="module")
def encoded(cases, inpainter):
    return inpainter.encode(load_case(cases[0]))


@pytest.fixture
def pair(cases, tmp_path):
    """Copies of one case's voided image and mask."""
    return tuple(Path(shutil.copy(path, tmp_path)) for path in (cases[0].t1n_voided, cases[0].mask))


@pytest.fixture
def model(tiny_model_folder):
    return {"model": tiny_model_folder, **FAST}


def raw(path):
    return read_volume(path).raw


def rewrite(path, change, dtype=None):
    """Change the voxels of a file in place."""
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    change(voxels)
    nib.save(nib.Nifti1Image(voxels.astype(dtype or voxels.dtype), image.affine), path)


def test_a_model_and_a_result_are_one_line_in_a_session(cases, inpainter):
    result = inpainter(cases[0], n_samples=2, num_inference_steps=1)
    assert repr(result) == f"Inpainting({load_case(cases[0])!r}, 2 samples)"
    codec = inpainter.model.autoencoder
    assert repr(inpainter.model.schedule) == "NoiseSchedule(1000 steps, variance preserving)"
    assert repr(noise_schedule("flow", 10)) == "NoiseSchedule(10 steps, rectified flow)"
    weights = sum(p.numel() for p in inpainter.model.denoiser.parameters())
    assert repr(inpainter.model) == (
        f"LatentDiffusion({weights:,} weights, {codec.latent_channels} channels of {codec.factor} voxels, "
        f"{inpainter.model.prediction}, {inpainter.model.schedule!r}, cpu, 32)"
    )
    assert repr(inpainter) == f"Inpainter({inpainter.model!r}, blend_mm=16, detail=1)"


# ---- law 1: outside the mask


@pytest.mark.parametrize(("dtype", "suffix"), [
    ("int16", ".nii.gz"), ("uint8", ".nii"), (">f4", ".nii"),
])  # fmt: skip
def test_outside_the_mask_the_file_comes_back_bit_for_bit(pair, tmp_path, model, dtype, suffix):
    image = nib.load(pair[0])
    voxels = np.asanyarray(image.dataobj).astype(float)
    voxels *= (250 if dtype == "uint8" else 3000) / voxels.max()
    given = tmp_path / f"given{suffix}"
    header = nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header["descrip"], header["cal_max"], header["intent_name"] = b"a scan", 1234, b"kept"
    nib.save(nib.Nifti1Image(voxels.astype(dtype), image.affine, header), given)
    output = tmp_path / f"result{suffix}"
    assert inpaint(given, pair[1], output, **model) == [output]
    before, after, mask = read_volume(given), read_volume(output), raw(pair[1]) > 0
    assert after.preamble == before.preamble and after.raw.dtype == before.raw.dtype
    assert after.shape == before.shape and np.array_equal(after.affine, before.affine)
    assert np.array_equal(after.raw[~mask], before.raw[~mask])
    assert np.isfinite(after.voxels).all() and after.raw[mask].any() and not before.raw[mask].any()


# ---- samples, mean and spread


def test_of_several_samples_the_output_is_the_mean_and_the_deviation_is_numpys(pair, tmp_path, model):
    rewrite(pair[0], lambda voxels: None, np.float32)
    output = tmp_path / "out.nii.gz"
    written = inpaint(*pair, output, n_samples=5, write_samples=True, **model)
    names = ["out.nii.gz", "out-std.nii.gz", "out-nearest.nii.gz", *(f"out-sample-{k:04d}.nii.gz" for k in range(5))]
    assert [path.name for path in written] == names and all(path.parent == tmp_path for path in written)
    samples = np.stack([raw(path) for path in written[3:]]).astype(np.float64)
    mask = raw(pair[1]) > 0
    np.testing.assert_allclose(raw(output), samples.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(raw(written[1]), samples.std(axis=0), rtol=1e-4, atol=1e-3)
    assert (
        not raw(written[1])[~mask].any() and (raw(written[1])[mask] > 0).mean() > 0.5
    )  # where all samples are cut at 0 they agree
    assert len({sample[mask].tobytes() for sample in samples}) == 5
    distances = np.square(samples - samples.mean(axis=0)).sum(axis=(1, 2, 3))
    assert np.array_equal(raw(written[2]), samples[np.argmin(distances)])
    assert np.array_equal(read_volume(written[1]).affine, read_volume(output).affine)


def test_mean_and_deviation_outside_the_mask_are_exact():
    """A third of three equal numbers is the number: the spread of known voxels is exactly 0."""
    voxels = np.random.default_rng(0).uniform(0, 4000, (20, 20, 20)).astype(np.float32)
    mask = voxels > 2000
    filled = Inpainting(SimpleNamespace(voided=np.where(mask, 0, voxels), mask=mask), np.stack([voxels[mask]] * 3))
    assert [np.array_equal(a, filled.samples[k]) for k, a in enumerate(filled.samples[:2])] == [True, True]
    for volume in (filled.mean, filled.medoid, filled.samples[2]):
        assert np.array_equal(volume, voxels)
    assert not filled.std.any()


def test_the_medoid_is_the_sample_nearest_to_the_mean():
    mask = np.ones((2, 1, 1), bool)
    values = np.array([[0, 0], [4, 4], [10, 10]], np.float32)  # mean 4.67
    case = SimpleNamespace(voided=np.zeros((2, 1, 1), np.float32), mask=mask)
    assert np.array_equal(Inpainting(case, values).medoid.ravel(), [4, 4])


# ---- law 2: no peeking


def test_what_lies_under_the_mask_changes_nothing(pair, tmp_path, model, caplog):
    rng, mask = np.random.default_rng(0), raw(pair[1]) > 0
    results = []
    for k in range(3):

        def peek(voxels, k=k):
            voxels[mask] = rng.integers(1, 30000, mask.sum()) if k else 0

        rewrite(pair[0], peek)
        with caplog.at_level(logging.WARNING):
            inpaint(*pair, tmp_path / f"{k}.nii.gz", **model)
        results.append(raw(tmp_path / f"{k}.nii.gz"))
        assert (f"{mask.sum()} of {mask.sum()} voxels under the mask were not void" in caplog.text) == (k > 0)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0][mask], raw(pair[0])[mask])


# ---- law 3: an identity in place of the autoencoder


class SpaceToDepth(nn.Module):
    """Volume and latent hold the same numbers: each latent voxel keeps its factor^3 voxels as channels."""

    spacing_mm = 1.0
    network = nn.Identity()  # a network, of which no detail is measured

    def __init__(self, factor):
        super().__init__()
        self.factor, self.latent_channels = factor, factor**3
        self.pattern, self.sizes = "b 1 (x i) (y j) (z k) -> b (i j k) x y z", dict.fromkeys("ijk", factor)

    def encode(self, volume):
        return rearrange(volume, self.pattern, **self.sizes)

    def decode(self, latent):
        return rearrange(latent, " -> ".join(reversed(self.pattern.split(" -> "))), **self.sizes)


class KnowsTheTarget(nn.Module):
    """What a perfect denoiser answers, seen from the true latent."""

    def __init__(self, truth, schedule, prediction):
        super().__init__()
        self.truth, self.schedule, self.prediction = truth, schedule, prediction

    def forward(self, x, t, conditional=None):
        z = x[:, : self.truth.shape[1]].double()
        alpha, sigma = self.schedule.alpha_sigma(t, z)
        noise = (z - alpha * self.truth) / sigma
        return prediction_target(self.prediction, self.schedule, self.truth, noise, t).to(x.dtype)


def write_head(folder, depth, orientation):
    """A random head with a mask, as three files; the same voxels in the world whatever the orientation."""
    rng, shape = np.random.default_rng(depth), (24, 20, depth)
    voxels = rng.integers(1, 4000, shape).astype(np.int16)
    voxels[:3] = voxels[:, :2] = voxels[..., -20:] = 0
    mask = np.zeros(shape, np.uint8)
    mask[5:14, 8:15, 60:71] = 1
    mask[20:, :5, -4:] = 1  # a mask at the edge of the grid
    volumes = {"head": voxels, "head-t1n-voided": voxels * (1 - mask), "head-mask": mask}
    lps = nib.orientations.axcodes2ornt("LPS")
    turn = nib.orientations.ornt_transform(lps, nib.orientations.axcodes2ornt(orientation))
    folder.mkdir()
    for name, volume in volumes.items():
        image = nib.Nifti1Image(volume.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0])).as_reoriented(turn)
        write_map(folder / f"{name}.nii.gz", np.asanyarray(image.dataobj), image.affine)
    return [folder / f"{name}.nii.gz" for name in volumes]


@pytest.mark.parametrize(("depth", "orientation", "factor", "sampler", "prediction"), [
    (155, "LPS", 4, "ddim", "noise"), (156, "RAS", 4, "ddpm", "velocity"), (155, "RAS", 2, "dpm++2m", "noise"),
    (156, "LPS", 2, "midpoint", "flow"), (155, "PSL", 4, "ddim", "x0"), (155, "LPS", 1, "ddpm", "noise"),
    (156, "RAS", 4, "dpm++2m", "flow"),
])  # fmt: skip
def test_with_an_identity_for_an_autoencoder_the_truth_comes_back(
    tmp_path, depth, orientation, factor, sampler, prediction
):
    full, voided, mask = write_head(tmp_path / "head", depth, orientation)
    data = load_case(replace(case_of_files(voided, mask), t1n=full))
    autoencoder = SpaceToDepth(factor)
    schedule = noise_schedule("flow" if prediction == "flow" else "linear")
    truth = autoencoder.encode(torch.from_numpy(grid_case(data, factor).target)[None, None]).double()
    oracle = KnowsTheTarget(truth, schedule, prediction)
    inpainter = Inpainter(LatentDiffusion(autoencoder, oracle, schedule, LatentSpec(), CPU, "32", prediction))
    filled = inpainter(data, sampler=sampler, num_inference_steps=3)
    filled.save(tmp_path / "out.nii.gz")
    assert np.array_equal(raw(tmp_path / "out.nii.gz"), raw(full))


def test_the_order_of_a_files_voxels_does_not_matter(tmp_path, inpainter):
    results = []
    for name in ("LPS", "SLA"):
        _, voided, mask = write_head(tmp_path / name, 155, name)
        data = load_case(case_of_files(voided, mask))
        inpainter(data, num_inference_steps=2).save(tmp_path / f"{name}.nii.gz")
        results.append(nib.as_closest_canonical(nib.load(tmp_path / f"{name}.nii.gz")))
    assert np.array_equal(*(np.asanyarray(image.dataobj) for image in results))
    assert np.allclose(results[0].affine, results[1].affine)


@pytest.mark.parametrize("degrees", [0, 14, 16, 45])
def test_a_file_of_other_voxels_is_resampled_to_the_models_and_back(tmp_path, inpainter, degrees):
    """With the ground truth in the model's voxels, a smooth head of other voxels comes back within a few percent."""
    grid, step = np.indices((40, 44, 36)), np.array([0.8, 1.0, 1.3])
    millimetres = grid * step[:, None, None, None] - np.array([16, 22, 23])[:, None, None, None]
    radius = np.sqrt(np.square(millimetres).sum(axis=0))
    head = np.where(radius < 15, 1000 + 300 * np.cos(radius / 4), 0).astype(np.float32)
    masked = np.square(millimetres - np.array([3, 2, -4])[:, None, None, None]).sum(axis=0) < 25
    affine = np.diag([*-step[:2], step[2], 1])
    affine[:3, :3] = Rotation.from_rotvec(np.array([2, -1, 2]) / 3 * degrees, degrees=True).as_matrix() @ affine[:3, :3]
    for name, volume in {"head": head, "head-t1n-voided": head * ~masked, "head-mask": masked.astype(np.uint8)}.items():
        write_map(tmp_path / f"{name}.nii.gz", volume, affine)
    files = [tmp_path / f"head{name}.nii.gz" for name in ("-t1n-voided", "-mask")]
    data = load_case(case_of_files(*files))
    truth = resample_case(replace(data, voided=head, mask=np.zeros_like(masked)), resampling_to(data, 1.0))
    autoencoder, schedule = SpaceToDepth(2), noise_schedule()
    latent = autoencoder.encode(torch.from_numpy(grid_case(truth, 2).voided)[None, None]).double()
    oracle = KnowsTheTarget(latent, schedule, "noise")
    filled = Inpainter(LatentDiffusion(autoencoder, oracle, schedule, LatentSpec(), CPU, "32"))(
        data, num_inference_steps=3
    )
    filled.save(tmp_path / "out.nii.gz")
    result = raw(tmp_path / "out.nii.gz")
    assert np.array_equal(result[~masked], head[~masked]) and result.shape == head.shape
    assert np.abs(result - head)[masked].max() < 50 and np.abs(head[masked] - head[masked].mean()).max() > 250


@pytest.mark.parametrize("shape", ["one voxel", "two regions", "border"])
def test_masks_of_every_kind_are_inpainted(cases, inpainter, shape):
    data = load_case(cases[0])
    brain, mask = data.target > 0, np.zeros(data.mask.shape, bool)
    centre = tuple(np.argwhere(brain)[brain.sum() // 2])
    mask[centre] = True
    if shape == "two regions":
        mask[tuple(np.argwhere(brain)[50])] = True
    if shape == "border":
        mask[:, 12:18, :4] = mask[-3:, -3:, -3:] = True
    data = replace(data, mask=mask, voided=np.where(mask, 0, data.target))
    for crop in (0, 6):
        filled = changed(inpainter, crop=crop)(data, n_samples=2, num_inference_steps=2)
        assert np.array_equal(filled.mean[~mask], data.voided[~mask]) and np.isfinite(filled.values).all()
        assert filled.std[centre] > 0


# ---- the box of latent voxels, and the edge


def test_the_denoiser_sees_a_crop_around_the_mask_with_the_noise_of_the_whole(encoded, inpainter):
    seen, whole = [], []
    for crop, calls in ((6, seen), (0, whole)):

        def spy(x, t, conditional=None, calls=calls):
            calls.append(x)
            return torch.zeros_like(x[:, :3])

        spy.multiple = 2
        changed(inpainter, crop=crop, denoiser=spy).model.sample(
            encoded, ["a/0"], seed=0, sampler="ddim", num_inference_steps=1
        )
    box = changed(inpainter, crop=6).model.context(encoded)
    assert torch.equal(seen[0], whole[0][(..., *box)]) and seen[0].numel() < whole[0].numel()
    outside = encoded["mask"].clone()
    outside[(..., *box)] = 0
    assert not outside.any()


@pytest.mark.parametrize(("masked", "edge", "multiple", "box"), [
    ((slice(4, 6), slice(0, 2), slice(9, 10)), 4, 1, [(3, 7), (0, 4), (6, 10)]),  # moved into the grid
    ((slice(4, 6), slice(4, 6), slice(4, 5)), 1, 4, [(3, 7), (3, 7), (2, 6)]),  # multiples, the mask in the middle
    ((slice(0, 10), slice(3, 4), slice(3, 4)), 12, 4, [(0, 10), (0, 10), (0, 10)]),  # all there is
    ((slice(2, 8), slice(3, 4), slice(3, 4)), 2, 1, [(1, 9), (2, 5), (2, 5)]),  # a known latent voxel on each side
])  # fmt: skip
def test_the_box_holds_mask_margin_and_crop_within_the_grid(masked, edge, multiple, box):
    latent_mask = np.zeros((10, 10, 10), bool)
    latent_mask[masked] = True
    assert [(s.start, s.stop) for s in context_box(latent_mask, edge=edge, multiple=multiple)] == box


def test_a_callback_receives_whole_latents(encoded, inpainter):
    states = []
    drawn = changed(inpainter, crop=6).model.sample(
        encoded, ["a/0"], seed=0, sampler="ddim", num_inference_steps=2, callback=states.append
    )
    known = (encoded["mask"] == 0).expand_as(encoded["voided"])
    for state in states:
        assert torch.equal(state["x"][0][known], encoded["voided"][known]) and state["x0"].shape == drawn.shape
    assert torch.equal(drawn[0][known], encoded["voided"][known])


def test_the_edge_is_corrected_unless_that_is_off(tmp_path):
    """A denoiser that sees all latent voxels equally too bright is corrected by the voxels around the mask."""
    full, voided, mask = write_head(tmp_path / "head", 155, "LPS")
    data, autoencoder, schedule = load_case(case_of_files(voided, mask)), SpaceToDepth(4), noise_schedule()
    truth = grid_case(load_case(replace(data.case, t1n=full)), 4).target
    brighter = KnowsTheTarget(autoencoder.encode(torch.from_numpy(truth)[None, None]).double() + 0.3, schedule, "noise")
    model = LatentDiffusion(autoencoder, brighter, schedule, LatentSpec(), CPU, "32")
    off = {}
    for reach in (0.0, 1e5):
        inpainter = Inpainter(model, blend_mm=reach)
        off[reach] = np.abs(inpainter(data, num_inference_steps=3).mean - raw(full))[data.mask] / data.scale
    np.testing.assert_allclose(off[0.0], 0.3, atol=1e-4)
    assert off[1e5].max() < 1e-2


def test_memory_bounds_how_many_samples_are_drawn_at_once(encoded, inpainter, monkeypatch):
    values = encoded["mask"].numel() * inpainter.model.denoiser.config["base_width"]
    for fitting, at_once in ((0.5, 1), (2.5, 2), (1e6, model_module.LARGEST_BATCH["cpu"])):
        bytes_in_all = fitting * values * model_module.BYTES_PER_CHANNEL / model_module.MEMORY_FRACTION
        monkeypatch.setattr(model_module, "total_memory", lambda device, total=bytes_in_all: total)
        assert inpainter.model.samples_at_once(encoded) == at_once


# ---- law 4: a batch equals its elements; case and seed determine a sample


@every_sampler
@pytest.mark.parametrize("crop", [0, 6])
def test_a_batch_equals_its_elements_in_any_order(encoded, inpainter, sampler, crop):
    inpainter, names = changed(inpainter, crop=crop), ["a/0", "a/1", "b/0"]
    how = {"seed": 3, "sampler": sampler, "num_inference_steps": 3}
    alone = torch.cat([inpainter.model.sample(encoded, [name], **how) for name in names])
    together = inpainter.model.sample(encoded, names, **how)
    backwards = inpainter.model.sample(encoded, names[::-1], **how).flip(0)
    scale = alone.abs().max().item()
    assert torch.allclose(together, alone, atol=1e-4 * scale) and torch.allclose(backwards, alone, atol=1e-4 * scale)
    assert (alone[0] - alone[1]).abs().max() > 0.1 * scale


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_case_and_seed_determine_a_sample(cases, inpainter, sampler):
    data, how = load_case(cases[0]), {"sampler": sampler, "num_inference_steps": 3}
    torch.manual_seed(0)
    one = inpainter(data, seed=5, **how).samples[0]
    torch.manual_seed(1)
    inpainter(load_case(cases[1]), seed=6, **how)
    assert np.array_equal(one, inpainter(data, seed=5, **how).samples[0])
    assert not np.array_equal(one, inpainter(data, seed=6, **how).samples[0])
    six = inpainter(data, seed=5, n_samples=6, **how)  # more than one batch
    np.testing.assert_allclose(six.samples[0], one, rtol=1e-3, atol=1e-3 * data.scale)
    assert len({values.tobytes() for values in six.values}) == 6


def test_a_file_gives_the_result_of_the_case_in_a_cohort(cases, tiny_model_folder, tmp_path):
    case, output = cases[1], tmp_path / "out.nii.gz"
    maps = {"growth": case.growth, "tissue": case.tissue, "model": tiny_model_folder}
    how = {"n_samples": 2, "seed": 9, "num_inference_steps": 3}
    inpaint(case.t1n_voided, case.mask, output, **maps, **how)
    Inpainter.load(tiny_model_folder)(load_case(case), **how).save(tmp_path / "cohort.nii.gz")
    assert output.read_bytes() == (tmp_path / "cohort.nii.gz").read_bytes()
    assert case_of_files(case.t1n_voided, case.mask).key == case.key


def test_names_of_files_and_the_order_of_voxels_do_not_change_a_sample(cases, inpainter, tmp_path):
    """The noise is a function of the seed and the mask."""
    expected = inpainter(cases[0].to_inpaint(), seed=3, num_inference_steps=2).mean
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", "SRA")))
    back = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("SRA", "LPS")))
    paths = {}
    for role in ("t1n_voided", "mask", "growth", "tissue"):
        paths[role] = tmp_path / f"other-name-{role}.nii.gz"
        nib.save(nib.load(cases[0].files()[role]).as_reoriented(turn), paths[role])
    case = case_of_files(paths.pop("t1n_voided"), paths.pop("mask"), **paths)
    found = inpainter(case, seed=3, num_inference_steps=2).mean
    np.testing.assert_allclose(nib.orientations.apply_orientation(found, back), expected, rtol=1e-5)


def test_the_estimate_is_one_evaluation_at_the_noisiest_step(cases, inpainter, model, tmp_path):
    calls = []
    handle = inpainter.model.denoiser.register_forward_pre_hook(lambda _, given: calls.append(int(given[1][0])))
    found = inpainter.estimate(cases[0].to_inpaint())
    handle.remove()
    assert calls == [inpainter.model.schedule.steps - 1]
    for seed, sampler in ((3, "ddim"), (4, "dpm++2m")):
        other = inpainter(cases[0].to_inpaint(), sampler=sampler, num_inference_steps=1, seed=seed)
        np.testing.assert_allclose(found.values, other.values, rtol=1e-5)
    files = {"growth": cases[0].growth, "tissue": cases[0].tissue, "seed": 3, "estimate": "mean"}
    inpaint(cases[0].t1n_voided, cases[0].mask, tmp_path / "mean.nii.gz", **files, **model)
    np.testing.assert_allclose(read_volume(tmp_path / "mean.nii.gz").voxels, found.mean, atol=0.51)
    with pytest.raises(ConfigError, match=r"^n_samples = 4: allowed: 1 with estimate 'mean'"):
        inpaint(cases[0].t1n_voided, cases[0].mask, tmp_path / "b.nii.gz", estimate="mean", n_samples=4, **model)


def test_noise_is_standard_and_a_function_of_its_name():
    noise = CaseNoise(["a/0", "a/1", "b/0"], 0, (3, 16, 16, 16), CPU)
    start = noise(-1)
    assert abs(start.mean()) < 0.02 and abs(start.std() - 1) < 0.02
    correlation = torch.corrcoef(torch.cat([start.flatten(1), noise(0).flatten(1)]))
    assert (correlation - torch.eye(6)).abs().max() < 0.05
    assert torch.equal(CaseNoise(["b/0"], 0, (3, 16, 16, 16), CPU)(-1)[0], start[2])
    assert not torch.equal(CaseNoise(["b/0"], 1, (3, 16, 16, 16), CPU)(-1)[0], start[2])


@every_sampler
@pytest.mark.parametrize("context", ["composite", "concat"])
def test_known_latent_voxels_are_clean_at_every_step(cases, inpainter, sampler, context):
    data, settings = load_case(cases[0]), LatentSpec(context=context)
    latents = encode_case(grid_case(data, 2), inpainter.model.autoencoder, settings, device=CPU, precision="32")
    known, seen = (latents["mask"] == 0).expand_as(latents["voided"]), []

    def spy(x, t, conditional=None):
        seen.append((int(t[0]), x[0]))
        return torch.tanh(x[:, :3])

    drawn = changed(inpainter, denoiser=spy, spec=settings).model.sample(
        latents, ["a/0"], seed=0, sampler=sampler, num_inference_steps=4
    )
    assert len({t for t, _ in seen}) == 4 and known.any() and not known.all()
    for _, x in seen:
        assert len(x) == (8 if context == "composite" else 12)
        assert torch.equal(x[:3][known], latents["voided"][known])
    assert torch.equal(drawn[0][known], latents["voided"][known])
    if context == "concat":
        assert all(
            torch.equal(x[8:11], latents["voided"]) and torch.equal(x[11:], latents["mask_fraction"]) for _, x in seen
        )


# ---- errors, before anything is loaded or written


@pytest.mark.parametrize(("wrong", "reason"), [
    ({"sampler": "heun"}, "sampler = 'heun': allowed: ddpm, ddim"),
    ({"sampler": "midpoint"}, "'midpoint' given, the model was trained on a variance-preserving.*ddpm, ddim"),
    ({"num_inference_steps": 0}, "num_inference_steps = 0: allowed: integer from 1 to 100,000,000"),
    ({"n_samples": 0}, r"^n_samples = 0: allowed: integer from 1 to 10,000\. Fix: give an allowed value\.$"),
    ({"seed": -1}, "seed = -1"),
    ({"guidance": float("inf")}, "guidance = inf: allowed: finite number from 0"),
    ({"blend_mm": -1.0}, "blend_mm = -1"),
    ({"num_inference_steps": 1001}, "1001 sampling steps given, 1 to 1000 allowed"),
])  # fmt: skip
def test_parameters_out_of_range_are_rejected(pair, tmp_path, model, wrong, reason):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=reason):
        inpaint(*pair, tmp_path / "out.nii.gz", **model | wrong)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("cls", "wrong", "reason"), [
    (Inpainter, {"precision": "fp16"}, "^precision = 'fp16': allowed: auto, 32, bf16, 16"),
    (Inpainter, {"temperature": -3}, "^temperature = -3: allowed: number from 0 to 2"),
    (Inpainter, {"blend_mm": -3}, "^blend_mm = -3: allowed: number from 0 to 1,000"),
    (LatentDiffusion, {"temperature": -3}, "^temperature = -3: allowed: number from 0 to 2"),
])  # fmt: skip
def test_arguments_of_load_are_checked_before_anything_is_read(cls, wrong, reason, monkeypatch):
    monkeypatch.setattr(model_module, "load_model", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(ConfigError, match=reason):
        cls.load(device="cpu", **wrong)


def test_a_sampler_is_checked_before_a_tissue_map_is_made(cases, tiny_model_folder, monkeypatch):
    model = Inpainter.load(tiny_model_folder, device="cpu")
    monkeypatch.setattr(Inpainter, "_with_map", lambda *_: pytest.fail("a map was made"))
    for case in (cases[0], load_case(cases[0])):
        with pytest.raises(ConfigError, match="'euler' given, the model was trained on a variance-preserving"):
            model(case, sampler="euler", make_missing=True)


@pytest.mark.parametrize("output", ["missing/out.nii.gz", "out.png", "folder.nii.gz", "out"])
def test_an_output_that_cannot_be_written_is_rejected_first(pair, tmp_path, model, monkeypatch, output):
    (tmp_path / "folder.nii.gz").mkdir()
    for module, name in ((single_file, "load_case"), (model_module, "load_model")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(InputError, match=r"must end in|folder does not exist|is a directory"):
        inpaint(*pair, tmp_path / output, **model)


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_is_never_overwritten(pair, tmp_path, model, which):
    before = pair[which].read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(pair[which])
    for output in (pair[which], tmp_path / "." / pair[which].name, tmp_path / "link.nii.gz"):
        with pytest.raises(InputError, match="is one of the inputs"):
            inpaint(*pair, output, **model)
    assert pair[which].read_bytes() == before


def test_a_failure_on_the_way_leaves_nothing_behind(pair, tmp_path, model, monkeypatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(CaseGrid, "values", lambda self, volume: np.full(self.data.mask.sum(), np.nan))
    with pytest.raises(InputError, match="inpainted voxels are not finite"):
        inpaint(*pair, tmp_path / "out.nii.gz", n_samples=2, **model)
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_model_the_pretrained_weights_are_used(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(model_module, "PRETRAINED", tiny_model_folder)
    found, named = Inpainter.load(device="cpu"), Inpainter.load(tiny_model_folder, device="cpu")
    assert found.model.denoiser.folder_config["sha256"] == named.model.denoiser.folder_config["sha256"]


# ---- more laws


def test_slope_and_intercept_are_kept(pair, tmp_path, model):
    image = nib.load(pair[0])
    stored = nib.Nifti1Image(np.asanyarray(image.dataobj) // 2, image.affine)
    stored.header.set_slope_inter(2.0, 0.0)
    content = bytearray(stored.to_bytes())
    content[112:120] = np.array([2.0, 0.0], "<f4").tobytes()  # nibabel does not write a slope of its own accord
    given = tmp_path / "sloped" / pair[0].name  # of the same name, so of the same noise
    given.parent.mkdir()
    given.write_bytes(gzip.compress(content))
    inpaint(given, pair[1], tmp_path / "out.nii", **model)
    before, after, mask = read_volume(given), read_volume(tmp_path / "out.nii"), raw(pair[1]) > 0
    assert (before.slope, after.slope) == (2.0, 2.0) and before.preamble == after.preamble
    assert np.array_equal(after.raw[~mask], before.raw[~mask])
    inpaint(*pair, tmp_path / "plain.nii", **model)
    plain = read_volume(tmp_path / "plain.nii").voxels[mask]
    assert np.abs(after.voxels[mask] - plain).max() <= 0.05 * plain.max()  # source units, not stored ones


def test_samples_are_written_only_on_request(pair, tmp_path, model):
    before = set(tmp_path.iterdir())
    written = inpaint(*pair, tmp_path / "OUT.NII.GZ", n_samples=2, **model)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {path.name for path in written}
    assert [path.name for path in written] == ["OUT.NII.GZ", "OUT-std.NII.GZ", "OUT-nearest.NII.GZ"]


def test_one_sample_is_its_own_mean(cases, inpainter):
    filled = inpainter(load_case(cases[0]), n_samples=1, num_inference_steps=2)
    assert np.array_equal(filled.mean, filled.samples[0]) and not filled.std.any()


def test_a_case_with_its_target_gives_the_result_of_one_without(cases, inpainter):
    data = load_case(cases[0])
    blind = replace(data, target=None, healthy=None, unhealthy=None)
    assert np.array_equal(inpainter(data, num_inference_steps=2).mean, inpainter(blind, num_inference_steps=2).mean)


def test_a_file_with_a_fourth_axis_of_one_keeps_it(pair, tmp_path, model):
    for path in pair:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[..., None], image.affine), path)
    inpaint(*pair, tmp_path / "out.nii.gz", **model)
    before, after = (nib.load(path) for path in (pair[0], tmp_path / "out.nii.gz"))
    assert after.shape == before.shape and after.shape[3:] == (1,)
    assert read_volume(tmp_path / "out.nii.gz").preamble == read_volume(pair[0]).preamble


def test_maps_are_read_and_matter(cases, model, tmp_path):
    case, results = cases[0], []
    for maps in ({}, {"growth": case.growth}, {"tissue": case.tissue}):
        inpaint(case.t1n_voided, case.mask, tmp_path / "out.nii.gz", **maps, **model)
        results.append((tmp_path / "out.nii.gz").read_bytes())
    assert len(set(results)) == 3


def test_a_deviation_that_cannot_be_written_is_rejected_before_the_mean_is(pair, tmp_path, model):
    (tmp_path / "out-std.nii.gz").mkdir()
    with pytest.raises(InputError, match=r"out-std\.nii\.gz: is a directory"):
        inpaint(*pair, tmp_path / "out.nii.gz", n_samples=2, **model)
    assert not (tmp_path / "out.nii.gz").exists()


def test_an_input_is_not_overwritten_by_a_file_next_to_the_output(pair, tmp_path, model):
    given = pair[0].rename(tmp_path / "out-sample-0001.nii.gz")
    with pytest.raises(InputError, match=r"out-sample-0001\.nii\.gz: is one of the inputs"):
        inpaint(given, pair[1], tmp_path / "out.nii.gz", n_samples=2, write_samples=True, **model)


def test_inputs_that_do_not_belong_together_are_rejected(pair, tmp_path, model):
    write_map(tmp_path / "small.nii.gz", np.ones((4, 4, 4), np.uint8), np.eye(4))
    with pytest.raises(InputError, match="resample it onto the image's grid"):
        inpaint(pair[0], tmp_path / "small.nii.gz", tmp_path / "out.nii.gz", **model)
    assert not (tmp_path / "out.nii.gz").exists()


def test_another_voxel_size_than_the_models_is_reported(pair, tmp_path, model, caplog):
    for path in pair:
        volume = read_volume(path)
        write_map(path, volume.raw, volume.affine * np.array([[0.5], [0.5], [0.5], [1]]))
    with caplog.at_level(logging.WARNING):
        inpaint(*pair, tmp_path / "out.nii.gz", **model)
    assert "voxels of (4.0, 4.0, 4.0) mm; inpainted at the model's 8 mm" in caplog.text


@pytest.mark.parametrize(("name", "key"), [
    ("BraTS2021_00000-t1n-voided-0002.nii.gz", "BraTS2021_00000-0002"),
    ("BraTS-GLI-00000-000-t1n-voided.nii.gz", "BraTS-GLI-00000-000"),
    ("scan.NII", "scan"),
])  # fmt: skip
def test_a_file_names_its_case_as_the_layouts_do(name, key):
    assert case_of_files(f"folder/{name}", "mask.nii.gz").key == key


# ---- files of an earlier result


def test_one_sample_over_several_leaves_none_of_their_files(pair, tmp_path, model, caplog):
    output = tmp_path / "a[1].nii.gz"
    others = [tmp_path / name for name in ("a1-std.nii.gz", "a[1]-sample-left.nii.gz", "a[1]-dseg.nii.gz", "a[1].html")]
    for path in others:
        path.write_text("of somebody else")
    several = inpaint(*pair, output, n_samples=2, write_samples=True, **model)
    assert len(several) == 5 and not caplog.records
    assert inpaint(*pair, output, **model) == [output]
    assert [path for path in several if path.exists()] == [output] and all(path.exists() for path in others)
    (record,) = caplog.records
    names = ", ".join(path.name for path in several[1:])
    assert record.getMessage() == f"a[1].nii.gz: removed {names} of an earlier result"


def test_summary_and_page_of_an_earlier_result_are_removed_with_their_labels(pair, tmp_path, model):
    output = tmp_path / "out.nii.gz"
    written = inpaint(*pair, output, summary=True, page=True, **model)
    (tmp_path / "out-dseg.nii.gz").write_bytes(output.read_bytes())
    assert {path.name for path in written} >= {"out-summary.json", "out.html"}
    inpaint(*pair, output, **model)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.nii.gz"]


def test_an_input_is_never_removed(pair, tmp_path, model):
    scan, mask = tmp_path / "out-std.nii.gz", tmp_path / "out-nearest.nii.gz"
    scan.write_bytes(pair[0].read_bytes())
    mask.write_bytes(pair[1].read_bytes())
    inpaint(scan, mask, tmp_path / "out.nii.gz", **model)
    assert scan.read_bytes() == pair[0].read_bytes() and mask.read_bytes() == pair[1].read_bytes()


# ---- the bias field


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A patient with voxels of 4 mm, whose white matter is more than one voxel thick."""
    folder = tmp_path_factory.mktemp("bias_field")
    make_synthetic_cohort(folder, 1, first=0, spacing_mm=4.0, masks=1)
    return load_case(find_cases(folder / "data", conditioning_dir=folder / "conditioning_data")[0])


def gained(data):
    """The same scan with another bias field, and the ratio of the two in its voxels."""
    gain = np.broadcast_to(np.exp(0.3 * np.linspace(-1, 1, data.mask.shape[1]))[:, None], data.mask.shape)
    return replace(data, target=data.target * gain, voided=data.voided * gain), gain


def test_a_result_has_the_bias_field_of_its_scan(scan):
    other, gain = gained(scan)
    flat, again = (CaseGrid(each, 4.0, 2, 0.0, bias_field_correction=True) for each in (scan, other))
    ratio = (again.to_see.voided / np.maximum(flat.to_see.voided, 1e-6))[flat.to_see.voided > 0.1]
    assert np.ptp(ratio) < 0.1 < np.ptp(gain) / 3
    for each, grid in ((scan, flat), (other, again)):
        truth = grid_case(each, 2, bias_field_correction=True).target
        np.testing.assert_allclose(grid.values(truth), np.maximum(each.target[each.mask], 0), rtol=1e-4, atol=1e-3)


def test_the_bias_field_of_a_scan_changes_its_result_by_itself_alone(scan, inpainter):
    spec = inpainter.model.spec.model_copy(update={"bias_field_correction": True})
    corrected = replace(inpainter, model=replace(inpainter.model, spec=spec))
    other, gain = gained(scan)

    def difference(model):
        plain, changed = (model.estimate(each).values[0] for each in (scan, other))
        return np.abs(changed / gain[scan.mask] - plain).mean() / scan.scale

    assert difference(corrected) < difference(inpainter) / 3
