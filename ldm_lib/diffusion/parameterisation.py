"""What the denoiser is asked for, and what its answer means: x_t = α x_0 + σ ε, seen from four sides.

| prediction | asked for | x_0 | ε | source |
|---|---|---|---|---|
| noise | ε | (x_t - σ ε) / α | as told | Ho et al. 2020, eq. 14 |
| x0 | x_0 | as told | (x_t - α x_0) / σ | Ramesh et al. 2022, section 2.2 |
| velocity | v = α ε - σ x_0 | α x_t - σ v | σ x_t + α v | Salimans & Ho 2022, section 4 |
| flow | u = ε - x_0 | x_t - σ u | x_t + α u | Liu et al. 2023, eq. 1 |

The first three belong to a variance-preserving schedule, the last to the straight path. Everything is computed in
float64 and returned in the dtype of x_t.
"""

import torch
from torch import Tensor

from ldm_lib.diffusion.schedule import NoiseSchedule

PREDICTIONS = ("noise", "x0", "velocity", "flow")


def prediction_target(prediction: str, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect denoiser answers, like x0 in shape and dtype.

    Args:
        x0, noise: (b c x y z).
        t: (b,) integers in [0, schedule.steps - 1].
    """
    alpha, sigma = schedule.alpha_sigma(t, x0)
    answers = {
        "noise": lambda: noise,
        "x0": lambda: x0,
        "velocity": lambda: alpha * noise - sigma * x0,
        "flow": lambda: noise - x0,
    }
    return answers[prediction]().to(x0.dtype)


def to_x0_and_noise(
    prediction: str, schedule: NoiseSchedule, answer: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(x_0, ε) that an answer means at x_t (b c x y z); never clipped."""
    alpha, sigma = schedule.alpha_sigma(t, x_t)
    means = {
        "noise": lambda: (schedule.predict_x0(x_t, answer, t), answer),
        "x0": lambda: (answer, (x_t - alpha * answer) / sigma),
        "velocity": lambda: (alpha * x_t - sigma * answer, sigma * x_t + alpha * answer),
        "flow": lambda: (x_t - sigma * answer, x_t + alpha * answer),
    }
    x0, noise = means[prediction]()
    return x0.to(x_t.dtype), noise.to(x_t.dtype)


def min_snr_weight(prediction: str, schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """(b,) float64: what the squared error of an answer counts at t.

    Of x_0 it is min(SNR, γ) (Hang et al. 2023, arXiv 2303.09556, section 3.4); the other answers' errors are that of
    x_0 over a factor (σ / α for the noise, σ for velocity and flow), so that all weigh the same error alike.
    """
    alpha, sigma = schedule.alpha_sigma(t, t)
    snr = (alpha / sigma) ** 2
    if prediction == "noise":  # min(SNR, γ) / SNR, also where SNR is 0
        return (gamma / snr).clamp(max=1.0)
    capped = snr.clamp(max=gamma)
    return capped if prediction == "x0" else torch.as_tensor(sigma**2 * capped)
