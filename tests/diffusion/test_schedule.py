"""Laws of the noise schedule: closed forms, exact inverses, and tables that nothing changes."""

import math

import pytest
import torch

from ldm_lib.diffusion.schedule import noise_schedule, spaced_timesteps
from ldm_lib.errors import ConfigError

SPACINGS = ("uniform", "log_snr")
SHAPE = (3, 2, 4, 3, 5)


@pytest.fixture
def schedule():
    return noise_schedule()


def noisy_case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x0, noise = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0.to(dtype), noise.to(dtype), torch.tensor([0, 413, 999])


def test_alpha_bar_is_the_product_of_one_minus_the_betas(schedule):
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    for t in (0, 1, 500, 999):
        expected = math.prod(1 - beta for beta in betas[: t + 1])
        assert (schedule.alpha**2)[t].item() == pytest.approx(expected, rel=1e-12)
    assert (schedule.alpha**2)[999].item() == pytest.approx(4.036e-5, rel=1e-3)  # Ho et al. 2020


def test_one_jump_equals_the_chain_of_single_steps():
    schedule = noise_schedule(steps=50, beta_end=0.3)
    signal, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1)
    for t in range(50):
        beta = 1e-4 + (0.3 - 1e-4) * t / 49
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        step = torch.tensor([t])
        assert schedule.add_noise(one, zero, step).item() == pytest.approx(signal, rel=1e-12)
        assert schedule.add_noise(zero.double(), one, step).item() == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_predict_x0_inverts_add_noise(schedule):
    x0, noise, t = noisy_case()
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.predict_x0(x_t, noise, t), x0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once_and_leaves_the_table_alone(schedule, dtype):
    before = schedule.alpha.clone()
    x0, noise, t = noisy_case(dtype)
    x_t = schedule.add_noise(x0, noise, t)
    back = schedule.predict_x0(x_t, noise, t)
    assert torch.equal(x_t, schedule.add_noise(x0.double(), noise.double(), t).to(dtype))
    assert torch.equal(back, schedule.predict_x0(x_t.double(), noise.double(), t).to(dtype))
    assert schedule.alpha.dtype == torch.float64
    assert torch.equal(schedule.alpha, before)


def test_the_default_dtype_does_not_reach_the_table(schedule):
    torch.set_default_dtype(torch.float16)
    try:
        built = noise_schedule()
        visited = [spaced_timesteps(built, 333, spacing) for spacing in SPACINGS]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(built.alpha, schedule.alpha)
    for got, spacing in zip(visited, SPACINGS, strict=True):
        assert torch.equal(got, spaced_timesteps(schedule, 333, spacing))


def test_log_snr_is_the_log_of_signal_power_over_noise_power(schedule):
    t = torch.tensor([0, 10, 500, 999])
    one, zero = (torch.full((4, 1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.0))
    signal = schedule.add_noise(one, zero, t).flatten() ** 2
    noise = schedule.add_noise(zero, one, t).flatten() ** 2
    torch.testing.assert_close(schedule.log_snr(t), (signal / noise).log(), rtol=1e-10, atol=1e-10)
    assert (schedule.log_snr(torch.arange(1000)).diff() < 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("trained", [1, 2, 37, 1000])
def test_timesteps_descend_from_the_last_for_every_number_of_steps(spacing, trained):
    schedule = noise_schedule(steps=trained)
    for steps in {*range(1, min(trained, 20) + 1), trained // 2 + 1, trained}:
        times = spaced_timesteps(schedule, steps, spacing)
        assert times.dtype == torch.int64
        assert len(times) == steps
        assert times[0] == trained - 1
        assert times[-1] >= 0
        assert (times.diff() < 0).all()
    everything = spaced_timesteps(schedule, trained, spacing)
    assert torch.equal(everything, torch.arange(trained).flip(0))


def test_log_snr_gaps_are_equal_up_to_the_resolution_of_the_table(schedule):
    times = spaced_timesteps(schedule, 10, "log_snr")
    assert times[-1] == 0
    log_snr = schedule.log_snr(torch.arange(1000))
    even = torch.linspace(log_snr[-1], log_snr[0], 10, dtype=torch.float64)
    nearest = torch.stack([(log_snr - level).abs().min() for level in even])
    torch.testing.assert_close((schedule.log_snr(times) - even).abs(), nearest)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_rejected(schedule, steps):
    with pytest.raises(ConfigError, match=f"{steps} sampling steps given, 1 to 1000 allowed"):
        spaced_timesteps(schedule, steps)


def test_an_unknown_schedule_is_rejected():
    with pytest.raises(ConfigError, match="'cosin' given, linear, cosine, flow allowed"):
        noise_schedule("cosin")


def test_cosine_is_the_closed_form_until_its_betas_are_cut():
    """Nichol & Dhariwal 2021, eq. 17: cos^2 of the fraction of the way, over its value at the start."""
    found = noise_schedule(schedule="cosine").alpha ** 2
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in (0, 1, 500, 990):
        assert found[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-9)
    assert found[999].item() == pytest.approx(found[998].item() * 0.001, rel=1e-9)  # the largest beta is 0.999


def test_flow_is_the_straight_line_from_data_to_noise():
    found = noise_schedule(schedule="flow", steps=8)
    assert found.sigma.tolist() == [k / 8 for k in range(1, 9)] and found.is_flow
    assert torch.equal(found.alpha, 1 - found.sigma)
    assert not any(noise_schedule(schedule=name).is_flow for name in ("linear", "cosine"))


@pytest.mark.parametrize("trained", [2, 1000])
def test_a_silent_end_is_visited_first_and_the_rest_lies_even_in_log_snr(trained):
    schedule = noise_schedule("flow", steps=trained)
    for steps in range(1, min(trained, 30) + 1):
        times = spaced_timesteps(schedule, steps, "log_snr")
        assert times[0] == trained - 1 and len(times) == steps and (times.diff() < 0).all()
    if trained > 30:
        log_snr = schedule.log_snr(spaced_timesteps(schedule, 12, "log_snr")[1:])
        gaps = log_snr.diff()
        assert log_snr[0].item() == pytest.approx(-10, abs=0.6) and gaps.std() < 0.25 * gaps.mean().abs()


def test_each_sample_has_its_own_timestep(schedule):
    x0, noise, t = noisy_case()
    together = schedule.add_noise(x0, noise, t)
    for i in range(len(t)):
        alone = schedule.add_noise(x0[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("steps", [7, 20, 50, 333])
def test_uniform_gaps_are_equal_up_to_rounding_down_to_the_clean_end(schedule, steps):
    gaps = torch.cat([spaced_timesteps(schedule, steps), torch.tensor([-1])]).diff()
    assert gaps.max() - gaps.min() <= 1
