"""Laws of the objectives: four names of one pair (x_0, noise)."""

import pytest
import torch

from ldm_lib.diffusion.parameterisation import prediction_target, to_x0_and_noise
from ldm_lib.diffusion.schedule import noise_schedule

PREDICTIONS = ("noise", "x0", "velocity", "flow")
SCHEDULES = {name: noise_schedule("flow" if name == "flow" else "cosine") for name in PREDICTIONS}
T = torch.tensor([0, 9, 500, 990])


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(4, 2, 3, 3, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_the_pair_that_made_x_t(prediction):
    schedule, (x0, noise) = SCHEDULES[prediction], pair()
    x_t = schedule.add_noise(x0, noise, T)
    found = to_x0_and_noise(prediction, schedule, prediction_target(prediction, schedule, x0, noise, T), x_t, T)
    torch.testing.assert_close(found[0], x0)
    torch.testing.assert_close(found[1], noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_prediction_gives_a_pair_that_makes_x_t(prediction):
    """No prediction can contradict its input."""
    schedule, (x_t, output) = SCHEDULES[prediction], pair()
    x0, noise = to_x0_and_noise(prediction, schedule, output, x_t, T)
    torch.testing.assert_close(schedule.add_noise(x0, noise, T), x_t)


def test_without_signal_the_result_is_still_finite():
    (x_t, output), last = pair(), torch.full((4,), 999)
    x0, noise = to_x0_and_noise("flow", SCHEDULES["flow"], output, x_t, last)
    assert x0.isfinite().all() and torch.equal(noise, x_t)  # x_t is all noise there


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_is_rounded_once(prediction):
    schedule, (x0, noise) = SCHEDULES[prediction], pair(torch.bfloat16)
    found = prediction_target(prediction, schedule, x0, noise, T)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, prediction_target(prediction, schedule, x0.double(), noise.double(), T).bfloat16())
