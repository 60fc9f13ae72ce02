"""Laws of the latent cache: never stale, never damaged, never encoded twice; and what the denoiser is shown."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ldm_lib import latents as module
from ldm_lib.augmentation import Augmentation
from ldm_lib.cases import load_case
from ldm_lib.cohort import find_cases
from ldm_lib.conditioning import model_case
from ldm_lib.geometry import latent_mask
from ldm_lib.latents import (
    CellSettings,
    LatentCache,
    collate,
    denoiser_input,
    encode_case,
    input_channels,
    keep_known,
)
from ldm_lib.volumes import read_volume, write_map
from ldm_lib.weights import load_model

HOW = {"device": torch.device("cpu"), "precision": "32"}
CHANGE = Augmentation(flip_probability=0.5, rotation_degrees=8.0, intensity_shift=0.1)


class Counting(nn.Module):
    """An autoencoder that counts how often it encodes."""

    def __init__(self, folder):
        super().__init__()
        self.network, self.calls = load_model(folder, "autoencoder"), 0

    @property
    def factor(self):
        return self.network.factor

    @property
    def spacing_mm(self):
        return self.network.spacing_mm

    def encode(self, volume):
        self.calls += 1
        return self.network.encode(volume)


@pytest.fixture
def autoencoder(tiny_autoencoder_folder):
    return Counting(tiny_autoencoder_folder)


@pytest.fixture
def sources(cohort_folder, tmp_path):
    """Cases of a copy of the cohort, to spoil."""
    shutil.copytree(cohort_folder.parent, tmp_path / "cohort")
    return find_cases(tmp_path / "cohort" / "data")[0][:3:2]


def cache(folder, autoencoder, weights="w", settings=None, **options):
    return LatentCache(folder, autoencoder, weights, settings or CellSettings(), **{**HOW, **options})


def filled(*args, cases, **options):
    """All entries of a cache over these cases."""
    return [entry for _, entries in cache(*args, **options).fill(cases) for entry in entries]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_entry_is_what_encoding_gives(sources, autoencoder, tmp_path):
    for case, entry in zip(sources, filled(tmp_path / "c", autoencoder, cases=sources), strict=True):
        on_grid = model_case(load_case(case), 2)
        assert same(entry, encode_case(on_grid, autoencoder, CellSettings(), **HOW))
        with torch.inference_mode():
            target = autoencoder.encode(torch.from_numpy(on_grid.target)[None, None])[0]
        assert torch.equal(entry["target"], target)
        assert np.array_equal(entry["hole"][0].numpy() > 0, latent_mask(on_grid.mask, 2, 1))


def test_what_did_not_change_is_not_encoded_again(sources, autoencoder, tmp_path):
    first = filled(tmp_path / "c", autoencoder, cases=sources, variants=2, augmentation=CHANGE)
    assert autoencoder.calls == 2 * 2 * 2  # cases, variants, voided and target
    again = filled(tmp_path / "c", autoencoder, cases=sources, variants=2, augmentation=CHANGE)
    assert autoencoder.calls == 8
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    filled(tmp_path / "c", autoencoder, cases=sources, variants=3, augmentation=CHANGE)
    assert autoencoder.calls == 8 + 4  # the third variant alone


def test_only_the_first_variant_is_as_it_is(sources, autoencoder, tmp_path):
    variants = filled(tmp_path / "c", autoencoder, cases=sources[:1], variants=4, augmentation=CHANGE)
    plain, *others = variants
    assert same(plain, filled(tmp_path / "d", autoencoder, cases=sources[:1])[0])
    targets = [plain, *others]
    assert not any(torch.equal(a["target"], b["target"]) for k, a in enumerate(targets) for b in targets[:k])


@pytest.mark.parametrize("change", [
    {"weights": "other"},
    {"settings": CellSettings(mask_dilation=0)},
    {"settings": CellSettings(growth_threshold=0.3)},
    {"settings": CellSettings(pooling="nearest")},
    {"settings": CellSettings(context="concat")},
    {"precision": "bf16"},
], ids=str)  # fmt: skip
def test_other_weights_or_settings_never_find_an_entry(sources, autoencoder, tmp_path, change):
    filled(tmp_path / "c", autoencoder, cases=sources)
    before = autoencoder.calls
    filled(tmp_path / "c", autoencoder, cases=sources, **change)
    assert autoencoder.calls == 2 * before


def test_other_code_never_finds_an_entry(sources, autoencoder, tmp_path, monkeypatch):
    filled(tmp_path / "c", autoencoder, cases=sources)
    monkeypatch.setattr(module, "CODE_VERSION", module.CODE_VERSION + 1)
    filled(tmp_path / "c", autoencoder, cases=sources)
    assert autoencoder.calls == 8


@pytest.mark.parametrize("change", [
    {"seed": 1},
    {"augmentation": replace(CHANGE, rotation_degrees=9.0)},
], ids=["seed", "augmentation"])  # fmt: skip
def test_other_augmentation_is_encoded_anew_and_only_it(sources, autoencoder, tmp_path, change):
    options = {"variants": 2, "augmentation": CHANGE}
    first = filled(tmp_path / "c", autoencoder, cases=sources[:1], **options)
    other = filled(tmp_path / "c", autoencoder, cases=sources[:1], **options | change)
    assert autoencoder.calls == 4 + 2
    assert same(first[0], other[0]) and not torch.equal(first[1]["target"], other[1]["target"])


@pytest.mark.parametrize("role", ["t1n", "t1n_voided", "growth", "tissue", "mask", "mask_unhealthy"])
def test_other_source_bytes_are_encoded_anew(sources, autoencoder, tmp_path, role):
    case = sources[0]
    filled(tmp_path / "c", autoencoder, cases=[case])
    path = getattr(case, role)
    volume = read_volume(path)
    changed = volume.raw.copy()
    hole = tuple(np.argwhere(load_case(case).unhealthy)[0])
    changed[hole] = 0 if role in ("mask", "mask_unhealthy") else 1
    if role == "growth":
        changed[hole] = 0.123
    write_map(path, changed, volume.affine)
    with_change = filled(tmp_path / "c", autoencoder, cases=[case])
    assert autoencoder.calls == 4
    assert same(with_change[0], filled(tmp_path / "d", autoencoder, cases=[case])[0])


def test_a_map_that_went_missing_is_noticed(sources, autoencoder, tmp_path):
    known = filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]
    unknown = filled(tmp_path / "c", autoencoder, cases=[replace(sources[0], growth=None)])[0]
    assert known["conditioning"][0].any() and not unknown["conditioning"][0].any()
    assert unknown["loss"].sum() < known["loss"].sum()  # unhealthy cells of unknown growth leave the loss


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_flipped_bit_is_found_and_mended(sources, autoencoder, tmp_path, share, caplog):
    entry = filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]
    (path,) = (tmp_path / "c").iterdir()
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)
    again = filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]
    assert same(entry, again) and autoencoder.calls == 4
    assert "encoded again" in caplog.text and path.name in caplog.text
    assert same(entry, filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]) and autoencoder.calls == 4


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_entry_is_found_and_mended(sources, autoencoder, tmp_path, length, caplog):
    entry = filled(tmp_path / "c", autoencoder, cases=sources[:1])[0]
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:length])
    assert same(entry, filled(tmp_path / "c", autoencoder, cases=sources[:1])[0])
    assert autoencoder.calls == 4 and "encoded again" in caplog.text


def test_two_caches_that_fill_one_folder_agree(sources, autoencoder, tiny_autoencoder_folder, tmp_path):
    """While the first encodes a case, the second encodes and writes the same one."""
    second = Counting(tiny_autoencoder_folder)
    theirs = []

    def meanwhile(volume):
        if not theirs:
            theirs.extend(filled(tmp_path / "c", second, cases=sources))
        return Counting.encode(autoencoder, volume)

    autoencoder.encode = meanwhile
    ours = filled(tmp_path / "c", autoencoder, cases=sources)
    assert second.calls == 4 and autoencoder.calls == 2  # the second case was there already
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_an_interrupted_write_leaves_nothing_to_be_found(sources, autoencoder, tmp_path, monkeypatch):
    def die(entry, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", die)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / "c", autoencoder, cases=sources[:1])
    assert not list((tmp_path / "c").iterdir())
    assert len(filled(tmp_path / "c", autoencoder, cases=sources[:1])) == 1


def random_batch(c=3, shape=(4, 4, 4), b=2):
    draw = torch.Generator().manual_seed(0)
    sizes = {"voided": c, "target": c, "conditioning": 4, "share": 1}
    batch = {name: torch.randn(b, n, *shape, generator=draw) for name, n in sizes.items()}
    return batch | {"hole": (torch.rand(b, 1, *shape, generator=draw) > 0.5).float()}


def test_known_cells_are_the_voided_ones_whatever_the_rest():
    batch = random_batch()
    kept = keep_known(torch.full_like(batch["voided"], 9.0), batch)
    hole = batch["hole"].expand_as(kept) > 0
    assert (kept[hole] == 9).all() and torch.equal(kept[~hole], batch["voided"][~hole])


@pytest.mark.parametrize("context", ["composite", "concat"])
def test_the_denoiser_sees_what_the_context_says(context):
    batch, settings, noisy = random_batch(), CellSettings(context=context), torch.randn(2, 3, 4, 4, 4)
    seen = denoiser_input(noisy, batch, settings)
    assert seen.shape[1] == input_channels(3, settings) == (8 if context == "composite" else 12)
    assert torch.equal(seen[:, :3], keep_known(noisy, batch))
    assert torch.equal(seen[:, 3:7], batch["conditioning"]) and torch.equal(seen[:, 7:8], batch["hole"])
    if context == "concat":
        assert torch.equal(seen[:, 8:11], batch["voided"]) and torch.equal(seen[:, 11:], batch["share"])


def test_collating_pads_behind_with_what_no_loss_sees():
    small, large = ({k: v[0] for k, v in random_batch(shape=s).items()} for s in ((3, 4, 2), (4, 4, 4)))
    batch = collate([small | {"t": torch.tensor(5)}, large | {"t": torch.tensor(6)}])
    assert batch["t"].tolist() == [5, 6]
    for name in small:
        assert torch.equal(batch[name][0][:, :3, :4, :2], small[name]) and torch.equal(batch[name][1], large[name])
        assert not batch[name][0][:, 3:].any() and not batch[name][0][..., 2:].any()
