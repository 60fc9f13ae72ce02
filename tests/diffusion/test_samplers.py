"""Laws of the samplers: right on a Gaussian, true to their papers, and known voxels never changed."""

import math

import pytest
import torch

from ldm_lib.diffusion import samplers
from ldm_lib.diffusion.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp_2m, euler, midpoint, samplers_for
from ldm_lib.diffusion.schedule import noise_schedule, spaced_timesteps
from ldm_lib.errors import ConfigError

MEAN, STD = 0.7, 0.5
SCHEDULE, FLOW = noise_schedule(), noise_schedule("flow")
DIFFUSION = {name: SAMPLERS[name] for name in samplers_for(SCHEDULE)}
every_sampler = pytest.mark.parametrize("sampler", DIFFUSION.values(), ids=DIFFUSION.keys())


def alpha_sigma(t, x):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, shaped like x."""
    alpha_bar = (SCHEDULE.alpha**2)[t].view(-1, 1, 1, 1, 1).to(x.dtype)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def gaussian(x, t):
    """The exact noise predictor for data ~ N(MEAN, STD^2)."""
    alpha, sigma = alpha_sigma(t, x)
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def bent(x, t):
    """A noise predictor that is not linear, and differs from t to t."""
    return torch.tanh(x + 0.001 * t.view(-1, 1, 1, 1, 1).to(x.dtype))


def denoiser_of(predictor, schedule=SCHEDULE):
    """A denoiser as the samplers want it, from a predictor of the noise."""

    def denoise(x, t):
        noise = predictor(x, t)
        return schedule.predict_x0(x, noise, t), noise

    return denoise


def standard(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(x):
    """noise(i) that is the same whenever it is asked for the same step."""
    return lambda i: standard(*x.shape, seed=1000 + i, dtype=x.dtype)


def run(sampler, denoise, x, steps, **options):
    return sampler(denoiser_of(denoise), x, SCHEDULE, steps=steps, noise=fresh(x), **options)


def gain(sampler, steps):
    """The std that a deterministic sampler makes of unit noise, without sampling error.

    The Gaussian predictor is affine in x, and so is the whole sampler.
    """
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    low, high = run(sampler, gaussian, x, steps).flatten().tolist()
    return high - low


@pytest.mark.parametrize(
    ("sampler", "steps", "bound"),
    [
        (dpm_solver_pp_2m, 20, 0.02),
        (dpm_solver_pp_2m, 50, 0.005),
        (ddim, 20, 0.14),  # of first order: it cannot do better in 20 steps
        (ddim, 250, 0.02),
        (ddim, 1000, 0.005),
    ],
)
def test_deterministic_samplers_return_the_gaussian(sampler, steps, bound):
    assert gain(sampler, steps) == pytest.approx(STD, rel=bound)
    x = standard(1, 1, 20, 20, 20)
    x = (x - x.mean()) / x.std()
    y = run(sampler, gaussian, x, steps)
    assert y.mean().item() == pytest.approx(MEAN, rel=0.02)
    assert y.std().item() == pytest.approx(STD, rel=bound)


@pytest.mark.parametrize(("steps", "bound"), [(20, 0.05), (250, 0.02)])
def test_ancestral_sampling_returns_the_gaussian(steps, bound):
    x = standard(1, 1, 28, 28, 28)
    y = run(ddpm, gaussian, x, steps)
    assert y.mean().item() == pytest.approx(MEAN, rel=0.02)
    assert y.std().item() == pytest.approx(STD, rel=bound)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2)])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order):
    fine, coarse = abs(gain(sampler, 40) - STD), abs(gain(sampler, 20) - STD)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


EVERY = [(SCHEDULE, name) for name in samplers_for(SCHEDULE)] + [(FLOW, name) for name in samplers_for(FLOW)]
on_both = pytest.mark.parametrize(("schedule", "name"), EVERY, ids=[f"{s.is_flow}-{n}" for s, n in EVERY])


@on_both
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_a_denoiser_that_knows_the_truth_gets_it_back(schedule, name, steps):
    truth, x = 3 * standard(2, 1, 3, 4, 5, seed=1), standard(2, 1, 3, 4, 5)

    def omniscient(x, t):
        alpha, sigma = schedule.alpha_sigma(t, x)
        return truth, (x - alpha * truth) / sigma

    y = SAMPLERS[name](omniscient, x, schedule, steps=steps, noise=fresh(x))
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-9)


@on_both
def test_known_latent_voxels_are_clean_at_every_step_and_every_timestep_is_visited_once(schedule, name):
    x, known, seen, states = standard(2, 1, 4, 3, 3), 5 + standard(2, 1, 4, 3, 3, seed=2), [], []
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[:, :, 1:3] = True

    def watched(x, t):
        seen.append((int(t[0]), x[~masked]))
        return torch.tanh(x), x

    keep = lambda z: torch.where(masked, z, known)  # noqa: E731
    y = SAMPLERS[name](watched, x, schedule, steps=9, noise=fresh(x), keep=keep, callback=states.append)
    times = [t for t, _ in seen]
    assert len(set(times)) == 9 and times == sorted(times, reverse=True) and times[0] == 999
    assert all(torch.equal(voxels, known[~masked]) for _, voxels in seen)
    assert all(torch.equal(s["x0"][~masked], known[~masked]) for s in states)
    assert torch.equal(y[~masked], known[~masked]) and not torch.isclose(y[masked], known[masked]).any()


def test_ddim_at_full_length_is_equation_12_step_by_step():
    x = y = standard(2, 1, 3, 2, 2)
    for t in reversed(range(1000)):
        now, then = (SCHEDULE.alpha**2)[t], (SCHEDULE.alpha**2)[t - 1] if t else torch.tensor(1.0)
        epsilon = bent(y, torch.full((2,), t))
        y = (then / now).sqrt() * (y - (1 - now).sqrt() * epsilon) + (1 - then).sqrt() * epsilon
    torch.testing.assert_close(run(ddim, bent, x, 1000), y, rtol=1e-7, atol=1e-7)


def test_ddpm_at_full_length_is_algorithm_2_step_by_step():
    x = y = standard(2, 1, 3, 2, 2)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for i, t in enumerate(reversed(range(1000))):
        epsilon = bent(y, torch.full((2,), t))
        y = (y - betas[t] / (1 - (SCHEDULE.alpha**2)[t]).sqrt() * epsilon) / (1 - betas[t]).sqrt()
        y = y + betas[t].sqrt() * fresh(x)(i) if t else y
    torch.testing.assert_close(run(ddpm, bent, x, 1000), y, rtol=1e-7, atol=1e-7)


@every_sampler
def test_the_callback_sees_every_step(sampler):
    states, x = [], standard(1, 1, 2, 3, 2)
    y = run(sampler, bent, x, 8, callback=states.append)
    assert [s["i"] for s in states] == list(range(8))
    assert torch.equal(states[0]["x"], x)
    assert torch.equal(states[-1]["x0"], y)
    for s in states:
        t = torch.tensor([s["t"]])
        torch.testing.assert_close(s["x0"], SCHEDULE.predict_x0(s["x"], bent(s["x"], t), t))
    assert torch.equal(run(sampler, bent, x, 8), y)


def test_only_ancestral_sampling_asks_for_noise_once_a_step_but_the_last():
    asked, x = [], standard(1, 1, 2, 2, 2)

    def noise(i):
        asked.append(i)
        return fresh(x)(i)

    for sampler in (ddim, dpm_solver_pp_2m, ddpm):
        sampler(denoiser_of(bent), x, SCHEDULE, steps=6, noise=noise)
    assert asked == [0, 1, 2, 3, 4]


@every_sampler
def test_precision_of_x_decides_the_result_and_never_the_tables(sampler):
    before, x = SCHEDULE.alpha.clone(), standard(1, 1, 3, 3, 3, dtype=torch.float32)
    exact = sampler(denoiser_of(gaussian), x.double(), SCHEDULE, steps=20, noise=lambda i: fresh(x)(i).double())
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.4)]:
        y = sampler(denoiser_of(gaussian), x.to(dtype), SCHEDULE, steps=20, noise=lambda i, d=dtype: fresh(x)(i).to(d))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    assert torch.equal(SCHEDULE.alpha, before)


# ---- rectified flow


def flow_gaussian(x, t):
    """(x_0, noise) of the exact denoiser for data ~ N(MEAN, STD^2) on the straight path."""
    alpha, sigma = FLOW.alpha_sigma(t, x)
    noise = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return x0, noise


def flow_gain(sampler, steps, schedule=FLOW):
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    low, high = sampler(flow_gaussian, x, schedule, steps=steps, noise=fresh(x)).flatten().tolist()
    return high - low, low


@pytest.mark.parametrize(("name", "bound"), [("ddim", 0.08), ("euler", 0.08), ("midpoint", 0.02), ("dpm++2m", 0.04)])
def test_a_flow_returns_the_gaussian(name, bound):
    std, mean = flow_gain(SAMPLERS[name], 20)
    assert std == pytest.approx(STD, rel=bound) and mean == pytest.approx(MEAN, rel=0.02)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (midpoint, 2)])
def test_the_error_on_a_flow_falls_with_the_order_of_the_solver(sampler, order):
    fine, coarse = abs(flow_gain(sampler, 40)[0] - STD), abs(flow_gain(sampler, 20)[0] - STD)
    assert math.log2(coarse / fine) > order - 0.35  # on a Gaussian the midpoint method happens to do even better


def test_ddim_on_a_flow_is_eulers_method():
    """alpha' x_0 + sigma' noise = x + (sigma' - sigma) (noise - x_0), where alpha = 1 - sigma."""
    x = standard(2, 1, 3, 2, 2)
    found = [sampler(flow_gaussian, x, FLOW, steps=7, noise=fresh(x)) for sampler in (ddim, euler)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "schedule", "said"), [
    ("ddpm", FLOW, "'ddpm' given, the model was trained on a rectified flow.*ddim, dpm"),
    ("midpoint", SCHEDULE, "'midpoint' given, the model was trained on a variance-preserving diffusion.*ddpm, ddim"),
])  # fmt: skip
def test_a_sampler_of_the_other_path_is_rejected(name, schedule, said):
    x = standard(1, 1, 2, 2, 2)
    with pytest.raises(ConfigError, match=said):
        SAMPLERS[name](flow_gaussian, x, schedule, steps=2, noise=fresh(x))


# ---- more laws


@every_sampler
def test_a_batch_equals_its_elements(sampler):
    x = standard(3, 2, 3, 2, 4)
    together = run(sampler, bent, x, 12)
    for i in range(3):
        alone = sampler(
            denoiser_of(bent),
            x[i : i + 1],
            SCHEDULE,
            steps=12,
            noise=lambda step, i=i: fresh(x)(step)[i : i + 1],
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_the_first_order_of_dpm_solver_is_ddim(monkeypatch):
    x = standard(2, 1, 3, 2, 2)
    times = torch.tensor([999, 300])
    monkeypatch.setattr(samplers, "spaced_timesteps", lambda *_: times)
    torch.testing.assert_close(run(dpm_solver_pp_2m, bent, x, 2), run(ddim, bent, x, 2))


def test_dpm_solver_extrapolates_x0_to_the_middle_of_uneven_steps(monkeypatch):
    times, states = torch.tensor([999, 700, 200]), []
    monkeypatch.setattr(samplers, "spaced_timesteps", lambda *_: times)
    run(dpm_solver_pp_2m, bent, standard(1, 1, 3, 2, 2), 3, callback=states.append)
    lambdas = SCHEDULE.log_snr(times) / 2
    (h1, h2), (first, second) = lambdas.diff(), (s["x0"] for s in states[:2])
    middle = second + (second - first) / h1 * (h2 / 2)
    (_, alpha), (sigma, next_sigma) = (rate.flatten() for rate in alpha_sigma(times[1:], middle))
    expected = next_sigma / sigma * states[1]["x"] + alpha * (1 - torch.exp(-h2)) * middle
    torch.testing.assert_close(states[2]["x"], expected)


def test_dpm_solver_is_spaced_in_log_snr_and_the_others_in_t():
    for sampler, spacing in [(ddpm, "uniform"), (ddim, "uniform"), (dpm_solver_pp_2m, "log_snr")]:
        states = []
        run(sampler, bent, standard(1, 1, 2, 2, 2), 9, callback=states.append)
        assert [s["t"] for s in states] == spaced_timesteps(SCHEDULE, 9, spacing).tolist()


@every_sampler
def test_a_half_precision_denoiser_does_not_lower_the_arithmetic(sampler):
    x = standard(1, 1, 2, 2, 2, dtype=torch.float32)
    y = run(sampler, lambda x, t: gaussian(x, t).bfloat16(), x, 5)
    assert y.dtype == torch.float32
    assert torch.equal(y, run(sampler, lambda x, t: gaussian(x, t).bfloat16().float(), x, 5))
