"""Bad inputs, first part of the catalogue: the file as bytes, the file in its folder, the header."""

import os
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from bad_places import Place, Row, packed

SECRET = "DOE^JOHN 1950"


# ---- the file as bytes


def _flip_a_stored_bit(place: Place) -> None:
    """One voxel of air becomes 16384: an upper byte, at an even place, since the stored voxels begin at an odd one."""
    content = bytearray(packed(place.raw, level=0))
    content[len(content) // 4 * 2] ^= 0x40
    place.P.write_bytes(content)


def _flip_the_checksum(place: Place) -> None:
    content = bytearray(place.P.read_bytes())
    content[-6] ^= 0xFF
    place.P.write_bytes(content)


def _cut(end: Callable[[int], int]) -> Callable[[Place], object]:
    def build(place: Place) -> None:
        content = place.P.read_bytes()
        place.P.write_bytes(content[: end(len(content))])

    return build


def _text(text: str) -> Callable[[Place], object]:
    return lambda place: place.P.write_text(text)


def _replaced(make: Callable[[Path], object]) -> Callable[[Place], object]:
    """Something that is no regular file takes the image's name."""

    def build(place: Place) -> None:
        place.P.unlink()
        make(place.P)

    return build


PAGE = "<!DOCTYPE html><html><head><title>Synapse</title></head><body>Please log in</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 5390\n"
DAMAGED = {
    "empty file": Row(_text(""), "reject", r"empty \(0 bytes\).*download"),
    "truncated gz": Row(_cut(lambda n: n // 2), "reject", r"gzip ends early \(got \d+ (bytes )?of \d+"),
    "gz trailer missing": Row(_cut(lambda n: n - 8), "reject", r"gzip ends early"),
    "gz CRC wrong": Row(_flip_the_checksum, "reject", r"checksum mismatch"),
    "bit-flip in a stored gz": Row(_flip_a_stored_bit, "reject", r"checksum mismatch"),
    "garbage after gz": Row(
        lambda p: p.P.write_bytes(p.P.read_bytes() + b"GARBAGE"), "reject", r"follow the gzip stream"
    ),
    "plain NIfTI named .gz": Row(lambda p: p.P.write_bytes(p.raw), "reject", r"not gzip.*rename it to \.nii"),
    "HTML login page": Row(_text(PAGE), "reject", r"HTML page, not NIfTI.*log in.*download"),
    "git-LFS pointer": Row(_text(POINTER), "reject", r"LFS pointer.*`git lfs pull`"),
    "git-annex pointer": Row(
        _text("/annex/objects/SHA256E-s5390--4d7a2146.nii.gz\n"), "reject", r"annex pointer.*`git annex get`"
    ),
    "text in gz": Row(lambda p: p.put(b"subject,age\n1,50\n" * 40), "reject", r"no(t a)? NIfTI"),
    "header only": Row(lambda p: p.put(p.raw[:352]), "reject", r"expected \d+ bytes.*got 0\b"),
    "last slices missing": Row(
        lambda p: p.put(p.raw[: -2 * p.x.shape[0] * p.x.shape[1]]), "reject", r"expected 36000 bytes.*got 34200\b"
    ),
    "extra bytes after voxels": Row(lambda p: p.put(p.raw + b"\1" * 5000), "warn", r"\b5000 bytes"),
}


# ---- the file in its folder


def _link_out(place: Place) -> None:
    target = place.root.parent / f"elsewhere-{place.P.name}"
    place.P.rename(target)
    place.P.symlink_to(target)


def _link_in(place: Place) -> None:
    place.P.symlink_to(place.P.rename(place.folder / "original.nii.gz").name)


def _folder_out(place: Place) -> None:
    target = place.root.parent / f"elsewhere-{place.id}"
    place.folder.rename(target)
    place.folder.symlink_to(target)


def _unpack(place: Place) -> None:
    content = place.raw
    place.move("t1n-voided", place.P.stem).write_bytes(content)


def _pair(kind: type) -> Callable[[Place], object]:
    def build(place: Place) -> None:
        place.P.unlink()
        kind(place.x, place.A).to_filename(place.folder / place.P.name.replace(".nii.gz", ".hdr"))

    return build


def _next_to_it(name: str) -> Callable[[Place], object]:
    """A file next to the image; * stands for its name without .nii.gz."""

    def build(place: Place) -> None:
        (place.folder / name.replace("*", place.P.name.removesuffix(".nii.gz"))).write_bytes(place.P.read_bytes())

    return build


def _named(identity: str) -> Row:
    return Row(lambda place: place.rename(identity), "reject or accept", r"not a patient id")


PLACES = {
    "directory": Row(_replaced(os.mkdir), "reject", r"is a directory"),
    "dangling symlink": Row(_replaced(lambda path: path.symlink_to("nowhere")), "reject", r"broken link.*nowhere"),
    "symlink loop": Row(_replaced(lambda path: path.symlink_to(path)), "reject", r"link"),
    "pipe": Row(_replaced(os.mkfifo), "reject", r"not a regular file"),
    "unreadable": Row(lambda p: p.P.chmod(0), "reject", r"[Pp]ermission denied", needs_user=True),
    "link out of the data": Row(_link_out, "warn", r"\.\./elsewhere-\S+\.nii\.gz"),
    "folder is a link out of the data": Row(_folder_out, "warn", r"\.\./elsewhere-"),
    "link within the data": Row(_link_in, "accept"),
    ".part next to the data": Row(_next_to_it("*.nii.gz.part"), "warn", r"\.nii\.gz\.part"),
    ".crdownload next to the data": Row(_next_to_it("*.nii.gz.crdownload"), "warn", r"\.crdownload"),
    "(1) next to the data": Row(_next_to_it("* (1).nii.gz"), "warn", r" \(1\)\.nii\.gz"),
    "._ next to the data": Row(_next_to_it("._*.nii.gz"), "accept"),
    ".DS_Store next to the data": Row(_next_to_it(".DS_Store"), "accept"),
    "upper-case extension": Row(lambda p: p.move("t1n-voided", p.P.name.replace("nii.gz", "NII.GZ")), "accept"),
    "plain .nii": Row(_unpack, "accept"),
    "both .nii and .nii.gz": Row(
        lambda p: p.P.with_suffix("").write_bytes(p.raw), "reject", r"ambiguous.*\.nii\b|\.nii\b.*ambiguous"
    ),
    "glob in the name": _named("BraTS [1]*"),
    "é in the name, composed": _named(unicodedata.normalize("NFC", "BraTS é")),
    "é in the name, decomposed": _named(unicodedata.normalize("NFD", "BraTS é")),
    "newline in the name": _named("BraTS\nERROR"),
    ".hdr/.img pair": Row(_pair(nib.Nifti1Pair), "reject", r"(?i)(\.hdr|analyze).*convert"),
    "Analyze": Row(_pair(nib.AnalyzeImage), "reject", r"(?i)(\.hdr|analyze).*convert"),
}


# ---- the header


def _patched(offset: int, fmt: str, *values: float) -> Callable[[Place], object]:
    return lambda place: place.patch(offset, fmt, *values)


def _extension_of_2_gb(place: Place) -> None:
    raw = place.raw
    place.put(raw[:348] + struct.pack("<i2i", 1, 2**31 - 16, 6) + bytes(1016) + raw[352:])
    place.patch(108, "f", 1376.0)


def _sheared(place: Place) -> None:
    affine = place.A.copy()
    affine[0, 1] = 0.4 * affine[0, 0]
    place.save(place.x, place.P, affine=affine)


def _sloped(slope: float, intercept: float, stored: Callable[[np.ndarray], np.ndarray]) -> Callable[[Place], object]:
    """The stored voxels and what they mean: stored * slope + intercept."""

    def build(place: Place) -> None:
        raw = stored(place.x).astype(np.int16)
        place.save(raw, place.P)
        place.patch(112, "2f", slope, intercept)
        place.x = raw * slope + intercept

    return build


def _without_orientation(*roles: str) -> Callable[[Place], object]:
    def build(place: Place) -> None:
        for role in roles:
            place.patch(252, "2h", 0, 0, path=place.paths[role])

    return build


def _free_text(edit: Callable[[nib.Nifti1Header], object]) -> Row:
    return Row(lambda p: p.save(p.x, p.P, edit=edit), "warn", r"free text in the header", secret=SECRET)


def _field(name: str, text: str) -> Callable[[nib.Nifti1Header], object]:
    return lambda header: header.__setitem__(name, text.encode())


ORIENTATION = ("--assume-orientation", "LPS")
HEADERS = {
    "claims 32767^3 voxels": Row(
        _patched(40, "8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "reject", r"claims (70(\.\d+)? TB|70\d{3}(\.\d+)? GB)"
    ),
    "claims 1290^3 voxels": Row(_patched(40, "8h", 3, 1290, 1290, 1290, 1, 1, 1, 1), "reject", r"claims 4\.3 GB"),
    "dim[0] = 0": Row(_patched(40, "h", 0), "reject", r"dim\[0\] is 0\b|0-dimensional"),
    "dim[0] = 9": Row(_patched(40, "h", 9), "reject", r"dim\[0\] is \d+\b"),
    "negative dim": Row(_patched(42, "h", -48), "reject", r"-48\b"),
    "zero-length axis": Row(_patched(46, "h", 0), "reject", r"\(30, 30, 0\)"),
    "sizeof_hdr wrong": Row(_patched(0, "i", 999), "warn", r"sizeof_hdr is 999"),
    "unknown datatype": Row(_patched(70, "h", 9999), "reject", r"datatype.*\b9999\b"),
    "bitpix contradicts datatype": Row(_patched(72, "h", 64), "warn", r"bitpix 64\b"),
    "vox_offset negative": Row(_patched(108, "f", -10.0), "reject", r"vox_offset -10\b"),
    "vox_offset NaN": Row(_patched(108, "f", np.nan), "reject", r"vox_offset nan\b"),
    "vox_offset too large": Row(_patched(108, "f", 500.0), "reject", r"vox_offset 500\b|expected 36000 bytes.*35852\b"),
    "extension claims 2 GB": Row(_extension_of_2_gb, "reject", r"extension claims 2147483632 bytes"),
    "scl_slope NaN": Row(_patched(112, "2f", np.nan, 0), "warn", r"scl_slope (is )?nan\b"),
    "scl_slope Inf": Row(_patched(112, "2f", np.inf, 0), "warn", r"scl_slope (is )?inf\b"),
    "scl_slope negative": Row(_sloped(-1, 0, lambda x: x), "reject", r"no voxel above 0|max -?0\b"),
    "scl_slope negative, some voxels above 0": Row(_sloped(-1, 400, lambda x: x), "warn", r"negative"),
    "scl_slope 1e-38": Row(_patched(112, "2f", 1e-38, 0), "reject", r"scl_slope 1e-38\b.*range"),
    "scl_inter Inf": Row(_patched(112, "2f", 1, np.inf), "reject", r"scl_inter inf\b"),
    "slope and intercept": Row(_sloped(0.5, 10, lambda x: 2 * x - 20), "accept"),
    "slope and intercept, air above 0": Row(_sloped(0.5, 10, lambda x: x), "accept or warn", r"."),
    "pixdim 0": Row(_patched(76, "8f", 1, 0, 8, 8, 0, 0, 0, 0), "warn", r"pixdim \(0, 8, 8\)"),
    "pixdim negative": Row(_patched(76, "8f", 1, -8, 8, 8, 0, 0, 0, 0), "warn", r"pixdim \(-8, 8, 8\)"),
    "pixdim NaN": Row(_patched(76, "8f", 1, np.nan, 8, 8, 0, 0, 0, 0), "reject", r"pixdim \(nan, 8, 8\)"),
    "no orientation": Row(_without_orientation("t1n-voided"), "reject", r"no orientation.*--assume-orientation"),
    "no orientation in any file": Row(
        _without_orientation("t1n-voided", "mask"),
        "reject",
        r"no orientation.*--assume-orientation",
        options=ORIENTATION,
    ),
    "no orientation of the mask": Row(_without_orientation("mask"), "reject or warn", r"orientation"),
    "nonsense codes 77": Row(_patched(252, "2h", 77, 77), "reject", r"codes.*77|codes outside 0\.\.5"),
    "sform singular": Row(_patched(280, "4f", 0, 0, 0, 0), "reject", r"singular|invertible"),
    "sform with shear": Row(_sheared, "reject", r"sheared.*resample"),
    "impossible quaternion": Row(_patched(252, "2h3f", 1, 0, 1, 1, 1), "reject", r"quaternion"),
    "units = metre": Row(_patched(123, "B", 1), "reject", r"metre"),
    "free text in descrip": _free_text(_field("descrip", SECRET)),
    "free text in db_name": _free_text(_field("db_name", SECRET)),
    "free text in aux_file": _free_text(_field("aux_file", SECRET)),
    "free text in an extension": _free_text(
        lambda header: header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
    ),
}
