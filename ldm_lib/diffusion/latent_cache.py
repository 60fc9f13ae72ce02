"""The latent cache: cases encoded once, kept small on disk, read one at a time, never served stale.

    <scan>-<variant>-<key>.safetensors, all holes of a scan in one variant, each by the name of its case:
    <case>/voided, target (c x y z), share (1 x y z), conditioning (4 x y z) float16; hole, loss (1 x y z) bool

The full image is encoded for every hole, not once a scan: a case's intensities are divided by a percentile of its own
voided image, so that the network may see other numbers with another hole. Augmentation is drawn for every hole too,
which gives more domain_randomisation. Conditioning that all holes of an entry share is stored once, without the name of a case.

float16 keeps 11 binary digits, so that a standardised latent is off by at most 5e-4 of itself; masks are exact.

The key is over everything an entry was made from: bytes of the sources, weights and build of the autoencoder,
settings, augmentation, precision and the version of this code. An entry carries the digest of its own tensors.
"""

import fcntl
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.augmentation import Augmentation
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import GridCase, grid_case
from ldm_lib.diffusion.latents import Latents, LatentSpec, encode_case
from ldm_lib.errors import InputError, RunError
from ldm_lib.files import fingerprint, replacing, sha256

log = logging.getLogger("ldm_lib")

CODE_VERSION = 2  # raise it when encoding, conditioning or storing change their meaning
MASKS = ("mask", "loss")
CLAIMS = ".claims"  # a file in the folder, always empty
CASES_IN_MEMORY = 3  # the holes of one scan, loaded once for all its variants


@dataclass(frozen=True)
class CachedCase(Sequence[Latents]):
    """A case and its encodings, read from disk when asked for: `cached[variant]`, float32, on the CPU.

    Raises:
        RunError: an entry is no longer there, or no longer readable; damage to its numbers is found by `fill` alone.
    """

    case: Case
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, variant: int) -> Latents:
        path = self.paths[variant]
        try:
            with safe_open(path, "pt") as stream:
                parts = [(name, *name.rpartition("/")[::2]) for name in stream.keys()]  # noqa: SIM118
                return {
                    short: stream.get_tensor(name).float() for name, of, short in parts if of in ("", self.case.key)
                }
        except (SafetensorError, OSError) as error:
            raise RunError(f"cannot be read ({error})", where=path, fix="run the stage again") from error


@dataclass(frozen=True)
class _Entry:
    """A file of the cache: where it is, what it is to be made from, and of which cases."""

    path: Path
    made_from: str
    cases: tuple[Case, ...]
    variant: int

    @property
    def volumes(self) -> int:
        return sum(map(_volumes, self.cases))


class LatentCache:
    """Encoded cases in one folder, which belongs to one run; several processes may fill it at once.

    Args:
        folder: created if needed.
        autoencoder: frozen, on `device`.
        weights_sha256: identifies the autoencoder's weights.
        seed: of the augmentations.

    Attributes:
        costs: of the last fill: patients, holes, variants, MB per patient, and what was encoded in which time.
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
        self._how = {"device": device, "precision": precision}
        self._about = {
            "code": CODE_VERSION,
            "weights": weights_sha256,
            "build": autoencoder.config,
            "settings": spec.model_dump(),
            "precision": precision,
        }
        folder.mkdir(parents=True, exist_ok=True)

    def encode(self, cases: Sequence[Case], *, variants: int = 1) -> list[CachedCase]:
        """Encode what is missing, stale or damaged, and return a handle for each case.

        What another process is encoding is left to it, and waited for at the end. Entries of the same scans that were
        made from anything else are removed, so all cases of a scan are asked for together.

        Args:
            variants: encodings per case; the first is as it is, the others are augmented.

        Raises:
            InputError: a case is refused, or its latents are not finite.
        """
        entries = self._entries(cases, variants)
        wanted = [entry for scan in entries.values() for entry in scan]
        stale = self._remove_stale(wanted)
        flaws = {entry: flaw for entry in wanted if (flaw := _flaw(entry))}
        damaged = {entry.path.name: flaw for entry, flaw in flaws.items() if flaw != "missing"}
        for name, flaw in damaged.items():
            log.warning("%s is %s; encoded again", name, flaw)
        took = self._make(list(flaws))
        self.costs = _costs(cases, wanted, took) | {"replaced": stale + len(damaged)}
        return [CachedCase(case, tuple(entry.path for entry in entries[case.id])) for case in cases]

    def _entries(self, cases: Sequence[Case], variants: int) -> dict[str, list[_Entry]]:
        """Scan -> its entries, one for each variant."""
        scans: dict[str, list[Case]] = {}
        for case in cases:
            scans.setdefault(case.id, []).append(case)
        return {name: self._scan_entries(name, tuple(scan), variants) for name, scan in scans.items()}

    def _scan_entries(self, name: str, scan: tuple[Case, ...], variants: int) -> list[_Entry]:
        digests = {path: sha256(path) for path in {path for case in scan for path in case.files().values()}}
        holes = {case.key: {role: digests[path] for role, path in case.files().items()} for case in scan}
        augmented = {"augmentation": asdict(self.augmentation), "seed": self.seed}
        entries = []
        for variant in range(variants):
            key = fingerprint(self._about | {"holes": holes, "variant": variant} | (augmented if variant else {}))
            path = self.folder / f"{name}-{variant}-{key[:16]}.safetensors"
            entries.append(_Entry(path, key, scan, variant))
        return entries

    def _remove_stale(self, wanted: Sequence[_Entry]) -> int:
        """Remove files of the wanted scans and variants that have another key; return how many there were."""
        names = {entry.path.name for entry in wanted}
        slots = {name.rpartition("-")[0] for name in names}
        found = [path for path in self.folder.glob("*.safetensors") if path.name.rpartition("-")[0] in slots]
        stale = [path for path in found if path.name not in names]
        for path in stale:
            path.unlink(missing_ok=True)
        if stale:
            log.warning("%d stale, made from other sources, weights or settings; removed, encoded again", len(stale))
        return len(stale)

    def _make(self, missing: Sequence[_Entry]) -> dict[_Entry, float]:
        """Encode these entries, or wait for who does; return the seconds that each took here."""
        if not missing:
            return {}
        load = lru_cache(CASES_IN_MEMORY)(lambda case: grid_case(load_case(case), self.autoencoder.factor))
        # Plain text, because the widgets of tqdm.auto are blank in a notebook that was run headless.
        bar = tqdm(total=sum(entry.volumes for entry in missing), desc="encoding", unit=" volumes", ascii=True,
                   mininterval=1.0, file=sys.stdout)  # fmt: skip
        took: dict[_Entry, float] = {}
        with bar, (self.folder / CLAIMS).open("a") as claims:
            for wait in (False, True):
                for entry in [entry for entry in missing if entry not in took]:
                    with _claimed(claims, entry, wait=wait) as ours:
                        if ours:
                            took[entry] = self._encode(entry, load, bar) if _flaw(entry) else 0.0
                            bar.update(0 if took[entry] else entry.volumes)
        return took

    def _encode(self, entry: _Entry, load: Callable[[Case], GridCase], bar: tqdm) -> float:
        started, holes = time.monotonic(), {}
        for case in entry.cases:
            plain = load(case)
            if entry.variant:
                digest = hashlib.sha256(case.key.encode()).digest()[:4]
                rng = np.random.default_rng([self.seed, entry.variant, int.from_bytes(digest, "big")])
                plain = self.augmentation(plain, rng, spacing_mm=self.autoencoder.spacing_mm)
            holes[case.key] = encode_case(plain, self.autoencoder, self.spec, **self._how)
            bar.update(_volumes(case))
        tensors = _small(holes)
        with replacing(entry.path) as partial:
            save_file(tensors, partial, {"digest": _digest(entry.made_from, tensors)})
        return time.monotonic() - started


def _volumes(case: Case) -> int:
    """Images of a case that are encoded: the voided one, and the full one if there is one."""
    return 1 + (case.t1n is not None)


def _small(holes: dict[str, Latents]) -> dict[str, Tensor]:
    """The tensors of one entry, by case and name, in as few bytes as they need."""
    tensors = {f"{key}/{name}": tensor.bool() if name in MASKS else tensor.half()
               for key, latents in holes.items() for name, tensor in latents.items()}  # fmt: skip
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                "not finite as latents in float16", where=name, fix="use precision 32, or another autoencoder"
            )
    maps = [tensors[f"{key}/conditioning"] for key in holes]
    if all(torch.equal(other, maps[0]) for other in maps):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("/conditioning")}
        tensors["conditioning"] = maps[0]
    return tensors


def _flaw(entry: _Entry) -> str:
    """Why an entry cannot be used; empty if it can."""
    if not entry.path.exists():
        return "missing"
    try:
        with safe_open(entry.path, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            recorded = (stream.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        return f"damaged ({error})"
    return "" if recorded == _digest(entry.made_from, tensors) else "not what was written"


def _digest(made_from: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(made_from.encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _claimed(claims: IO[str], entry: _Entry, *, wait: bool) -> Iterator[bool]:
    """Yield whether this process alone may make an entry; the system drops the claim when its owner dies.

    A claim is a lock on one byte of the folder's file of claims, at the place that the entry's key names: so there are
    no lock files to remove, and none that was removed while another process waited for it.
    """
    place = int(entry.made_from[:15], 16)  # 60 bits, as far as a file offset surely goes
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(claims, fcntl.LOCK_UN, 1, place)


def _costs(cases: Sequence[Case], entries: Sequence[_Entry], took: Mapping[_Entry, float]) -> dict[str, Any]:
    """Patients, holes and variants, what they take on disk, and the seconds from the files to the entries made now."""
    patients = len({case.patient for case in cases}) or 1
    encoded = sum(entry.volumes for entry, seconds in took.items() if seconds)
    each_s = sum(took.values()) / encoded if encoded else None
    return {
        "patients": patients,
        "holes": len(cases),
        "variants": len({entry.variant for entry in entries}),
        "MB per patient": sum(entry.path.stat().st_size for entry in entries) / 1e6 / patients,
        "encoded now": encoded,
        "s per volume": each_s or "all cached",
        "s per patient": each_s * sum(entry.volumes for entry in entries) / patients if each_s else "all cached",
    }
