"""Convert between prediction targets of the denoiser and (x_0, ε), where x_t = α x_0 + σ ε.

| prediction | target | x_0 | ε | source |
|---|---|---|---|---|
| noise | ε | (x_t - σ ε) / α | the prediction | Ho et al. 2020, eq. 14 |
| x0 | x_0 | the prediction | (x_t - α x_0) / σ | Ramesh et al. 2022, section 2.2 |
| velocity | v = α ε - σ x_0 | α x_t - σ v | σ x_t + α v | Salimans & Ho 2022, section 4 |
| flow | u = ε - x_0 | x_t - σ u | x_t + α u | Liu et al. 2023, eq. 1 |

The first three belong to a variance-preserving schedule, the last to the straight path. Everything is computed in
float64 and returned in the dtype of x_t.
"""

from torch import Tensor

from ldm_lib.diffusion.schedule import NoiseSchedule


def prediction_target(prediction: str, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the target of the denoiser (b c x y z), like x0 in shape and dtype."""
    alpha, sigma = schedule.alpha_sigma(t, x0)
    targets = {
        "noise": lambda: noise,
        "x0": lambda: x0,
        "velocity": lambda: alpha * noise - sigma * x0,
        "flow": lambda: noise - x0,
    }
    return targets[prediction]().to(x0.dtype)


def to_x0_and_noise(
    prediction: str, schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Convert the output of the denoiser at x_t (b c x y z) into (x_0, ε); never clipped."""
    alpha, sigma = schedule.alpha_sigma(t, x_t)
    conversions = {
        "noise": lambda: (schedule.predict_x0(x_t, output, t), output),
        "x0": lambda: (output, (x_t - alpha * output) / sigma),
        "velocity": lambda: (alpha * x_t - sigma * output, sigma * x_t + alpha * output),
        "flow": lambda: (x_t - sigma * output, x_t + alpha * output),
    }
    x0, noise = conversions[prediction]()
    return x0.to(x_t.dtype), noise.to(x_t.dtype)
