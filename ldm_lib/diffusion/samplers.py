"""Sample clean latents from Gaussian noise, by pure functions of one signature.

    sampler(denoise, x, schedule, *, steps, noise, keep, callback) -> x_0, all (b c x y z)

denoise(x_t, t): estimates of (x_0, noise) for int64 t (b,), where x_t = α x_0 + σ noise.
x: standard normal noise to start from; its dtype is that of every x_t and of the result.
steps: network evaluations, 1 to schedule.steps.
noise(i): fresh standard normal noise like x for step i; the deterministic samplers ignore it.
keep(x): x with the known voxels put back, before the first step and after every step, so that the network sees them
    clean at every t, as in training.
callback({"i", "t", "x", "x0"}): called once per step with the input of the step and the estimate of x_0.

Coefficients are Python floats (float64) whatever the precision of x; x_0 is never clipped. After the last timestep
comes the clean end, α = 1 and σ = 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
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
SAMPLERS: dict[str, Callable[..., Tensor]] = {}


@dataclass(frozen=True)
class Trajectory:
    """Hold the timesteps that a sampler visits, (α, σ) at each of them and at the clean end, and its functions."""

    denoise: Denoise
    times: Tensor
    levels: list[tuple[float, float]]
    noise: Callable[[int], Tensor]
    keep: Keep
    callback: Callback | None

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Estimate x_0 and the noise at the i-th visited timestep, with the known voxels put back in x_0."""
        x0, epsilon = (part.to(x.dtype) for part in self.denoise(x, self.times[i].to(x.device).expand(len(x))))
        x0 = self.keep(x0)
        if self.callback:
            self.callback({"i": i, "t": int(self.times[i]), "x": x, "x0": x0})
        return x0, epsilon


def sampler(name: str, spacing: str = "uniform") -> Callable[[Callable[[Trajectory, Tensor], Tensor]], Any]:
    """Register a solver in `SAMPLERS`, and give it the signature of all samplers."""

    def register(solve: Callable[[Trajectory, Tensor], Tensor]) -> Callable[..., Tensor]:
        @wraps(solve)
        def sample(
            denoise: Denoise, x: Tensor, schedule: NoiseSchedule, *, steps: int, noise: Callable[[int], Tensor],
            keep: Keep = lambda x: x, callback: Callback | None = None,
        ) -> Tensor:  # fmt: skip
            check_sampler(name, steps, schedule)
            times = spaced_timesteps(schedule, steps, spacing)
            levels = zip(schedule.alpha[times].tolist(), schedule.sigma[times].tolist(), strict=True)
            return solve(Trajectory(denoise, times, [*levels, (1.0, 0.0)], noise, keep, callback), keep(x))

        SAMPLERS[name] = sample
        return sample

    return register


@sampler("ddpm")
def ddpm(path: Trajectory, x: Tensor) -> Tensor:
    """Sample by ancestral sampling, with betas recomputed for the visited timesteps.

    Source: Ho et al. 2020, eq. 7 and algorithm 2; respacing by Nichol & Dhariwal 2021, eq. 19. Of the two variances
    that Ho et al. allow it takes the larger, beta: in 20 steps a Gaussian of standard deviation 0.5 is sampled with
    0.516, with the posterior variance with 0.39 only.
    """
    for i, (alpha_bar, next_alpha_bar) in enumerate(pairwise(alpha * alpha for alpha, _ in path.levels)):
        x0, _ = path.predict(x, i)
        alpha = alpha_bar / next_alpha_bar
        beta = 1 - alpha
        mean = sqrt(next_alpha_bar) * beta / (1 - alpha_bar) * x0
        mean = mean + sqrt(alpha) * (1 - next_alpha_bar) / (1 - alpha_bar) * x
        x = path.keep(mean + sqrt(beta) * path.noise(i) if next_alpha_bar < 1 else mean)
    return x


@sampler("ddim")
def ddim(path: Trajectory, x: Tensor) -> Tensor:
    """Sample by deterministic implicit sampling: Song et al. 2021, eq. 12 with eta = 0."""
    for i, (alpha, sigma) in enumerate(path.levels[1:]):
        x0, epsilon = path.predict(x, i)
        x = path.keep(alpha * x0 + sigma * epsilon)
    return x


@sampler("dpm++2m", spacing="log_snr")
def dpm_solver_pp_2m(path: Trajectory, x: Tensor) -> Tensor:
    """Sample by DPM-Solver++(2M): second-order multistep in x_0 over timesteps uniform in log-SNR.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2. The first step is of first order, and so is the last, which
    goes to lambda = infinity.
    """
    alpha, sigma = zip(*path.levels, strict=True)
    lambda_ = [log(a / s) if a else -inf for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    previous_x0, previous_h = None, None
    for i in range(len(path.times) - 1):
        x0, _ = path.predict(x, i)
        h = lambda_[i + 1] - lambda_[i]
        estimate = x0
        if i > 0:
            r = previous_h / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
        x = path.keep(sigma[i + 1] / sigma[i] * x - alpha[i + 1] * expm1(-h) * estimate)
        previous_x0, previous_h = x0, h
    return path.keep(path.predict(x, len(path.times) - 1)[0])


@sampler("euler")
def euler(path: Trajectory, x: Tensor) -> Tensor:
    """Sample by Euler's method on dx/dσ = noise - x_0, a rectified flow (Liu et al. 2023, algorithm 1)."""
    for i, (sigma, next_sigma) in enumerate(pairwise(s for _, s in path.levels)):
        x0, epsilon = path.predict(x, i)
        x = path.keep(x + (next_sigma - sigma) * (epsilon - x0))
    return x


@sampler("midpoint")
def midpoint(path: Trajectory, x: Tensor) -> Tensor:
    """Sample by the midpoint method on a rectified flow: two evaluations per step; a last odd one is Euler's.

    Both evaluations are at timesteps of the table, so that the network sees only those it was trained at. The inner one
    may lie off the middle by rounding; its weight is 1 / (2c) for an inner point at the fraction c of the
    step (Hairer, Nørsett & Wanner 1993, section II.1, every explicit two-stage method of order 2).
    """
    sigma, steps = [s for _, s in path.levels], len(path.times)
    for i in range(0, steps, 2):
        x0, epsilon = path.predict(x, i)
        slope, end = epsilon - x0, min(i + 2, steps)
        if end - i == 2:
            inner = path.keep(x + (sigma[i + 1] - sigma[i]) * slope)
            x0, epsilon = path.predict(inner, i + 1)
            weight = (sigma[end] - sigma[i]) / (2 * (sigma[i + 1] - sigma[i]))
            slope = (1 - weight) * slope + weight * (epsilon - x0)
        x = path.keep(x + (sigma[end] - sigma[i]) * slope)
    return x


def samplers_for(schedule: NoiseSchedule) -> list[str]:
    """List the names of the samplers that support this schedule."""
    return [name for name in SAMPLERS if FLOW_SAMPLERS.get(name, schedule.is_flow) == schedule.is_flow]


def check_sampler(name: str, steps: int, schedule: NoiseSchedule) -> None:
    """Reject a sampler whose equations are of the other kind of process, or more steps than the schedule has."""
    if name not in samplers_for(schedule):
        process = "rectified flow" if schedule.is_flow else "variance-preserving diffusion"
        raise ConfigError(f"{name!r} given, the model was trained on a {process}", where="sampler",
                          fix=f"take one of {', '.join(samplers_for(schedule))}")  # fmt: skip
    spaced_timesteps(schedule, steps)
