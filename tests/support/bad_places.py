"""A good little case, and the tools that spoil it: what the catalogue of bad inputs is written with.

The case is BraTS's field of view in 8 mm voxels: an ellipsoid of smooth texture with two masks, all else exactly 0.
Everything is a function of the case's id, so that two cases never share their voxels.
"""

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

IMAGE, MASK = "t1n-voided", "mask"
TO_FILL = (IMAGE, MASK)
COMPLETE = ("t1n", IMAGE, MASK, "mask-healthy", "mask-unhealthy")
BRATS_SHAPE, BRATS_SPACING = (30, 30, 20), (8.0, 8.0, 8.0)  # 240 x 240 x 160 mm: 155 mm and a part of a voxel
BRAIN_CENTRE_MM, BRAIN_RADII_MM = np.array([120.0, 126.0, 76.0]), np.array([68.0, 85.0, 62.0])
STATUS = {"reject": "refused", "warn": "warning", "accept": "ok"}
WORD = {"refused": "ERROR", "warning": "WARNING", "ok": "OK"}
BRIGHTEST = 643  # times 60 is 38,580: beyond int16, within uint16


@dataclass(frozen=True)
class Head:
    """One small head: int16 voxels (x, y, z), 0 outside the brain, and bool volumes of the same shape."""

    t1n: np.ndarray
    brain: np.ndarray
    healthy: np.ndarray
    unhealthy: np.ndarray


@lru_cache(maxsize=8)
def head_of(identity: str, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Head:
    """The head of a case id on a grid; where BraTS's field of view does not fit it sits in the middle, smaller."""
    extent = np.array(shape) * spacing
    fits = np.all(extent >= np.array(BRATS_SHAPE) * BRATS_SPACING)
    centre, radii = (
        (BRAIN_CENTRE_MM, BRAIN_RADII_MM) if fits else (extent / 2, np.minimum(BRAIN_RADII_MM, extent / 2.6))
    )
    position = (np.indices(shape).T + 0.5) * spacing - centre
    brain = (((position / radii) ** 2).sum(-1) < 1).T

    def ball(place: tuple[float, ...]) -> np.ndarray:
        return (((position - radii * place) ** 2).sum(-1) < (0.3 * radii.min()) ** 2).T

    healthy, unhealthy = ball((-0.45, 0.3, 0.1)), ball((0.1, -0.45, -0.1))
    rng = np.random.default_rng(zlib.crc32(identity.encode()))
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), 1.2)
    values = 400 + 110 * texture / texture.std()
    brightest_seen = values[brain & ~healthy & ~unhealthy].max()
    t1n = np.where(brain, np.clip(np.rint(values * BRIGHTEST / brightest_seen), 60, BRIGHTEST), 0)
    return Head(t1n.astype(np.int16), brain, healthy, unhealthy)


def affine_of(spacing: tuple[float, ...]) -> np.ndarray:
    """Axes towards left, posterior and superior, the field of view's corner where BraTS has it."""
    shift = (np.array(spacing) - 1) / 2
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -shift[0], 239 - shift[1], shift[2]
    return affine


def packed(content: bytes, level: int = 1) -> bytes:
    """Gzip without a time, so that the same case is the same bytes."""
    return gzip.compress(content, level, mtime=0)


class Place:
    """One case folder of the challenge's layout, and what its two files must be read as.

    Attributes:
        id: name of the folder; a row may rename it.
        P, K: paths of the voided image and of the mask; a row may move them.
        x, m, A: what must be read from them: voxels in scaled units, mask (both x, y, z) and affine.
        head: what they were made from.
    """

    def __init__(self, root: Path, identity: str = "BraTS-GLI-00001-000", *, complete: bool = False) -> None:
        self.root, self.id, self.complete = Path(root), identity, complete
        self.folder.mkdir(parents=True)
        self.paths = {role: self.folder / f"{identity}-{role}.nii.gz" for role in (COMPLETE if complete else TO_FILL)}
        self.draw(BRATS_SHAPE, BRATS_SPACING)

    @property
    def folder(self) -> Path:
        return self.root / self.id

    @property
    def P(self) -> Path:  # noqa: N802 - as the table calls it
        return self.paths[IMAGE]

    @property
    def K(self) -> Path:  # noqa: N802 - as the table calls it
        return self.paths[MASK]

    @property
    def raw(self) -> bytes:
        """The unpacked bytes of P."""
        return gzip.decompress(self.P.read_bytes())

    def draw(self, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
        """Write all files of the case on a grid."""
        self.head, self.A = head_of(self.id, shape, spacing), affine_of(spacing)
        self.mark(self.head.healthy, self.head.unhealthy)

    def mark(self, healthy: np.ndarray, unhealthy: np.ndarray) -> None:
        """Write all files of the case with another mask, the image voided under it."""
        mask = healthy | unhealthy
        self.x, self.m = np.where(mask, 0, self.head.t1n).astype(np.int16), mask.astype(np.uint8)
        volumes = {"t1n": self.head.t1n, IMAGE: self.x, MASK: self.m, "mask-healthy": healthy.astype(np.uint8),
                   "mask-unhealthy": unhealthy.astype(np.uint8)}  # fmt: skip
        for role, path in self.paths.items():
            self.save(volumes[role], path)

    def save(
        self,
        array: np.ndarray,
        path: Path,
        *,
        affine: np.ndarray | None = None,
        kind: type = nib.Nifti1Image,
        header: nib.Nifti1Header | None = None,
        edit: Callable[[nib.Nifti1Header], object] | None = None,
    ) -> None:
        """Write an array of any dtype, its affine as both sform and qform, in millimetres.

        Args:
            header: gives the byte order.
            edit: is called with the header before the file is written.
        """
        image = kind(array, self.A if affine is None else affine, header, dtype=array.dtype)
        image.header.set_data_dtype(array.dtype)
        image.header.set_xyzt_units("mm")
        for set_form in (image.set_sform, image.set_qform):
            set_form(image.affine, 1)
        if edit:
            edit(image.header)
        path.write_bytes(packed(image.to_bytes()))

    def put(self, content: bytes, path: Path | None = None) -> None:
        """Write unpacked bytes, packed, to P or another file."""
        (path or self.P).write_bytes(packed(content))

    def patch(self, offset: int, fmt: str, *values: float, path: Path | None = None) -> None:
        """Change fields of the header of P or another file, whatever nibabel would say."""
        content = bytearray(gzip.decompress((path or self.P).read_bytes()))
        struct.pack_into(f"<{fmt}", content, offset, *values)
        self.put(bytes(content), path)

    def move(self, role: str, name: str) -> Path:
        """Give a file another name in the case's folder."""
        self.paths[role] = self.paths[role].rename(self.folder / name)
        return self.paths[role]

    def rename(self, identity: str) -> None:
        """Give folder and files another case id."""
        moved, before = self.folder.rename(self.root / identity), self.id
        self.id = identity
        for role, path in self.paths.items():
            self.paths[role] = (moved / path.name).rename(moved / path.name.replace(before, identity))


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        build: makes a good case folder the bad one.
        must: "reject", "warn" or "accept", or several joined by " or "; accepted cases are reported as the good one is.
        says: what the text of an error or a warning must match.
        complete: the case has its full image and the parts of its mask, as training and evaluation need.
        filled: as `must`, of inpainting, where that differs.
        options: words for the command line with which the same case is accepted or warned of.
        secret: text that must never be printed.
        needs_user: nothing is wrong for who may read everything (root).
    """

    build: Callable[[Place], object]
    must: str
    says: str = ""
    complete: bool = False
    filled: str = ""
    options: tuple[str, ...] = ()
    secret: str = ""
    needs_user: bool = False

    @property
    def statuses(self) -> set[str]:
        """The statuses of `cohort.audit` that meet the row."""
        return {STATUS[word] for word in self.must.split(" or ")}
