"""Bad inputs, second part of the catalogue: the type of the voxels, the grid, the values."""

from collections.abc import Callable

import nibabel as nib
import numpy as np
from bad_places import Place, Row
from scipy import ndimage

BRAIN_VOXEL = (20, 20, 12)  # in the brain of BRATS_SHAPE and outside the mask


# ---- the voxels' type and the grid


def _saved(array: Callable[[Place], np.ndarray], **save_kwargs: object) -> Callable[[Place], object]:
    return lambda place: place.save(array(place), place.P, **save_kwargs)


def _saved_mask(array: Callable[[Place], np.ndarray]) -> Callable[[Place], object]:
    return lambda place: place.save(array(place), place.K)


def _rgb(place: Place) -> np.ndarray:
    colours = np.zeros(place.x.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = place.x // 4
    return colours


def _beyond_float32(place: Place) -> np.ndarray:
    voxels = place.x.astype(np.int64)
    voxels[BRAIN_VOXEL] = 2**24 + 1
    return voxels


def _canonical(place: Place) -> None:
    """Both files in RAS order, each voxel where it was in the world."""
    turned = [nib.as_closest_canonical(nib.Nifti1Image(array, place.A)) for array in (place.x, place.m)]
    place.x, place.m = (np.asanyarray(image.dataobj) for image in turned)
    place.A = turned[0].affine
    place.save(place.x, place.P)
    place.save(place.m, place.K)


def _mask_flipped_in_its_header(place: Place) -> None:
    affine = place.A.copy()
    affine[:3, 3] += affine[:3, 0] * (place.m.shape[0] - 1)
    affine[:3, 0] *= -1
    place.save(np.ascontiguousarray(place.m[::-1]), place.K, affine=affine)


def _mask_permuted(place: Place) -> None:
    """Of the same shape, since x and y are of one length: by its grid alone nobody can see it."""
    place.m = np.ascontiguousarray(place.m.transpose(1, 0, 2))
    place.save(place.m, place.K)


def _mask_moved(place: Place) -> None:
    affine = place.A.copy()
    affine[:3, 3] += 10
    place.save(place.m, place.K, affine=affine)


def _with_skull(place: Place) -> np.ndarray:
    skull = 80 + np.arange(place.x.size, dtype=np.int16).reshape(place.x.shape) % 20
    place.x = np.where(place.head.brain, place.x, skull)
    return place.x


def _drawn(shape: tuple[int, ...], spacing: tuple[float, ...] = (8.0, 8.0, 8.0)) -> Callable[[Place], object]:
    return lambda place: place.draw(shape, spacing)


BIG_ENDIAN = nib.Nifti1Header(endianness=">")
NOT_BRATS = r"not BraTS's"
GRIDS = {
    "RGB24": Row(_saved(_rgb), "reject", r"RGB"),
    "complex64": Row(_saved(lambda p: p.x.astype(np.complex64)), "reject", r"complex64"),
    "int64": Row(_saved(lambda p: p.x.astype(np.int64)), "accept"),
    "uint64": Row(_saved(lambda p: p.x.astype(np.uint64)), "accept"),
    "int64 beyond float32": Row(_saved(_beyond_float32), "reject", r"float32"),
    "float64": Row(_saved(lambda p: p.x.astype(np.float64)), "accept"),
    "big-endian": Row(_saved(lambda p: p.x.astype(">i2"), header=BIG_ENDIAN), "accept"),
    "NIfTI-2": Row(_saved(lambda p: p.x, kind=nib.Nifti2Image), "accept"),
    "4D, 3 volumes": Row(_saved(lambda p: np.stack([p.x] * 3, -1)), "reject", r"3 volumes, need 1"),
    "2D slice": Row(_saved(lambda p: p.x[:, :, 10]), "reject", r"\(30, 30\)"),
    "5D of one volume": Row(_saved(lambda p: p.x[..., None, None]), "accept"),
    "odd shape": Row(_drawn((47, 39, 31)), "warn", NOT_BRATS),
    "smaller than a patch": Row(_drawn((16, 16, 16)), "reject or warn", NOT_BRATS),
    "not BraTS's field of view": Row(_drawn((32, 32, 24)), "warn", NOT_BRATS),
    "skull on": Row(_saved(_with_skull), "warn", r"not skull-stripped"),
    "anisotropic": Row(_drawn((48, 48, 7), (5.0, 5.0, 25.0)), "warn", r"anisotropic|\b5\D+5\D+25\b"),
    "mask shape differs": Row(
        _saved_mask(lambda p: p.m[:-2]),
        "reject",
        r"-mask\.nii\.gz: .*\(28, 30, 20\).*-t1n-voided\.nii\.gz.*\(30, 30, 20\)",
    ),
    "mask axes permuted": Row(_mask_permuted, "reject or warn", r"\b\d+ .*not void"),
    "mask axes permuted, to train on": Row(_mask_permuted, "reject", r"\b\d+ ", complete=True, filled="reject or warn"),
    "mask 4D of one volume": Row(_saved_mask(lambda p: p.m[..., None]), "accept"),
    "mask shifted 10 mm": Row(_mask_moved, "reject", r"17\.3 mm"),
    "mask flipped, as its header says": Row(_mask_flipped_in_its_header, "accept or reject", r"-mask\.nii\.gz: "),
    "mask of another spacing": Row(
        lambda p: p.save(p.m, p.K, affine=p.A @ np.diag([0.25, 0.25, 0.25, 1])), "reject", r"\d mm"
    ),
    "RAS copy": Row(_canonical, "accept"),
}


# ---- the voxels' values


def _valued(change: Callable[[Place], np.ndarray]) -> Callable[[Place], object]:
    """The image with other values, which are then what it holds."""

    def build(place: Place) -> None:
        place.x = change(place)
        place.save(place.x, place.P)

    return build


def _with(value: float, dtype: type) -> Callable[[Place], np.ndarray]:
    def change(place: Place) -> np.ndarray:
        voxels = place.x.astype(dtype)
        voxels[BRAIN_VOXEL] = value
        return voxels

    return change


def _background(value: float, dtype: type) -> Callable[[Place], np.ndarray]:
    return lambda place: np.where(place.head.brain, place.x, value).astype(dtype)


def _labelled(*labels: int) -> Callable[[Place], object]:
    """A tumour segmentation in place of the mask: labels in turn along z."""
    return _saved_mask(lambda p: p.m * np.array(labels, np.uint8)[np.arange(p.m.shape[2]) % len(labels)])


def _interpolated(place: Place) -> np.ndarray:
    return ndimage.zoom(place.m[::2, ::2, ::2].astype(np.float32), 2, order=1)


def _mask_with_nan(place: Place) -> np.ndarray:
    mask = place.m.astype(np.float32)
    mask[0, 0, 0] = np.nan
    return mask


def _marked(choose: Callable[[np.ndarray], np.ndarray]) -> Callable[[Place], object]:
    """Another mask, chosen from the brain, void in the image."""

    def build(place: Place) -> None:
        mask = choose(place.head.brain)
        place.mark(mask, mask & False)

    return build


def _at(*index: int | slice) -> Callable[[np.ndarray], np.ndarray]:
    def choose(brain: np.ndarray) -> np.ndarray:
        mask = np.zeros_like(brain)
        mask[index] = True
        return mask

    return choose


def _specks(brain: np.ndarray) -> np.ndarray:
    return brain & (np.random.default_rng(0).random(brain.shape) < 0.03)


def _healthy_on_tumour(place: Place) -> None:
    place.save(place.head.unhealthy.astype(np.uint8), place.paths["mask-healthy"])


def _healthy_too_small(place: Place) -> None:
    place.save((place.head.healthy & _at(slice(0, 12))(place.m > 0)).astype(np.uint8), place.paths["mask-healthy"])


OUTSIDE = _marked(_at(slice(0, 4), slice(0, 4), slice(0, 4)))
LABELS = ("--mask-labels", "1,2,4")
VALUES = {
    "not void under the mask": Row(_valued(lambda p: p.head.t1n), "warn", r"\b102 of 102 voxels.*not void"),
    "not void under the mask, to train on": Row(
        _valued(lambda p: p.head.t1n), "reject", r"\b102 of 102 voxels.*not void", complete=True, filled="warn"
    ),
    "one NaN voxel": Row(
        _valued(_with(np.nan, np.float32)), "reject", r"\b1 voxels?\b.*\(20, 20, 12\)", options=("--nan-as-zero",)
    ),
    "NaN background": Row(
        _valued(_background(np.nan, np.float32)),
        "reject",
        r"\b\d{5} voxels\b.*\(0, 0, 0\).*[Ss]et the background to 0",
        options=("--nan-as-zero",),
    ),
    "all zero": Row(_valued(lambda p: p.x * 0), "reject", r"image is empty"),
    "constant": Row(_valued(lambda p: p.x * 0 + 7), "reject", r"no contrast \(min = max = 7\)"),
    "negative background": Row(_valued(_background(-1024, np.int16)), "warn", r"the background is -1024, not 0"),
    "one outlier 1e30": Row(_valued(_with(1e30, np.float32)), "warn", r"1e\+30"),
    "uint16 up to 38580": Row(_valued(lambda p: p.x.astype(np.uint16) * 60), "accept"),
    "z-scored": Row(
        _valued(lambda p: ((p.x - p.x.mean()) / p.x.std()).astype(np.float32)),
        "warn",
        r"the background is -0\.\d+, not 0",
    ),
    "values of [0, 1]": Row(_valued(lambda p: (p.x / p.x.max()).astype(np.float32)), "accept"),
    "empty mask": Row(_saved_mask(lambda p: p.m * 0), "reject or warn", r"mask is empty"),
    "empty mask, to train on": Row(
        _marked(lambda brain: brain & False), "reject", r"mask is empty", complete=True, filled="reject or warn"
    ),
    "mask of 0 and 255": Row(_saved_mask(lambda p: p.m * np.uint8(255)), "warn", r"\b255 read as 1"),
    "segmentation as mask": Row(
        _labelled(1, 2, 4), "reject", r"1, 2, 4\b.*segmentation.*--mask-labels", options=LABELS
    ),
    "segmentation of 2023 as mask": Row(
        _labelled(1, 2, 3), "reject", r"1, 2, 3\b.*segmentation.*--mask-labels", options=("--mask-labels", "1,2,3")
    ),
    "mask interpolated": Row(_saved_mask(_interpolated), "reject", r"not binary.*looks interpolated"),
    "NaN in mask": Row(_saved_mask(_mask_with_nan), "reject", r"-mask\.nii\.gz: 1 voxels?\b.*\(0, 0, 0\)"),
    "negative mask": Row(_saved_mask(lambda p: -p.m.astype(np.int16)), "reject", r"not binary.*-1\b"),
    "mask outside the head": Row(OUTSIDE, "warn", r"\b0 ?%"),
    "mask outside the head, to train on": Row(OUTSIDE, "reject", r"\b0 ?%|no brain", complete=True, filled="warn"),
    "mask of one voxel": Row(_marked(_at(*BRAIN_VOXEL)), "accept"),
    "mask of specks": Row(_marked(_specks), "accept"),
    "mask touching the border": Row(_marked(_at(slice(None), slice(14, 16), slice(8, 10))), "accept"),
    "healthy and unhealthy overlap": Row(_healthy_on_tumour, "reject", r"\b50 voxels", complete=True, filled="accept"),
    "mask is not healthy or unhealthy": Row(
        _healthy_too_small, "reject", r"\b\d+ voxels", complete=True, filled="accept"
    ),
}
