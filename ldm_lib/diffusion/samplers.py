"""Sample clean latents from Gaussian noise, by pure functions of one signature.

    sampler(denoise, x, schedule, *, steps, noise, keep, callback) -> x_0, all (b c x y z)

denoise(x_t, t): estimates of (x_0, noise) for int64 t (b,), where x_t = α x_0 + σ noise.
x: standard normal noise to start from; its dtype is that of every x_t and of the result.
steps: network evaluations, 1 to schedule.steps.
noise(i): fresh standard normal noise like x for step i; the deterministic samplers ignore it.
keep(x): x with the known voxels put back. It is applied to x before the first step and after every step, so that the
    network sees the known voxels clean at every t, as in training.
callback({"i", "t", "x", "x0"}): called once per step with the input of the step and the estimate of x_0.

Coefficients are Python floats (float64) whatever the precision of x; x_0 is never clipped. After the last timestep
comes the clean end, α = 1 and σ = 0. `ddpm` needs a variance-preserving schedule, `euler` and `midpoint` a rectified
flow; `ddim` and `dpm++2m` support both.
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
    """Put back no known voxels: everything is generated."""
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
    """Sample by ancestral sampling, with betas recomputed for the visited timesteps.

    Source: Ho et al. 2020, eq. 7 and algorithm 2; respacing by Nichol & Dhariwal 2021, eq. 19. Of the
    two variances that Ho et al. allow it takes the larger, beta: in 20 steps a Gaussian of standard deviation 0.5 is
    sampled with 0.516, with the posterior variance with 0.39 only.
    """
    check_process("ddpm", schedule)
    x, times, _ = _start(x, schedule, steps, keep)
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
    """Sample by deterministic implicit sampling: Song et al. 2021, eq. 12 with eta = 0."""
    x, times, levels = _start(x, schedule, steps, keep)
    for i, (alpha, sigma) in enumerate(levels[1:]):
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
    """Sample by DPM-Solver++(2M): second-order multistep in x_0 over timesteps uniform in log-SNR.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2. The first step is of first order, and so
    is the last, which goes to lambda = infinity.
    """
    x, times, levels = _start(x, schedule, steps, keep, "log_snr")
    alpha, sigma = zip(*levels, strict=True)
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
    """Sample by Euler's method on dx/dσ = noise - x_0, a rectified flow (Liu et al. 2023, algorithm 1)."""
    check_process("euler", schedule)
    x, times, levels = _start(x, schedule, steps, keep)
    sigma = [s for _, s in levels]
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
    """Sample by the midpoint method on a rectified flow: two evaluations per step; a last odd one is Euler's.

    Both evaluations are at timesteps of the table, so that the network sees only those it was trained at. The inner one
    may lie off the middle by rounding or by a shift; its weight is 1 / (2c) for an inner point at the fraction c of the
    step (Hairer, Nørsett & Wanner 1993, section II.1, every explicit two-stage method of order 2).
    """
    check_process("midpoint", schedule)
    x, times, levels = _start(x, schedule, steps, keep)
    sigma = [s for _, s in levels]
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
    """List the names of the samplers that support this schedule."""
    return [name for name in SAMPLERS if FLOW_SAMPLERS.get(name, schedule.is_flow) == schedule.is_flow]


def check_process(name: str, schedule: NoiseSchedule) -> None:
    """Reject a sampler whose equations are those of the other kind of process."""
    if name not in samplers_for(schedule):
        process = "rectified flow" if schedule.is_flow else "variance-preserving diffusion"
        raise ConfigError(f"{name!r} given, the model was trained on a {process}", where="sampler",
                          fix=f"take one of {', '.join(samplers_for(schedule))}")  # fmt: skip


def check_sampler(name: str, steps: int, schedule: NoiseSchedule) -> None:
    """Reject a sampler that does not support the schedule, or more steps than the schedule has."""
    check_process(name, schedule)
    spaced_timesteps(schedule, steps)


def _start(
    x: Tensor, schedule: NoiseSchedule, steps: int, keep: Keep, spacing: str = "uniform"
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Return x with the known voxels, the timesteps to visit, and (α, σ) at each of them and at the clean end."""
    times = spaced_timesteps(schedule, steps, spacing)
    levels = zip(schedule.alpha[times].tolist(), schedule.sigma[times].tolist(), strict=True)
    return keep(x), times, [*levels, (1.0, 0.0)]


def _predict(
    denoise: Denoise, x: Tensor, i: int, times: Tensor, keep: Keep, callback: Callback | None
) -> tuple[Tensor, Tensor]:
    """Estimate x_0 and the noise at the i-th visited timestep, with the known voxels put back in x_0."""
    x0, epsilon = (part.to(x.dtype) for part in denoise(x, times[i].to(x.device).expand(len(x))))
    x0 = keep(x0)
    if callback:
        callback({"i": i, "t": int(times[i]), "x": x, "x0": x0})
    return x0, epsilon
