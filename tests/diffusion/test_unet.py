"""Laws of the 3D ADM: what it computes at first, where it looks, and that axes and padding are fair."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm_lib.diffusion.unet import (
    ADM,
    Attention,
    Norm,
    ResidualBlock,
    count_flops,
    count_parameters,
    timestep_embedding,
)
from ldm_lib.errors import ConfigError

SMALL = {"in_channels": 5, "out_channels": 3, "base_width": 8, "head_channels": 8}


def awake(seed=0, **options):
    """A small network whose zero-initialised layers are drawn too, as if it had been trained."""
    torch.manual_seed(seed)
    network = ADM(**{**SMALL, **options}).eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def latents(*shape, batch=2, channels=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *shape, generator=generator)


def test_an_untrained_network_predicts_exactly_zero():
    network = ADM(**SMALL)
    assert not network(latents(5, 7, 3), torch.tensor([0, 999])).any()


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (8, 4, 12)])
def test_any_latent_shape_comes_back(shape):
    y = awake()(latents(*shape, batch=1), torch.tensor([10]))
    assert y.shape == (1, 3, *shape)
    assert y.std() > 0


def test_padding_is_zeros_and_is_undone_at_its_offset():
    network, t = awake(), torch.tensor([3, 700])
    x = latents(6, 5, 7)
    whole = network(F.pad(x, (0, 1, 1, 2, 1, 1)), t)
    assert torch.equal(network(x, t), whole[:, :, 1:7, 1:6, 0:7])


@pytest.mark.parametrize("rates", [(), (4,), (2, 4), (1,)])
def test_attention_acts_only_at_the_rates_asked_for(rates):
    network, voxels = awake(attention_rates=rates), []
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda *args: voxels.append(args[1][0][0, 0].numel()))
    network(latents(8, 8, 8), torch.tensor([0, 1]))
    counts = {rate: voxels.count((8 // rate) ** 3) for rate in (1, 2, 4)}
    # Two blocks down, three up; and always one in the middle.
    assert counts == {rate: 5 * (rate in rates) + (rate == 4) for rate in (1, 2, 4)}


@pytest.mark.parametrize(("channels", "heads"), [(512, 8), (24, 1)])
def test_heads_have_64_channels(channels, heads):
    assert Attention(channels, 64).heads == heads


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(1)
    attention = Attention(8, 4)
    nn.init.eye_(attention.projection.weight)
    x = latents(3, 2, 2, channels=8)
    q, k, v = attention.qkv(attention.norm(x).flatten(2).transpose(1, 2)).split(8, dim=2)
    expected = x.clone().flatten(2)
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(4)).softmax(dim=-1)
        expected[:, head] += (weights @ v[..., head]).transpose(1, 2)
    torch.testing.assert_close(attention(x).flatten(2), expected, rtol=1e-5, atol=1e-5)


def test_the_timestep_acts_and_only_by_the_scale_and_shift():
    network, x = awake(), latents(4, 4, 4)
    early, late = (network(x, torch.tensor([t, t])) for t in (3, 900))
    assert (early - late).abs().max() > 1e-2
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.scale_shift.weight)
    assert torch.equal(network(x, torch.tensor([3, 3])), network(x, torch.tensor([900, 900])))


def test_timestep_embedding_is_cosines_and_sines():
    t = torch.tensor([0, 1, 999])
    embedding = timestep_embedding(t, 6)
    for row, time in zip(embedding, t.tolist(), strict=True):
        angles = [time * 10000 ** (-k / 3) for k in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_batch_equals_its_elements():
    network, x, t = awake(), latents(6, 5, 4, batch=3), torch.tensor([0, 400, 999])
    together = network(x, t)
    for i in range(3):
        alone = network(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turn", [
    lambda x: x.permute(0, 1, 3, 4, 2), lambda x: x.permute(0, 1, 2, 4, 3), lambda x: x.flip(2, 3, 4),
], ids=["rotated", "swapped", "mirrored"])  # fmt: skip
def test_all_axes_and_directions_are_treated_alike(turn):
    """Turning the input and every kernel turns the output: nothing is shifted on the way."""
    network, x, t = awake(), latents(8, 4, 12), torch.tensor([5, 600])
    expected = turn(network(x, t))
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.weight = nn.Parameter(turn(module.weight.detach()).contiguous())
    torch.testing.assert_close(network(turn(x), t), expected, rtol=1e-4, atol=1e-4)


def test_every_output_sees_the_whole_input():
    network = awake()
    x = latents(12, 12, 12, batch=1).requires_grad_()
    network(x, torch.tensor([300]))[0, :, 0, 0, 0].sum().backward()
    assert (x.grad != 0).all()


def test_a_gradient_reaches_every_parameter():
    network = awake(attention_rates=(1, 2, 4)).train()
    network(latents(8, 8, 4), torch.tensor([100, 800])).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_norms_stay_in_float32_under_autocast(monkeypatch):
    seen, group_norm = [], F.group_norm

    def watched(x, *args, **kwargs):
        y = group_norm(x, *args, **kwargs)
        seen.append((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(F, "group_norm", watched)
    network, x, t = awake(), latents(8, 8, 4), torch.tensor([100, 800])
    exact = network(x, t)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x, t)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert y.dtype == torch.float32
    assert not torch.equal(y, exact)
    assert (y - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize(("channels", "groups"), [(512, 32), (64, 16), (10, 2), (7, 1)])
def test_norms_have_at_most_32_groups_of_at_least_four_channels(channels, groups):
    assert Norm(channels).num_groups == groups


def test_config_rebuilds_the_same_network():
    network = awake(multipliers=(1, 3), attention_rates=(1,), blocks_per_level=1, dropout=0.1)
    twin = ADM(**json.loads(json.dumps(network.config))).eval()
    assert twin.config == network.config
    assert twin.load_state_dict(network.state_dict()).missing_keys == []
    x, t = latents(4, 5, 6), torch.tensor([4, 40])
    assert torch.equal(twin(x, t), network(x, t))


def test_flops_equal_those_of_every_layer_that_ran():
    network, flops = awake(attention_rates=(2,)), []

    def convolution(module, inputs, output):
        flops.append(2 * module.weight[0].numel() * output[0].numel())

    def linear(module, inputs, output):
        flops.append(2 * module.in_features * output[0].numel())

    def attention(module, inputs, output):
        channels, voxels = inputs[0].shape[1], inputs[0][0, 0].numel()
        flops.append(2 * 2 * channels * voxels**2)

    for module in network.modules():
        for kind, hook in [(nn.Conv3d, convolution), (nn.Linear, linear), (Attention, attention)]:
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    network(latents(6, 5, 4, batch=1), torch.tensor([5]))
    assert count_flops(network, (6, 5, 4)) == sum(flops)


def test_the_full_size_is_counted_without_being_built():
    with torch.device("meta"):
        full = ADM(in_channels=11, out_channels=6)
    assert count_parameters(full) == 180_281_990
    assert count_flops(full, (30, 30, 20)) == pytest.approx(0.684e12, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_width": 9}, "base_width: 9 given, even numbers"),
        ({"multipliers": ()}, r"multipliers: \[\] given"),
        ({"blocks_per_level": 0}, "blocks_per_level: 0 given"),
        ({"conditioning": (3, 6)}, "conditioning: .* given, none, or start and stop within 5 channels allowed"),
        ({"head_channels": 10}, r"head_channels: 10 given, .*widths \[32, 32\]"),
    ],
)
def test_options_no_network_can_have_are_rejected(options, said):
    with pytest.raises(ConfigError, match=said):
        ADM(**{**SMALL, **options})


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 4, 4)])
def test_gradients_of_tiny_latents_do_not_read_unwritten_memory(shape):
    """In bfloat16 torch's own convolution fails this in most of the trials when the first axis has two voxels."""
    network = awake(in_channels=4, out_channels=2, base_width=16, multipliers=(1, 2), attention_rates=())
    for _ in range(5):
        litter = [torch.full((size,), torch.nan) for size in (1000, 5000, 10000, 70000, 100000)]
        del litter
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = network(torch.randn(2, 4, *shape), torch.tensor([3, 700]))
        out.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())


GUIDED = {"in_channels": 9, "conditioning": (3, 7)}


def test_unconditional_samples_do_not_see_the_conditioning_and_it_is_not_zeros():
    network, x, t = awake(**GUIDED), latents(6, 4, 4, channels=9), torch.tensor([3, 700])
    other, zeros = x.clone(), x.clone()
    other[:, 3:7] = latents(6, 4, 4, channels=4, seed=9)
    zeros[:, 3:7] = 0
    unconditional = network(x, t, torch.zeros(2))
    assert torch.equal(network(other, t, torch.zeros(2)), unconditional)
    assert not torch.allclose(network(zeros, t), unconditional, atol=1e-3)
    elsewhere = x.clone()
    elsewhere[:, 7:] += 1
    assert not torch.allclose(network(elsewhere, t, torch.zeros(2)), unconditional, atol=1e-3)


def test_a_batch_may_be_conditioned_in_part():
    network, x, t = awake(**GUIDED), latents(6, 4, 4, channels=9), torch.tensor([3, 700])
    mixed = network(x, t, torch.tensor([1.0, 0.0]))
    assert torch.equal(network(x, t, torch.ones(2)), network(x, t))
    torch.testing.assert_close(mixed[:1], network(x, t)[:1])
    torch.testing.assert_close(mixed[1:], network(x, t, torch.zeros(2))[1:])


def test_null_conditioning_and_embedding_are_learned_from_unconditional_samples_alone():
    network, x, t = awake(**GUIDED), latents(6, 4, 4, channels=9), torch.tensor([3, 700])
    network(x, t, torch.ones(2)).square().mean().backward()
    assert not network.null_conditioning.grad.any() and not network.unconditional_embedding.grad.any()
    network(x, t, torch.zeros(2)).square().mean().backward()
    assert network.null_conditioning.grad.all() and network.unconditional_embedding.grad.any()


def test_a_network_trained_with_conditioning_only_rejects_unconditional_samples():
    network = awake()
    assert not network.supports_unconditional
    with pytest.raises(ConfigError, match="ADM: it was trained with conditioning only"):
        network(latents(4, 4, 4), torch.tensor([0, 1]), torch.zeros(2))


def test_an_untrained_block_or_attention_is_the_identity():
    x, embedding = latents(4, 3, 2, channels=8), torch.randn(2, 16)
    assert torch.equal(ResidualBlock(8, 8, 16)(x, embedding), x)
    assert torch.equal(Attention(8, 4)(x), x)


def test_each_level_halves_and_each_way_up_doubles_all_three_axes():
    network, sizes = awake(attention_rates=()), []
    for stage in [*network.down, network.middle, *network.up]:
        stage.register_forward_hook(lambda *args: sizes.append(tuple(args[2].shape[2:])))
    network(latents(12, 8, 20), torch.tensor([0, 1]))
    rate1, rate2, rate4 = (12, 8, 20), (6, 4, 10), (3, 2, 5)
    down = [rate1, rate1, rate2, rate2, rate2, rate4, rate4, rate4]
    up = [rate4, rate4, rate2, rate2, rate2, rate1, rate1, rate1, rate1]
    assert sizes == [*down, rate4, *up]


def test_scale_minus_one_and_shift_zero_null_the_second_branch():
    torch.manual_seed(2)
    block = ResidualBlock(8, 12, 16)
    nn.init.normal_(block.conv2.weight)
    nn.init.zeros_(block.scale_shift.weight)
    x, embedding = latents(4, 4, 4, channels=8), torch.randn(2, 16)
    assert not torch.allclose(block(x, embedding), block.skip(x))
    with torch.no_grad():
        block.scale_shift.bias.copy_(torch.tensor([-1.0] * 12 + [0.0] * 12))
    assert torch.equal(block(x, embedding), block.skip(x))


def test_a_norm_of_small_half_values_does_not_lose_them():
    x = (1e-3 * latents(4, 4, 4, channels=8) + 1).bfloat16()
    expected = F.group_norm(x.double(), 2).to(torch.bfloat16)
    assert torch.equal(Norm(8)(x), expected)


def test_dropout_acts_in_training_only():
    network, x, t = awake(dropout=0.5), latents(4, 4, 4), torch.tensor([4, 40])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def test_memory_format_changes_nothing_but_rounding():
    network, x, t = awake(), latents(8, 8, 4), torch.tensor([4, 40])
    expected = network(x, t)
    network.to(memory_format=torch.channels_last_3d)
    got = network(x.contiguous(memory_format=torch.channels_last_3d), t)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_frozen_parameters_are_not_counted():
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 12
