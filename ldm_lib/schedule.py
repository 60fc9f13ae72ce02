"""The noise schedule: a float64 table of the process x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lib.errors import ConfigError

SPACINGS = ("uniform", "log_snr")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process of diffusion, as one table that nothing changes.

    Attributes:
        alpha_bar: (steps,) float64 on the CPU, the share of signal variance left after step t,
            falling from nearly 1 at t = 0 to nearly 0 at t = steps - 1 (Ho et al. 2020, eq. 4).
    """

    alpha_bar: Tensor

    @property
    def steps(self) -> int:
        """The number of timesteps T."""
        return len(self.alpha_bar)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean latents to step t (Ho et al. 2020, eq. 4).

        Args:
            x0, noise: (b c x y z); noise is standard normal.
            t: (b,) integers in [0, steps - 1].

        Returns:
            x_t, like x0 in shape, dtype and device; computed in float64.
        """
        alpha, sigma = self._signal_and_noise(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def predict_x0(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Invert `add_noise` for a known or predicted noise (Ho et al. 2020, eq. 15).

        Args:
            x_t, noise: (b c x y z).
            t: (b,) integers in [0, steps - 1].

        Returns:
            x_0, like x_t in shape, dtype and device; computed in float64, never clipped.
        """
        alpha, sigma = self._signal_and_noise(t, x_t)
        return ((x_t - sigma * noise) / alpha).to(x_t.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (Salimans & Ho 2022, section 4); arguments as in `add_noise`."""
        alpha, sigma = self._signal_and_noise(t, x0)
        return (alpha * noise - sigma * x0).to(x0.dtype)

    def noise_from_velocity(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """ε = sqrt(1 - ᾱ_t) x_t + sqrt(ᾱ_t) v, like x_t in shape, dtype and device; computed in float64."""
        alpha, sigma = self._signal_and_noise(t, x_t)
        return (sigma * x_t + alpha * v).to(x_t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(ᾱ_t / (1 - ᾱ_t)) in float64, of the shape of t; falls with t."""
        return torch.logit(self._alpha_bar_at(t))

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        t = t.cpu()
        if t.min() < 0 or t.max() >= self.steps:
            raise ConfigError(
                f"timesteps {t.min()}..{t.max()} given, 0..{self.steps - 1} allowed",
                where="t",
                fix="draw timesteps below schedule.steps",
            )
        return self.alpha_bar[t]

    def _signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), float64, shaped to broadcast over x."""
        alpha_bar = self._alpha_bar_at(t).to(x.device).view(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def linear_schedule(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """The linear variance schedule of DDPM (Ho et al. 2020, section 4).

    Args:
        steps: number of timesteps T, at least 1.
        beta_start, beta_end: variance added by the first and the last step, each in (0, 1).

    Raises:
        ConfigError: a value is out of range.
    """
    if steps < 1:
        raise ConfigError(f"{steps} given, at least 1 allowed", where="schedule steps")
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(
            f"betas {beta_start} to {beta_end} given, 0 < beta_start <= beta_end < 1 allowed",
            where="schedule betas",
            fix="use 1e-4 to 0.02",
        )
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
    return NoiseSchedule(alpha_bar=torch.cumprod(1 - betas, dim=0))


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "uniform") -> Tensor:
    """Choose the timesteps that a sampler visits before it goes to the clean end, ᾱ = 1.

    Args:
        schedule: the schedule the network was trained with, T steps.
        steps: how many to visit, 1 to T; T visits all, whatever the spacing.
        spacing: "uniform" divides t evenly between T - 1 and the clean end at -1 ("trailing" in
            Lin et al. 2024, table 2); "log_snr" divides log(ᾱ / (1 - ᾱ)) evenly between t = T - 1
            and t = 0 (Lu et al. 2022), each to the nearest timestep that is still free.

    Returns:
        (steps,) int64, strictly descending, from T - 1.

    Raises:
        ConfigError: steps or spacing is not allowed.
    """
    last = schedule.steps - 1
    if not 1 <= steps <= schedule.steps:
        raise ConfigError(
            f"{steps} sampling steps given, 1 to {schedule.steps} allowed",
            where="num_inference_steps",
            fix="choose no more steps than the schedule was trained with",
        )
    if spacing not in SPACINGS:
        raise ConfigError(f"{spacing!r} given, {' or '.join(SPACINGS)} allowed", where="spacing")
    if spacing == "uniform":
        return torch.linspace(last, -1, steps + 1, dtype=torch.float64)[:-1].round().long()
    log_snr = schedule.log_snr(torch.arange(schedule.steps))
    wanted = torch.linspace(log_snr[-1], log_snr[0], steps, dtype=torch.float64)
    nearest = (log_snr[:, None] - wanted).abs().argmin(dim=0)
    # The first timesteps lie far apart in log-SNR, so several wishes may share one: each then moves
    # down to a free one, but leaves one timestep to each wish after it.
    rank = torch.arange(steps)
    free = torch.cummin(nearest + rank, dim=0).values - rank
    return torch.maximum(free, steps - 1 - rank)
