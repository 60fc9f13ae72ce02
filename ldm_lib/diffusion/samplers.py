"""Samplers: pure functions of one signature from Gaussian noise to clean latents.

    sampler(denoise, x, schedule, *, steps, noise, keep, callback) -> x_0, all of it (b c x y z)

denoise(x_t, t): (x_0, noise) as the network believes them, for int64 t (b,): x_t = α x_0 + σ noise.
x: standard normal noise to start from; its dtype is that of every x_t and of the result.
steps: network evaluations, 1 to schedule.steps.
noise(i): fresh standard normal noise like x for step i; the deterministic samplers ignore it.
keep(x): x with the known cells put back. It is applied to x before the first step and after every
    step, so the network sees the known cells clean at every t, as in training.
callback({"i", "t", "x", "x0"}): called once a step with what entered it and the estimate of x_0.

Coefficients are Python floats (float64) whatever the precision of x; x_0 is never clipped. After
the last timestep comes the clean end, α = 1 and σ = 0. `ddpm` needs a variance-preserving schedule, `euler` and
`midpoint` a flow; `ddim` and `dpm++2m` walk on either.
"""

from collections.abc import Callable
from itertools import pairwise
from math import expm1, inf, log, sqrt
from typing import Any

from torch import Tensor

from ldm_lib.diffusion.options import FLOW_SAMPLERS
from ldm_lib.diffusion.schedule import NoiseSchedule, spaced_timesteps
from ldm_lib.errors import ConfigError

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
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
    check_process("ddpm", schedule)
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "uniform")
    alpha_bars = [*schedule.alpha_bar[times].tolist(), 1.0]
    for i, (alpha_bar, next_alpha_bar) in enumerate(pairwise(alpha_bars)):
        x0, _ = _predict(denoise, x, i, times, keep, callback)
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
    for i, (alpha, sigma) in enumerate(_rates(schedule, times)[1:]):
        x0, epsilon = _predict(denoise, x, i, times, keep, callback)
        x = keep(alpha * x0 + sigma * epsilon)
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
    alpha, sigma = zip(*_rates(schedule, times), strict=True)
    lambda_ = [log(a / s) if a else -inf for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    previous_x0, previous_h = None, None
    for i in range(steps - 1):
        x0, _ = _predict(denoise, x, i, times, keep, callback)
        h = lambda_[i + 1] - lambda_[i]
        estimate = x0
        if i > 0:
            r = previous_h / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
        x = keep(sigma[i + 1] / sigma[i] * x - alpha[i + 1] * expm1(-h) * estimate)
        previous_x0, previous_h = x0, h
    return keep(_predict(denoise, x, steps - 1, times, keep, callback)[0])


def euler(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Callable[[int], Tensor],  # noqa: ARG001 - one signature for all
    keep: Keep = identity,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on dx/dσ = noise - x_0, the straight path of a rectified flow (Liu et al. 2023, algorithm 1)."""
    check_process("euler", schedule)
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "uniform")
    sigma = [s for _, s in _rates(schedule, times)]
    for i in range(steps):
        x0, epsilon = _predict(denoise, x, i, times, keep, callback)
        x = keep(x + (sigma[i + 1] - sigma[i]) * (epsilon - x0))
    return x


def midpoint(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Callable[[int], Tensor],  # noqa: ARG001 - one signature for all
    keep: Keep = identity,
    callback: Callback | None = None,
) -> Tensor:
    """The midpoint method on a rectified flow: two evaluations a step, of second order; an odd one is Euler's.

    Both evaluations are at timesteps of the table, so that the network sees none it was not trained at. The inner one
    may lie off the middle by rounding or by a shift; its weight is 1 / (2c) for an inner point at the share c of the
    step (Hairer, Nørsett & Wanner 1993, section II.1, every explicit two-stage method of order 2).
    """
    check_process("midpoint", schedule)
    x = keep(x)
    times = spaced_timesteps(schedule, steps, "uniform")
    sigma = [s for _, s in _rates(schedule, times)]
    for i in range(0, steps, 2):
        x0, epsilon = _predict(denoise, x, i, times, keep, callback)
        slope, end = epsilon - x0, min(i + 2, steps)
        if end - i == 2:
            inner = keep(x + (sigma[i + 1] - sigma[i]) * slope)
            x0, epsilon = _predict(denoise, inner, i + 1, times, keep, callback)
            weight = (sigma[end] - sigma[i]) / (2 * (sigma[i + 1] - sigma[i]))
            slope = (1 - weight) * slope + weight * (epsilon - x0)
        x = keep(x + (sigma[end] - sigma[i]) * slope)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpm_solver_pp_2m, "euler": euler, "midpoint": midpoint}


def samplers_for(schedule: NoiseSchedule) -> list[str]:
    """The names of the samplers that can walk on the path of this schedule."""
    return [name for name in SAMPLERS if FLOW_SAMPLERS.get(name, schedule.is_flow) == schedule.is_flow]


def check_process(name: str, schedule: NoiseSchedule) -> None:
    """Refuse a sampler whose equations are those of the other path."""
    if name not in samplers_for(schedule):
        path = "rectified flow" if schedule.is_flow else "variance-preserving diffusion"
        raise ConfigError(f"{name!r} given, the model was trained on a {path}", where="sampler",
                          fix=f"take one of {', '.join(samplers_for(schedule))}")  # fmt: skip


def check_sampler(name: str, steps: int, schedule: NoiseSchedule) -> None:
    """Refuse a sampler of the other path, or more steps than the schedule has."""
    check_process(name, schedule)
    spaced_timesteps(schedule, steps)


def _rates(schedule: NoiseSchedule, times: Tensor) -> list[tuple[float, float]]:
    """(α, σ) at the visited timesteps, and (1, 0) for the clean end."""
    return [*zip(schedule.alpha[times].tolist(), schedule.sigma[times].tolist(), strict=True), (1.0, 0.0)]


def _predict(
    denoise: Denoise, x: Tensor, i: int, times: Tensor, keep: Keep, callback: Callback | None
) -> tuple[Tensor, Tensor]:
    """The x_0 and the noise that the network believes at the i-th visited time, known cells put back in x_0."""
    x0, epsilon = (part.to(x.dtype) for part in denoise(x, times[i].to(x.device).expand(len(x))))
    x0 = keep(x0)
    if callback:
        callback({"i": i, "t": int(times[i]), "x": x, "x0": x0})
    return x0, epsilon
