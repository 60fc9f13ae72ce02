"""Cache encoded cases on disk: each encoded once, read one at a time, never used when out of date.

    <scan>-<variant>-<key>.safetensors holds all masks of a scan in one variant, by the name of the case:
    <case>/voided, target (c x y z), mask_fraction (1 x y z), conditioning (4 x y z) float16; mask, loss (1 x y z) bool

The full image is encoded for every mask, because intensities are divided by a percentile of the voided image. float16
keeps 11 binary digits: the relative error of a standardised latent is at most 5e-4. The key covers everything an entry
was made from, and an entry contains the digest of its own tensors.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.augmentation import Augmentation
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import GridCase, grid_case, require_spacing
from ldm_lib.diffusion.fresh_samples import FreshSamples, fresh_samples, fresh_version
from ldm_lib.diffusion.latents import Latents, LatentSpec, case_seed, encode_case
from ldm_lib.errors import InputError, RunError
from ldm_lib.files import fingerprint, replacing, sha256
from ldm_lib.process_control import parallel_map
from ldm_lib.progress import Progress

log = logging.getLogger("ldm_lib")

CODE_VERSION = 6  # raise it when what is encoded or stored changes
MASKS = ("mask", "loss")
LOCKS = ".locks"  # subfolder: one empty file for each entry that was encoded
CASES_IN_MEMORY = 3  # the masks of one scan, loaded once for all its variants


@dataclass(frozen=True)
class CachedCase(Sequence[Latents]):
    """Read the encodings of a case from disk on demand: `cached[variant]`, float32, on the CPU.

    Raises:
        RunError: an entry is missing or not readable; damage to its numbers is found by `LatentCache.encode` alone.
    """

    case: Case
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, variant: int) -> Latents:
        path = self.paths[variant]
        try:
            with safe_open(path, "pt") as stream:
                own = [name for name in stream.keys() if name.startswith(f"{self.case.key}/")]  # noqa: SIM118
                return {name.rpartition("/")[2]: stream.get_tensor(name).float() for name in own}
        except (SafetensorError, OSError) as error:
            raise RunError(f"cannot be read ({error})", where=path, fix="run the stage again") from error


@dataclass(frozen=True)
class _Entry:
    """Describe a file of the cache: its path, the key of what it is made from, and its cases."""

    path: Path
    key: str
    cases: tuple[Case, ...]
    variant: int
    fresh_crop: int


class LatentCache:
    """Encode cases into a folder that belongs to one run; several processes may do so at once.

    `costs` of the last call of `encode`: patients, masks, variants, MB per patient, and the files encoded now.
    """

    def __init__(
        self,
        folder: Path,
        autoencoder: Autoencoder,
        weights_sha256: str,
        spec: LatentSpec,
        *,
        device: torch.device,
        precision: str,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.folder, self.autoencoder, self.spec, self.seed = folder, autoencoder, spec, seed
        self.augmentation = augmentation or Augmentation()
        self.costs: dict[str, Any] = {}
        self._placement: dict[str, Any] = {"device": device, "precision": precision}
        self._made_from = {"code": CODE_VERSION, "weights": weights_sha256, "build": autoencoder.config,
                           "settings": spec.model_dump(), "precision": precision}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def versions(self, case: Case, count: int, *, fresh_crop: int = 0) -> dict[str, GridCase]:
        """Return a case on the model's grid as it is, and `count` augmented or fresh versions, by name, to look at."""
        original, spacing_mm = self._on_grid(case), self.autoencoder.spacing_mm
        if fresh_crop:
            (source,) = self.fresh((case,), fresh_crop)
            return {"original": original} | {f"version {k}": source.volumes(k) for k in range(1, count + 1)}
        draws = {f"version {k}": np.random.default_rng([self.seed, k]) for k in range(1, count + 1)}
        augmented = {name: self.augmentation(original, rng, spacing_mm=spacing_mm) for name, rng in draws.items()}
        return {"original": original} | augmented

    def encode(
        self, cases: Sequence[Case], *, variants: int = 1, fresh_crop: int = 0, workers: int = 1
    ) -> list[CachedCase]:
        """Encode what is missing, out of date or damaged, and return a handle for each case.

        What another process is encoding is left to it, and waited for at the end. Entries of the same scans that were
        made from anything else are removed, so pass all cases of a scan together.

        Args:
            variants: encodings per case; the first is not augmented, the others are.
            fresh_crop: edge of a crop; if above 0, all encodings are drawn by `fresh_samples`.
            workers: processes that encode, on a CPU.
        """
        by_scan = {name: self._entries(name, scan, variants, fresh_crop) for name, scan in _by_scan(cases).items()}
        entries = [entry for scan in by_scan.values() for entry in scan]
        stale = self._remove_stale(entries)
        damaged = [entry for entry in entries if entry.path.exists() and not _is_intact(entry)]
        for entry in damaged:
            log.warning("%s is damaged; encoded again", entry.path.name)
        patients = len({case.patient for case in cases}) or 1
        self.costs = {
            "patients": patients,
            "masks": len(cases),
            "variants": variants,
            "encoded now": self._encode_missing([e for e in entries if e in damaged or not e.path.exists()], workers),
            "replaced": stale + len(damaged),
            "MB per patient": sum(entry.path.stat().st_size for entry in entries) / 1e6 / patients,
        }
        return [CachedCase(case, tuple(entry.path for entry in by_scan[case.id])) for case in cases]

    def _on_grid(self, case: Case) -> GridCase:
        data = load_case(case)
        require_spacing(data, self.autoencoder.spacing_mm)
        return grid_case(data, self.autoencoder.factor, bias_field_correction=self.spec.bias_field_correction)

    def _entries(self, name: str, scan: tuple[Case, ...], variants: int, fresh_crop: int) -> list[_Entry]:
        """List the entries of a scan, one for each variant."""
        digests = {path: sha256(path) for path in {path for case in scan for path in case.files().values()}}
        sources = {case.key: {role: digests[path] for role, path in case.files().items()} for case in scan}
        fresh = {"fresh": fresh_version(), "crop": fresh_crop, "seed": self.seed} if fresh_crop else {}
        augmented = {} if fresh else {"augmentation": asdict(self.augmentation), "seed": self.seed}
        entries = []
        for variant in range(variants):
            about = self._made_from | {"sources": sources, "variant": variant} | fresh | (augmented if variant else {})
            key = fingerprint(about)
            path = self.folder / f"{name}-{variant}-{key[:16]}.safetensors"
            entries.append(_Entry(path, key, scan, variant, fresh_crop))
        return entries

    def _remove_stale(self, entries: Sequence[_Entry]) -> int:
        """Remove files of the same scans and variants that have another key; return how many there were."""
        paths = {entry.path for entry in entries}
        slots = {path.name.rpartition("-")[0] for path in paths}
        found = (path for path in self.folder.glob("*.safetensors") if path.name.rpartition("-")[0] in slots)
        stale = [path for path in found if path not in paths]
        for path in stale:
            path.unlink(missing_ok=True)
        if stale:
            log.warning("%d stale cached files (other sources, weights or settings) removed; encoded again", len(stale))
        return len(stale)

    def _encode_missing(self, missing: Sequence[_Entry], workers: int) -> int:
        """Encode entries in some processes, scan by scan; return how many were encoded."""
        (self.folder / LOCKS).mkdir(exist_ok=True)
        progress = Progress(len(missing), name="encoding scan")
        if workers <= 1 or self._placement["device"].type != "cpu":
            return self._encode_entries(missing, progress)
        scans = [list(own) for _, own in groupby(missing, attrgetter("cases"))]
        done = encoded = 0
        counts = parallel_map(partial(_encode_scan, self), scans, workers)
        for own, count in zip(scans, counts, strict=True):
            done, encoded = done + len(own), encoded + count
            progress.update(done, own[0].cases[0].id, now=done == len(missing))
        return encoded

    def _encode_entries(self, missing: Sequence[_Entry], progress: Progress | None = None) -> int:
        """Encode entries, or wait for the process that does; return how many were encoded by this one."""
        load, read = lru_cache(CASES_IN_MEMORY)(self._on_grid), lru_cache(1)(self.fresh)
        done, encoded = set(), 0
        for wait in (False, True):
            for entry in [entry for entry in missing if entry.path not in done]:
                try:
                    with FileLock(self.folder / LOCKS / entry.path.stem, timeout=-1 if wait else 0):
                        if not _is_intact(entry):
                            self._encode_entry(entry, load, read)
                            encoded += 1
                except Timeout:  # another process encodes it: it is waited for at the end
                    continue
                done.add(entry.path)
                if progress:
                    progress.update(len(done), entry.path.name, now=len(done) == len(missing))
        return encoded

    def fresh(self, cases: tuple[Case, ...], crop: int) -> list[FreshSamples]:
        """Return what draws fresh samples of the cases of a scan."""
        return fresh_samples(cases, self.autoencoder, self.spec, crop=crop, seed=self.seed)

    def sources(self, cases: Sequence[Case], crop: int) -> list[FreshSamples]:
        """Read all scans, and return what draws fresh samples of each case, in the order of the cases."""
        scans, sources = _by_scan(cases), {}
        progress = Progress(len(scans), name="reading scan")
        for number, (name, scan) in enumerate(scans.items(), start=1):
            sources |= {source.case.key: source for source in self.fresh(scan, crop)}
            progress.update(number, name, now=number == len(scans))
        return [sources[case.key] for case in cases]

    def _encode_entry(
        self, entry: _Entry, load: Callable[[Case], GridCase], read: Callable[..., list[FreshSamples]]
    ) -> None:
        if entry.fresh_crop:
            latents = {source.case.key: source[entry.variant] for source in read(entry.cases, entry.fresh_crop)}
        else:
            latents = {case.key: self._encoded(case, load(case), entry.variant) for case in entry.cases}
        tensors = _pack(latents)
        with replacing(entry.path) as partial:
            save_file(tensors, partial, {"digest": _digest(entry.key, tensors)})

    def _encoded(self, case: Case, on_grid: GridCase, variant: int) -> Latents:
        """Encode a case as it is, or augmented if the variant is not the first."""
        if variant:
            rng = np.random.default_rng([self.seed, variant, case_seed(case)])
            on_grid = self.augmentation(on_grid, rng, spacing_mm=self.autoencoder.spacing_mm)
        return encode_case(on_grid, self.autoencoder, self.spec, **self._placement)


def _encode_scan(cache: LatentCache, entries: Sequence[_Entry]) -> int:
    """Encode the entries of a scan in a process of its own."""
    torch.set_num_threads(1)  # the other cores have processes of their own
    return cache._encode_entries(entries)


def _by_scan(cases: Sequence[Case]) -> dict[str, tuple[Case, ...]]:
    """Group cases by their scan, in order."""
    scans: dict[str, tuple[Case, ...]] = {}
    for case in cases:
        scans[case.id] = (*scans.get(case.id, ()), case)
    return scans


def _pack(cases: dict[str, Latents]) -> dict[str, Tensor]:
    """Return the tensors of one entry, by case and name, in as few bytes as they need."""
    tensors = {f"{key}/{name}": tensor.bool() if name in MASKS else tensor.half()
               for key, latents in cases.items() for name, tensor in latents.items()}  # fmt: skip
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            fix = "use precision 32, or another autoencoder"
            raise InputError("not finite as latents in float16", where=name, fix=fix)
    return tensors


def _is_intact(entry: _Entry) -> bool:
    """Return whether an entry is there, and holds what was written."""
    try:
        with safe_open(entry.path, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            recorded = (stream.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return False
    return recorded == _digest(entry.key, tensors)


def _digest(key: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
