"""Training samples are functions of (seed, step, index), and count alike in the loss."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm_lib.experiment.presets import resolve
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples, crop_around_mask
from ldm_lib.training.objective import masked_loss

STEPS = 1000


def settings(**changes):
    return resolve("smoke", {"latent_crop": 0, **changes})["04_training"]


def latents(k, variant=0, shape=(6, 5, 4)):
    """Distinct latents; every voxel of the target tells where it is, and the mask is one corner block."""
    position = torch.arange(torch.tensor(shape).prod()).view(1, *shape).float()
    mask = torch.zeros(1, *shape)
    mask[:, 1:3, 1:3, 1:3] = 1
    target = position + 1000 * k + 10000 * variant
    return {"target": target, "voided": target * (1 - mask), "mask": mask, "loss": mask, "mask_fraction": mask,
            "conditioning": position.expand(4, *shape).clone()}  # fmt: skip


def samples(count=3, variants=1, **changes):
    config = settings(**changes)
    encodings = [[latents(k, v) for v in range(variants)] for k in range(count)]
    return TrainingSamples(encodings, config, STEPS, global_batch=BatchPlan(count, config).global_batch)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_item_is_a_function_of_seed_step_and_index():
    changes = {"latent_flip_probability": 0.5, "latent_crop": 3}
    data, again = samples(variants=3, **changes), samples(variants=3, **changes)
    first = data[2, 5, 0]
    for other in (data[0, 0, 1], data[2, 6, 0]):  # what was read in between does not matter
        assert not same(first, other)
    torch.manual_seed(77)
    assert same(first, data[2, 5, 0]) and same(first, again[2, 5, 0])
    assert not torch.equal(first["noise"], samples(variants=3, seed=1, **changes)[2, 5, 0]["noise"])
    assert not torch.equal(first["noise"], data[3, 5, 0]["noise"])


def test_t_is_uniform_over_the_schedule_and_the_noise_standard():
    data = samples(1)
    drawn = [data[0, position, 0] for position in range(1000)]
    t = torch.stack([item["t"] for item in drawn])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < STEPS
    quarters = torch.histc(t.float(), bins=4, min=0, max=STEPS)
    assert (quarters - 250).abs().max() < 5 * (1000 * 0.25 * 0.75) ** 0.5
    noise = torch.stack([item["noise"] for item in drawn])
    assert noise.mean().abs() < 0.015 and abs(noise.std() - 1) < 0.015


def test_a_sample_reads_one_encoding_and_none_is_read_before():
    """What makes a cohort larger than memory possible."""
    read = []

    class OnDisk(Sequence):
        def __init__(self, k):
            self.k = k

        def __len__(self):
            return 3

        def __getitem__(self, variant):
            read.append((self.k, variant))
            return latents(self.k, range(3)[variant])

    data, plan = (
        TrainingSamples([OnDisk(k) for k in range(4)], settings(), STEPS, global_batch=2),
        BatchPlan(4, settings()),
    )
    assert not read
    samples = [data[index] for step in range(plan.steps_per_epoch) for index in plan.sample_indices(step)]
    assert [k * 1000 + v * 10000 for k, v in read] == [int(item["target"].flatten()[0]) for item in samples]
    assert sorted(k for k, _ in read) == [0, 1, 2, 3]


def test_a_flip_turns_the_signs_of_latents_and_of_nothing_else():
    """What is even stays, what is odd changes its sign; masks, shares and conditioning are neither."""
    signs = torch.tensor([1.0, -1.0])
    many = {n: t.repeat(2, 1, 1, 1) for n, t in (latents(0) | {"initial_estimate": 2 + latents(0)["target"]}).items()}
    data = TrainingSamples([[many]], settings(latent_flip_probability=1.0), STEPS, global_batch=1, mirror=signs)
    item = data[0, 0, 0]
    for name, tensor in many.items():
        turned = signs.view(2, 1, 1, 1) if name in ("target", "voided", "initial_estimate") else 1
        assert torch.equal(item[name], turned * tensor.flip(1))
    still = TrainingSamples([[many]], settings(), STEPS, global_batch=1, mirror=signs)[0, 0, 0]
    assert same({name: still[name] for name in many}, many), "what is not flipped keeps its signs"


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0.05), (0.3, 0.3 + 0.7 * 0.05), (1.0, 1.0)])
def test_a_fraction_of_the_timesteps_is_from_the_noisiest_twentieth(fraction, expected):
    data = TrainingSamples([[latents(0)]], settings(noisiest_fraction=fraction), 1000, global_batch=1)
    late = np.array([int(data[0, k, 0]["t"]) for k in range(3000)]) >= 950
    assert late.mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("edge", [1, 3, 16])
def test_a_crop_holds_a_part_of_the_mask_and_keeps_tensors_together(edge):
    data = samples(1, latent_crop=edge)
    corners = set()
    for position in range(40):
        item = data[0, position, 0]
        assert item["target"].shape == (1, *(min(edge, n) for n in (6, 5, 4))) == item["noise"].shape
        assert item["mask"].any()
        assert torch.equal(item["conditioning"][:1], item["target"])  # both encode their position
        corners.add(float(item["target"][0, 0, 0, 0]))
    assert len(corners) > 1 or edge == 16


def test_early_crops_are_those_of_the_first_three_quarters():
    config = settings(latent_crop=4, early_crop=2, max_epochs=4, batch_size=1)
    plan = BatchPlan(2, config)
    data = TrainingSamples(
        [[latents(k)] for k in range(2)], config, STEPS, global_batch=1, early_steps=plan.early_steps
    )
    edges = [data[step, 0, 0]["target"].shape[1] for step in range(plan.steps)]
    assert edges == [2] * 6 + [4] * 2


@pytest.mark.parametrize(("count", "batch", "accumulate", "world", "steps"), [
    (4, 2, 1, 1, 2), (5, 2, 3, 1, 1), (1, 2, 2, 1, 1), (7, 1, 1, 4, 2), (9, 2, 2, 2, 2),
])  # fmt: skip
def test_an_epoch_uses_every_case_and_wraps_to_full_batches(count, batch, accumulate, world, steps):
    plan = BatchPlan(count, settings(batch_size=batch, accumulate_grad_batches=accumulate), world=world)
    assert plan.global_batch == batch * accumulate * world and plan.steps_per_epoch == steps
    assert plan.steps == steps * plan.config.max_epochs
    for epoch in (0, 1):
        seen = [index for k in range(steps) for index in plan.sample_indices(epoch * steps + k)]
        cases = [case for *_, case in seen]
        assert sorted(cases[:count]) == list(range(count))
        assert cases[count:] == (cases * 2)[: len(cases) - count]
        assert [index for _, index, _ in seen] == list(range(plan.global_batch)) * steps


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_processes_and_accumulation_split_one_global_batch(world, accumulate):
    """Whoever does it, in however many pieces: together the samples of a step, each once, as for one process."""
    batch = 8 // (world * accumulate)
    config = settings(batch_size=batch, accumulate_grad_batches=accumulate, max_epochs=3)
    plans = [BatchPlan(11, config, rank, world) for rank in range(world)]
    whole = BatchPlan(11, settings(batch_size=8, max_epochs=3))
    for step in range(whole.steps):
        parts = [plan.batches(step) for plan in plans]
        assert all(len(part) == accumulate and all(len(b) == batch for b in part) for part in parts)
        assert sorted(index for part in parts for b in part for index in b) == whole.sample_indices(step)
    later = [list(plan.batches_from(3)) for plan in plans]
    assert [len(batches) for batches in later] == [(whole.steps - 3) * accumulate] * world
    assert later[0][0] == plans[0].batches(3)[0]


def test_the_order_is_a_function_of_seed_and_epoch():
    plan, other = BatchPlan(50, settings(batch_size=50)), BatchPlan(50, settings(batch_size=50, seed=1))
    first, second = ([case for *_, case in plan.sample_indices(step)] for step in (0, 1))
    assert [case for *_, case in plan.sample_indices(0)] == first != second
    assert [case for *_, case in other.sample_indices(0)] != first


@pytest.mark.parametrize("count", [1, 3])
def test_debug_mode_repeats_sixteen_pairs_per_case(count):
    changes = {"overfit_batches": 1, "latent_flip_probability": 0.5, "latent_crop": 3, "batch_size": 1}
    data, plan = samples(count, **changes), BatchPlan(count, settings(**changes))
    assert plan.steps_per_epoch == 16 * count
    epochs = [
        [
            data[index]
            for k in range(plan.steps_per_epoch)
            for index in plan.sample_indices(epoch * plan.steps_per_epoch + k)
        ]
        for epoch in (0, 1, 7)
    ]
    assert all(same(a, b) for other in epochs[1:] for a, b in zip(epochs[0], other, strict=True))
    for k in range(count):
        own = [item for item in epochs[0] if int(item["target"][0, 0, 0, 0]) // 1000 == k]
        times = sorted(int(item["t"]) for item in own)
        assert len(set(times)) == 16 and times[0] == 100 and times[-1] == 999
        assert len({item["noise"].sum().item() for item in own}) == 16
    assert len({item["noise"].sum().item() for item in epochs[0]}) == 16 * count


def test_the_loss_is_the_mean_over_samples_of_the_mean_over_the_mask():
    predicted, noise = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4, 4)
    mask[0, :, :1, :1, :1] = 1  # a mask of one latent voxel weighs as much
    mask[1, :, 1:] = 1  # as one of forty-eight
    oracle = (
        F.mse_loss(predicted[0, :, 0, 0, 0], noise[0, :, 0, 0, 0]) + F.mse_loss(predicted[1, :, 1:], noise[1, :, 1:])
    ) / 2
    assert masked_loss(predicted, noise, mask).item() == pytest.approx(oracle.item(), rel=1e-5)


def test_the_loss_ignores_latent_voxels_outside_the_mask_and_their_gradient():
    predicted, noise = torch.randn(1, 2, 3, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3, 3)
    mask = (torch.rand(1, 1, 3, 3, 3) > 0.5).float()
    masked_loss(predicted, noise, mask).backward()
    assert torch.equal((predicted.grad != 0).any(1, keepdim=True).float(), mask)


def test_latent_voxels_outside_the_mask_are_added_when_they_count():
    item = samples(1, outside_weight=0.1)[0, 0, 0]
    assert torch.equal(item.pop("outside"), 1 - item["mask"]) and same(item, samples(1)[0, 0, 0])


def test_a_sample_with_an_empty_mask_adds_nothing():
    predicted, noise = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    mask = torch.ones(2, 1, 2, 2, 2)
    mask[1] = 0
    assert masked_loss(predicted, noise, mask) == 0.5
    assert masked_loss(predicted, noise, 0 * mask) == 0


def test_the_loss_is_computed_in_float32():
    noise = torch.zeros(1, 1, 16, 16, 16, dtype=torch.float16)
    loss = masked_loss(noise + 100, noise, torch.ones(1, 1, 16, 16, 16))  # the sum overflows float16
    assert loss.dtype == torch.float32 and loss == 10000


def test_conditioning_is_dropped_with_the_requested_probability_and_changes_no_other_draw():
    one = {"latent_crop": 3}
    always, often = (samples(2, **one, conditioning_dropout=p) for p in (0.0, 0.3))
    indices = [(epoch, position, position % 2) for epoch in range(100) for position in range(8)]
    conditioned = []
    for index in indices:
        plain, dropped = always[index], often[index]
        conditioned.append(float(dropped.pop("conditioned")))
        assert "conditioned" not in plain and same(plain, dropped)
    assert set(conditioned) == {0.0, 1.0} and abs(1 - np.mean(conditioned) - 0.3) < 0.05


def test_debug_mode_is_always_conditioned():
    data = samples(2, overfit_batches=1, conditioning_dropout=1.0)
    assert all(data[0, position, 0]["conditioned"] == 1 for position in range(8))


def test_every_variant_is_used():
    data = samples(1, variants=3)
    seen = {int(data[0, position, 0]["target"][0, 0, 0, 0]) // 10000 for position in range(50)}
    assert seen == {0, 1, 2}


def test_without_latent_changes_the_latents_are_the_cached_ones():
    item = samples(1)[4, 2, 0]
    assert same({name: item[name] for name in latents(0)}, latents(0))


def test_a_latent_flip_flips_everything_left_and_right():
    item, plain = samples(1, latent_flip_probability=1.0)[0, 0, 0], latents(0)
    assert all(torch.equal(item[name], plain[name].flip(1)) for name in plain)
    assert torch.equal(item["noise"], samples(1)[0, 0, 0]["noise"])  # noise has no left and right


def test_cropping_changes_none_of_its_inputs():
    sample = latents(0)
    crop_around_mask(sample, 2, np.random.default_rng(0))
    assert same(sample, latents(0))


def test_debug_mode_fits_a_short_schedule():
    data = TrainingSamples([[latents(0)]], settings(overfit_batches=1), 20, global_batch=1)
    times = [int(data[step, 0, 0]["t"]) for step in range(16)]
    assert times[0] == 2 and times[-1] == 19


def test_accumulated_batches_average_samples_equally():
    predicted, noise = torch.randn(4, 2, 3, 3, 3), torch.randn(4, 2, 3, 3, 3)
    mask = (torch.rand(4, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    whole = masked_loss(predicted, noise, mask)
    halves = [masked_loss(predicted[part], noise[part], mask[part]) for part in (slice(2), slice(2, 4))]
    assert whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)
