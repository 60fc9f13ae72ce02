"""Samplers: pure functions of one signature from Gaussian noise to clean latents.

    sampler(denoise, x, schedule, *, steps, noise, keep, callback) -> x_0, all of it (b c x y z)

denoise(x_t, t): the predicted noise, for int64 t (b,).
x: standard normal noise to start from; its dtype is that of every x_t and of the result.
steps: network evaluations, 1 to schedule.steps.
noise(i): fresh standard normal noise like x for step i; the deterministic samplers ignore it.
keep(x): x with the known cells put back. It is applied to x before the first step and after every
    step, so the network sees the known cells clean at every t, as in training.
callback({"i", "t", "x", "x0"}): called once a step with what entered it and the estimate of x_0.

Coefficients are Python floats (float64) whatever the precision of x; x_0 is never clipped. After
the last timestep comes ᾱ = 1, so that the last step of each sampler returns its estimate of x_0.
"""

from collections.abc import Callable
from itertools import pairwise
from math import expm1, log, sqrt
from typing import Any

from torch import Tensor

from ldm_lib.schedule import NoiseSchedule, spaced_timesteps

Denoise = Callable[[Tensor, Tensor], Tensor]
Keep = Callable[[Tensor], Tensor]
Callback = Callable[[dict[str, Any]], None]


def identity(x: Tensor) -> Tensor:
    """Keep no cells: all are generated."""
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Callable[[int], Tensor],
    keep: Keep = identity,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling, its betas recomputed for the visited timesteps.

    Source: Ho et al. 2020, eq. 7 and algorithm 2; respacing by Nichol & Dhariwal 2021, eq. 19. Of
    the two variances that Ho et al. allow it takes the larger, beta: in 20 steps a Gaussian of std
    0.5 comes back with 0.516, with the posterior variance only with 0.39.
    """
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "uniform")
    for i, (alpha_bar, next_alpha_bar) in enumerate(pairwise(_alpha_bars(schedule, times))):
        _, x0 = _predict(denoise, x, schedule, i, times, keep, callback)
        alpha = alpha_bar / next_alpha_bar
        beta = 1 - alpha
        mean = (
            sqrt(next_alpha_bar) * beta / (1 - alpha_bar) * x0
            + sqrt(alpha) * (1 - next_alpha_bar) / (1 - alpha_bar) * x
        )
        x = keep(mean + sqrt(beta) * noise(i) if next_alpha_bar < 1 else mean)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Callable[[int], Tensor],  # noqa: ARG001 - one signature for all
    keep: Keep = identity,
    callback: Callback | None = None,
) -> Tensor:
    """Deterministic implicit sampling: Song et al. 2021, eq. 12 with eta = 0."""
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "uniform")
    for i, alpha_bar in enumerate(_alpha_bars(schedule, times)[1:]):
        epsilon, x0 = _predict(denoise, x, schedule, i, times, keep, callback)
        x = keep(sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * epsilon)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Callable[[int], Tensor],  # noqa: ARG001 - one signature for all
    keep: Keep = identity,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second-order multistep in x_0 over timesteps uniform in log-SNR.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2. The first step is of first order, and so
    is the last, which goes to lambda = infinity.
    """
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "log_snr")
    alpha_bars = _alpha_bars(schedule, times)
    alpha, sigma = [sqrt(a) for a in alpha_bars], [sqrt(1 - a) for a in alpha_bars]
    lambda_ = [log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    previous_x0, previous_h = None, None
    for i in range(steps - 1):
        _, x0 = _predict(denoise, x, schedule, i, times, keep, callback)
        h = lambda_[i + 1] - lambda_[i]
        estimate = x0
        if i > 0:
            r = previous_h / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
        x = keep(sigma[i + 1] / sigma[i] * x - alpha[i + 1] * expm1(-h) * estimate)
        previous_x0, previous_h = x0, h
    return keep(_predict(denoise, x, schedule, steps - 1, times, keep, callback)[1])


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpm_solver_pp_2m}


def _alpha_bars(schedule: NoiseSchedule, times: Tensor) -> list[float]:
    """ᾱ at the visited timesteps, and 1 for the clean end."""
    return [*schedule.alpha_bar[times].tolist(), 1.0]


def _predict(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    i: int,
    times: Tensor,
    keep: Keep,
    callback: Callback | None,
) -> tuple[Tensor, Tensor]:
    """The network's noise and the x_0 it means, known cells put back, at the i-th visited time."""
    t = times[i].to(x.device).expand(len(x))
    epsilon = denoise(x, t).to(x.dtype)
    x0 = keep(schedule.predict_x0(x, epsilon, t))
    if callback:
        callback({"i": i, "t": int(times[i]), "x": x, "x0": x0})
    return epsilon, x0
