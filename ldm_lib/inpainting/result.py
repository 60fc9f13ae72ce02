"""Hold the samples of one inpainted case, and write them in the scan's own grid, header and data type."""

import glob
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm_lib.data.case import Case, CaseData
from ldm_lib.errors import InputError
from ldm_lib.files import expand_path, replacing, require_writable
from ldm_lib.images.image_files import ANY_OF_SUFFIXES, SUFFIXES, require_results_writable, stem
from ldm_lib.images.volume import write_like, write_map

log = logging.getLogger("ldm_lib")

BRAIN = "brain-mask"
OF_SAMPLES = ("std", "nearest", f"sample-{'[0-9]' * 4}")  # files of several samples; the last one as a pattern
GENERATOR = '<meta name="generator" content="ldm">'  # by which a page is known as one of ours
BIDS_RESULT = "_desc-inpainted_T1w."  # in the names of results in a BIDS derivative data set
BIDS_ENDINGS = {"dseg": "_desc-inpainted_dseg.", "summary": "_desc-inpainted_summary.", BRAIN: "_desc-brain_mask."}


class Samples(Sequence[np.ndarray]):
    """Give the samples of a result as volumes (x, y, z), each made when it is read."""

    def __init__(self, result: "Inpainting") -> None:
        self._result = result

    def __len__(self) -> int:
        return len(self._result.values)

    def __getitem__(self, k: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return self._result.pasted(self._result.values[k])


@dataclass(frozen=True)
class Inpainting:
    """Hold K inpainted volumes of one case; volumes are (x, y, z) in the file's voxel order and units.

    Attributes:
        data: the case that was inpainted.
        values: (K, n) float32, the values of each sample at the n voxels of the mask.

    Examples:
        >>> import ldm_lib as ldm
        >>> case = ldm.load_case(ldm.find_cases(cohort)[0])
        >>> result = ldm.Inpainter.load(model)(case, n_samples=2, num_inference_steps=2)
        >>> bool((result.mean == case.voided)[~case.mask].all())  # known voxels are untouched
        True
        >>> len(result.samples), float(result.std[~case.mask].max())
        (2, 0.0)
        >>> [path.name for path in result.save(folder)][:2]
        ['Synthetic_00000-t1n-inference-0000.nii.gz', 'Synthetic_00000-t1n-inference-0000-std.nii.gz']
    """

    data: CaseData
    values: np.ndarray

    def __repr__(self) -> str:
        return f"Inpainting({self.data!r}, {len(self.values)} samples)"

    @property
    def samples(self) -> Samples:
        """Return the K samples, each equal to the voided image outside the mask."""
        return Samples(self)

    @property
    def mean(self) -> np.ndarray:
        """Return the mean over the samples."""
        return self.pasted(self.values.mean(axis=0, dtype=np.float64))

    @property
    def std(self) -> np.ndarray:
        """Return the standard deviation of each voxel over the samples (ddof 0); 0 outside the mask."""
        std = np.zeros_like(self.data.voided)
        std[self.data.mask] = self.values.std(axis=0, dtype=np.float64)
        return std

    @property
    def medoid(self) -> np.ndarray:
        """Return the sample with the smallest mean squared distance to the mean."""
        difference = self.values - self.values.mean(axis=0, dtype=np.float64)
        return self.pasted(self.values[np.argmin(np.square(difference).sum(axis=1))])

    def pasted(self, values: np.ndarray) -> np.ndarray:
        """Return the voided image with these n values in the mask."""
        volume = self.data.voided.copy()
        volume[self.data.mask] = values
        return volume

    def save(self, path: str | Path, *, samples: bool = False) -> list[Path]:
        """Write the result with the scan's header and return the files; voxels outside the mask keep their bits.

        Of one sample there is one file. Of several samples `<output>` is the mean, `<output>-std` the standard
        deviation (float32, source units) and `<output>-nearest` the medoid sample. Files of these names that an earlier
        result of more samples has left are removed, with a warning. A brain mask that was made is
        `<output>-brain-mask`.

        Args:
            path: a file that ends in .nii, .nii.gz, .mgh or .mgz, or a folder, which takes
                `<case>-t1n-inference.nii.gz`. A new folder whose name has another suffix ends in "/".
            samples: write each sample too, as `<output>-sample-000k`.

        Raises:
            InputError: a file that cannot be written or is one of the inputs, another suffix, or a value that is not
                finite.
        """
        output = expand_path(path)
        if not output.name.lower().endswith(SUFFIXES):
            if output.is_file() or (output.suffix and not output.is_dir() and not str(path).endswith("/")):
                raise InputError(f"is neither a folder nor named {ANY_OF_SUFFIXES}", where=output,
                                 fix='name a file .nii.gz, or end a new folder in "/"')  # fmt: skip
            output.mkdir(parents=True, exist_ok=True)
            output /= self.data.case.result_name
        paths = result_paths(output, len(self.values), each=samples, case=self.data.case)
        require_results_writable(paths.values(), self.data.case.files().values())
        for name, path in paths.items():
            if name in ("std", BRAIN):
                voxels = self.std if name == "std" else self.data.brain.astype(np.uint8)
                write_map(path, voxels, self.data.source.affine)
                continue
            kind, _, k = name.partition("-")
            volume = self.medoid if kind == "nearest" else self.pasted(self.values[int(k)]) if k else self.mean
            write_like(path, self.data.source, volume, self.data.mask)
        remove_companions(output, keep=[*paths.values(), *self.data.case.files().values()])
        return list(paths.values())

    def page(self, path: str | Path) -> Path:
        """Write an HTML page that shows the case in a browser, without a network, and return the file.

        It shows three planes and a 3D rendering. A slider fades in the mean of the samples, the medoid sample, the
        ground truth, or the scan as it was given, if it was not void under the mask.

        Raises:
            InputError: another suffix than .html, a file that cannot be written, or a nilearn without the viewer.
        """
        from ldm_lib.plots.page import page  # it loads matplotlib

        path, data = require_page(path), self.data
        layers = (
            {"mean of samples": self.mean, "one sample": self.medoid} if len(self.values) > 1 else {"result": self.mean}
        )
        if data.target is not None:
            layers["ground truth"] = data.target
        elif data.source.voxels[data.mask].any():
            layers["scan as given"] = data.source.voxels
        text = page(data.voided, layers, data.mask, affine=data.affine, title=data.key)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return path


def remove_companions(output: Path, *, keep: Iterable[Path] = ()) -> None:
    """Remove what an earlier result of this name has left: files of several samples, labels with summary, and page.

    A summary names its result: labels and summary of no or another result stay, and so does a page of anything else.
    """
    escaped, kept = output.with_name(glob.escape(output.name)), {path.resolve() for path in keep}
    found = [path for kind in OF_SAMPLES for path in sorted(output.parent.glob(result_path(escaped, kind).name))]
    if _names(summary_path(output), f'"Result": "{output.name}"'):
        found += [result_path(output, "dseg"), summary_path(output)]
    if _names(page_path(output), GENERATOR):
        found.append(page_path(output))
    found += [sidecar_path(path) for path in found if BIDS_RESULT in output.name]
    removed = [path for path in found if path.is_file() and path.resolve() not in kept]
    for path in removed:
        path.unlink()
    if removed:
        log.warning("%s: removed %s of an earlier result", output.name, ", ".join(path.name for path in removed))


def _names(path: Path, text: str) -> bool:
    """Return whether a file holds a text at its beginning."""
    return path.is_file() and text.encode() in path.read_bytes()[: 1 << 16]


def require_page(path: str | Path) -> Path:
    """Return the expanded path of a page; InputError if it cannot be written, or if nilearn lacks the viewer."""
    from ldm_lib.plots.page import viewer_script

    viewer_script()
    path = expand_path(path)
    if path.suffix.lower() != ".html":
        raise InputError("a page must end in .html", where=path, fix="name it so")
    require_writable(path)
    return path


def sidecar_path(image: Path) -> Path:
    """Return the sidecar of an image."""
    return image.with_name(f"{stem(image)}.json")


def summary_path(output: Path) -> Path:
    """Return `O-summary.json` of the result `O.nii.gz`."""
    return sidecar_path(result_path(output, "summary"))


def page_path(result: Path) -> Path:
    """Return the page of a result's file: next to it, with the same stem."""
    return result.with_name(f"{stem(result)}.html")


def result_paths(output: Path, samples: int, *, each: bool, case: Case) -> dict[str, Path]:
    """Return the files of a result by what they hold: "" the volume, "std", "nearest", "sample-000k", "brain-mask"."""
    names = (["std", "nearest"] if samples > 1 else []) + [f"sample-{k:04d}" for k in range(samples if each else 0)]
    names += [BRAIN] if case.read_options.skull_strip and not case.brain_mask else []
    return {name: result_path(output, name) for name in ("", *names)}


def result_path(output: Path, name: str) -> Path:
    """Return the file that holds `name` of a result: `O-std.nii.gz`, in BIDS `sub-01_desc-inpaintedStd_T1w.nii.gz`."""
    if name and BIDS_RESULT in output.name:
        label = "".join(part.capitalize() for part in name.split("-"))
        ending = BIDS_ENDINGS.get(name, f"_desc-inpainted{label}_T1w.")
        return output.with_name(output.name.replace(BIDS_RESULT, ending))
    first = stem(output)
    return output.with_name(f"{first}-{name}{output.name[len(first) :]}") if name else output
