"""Fresh training samples: without randomness they are the encodings of the case; image, mask and maps move together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lib.anatomy import contralateral
from ldm_lib.anatomy.appearance import RANGES
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion import fresh_samples as module
from ldm_lib.diffusion import scan as scan_module
from ldm_lib.diffusion.fresh_samples import RIM, Scan, draw, fresh_samples
from ldm_lib.diffusion.latents import LatentSpec, encode_case
from ldm_lib.diffusion.scan import TISSUE_BITS, UNHEALTHY
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box
from ldm_lib.model_io import load_model

CROP, FACTOR = 6, 2
SPEC = LatentSpec(context="initial_estimate", mask_dilation=0)


@pytest.fixture(scope="module")
def autoencoder(tiny_autoencoder_folder):
    return load_model(tiny_autoencoder_folder, Autoencoder)


@pytest.fixture(scope="module")
def linear():
    """A linear codec of the same factor: the latents of a box are those of the whole volume there."""
    return Autoencoder.of(channels=(8, 8), latent_channels=4, blocks=1, learned="none", spacing_mm=8.0).eval()


def sources_of(cases, autoencoder, spec=SPEC, seed=0):
    return fresh_samples(cases[:2], autoencoder, spec, crop=CROP, seed=seed)


@pytest.fixture
def still(monkeypatch):
    """No randomness but the place of the box."""
    values = {"DEGREES": 0, "SCALE": 0, "WARPS_MM": ((44.0, 0.0),), "MIRRORED": 0, "WHOLE": 1, "LESION": 1}
    for name, value in (values | {"PLANE_DEGREES": 0, "PLANE_MM": 0}).items():
        monkeypatch.setattr(module, name, value)
    plain = replace(RANGES, own_contrast=1, thin=1, in_plane_mm=(0, 0), gain=(0, 0), noise=(0, 0), gamma=(1, 1))
    monkeypatch.setattr(module, "RANGES", plain)


def exactly(cases, linear, spec, monkeypatch, plane=None):
    """A draw without randomness, and the encoding of the case at the same latent voxels; both by name.

    The box is around a voxel for which it lies on whole blocks of voxels; a white matter of 1 leaves intensities alone.
    """
    monkeypatch.setattr(module, "_scale", lambda target, mask: torch.ones(1, 1, 1, 1, 1))
    monkeypatch.setattr(module, "REACH", 0)
    case = load_case(cases[0])
    source = replace(sources_of(cases, linear)[0], spec=spec)
    exact = encode_case(grid_case(case, FACTOR), linear, spec, device=torch.device("cpu"), precision="32")
    kept = np.any([case.target > 0, case.tissue > 0, case.scored, load_case(cases[1]).scored], axis=0)
    corner = np.array([side.start for side in bounding_box(kept, 2)])
    half = (CROP // 2 + RIM) * FACTOR
    middle = np.argwhere(case.scored).mean(axis=0) // FACTOR * FACTOR
    start = np.clip(middle.astype(int) - half, 0, np.array(case.scored.shape) - 2 * half)
    centre = start + half - corner
    scan = replace(source.scan, means=(0.2, 0.5, 1.0), centres=(centre[None],) * 2)
    if plane is not None:
        moved = plane.copy()
        moved[:3, 3] += plane[:3, :3] @ corner - corner
        scan = replace(scan, reflection=moved)
    box = (slice(None), *(slice(k, k + CROP) for k in start // FACTOR + RIM))
    return replace(source, scan=scan)[0], {name: tensor[box] for name, tensor in exact.items()}


def test_without_randomness_a_draw_is_the_encoding_of_the_case_around_a_voxel_of_its_mask(
    cases, linear, still, monkeypatch
):
    found, exact = exactly(cases, linear, LatentSpec(context="composite", mask_dilation=0), monkeypatch)
    assert found["mask"].any() and found["conditioning"][1:].any()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, exact[name], atol=5e-3, rtol=0, msg=lambda text, name=name: f"{name} {text}")


def test_without_randomness_the_other_hemisphere_is_that_of_the_case(cases, linear, still, monkeypatch):
    """Compared where both are known: an encoding shows it near the mask only."""
    plane = np.diag([-1.0, 1, 1, 1])
    plane[0, 3] = 31
    monkeypatch.setattr(contralateral, "midsagittal_reflection", lambda *_, **__: plane)
    spec = SPEC.model_copy(update={"contralateral": True})
    found, exact = exactly(cases, linear, spec, monkeypatch, plane)
    known = (found["contralateral_known"] == 1) & (exact["contralateral_known"] == 1)
    assert known.sum() > 20 and found["mask"][known].any()
    drawn, own = (each["contralateral"] + each["initial_estimate"] for each in (found, exact))
    torch.testing.assert_close(drawn[:, known[0]], own[:, known[0]], atol=5e-3, rtol=0)
    assert (own - exact["initial_estimate"])[:, known[0]].abs().max() > 0.1, "they differ"


def test_a_draw_is_a_function_of_seed_case_and_number(cases, autoencoder):
    first, second = sources_of(cases, autoencoder)
    a, b = first[3], sources_of(cases, autoencoder)[0][3]
    assert all(torch.equal(a[name], b[name]) for name in a)
    for other in (first[4], second[3], sources_of(cases, autoencoder, seed=1)[0][3]):
        assert not torch.equal(a["target"], other["target"])


def test_the_voxel_that_a_box_is_drawn_around_stays_in_it_however_strong_the_warp(cases, autoencoder, monkeypatch):
    """Within the rounding of its place to a voxel of the box, which the scale and the rotation change."""
    monkeypatch.setattr(module, "WARPS_MM", ((44.0, 40.0), (20.0, 10.0)))
    source, mm = sources_of(cases, autoencoder)[0], autoencoder.spacing_mm
    voxel = source.scan.centres[0][7]
    one = replace(source, scan=replace(source.scan, centres=(voxel[None],) * 2))
    for number in range(20):
        box = module.Box.draw(one, one.rng(number), (CROP + 2 * RIM) * FACTOR, mm)
        inner = box.positions[:, *(slice(RIM * FACTOR, -RIM * FACTOR),) * 3]
        from_voxel = (inner - torch.from_numpy(voxel).view(3, 1, 1, 1)).norm(dim=0)
        assert from_voxel.min() <= 0.5 * 3**0.5 * np.exp(module.SCALE) + 1e-6


def test_a_batch_is_its_samples(cases, autoencoder):
    sources = sources_of(cases, autoencoder)
    batch = draw(sources, [5, 9])
    for source, number, found in zip(sources, [5, 9], batch, strict=True):
        for name, tensor in source[number].items():
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-4)


SPECS = [LatentSpec(context=context) for context in ("composite", "concat", "initial_estimate")]


@pytest.mark.parametrize("spec", [*SPECS, LatentSpec(context="initial_estimate", contralateral=True)], ids=str)
def test_a_draw_has_the_parts_and_shapes_of_an_encoding(cases, autoencoder, spec):
    exact = encode_case(
        grid_case(load_case(cases[0]), FACTOR), autoencoder, spec, device=torch.device("cpu"), precision="32"
    )
    found = sources_of(cases, autoencoder, spec)[0][0]
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.shape == (len(exact[name]), *[CROP] * 3) and tensor.isfinite().all() and not tensor.is_cuda


def test_image_mask_and_tissue_map_move_together(cases, linear, monkeypatch):
    """A scan whose intensities are its labels, and whose tissue map too, stays so under every warp."""
    monkeypatch.setattr(
        module,
        "RANGES",
        replace(RANGES, own_contrast=1, thin=1, in_plane_mm=(0, 0), gain=(0, 0), noise=(0, 0), gamma=(1, 1)),
    )
    data = load_case(cases[0])
    labels = data.tissue.astype(np.float32)
    scan = Scan.of([replace(data, target=labels * data.scale)], SPEC)
    source = replace(sources_of(cases, linear)[0], scan=scan)
    kept = {}
    monkeypatch.setattr(module, "_latents", lambda _, __, drawn: kept.update(vars(drawn)) or {})
    inside = 0
    for number in range(6):
        draw([source], [number])
        values, codes = kept["target"], kept["codes"] & 3
        unit = values[codes == 3].median() / 3
        inner = torch.nn.functional.max_pool3d(codes.float(), 3, 1, 1) == -torch.nn.functional.max_pool3d(
            -codes.float(), 3, 1, 1
        )
        inside += int((codes > 0)[inner].sum())
        agrees = (values - unit * codes).abs()[inner] < 0.03
        assert agrees.float().mean() > 0.99, "but where a thin part lies between the voxels"
    assert inside > 10


def test_masks_are_within_what_was_hidden_from_the_registration_and_vary(cases, autoencoder, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "_latents", lambda _, __, drawn: kept.append((drawn.mask, drawn.codes)) or {})
    for source in sources_of(cases, autoencoder):
        for number in range(30):
            draw([source], [number])
    hidden = [(codes >= 2 * module.BRAIN * 2) for _, codes in kept]
    assert all(mask.any() and not (mask & ~inside).any() for (mask, _), inside in zip(kept, hidden, strict=True))
    assert len({mask.numpy().tobytes() for mask, _ in kept}) > 55, "of 60"
    sizes = np.array([int(mask.sum()) for mask, _ in kept])
    assert sizes.max() > 3 * sizes.min()


def test_left_and_right_are_drawn_equally_often(cases, autoencoder, still, monkeypatch):
    monkeypatch.setattr(module, "MIRRORED", 0.5)
    (source, _) = sources_of(cases, autoencoder)
    plain = [source[k]["mask_fraction"] for k in range(40)]
    monkeypatch.setattr(module, "MIRRORED", 0)
    same = [bool(torch.equal(source[k]["mask_fraction"], seen)) for k, seen in enumerate(plain)]
    assert 8 <= sum(same) <= 32


def test_scans_of_another_voxel_size_and_too_many_masks_are_rejected(cases, linear):
    fine = Autoencoder.of(channels=(8, 8), latent_channels=4, blocks=1, learned="none", spacing_mm=1.0)
    with pytest.raises(InputError, match="has voxels of 8x8x8 mm"):
        sources_of(cases, fine)
    with pytest.raises(InputError, match="11 masks, at most 10 are supported"):
        fresh_samples([cases[0]] * 11, linear, SPEC, crop=CROP, seed=0)


def test_draws_are_made_from_the_scan_without_its_bias_field(cases, linear, monkeypatch):
    """The field is that of the whole scan, whose white matter is fitted without the lesion."""
    fitted = []

    def field(image, white, *, spacing_mm):
        fitted.append(white)
        return np.full(image.shape, 2, np.float32)

    monkeypatch.setattr(scan_module, "bias_field", field)
    corrected = SPEC.model_copy(update={"bias_field_correction": True})
    plain, flat = (sources_of(cases, linear, spec)[0].scan for spec in (SPEC, corrected))
    torch.testing.assert_close(flat.image.float(), plain.image.float() / 2, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(flat.means, np.array(plain.means) / 2, rtol=0.01)
    (white,) = fitted
    codes = plain.codes.numpy()
    np.testing.assert_array_equal(white, ((codes & TISSUE_BITS) == 3) & ((codes & UNHEALTHY) == 0))
