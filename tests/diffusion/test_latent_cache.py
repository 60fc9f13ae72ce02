"""Laws of the latent cache: never stale, never damaged, never encoded twice, not even by two processes."""

import logging
import multiprocessing
import pickle
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import CHANGE, HOW, Counting, cache, fill_slowly
from safetensors.torch import load_file, save_file

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.augmentation import Augmentation
from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion import latent_cache as module
from ldm_lib.diffusion.latent_cache import LatentCache
from ldm_lib.diffusion.latents import LatentSpec, encode_case
from ldm_lib.errors import InputError, RunError
from ldm_lib.files import sha256
from ldm_lib.images.volume import read_volume, write_map
from ldm_lib.model_io import load_model

MASKS = {"mask", "loss"}


@pytest.fixture
def autoencoder(tiny_autoencoder_folder):
    return Counting(tiny_autoencoder_folder)


@pytest.fixture
def sources(cohort_folder, tmp_path):
    """Two scans of two masks each, of a copy of the cohort, to spoil."""
    shutil.copytree(cohort_folder.parent, tmp_path / "cohort")
    return find_cases(tmp_path / "cohort" / "data")[:4]


def filled(*args, cases, variants=1, **options):
    """All encodings of a cache over these cases."""
    return [latents for case in cache(*args, **options).encode(cases, variants=variants) for latents in case]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def entries(folder):
    return sorted(folder.glob("*.safetensors"))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def encoded(case, autoencoder, **options):
    return encode_case(grid_case(load_case(case), 2), autoencoder, LatentSpec(**options), **HOW)


# ---- what is kept, and in how many bytes


def test_an_encoding_is_what_encoding_gives_to_half_precision(sources, autoencoder, tmp_path):
    for case, kept in zip(sources, filled(tmp_path / "c", autoencoder, cases=sources), strict=True):
        exact = encoded(case, autoencoder)
        assert kept.keys() == exact.keys() and all(tensor.dtype == torch.float32 for tensor in kept.values())
        for name, tensor in exact.items():
            assert torch.equal(kept[name], tensor if name in MASKS else tensor.half().float()), name
            assert ((kept[name] - tensor).abs() <= tensor.abs() * 2.0**-11 + 2.0**-25).all(), name


def test_one_file_holds_all_masks_of_a_scan_in_one_variant(sources, autoencoder, tmp_path):
    filled(tmp_path / "c", autoencoder, cases=sources, variants=2, augmentation=CHANGE)
    found = {path.name.rpartition("-")[0]: load_file(path) for path in entries(tmp_path / "c")}
    first, second = sources[0].id, sources[2].id
    assert sorted(found) == [f"{first}-0", f"{first}-1", f"{second}-0", f"{second}-1"]
    own = ("mask", "loss", "mask_fraction", "target", "voided", "conditioning")
    assert (
        found[f"{first}-0"].keys() == found[f"{first}-1"].keys() == {f"{c.key}/{n}" for c in sources[:2] for n in own}
    )
    for name, tensor in found[f"{first}-1"].items():
        assert tensor.dtype == (torch.bool if name.rpartition("/")[2] in MASKS else torch.float16), name
    for path in entries(tmp_path / "c"):
        content = 15 * 15 * 10 * 2 * (2 * (3 + 3 + 4 + 1) + 1 + 1)  # latent voxels, masks, bytes
        assert content < path.stat().st_size < content + 2000


def test_the_full_image_changes_with_the_scale_of_its_mask(sources, autoencoder, tmp_path):
    """Why it is encoded for each mask: the intensities are divided by a percentile of the voided image."""
    volume = read_volume(sources[1].t1n_voided)
    write_map(sources[1].t1n_voided, volume.raw * 1.25, volume.affine)
    one, other, third, fourth = filled(tmp_path / "c", autoencoder, cases=sources)
    assert load_case(sources[1]).scale == pytest.approx(1.25 * load_case(sources[0]).scale)
    assert (one["target"] - other["target"]).abs().max() > 0.1
    equal = load_case(sources[2]).scale == load_case(sources[3]).scale
    assert torch.equal(third["target"], fourth["target"]) == equal


def test_a_case_is_encoded_alike_whatever_other_masks_there_are(sources, autoencoder, tmp_path):
    options = {"variants": 2, "augmentation": CHANGE}
    together = filled(tmp_path / "c", autoencoder, cases=sources[:2], **options)
    alone = filled(tmp_path / "d", autoencoder, cases=sources[1:2], **options)
    assert all(same(a, b) for a, b in zip(together[2:], alone, strict=True))


def test_only_the_first_variant_is_not_augmented_and_every_mask_has_its_own(sources, autoencoder, tmp_path):
    drawn = []

    class Watched(Augmentation):
        def __call__(self, case, rng, *, spacing_mm):
            drawn.append(rng.bit_generator.state["state"]["state"])
            return super().__call__(case, rng, spacing_mm=spacing_mm)

    change = Watched(rotation_degrees=8.0, intensity_shift=0.1)
    variants = filled(tmp_path / "c", autoencoder, cases=sources[:2], variants=3, augmentation=change)[:3]
    assert same(variants[0], filled(tmp_path / "d", autoencoder, cases=sources[:2])[0])
    targets = [latents["target"] for latents in variants]
    assert not any(torch.equal(a, b) for k, a in enumerate(targets) for b in targets[:k])
    assert len(drawn) == len(set(drawn)) == 2 * 2  # masks, augmented variants


def test_latents_that_float16_cannot_hold_are_rejected(sources, autoencoder, tmp_path):
    autoencoder.encode = lambda volume: 1e5 * autoencoder.network.encode(volume).abs() + 1e5
    with pytest.raises(InputError, match=rf"{sources[0].key}/voided: not finite as latents in float16. Fix: use"):
        filled(tmp_path / "c", autoencoder, cases=sources)
    assert not entries(tmp_path / "c")


# ---- reading


def test_a_handle_reads_when_asked_and_holds_nothing(sources, autoencoder, tmp_path):
    handles = cache(tmp_path / "c", autoencoder, augmentation=CHANGE).encode(sources, variants=2)
    assert [handle.case for handle in handles] == sources and {len(handle) for handle in handles} == {2}
    assert same(handles[0][1], handles[0][-1]) and not same(handles[0][0], handles[0][1])
    copied = pickle.loads(pickle.dumps(handles[3]))  # noqa: S301, as a loader process gets it
    assert same(copied[1], handles[3][1]) and len(pickle.dumps(handles[3])) < 2000
    read = handles[0][0]
    for path in entries(tmp_path / "c"):
        path.write_bytes(b"")
    assert same(read, read | {"mask": read["mask"].clone()})  # what was read is not the file's own memory
    with pytest.raises(RunError, match=r"safetensors: cannot be read \(.*\). Fix: run the stage again"):
        handles[0][0]
    entries(tmp_path / "c")[0].unlink()
    with pytest.raises(RunError, match="cannot be read"):
        handles[0][0]


# ---- never encoded twice, never stale


def test_what_did_not_change_is_not_encoded_again(sources, autoencoder, tmp_path):
    options = {"cases": sources[:2], "augmentation": CHANGE}
    first = filled(tmp_path / "c", autoencoder, variants=2, **options)
    assert autoencoder.calls == 2 * 2 * 2  # cases, variants, voided and target
    again = filled(tmp_path / "c", autoencoder, variants=2, **options)
    assert autoencoder.calls == 8
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    filled(tmp_path / "c", autoencoder, variants=3, **options)
    assert autoencoder.calls == 8 + 4  # the third variant alone
    filled(tmp_path / "c", autoencoder, variants=1, **options)
    assert autoencoder.calls == 12 and len(entries(tmp_path / "c")) == 3  # fewer variants throw none away


@pytest.mark.parametrize("change", [
    {"weights": "other"},
    {"settings": LatentSpec(mask_dilation=0)},
    {"settings": LatentSpec(growth_threshold=0.3)},
    {"settings": LatentSpec(pooling="nearest")},
    {"settings": LatentSpec(context="concat")},
    {"precision": "bf16"},
    {"build": {"input_transform": "haar"}},
    {"code": 77},
], ids=str)  # fmt: skip
def test_other_weights_settings_or_code_never_find_an_entry(
    sources, autoencoder, tmp_path, monkeypatch, caplog, change
):
    made = cache(tmp_path / "c", autoencoder)
    made.encode(sources[:2])
    before = entries(tmp_path / "c")
    if "code" in change:
        monkeypatch.setattr(module, "CODE_VERSION", change.pop("code"))
    autoencoder.config = autoencoder.config | change.pop("build", {})
    made = cache(tmp_path / "c", autoencoder, **change)
    assert not warnings_of(caplog)
    made.encode(sources[:2])
    assert autoencoder.calls == 8 and made.costs["replaced"] == 1
    assert not set(before) & set(entries(tmp_path / "c")) and len(entries(tmp_path / "c")) == 1
    (warning,) = warnings_of(caplog)
    assert "1 stale" in warning


@pytest.mark.parametrize("change", [{"seed": 1}, {"augmentation": replace(CHANGE, rotation_degrees=9.0)}], ids=str)
def test_other_augmentation_is_encoded_again_and_only_it(sources, autoencoder, tmp_path, change):
    options = {"variants": 2, "augmentation": CHANGE, "cases": sources[:1]}
    first = filled(tmp_path / "c", autoencoder, **options)
    other = filled(tmp_path / "c", autoencoder, **options | change)
    assert autoencoder.calls == 4 + 2
    assert same(first[0], other[0]) and not torch.equal(first[1]["target"], other[1]["target"])


def test_stale_entries_of_other_scans_and_variants_stay(sources, autoencoder, tmp_path, caplog):
    """One warning per call, with the number; files of other scans and variants stay."""
    filled(tmp_path / "c", autoencoder, cases=sources[1:3], variants=2, augmentation=CHANGE)
    before = set(entries(tmp_path / "c"))
    filled(tmp_path / "c", autoencoder, "other", cases=sources[1:2])
    gone = {path.name.rpartition("-")[0] for path in before - set(entries(tmp_path / "c"))}
    assert gone == {f"{sources[0].id}-0"} and len(entries(tmp_path / "c")) == 4
    (warning,) = warnings_of(caplog)
    assert "1 stale" in warning


@pytest.mark.parametrize("role", ["t1n", "t1n_voided", "growth", "tissue", "mask", "mask_unhealthy"])
def test_other_source_bytes_are_encoded_again(sources, autoencoder, tmp_path, role):
    case = sources[0]
    filled(tmp_path / "c", autoencoder, cases=[case])
    path = getattr(case, role)
    volume = read_volume(path)
    changed, data = volume.raw.copy(), load_case(case)
    masked, brain = (tuple(np.argwhere(where)[0]) for where in (data.unhealthy, ~data.mask & (data.voided > 0)))
    changed[brain if role == "t1n_voided" else masked] = {"growth": 0.123, "mask": 0, "mask_unhealthy": 0}.get(role, 1)
    write_map(path, changed, volume.affine)
    if "mask" in role:  # the parts are the whole
        other = {"mask": case.mask_unhealthy, "mask_unhealthy": case.mask_healthy}[role]
        part = read_volume(other).raw.copy()
        part[masked] = role == "mask_unhealthy"
        write_map(other, part, volume.affine)
    with_change = filled(tmp_path / "c", autoencoder, cases=[case])
    assert autoencoder.calls == 4
    assert same(with_change[0], filled(tmp_path / "d", autoencoder, cases=[case])[0])


# ---- never damaged


def assert_replaced(sources, autoencoder, folder, before, caplog):
    """The next fill says so and encodes this one entry again, the one after it none."""
    made = cache(folder, autoencoder)
    assert all(same(a, handle[0]) for a, handle in zip(before, made.encode(sources[:2]), strict=True))
    assert autoencoder.calls == 8 and made.costs["replaced"] == 1
    (warning,) = warnings_of(caplog)
    assert "encoded again" in warning and entries(folder)[0].name in warning
    assert all(same(a, b) for a, b in zip(before, filled(folder, autoencoder, cases=sources[:2]), strict=True))
    assert autoencoder.calls == 8 and len(entries(folder)) == 1


@pytest.mark.parametrize("fraction", [0.0, 0.005, 0.3, 0.99999])
def test_a_flipped_bit_is_found_and_replaced(sources, autoencoder, tmp_path, fraction, caplog):
    before = filled(tmp_path / "c", autoencoder, cases=sources[:2])
    (path,) = entries(tmp_path / "c")
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= 4
    path.write_bytes(content)
    assert_replaced(sources, autoencoder, tmp_path / "c", before, caplog)


@pytest.mark.parametrize("what", ["cut", "empty", "another file", "another entry"])
def test_what_is_not_this_entry_is_found_and_replaced(
    sources, autoencoder, tiny_autoencoder_folder, tmp_path, what, caplog
):
    before = filled(tmp_path / "c", autoencoder, cases=sources[:2])
    (path,) = entries(tmp_path / "c")
    if what == "another file":
        save_file({"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(1)}, path)
    elif what == "another entry":  # sound in itself, and of other weights
        filled(tmp_path / "d", Counting(tiny_autoencoder_folder), "o", cases=sources[:2])
        shutil.copy(entries(tmp_path / "d")[0], path)
    else:
        path.write_bytes(path.read_bytes()[:-1] if what == "cut" else b"")
    assert_replaced(sources, autoencoder, tmp_path / "c", before, caplog)


def test_an_interrupted_write_leaves_nothing_to_be_found(sources, autoencoder, tmp_path, monkeypatch):
    def die(entry, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", die)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / "c", autoencoder, cases=sources[:1])
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_file()]
    assert len(filled(tmp_path / "c", autoencoder, cases=sources[:1])) == 1


# ---- two processes


def other_process(method, *args):
    """A process that works on the same folder; and a queue to hear from it."""
    context = multiprocessing.get_context(method)
    heard = context.Queue()
    process = context.Process(target=fill_slowly, args=(heard, *args), daemon=True)
    process.start()
    return process, heard


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_share_the_work(sources, autoencoder, tiny_autoencoder_folder, tmp_path, method, capsys):
    """Both end with the whole cache, which is that of one process, byte for byte; no volume is encoded twice."""
    process, heard = other_process(method, tmp_path / "c", tiny_autoencoder_folder, sources, 0.08)
    assert heard.get(timeout=60) == "began"
    autoencoder.seconds = 0.08
    handles = cache(tmp_path / "c", autoencoder, augmentation=CHANGE).encode(sources, variants=2)
    assert "encoding scan 4/4" in capsys.readouterr().err  # what the other one encoded included
    while (theirs := heard.get(timeout=60)) == "began":
        pass
    process.join(timeout=60)
    ours = sum(float(latents["voided"].sum()) for handle in handles for latents in handle)
    assert theirs[1] == ours and theirs[0] + autoencoder.calls == 16 and 4 <= theirs[0] <= 12
    alone = cache(tmp_path / "d", autoencoder, augmentation=CHANGE)
    alone.encode(sources, variants=2)
    assert [(p.name, sha256(p)) for p in entries(tmp_path / "c")] == [
        (p.name, sha256(p)) for p in entries(tmp_path / "d")
    ]
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p not in entries(tmp_path / "c")) == [".locks"]


def test_what_a_killed_process_began_is_made_last(sources, autoencoder, tiny_autoencoder_folder, tmp_path):
    """It holds the first entry: the others are made first, then it is waited for, and when it dies, replaced."""
    process, heard = other_process("fork", tmp_path / "c", tiny_autoencoder_folder, sources, 15.0)
    assert heard.get(timeout=60) == "began"
    alive, plain = [], autoencoder.network.encode

    def encode(volume):
        alive.append(process.is_alive())
        if len(alive) == 12:
            threading.Timer(0.3, process.kill).start()
        return plain(volume)

    autoencoder.encode = encode
    filled(tmp_path / "c", autoencoder, cases=sources, variants=2, augmentation=CHANGE)
    assert alive == [True] * 12 + [False] * 4 and process.exitcode == -signal.SIGKILL
    assert len(entries(tmp_path / "c")) == 4


def test_what_another_process_replaces_meanwhile_is_not_made_again(sources, autoencoder, tmp_path, monkeypatch):
    """Both find the entry damaged; the second gets the lock when the first has replaced it."""
    filled(tmp_path / "c", autoencoder, cases=sources[:2])
    (path,) = entries(tmp_path / "c")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    make = LatentCache._encode_entries

    def replaced_first(self, missing, progress):
        path.write_bytes(whole)
        return make(self, missing, progress)

    monkeypatch.setattr(LatentCache, "_encode_entries", replaced_first)
    made = cache(tmp_path / "c", autoencoder)
    made.encode(sources[:2])
    assert autoencoder.calls == 4 and made.costs["encoded now"] == 0


# ---- what is reported


def test_progress_and_costs_are_of_what_is_encoded_now(sources, autoencoder, tmp_path, capsys):
    made = cache(tmp_path / "c", autoencoder, augmentation=CHANGE)
    for variants, cases, encoded in ((1, sources[:2], 1), (2, sources[:3], 3), (2, sources[:3], 0)):
        made.encode(cases, variants=variants)
        size = sum(p.stat().st_size for p in entries(tmp_path / "c")) / 1e6
        patients = 1 if len(cases) == 2 else 2
        assert made.costs == {"patients": patients, "masks": len(cases), "variants": variants, "encoded now": encoded,
                              "replaced": 0, "MB per patient": pytest.approx(size / patients)}  # fmt: skip
        assert (f"encoding scan {encoded}/{encoded}: " in capsys.readouterr().err) is bool(encoded)


# ---- more laws


def test_handles_come_in_the_order_of_the_cases(sources, autoencoder, tmp_path):
    mixed = [sources[k] for k in (3, 0, 2, 1)]
    handles = cache(tmp_path / "c", autoencoder).encode(mixed)
    assert [handle.case.key for handle in handles] == [case.key for case in mixed]
    assert all(torch.equal(h[0]["mask"], encoded(h.case, autoencoder)["mask"]) for h in handles)
    assert same(filled(tmp_path / "c", autoencoder, cases=sources)[1], handles[3][0])
    assert autoencoder.calls == 8 + 8  # one of each pair to compare with; the order of cases does not matter


def test_a_map_that_went_missing_is_noticed(sources, autoencoder, tmp_path):
    known = filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]
    unknown = filled(tmp_path / "c", autoencoder, cases=[replace(sources[0], growth=None)])[0]
    assert known["conditioning"][0].any() and not unknown["conditioning"][0].any()
    assert unknown["loss"].sum() < known["loss"].sum()  # unhealthy latent voxels of unknown growth leave the loss


def test_cases_of_another_voxel_size_are_rejected(sources, autoencoder, tmp_path):
    """A training case is not resampled, so its latents would be of another scale than the model's."""
    autoencoder.spacing_mm = 1.0
    with pytest.raises(InputError, match=r"has voxels of 8x8x8 mm, the autoencoder was trained at 1 mm"):
        cache(tmp_path / "c", autoencoder).encode(sources)


def test_fresh_encodings_are_draws_to_half_precision_and_are_made_once(sources, autoencoder, tmp_path):
    latents = cache(tmp_path / "c", autoencoder)
    handles = latents.encode(sources, variants=2, fresh_crop=4)
    drawn = latents.sources(sources, 4)
    assert [each.case.key for each in drawn] == [case.key for case in sources]
    for handle, source in zip(handles, drawn, strict=True):
        for variant in range(2):
            for name, tensor in source[variant].items():
                kept = handle[variant][name]
                assert torch.equal(kept, tensor if name in MASKS else tensor.half().float()), name
    before = autoencoder.calls
    latents.encode(sources, variants=2, fresh_crop=4)
    assert autoencoder.calls == before and latents.costs["encoded now"] == 0
    latents.encode(sources, variants=2, fresh_crop=6)
    assert latents.costs["encoded now"] == 4, "another crop is another draw"


def test_versions_to_look_at_are_the_draws(sources, autoencoder, tmp_path):
    versions = cache(tmp_path / "c", autoencoder).versions(sources[0], 2, fresh_crop=4)
    assert list(versions) == ["original", "version 1", "version 2"]
    for name in ("version 1", "version 2"):
        version = versions[name]
        assert version.mask.shape == ((4 + 2) * autoencoder.factor,) * 3, "the crop and its rim"
        assert not version.voided[version.mask].any() and version.mask.any()
        assert np.array_equal(version.voided[~version.mask], version.target[~version.mask])


def test_processes_make_the_bytes_of_one(sources, tiny_autoencoder_folder, tmp_path):
    """Two scans in two processes, and augmented encodings as well as fresh ones."""
    model = load_model(tiny_autoencoder_folder, Autoencoder)
    for crop in (0, 4):
        made = [cache(tmp_path / f"{crop}-{workers}", model, augmentation=CHANGE) for workers in (1, 2)]
        for workers, each in enumerate(made, start=1):
            each.encode(sources, variants=2, fresh_crop=crop, workers=workers)
            assert each.costs["encoded now"] == 4
        one, two = (entries(each.folder) for each in made)
        assert [path.name for path in one] == [path.name for path in two]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
