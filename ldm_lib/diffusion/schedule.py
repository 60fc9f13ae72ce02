"""Define the noise schedule: float64 tables of the process x_t = α_t x_0 + σ_t ε.

There are two kinds: variance preserving, α² + σ² = 1 (Ho et al. 2020), and rectified flow, α + σ = 1 (Liu et al. 2023,
arXiv 2209.03003).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ldm_lib.errors import ConfigError

SCHEDULES = ("linear", "cosine", "flow")
COSINE_OFFSET = 0.008  # Nichol & Dhariwal 2021, eq. 17
LARGEST_BETA = 0.999  # of the cosine schedule, the same
FIRST_LOG_SNR = -10.0  # of steps uniform in log-SNR, after a first timestep without any signal


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Hold the factors of signal and noise at each t as immutable tables (steps,) float64 on the CPU.

    alpha falls from nearly 1 at t = 0 to nearly 0, or 0, at t = steps - 1.
    """

    alpha: Tensor
    sigma: Tensor

    def __repr__(self) -> str:
        kind = "rectified flow" if self.is_flow else "variance preserving"
        return f"NoiseSchedule({self.steps} steps, {kind})"

    @property
    def steps(self) -> int:
        """Count the timesteps T."""
        return len(self.alpha)

    @property
    def is_flow(self) -> bool:
        """Return whether the process is a straight line from noise to data."""
        return bool(((self.alpha + self.sigma - 1).abs() < 1e-12).all())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean latents (b c x y z) to step t (b,): x_t, computed in float64 (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def predict_x0(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Invert `add_noise` for a known or predicted noise (Ho et al. 2020, eq. 15); not where alpha is 0.

        x_0 is computed in float64 and never clipped.
        """
        alpha, sigma = self.alpha_sigma(t, x_t)
        return ((x_t - sigma * noise) / alpha).to(x_t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(α² / σ²) in float64, of the shape of t; it falls with t, to -inf where there is no signal."""
        alpha, sigma = self.alpha_sigma(t, t)
        return 2 * (alpha.log() - sigma.log())

    def alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t, float64, on the device of x and shaped to broadcast over it."""
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (table[t].to(x.device).view(shape) for table in _tables(self, t.device))
        return alpha, sigma


@lru_cache(maxsize=16)
def _tables(schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy the tables of a schedule to a device, once."""
    return schedule.alpha.to(device), schedule.sigma.to(device)


def noise_schedule(
    schedule: str = "linear",
    steps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> NoiseSchedule:
    """Build a schedule by name; `ScheduleOptions` checks the numbers.

    Args:
        schedule: "linear" in beta (Ho et al. 2020, section 4), "cosine" (Nichol & Dhariwal 2021, eq. 17), both variance
            preserving, or "flow": sigma = (t + 1) / steps on a straight line.
        beta_start, beta_end: variance added by the first and the last step of "linear", each in (0, 1).
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"{schedule!r} given, {', '.join(SCHEDULES)} allowed", where="schedule")
    if schedule == "flow":
        sigma = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
        return NoiseSchedule(1 - sigma, sigma)
    if schedule == "cosine":
        angle = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps + COSINE_OFFSET
        bars = torch.cos(angle / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=LARGEST_BETA)
    else:
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return NoiseSchedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "uniform") -> Tensor:
    """Choose the timesteps that a sampler visits before it goes to the clean end, ᾱ = 1.

    Args:
        schedule: the schedule the network was trained with, T steps.
        steps: how many to visit, 1 to T; T visits all, whatever the spacing.
        spacing: "uniform" divides t evenly between T - 1 and the clean end at -1 ("trailing" in Lin et al. 2024, arXiv
            2305.08891, table 2); "log_snr" divides log-SNR evenly between t = T - 1 and t = 0 (Lu et al. 2022), each to
            the nearest timestep that is still free. A last timestep without signal (of a flow) is visited first, and
            the others begin at a log-SNR of -10.

    Returns:
        (steps,) int64, strictly descending, from T - 1.
    """
    last = schedule.steps - 1
    if not 1 <= steps <= schedule.steps:
        raise ConfigError(f"{steps} sampling steps given, 1 to {schedule.steps} allowed", where="num_inference_steps",
                          fix="choose no more steps than the schedule was trained with")  # fmt: skip
    if spacing == "uniform":
        return torch.linspace(last, -1, steps + 1, dtype=torch.float64)[:-1].round().long()
    log_snr = schedule.log_snr(torch.arange(schedule.steps))
    silent = bool(log_snr[-1].isinf())
    first = max(FIRST_LOG_SNR, float(log_snr[:-1].min())) if silent and last else float(log_snr[-1])
    even = torch.linspace(first, log_snr[0], max(1, steps - silent), dtype=torch.float64)
    even = torch.cat([log_snr[-1:], even])[:steps] if silent else even
    nearest = (log_snr[:, None] - even).abs().nan_to_num(nan=0.0).argmin(dim=0)  # -inf less -inf is no distance
    # The first timesteps are far apart in log-SNR, so that several steps may share the nearest one: each then moves
    # down to a free one, but leaves one timestep to each step after it.
    rank = torch.arange(steps)
    free = torch.cummin(nearest + rank, dim=0).values - rank
    return torch.maximum(free, steps - 1 - rank)
