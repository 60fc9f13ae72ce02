"""The samplers compared with the schedulers of diffusers: the same trajectory wherever the definition is the same.

diffusers keeps its tables, and some of its steps, in float32. Its tables are replaced by ours here; where it computes a
step in float32 whatever it is given, the tolerance is float32's.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ldm_lib.diffusion.parameterisation import to_x0_and_noise
from ldm_lib.diffusion.samplers import SAMPLERS
from ldm_lib.diffusion.schedule import noise_schedule, spaced_timesteps

STEPS = pytest.mark.parametrize("steps", [4, 20])
KINDS = {"noise": "epsilon", "velocity": "v_prediction", "x0": "sample"}
LINEAR, FLOW = noise_schedule(), noise_schedule("flow")
FLOAT32 = 2e-5


def output(x, t):
    """A network that is neither linear in x nor constant in t."""
    return 0.8 * torch.tanh(1.3 * x) + 0.2 * torch.sin(x + t / 300.0)


def start():
    return torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(name, schedule, prediction, steps):
    """Every x that enters a step, and the last."""
    path = []
    last = SAMPLERS[name](
        lambda x, t: to_x0_and_noise(prediction, schedule, output(x, t.view(-1, 1, 1, 1, 1)), x, t), start(), schedule,
        steps=steps, noise=drawn, callback=lambda state: path.append(state["x"]),
    )  # fmt: skip
    return [*path, last]


def drawn(i):
    return torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64)


def theirs(scheduler):
    x = start()
    path = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t), t, x).prev_sample
        path.append(x)
    return path


def with_our_tables(scheduler):
    scheduler.alphas_cumprod = LINEAR.alpha**2
    return scheduler


def require_equal(one, other, tolerance):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


@STEPS
@pytest.mark.parametrize("prediction", KINDS)
def test_ddim(steps, prediction):
    scheduler = with_our_tables(DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True,
        prediction_type=KINDS[prediction],
    ))  # fmt: skip
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == spaced_timesteps(LINEAR, steps, "uniform").tolist()
    require_equal(ours("ddim", LINEAR, prediction, steps), theirs(scheduler), 1e-9)


@STEPS
@pytest.mark.parametrize("prediction", KINDS)
def test_dpm_solver_pp_2m(steps, prediction):
    """Theirs takes its timesteps from ours: its own "lu_lambdas" ends elsewhere."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero", prediction_type=KINDS[prediction],
    )  # fmt: skip
    times = spaced_timesteps(LINEAR, steps, "log_snr")
    scheduler.set_timesteps(timesteps=times.tolist())
    scheduler.sigmas = torch.cat([LINEAR.sigma[times] / LINEAR.alpha[times], torch.zeros(1)])
    require_equal(ours("dpm++2m", LINEAR, prediction, steps), theirs(scheduler), FLOAT32)


@STEPS
def test_euler(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    times = spaced_timesteps(FLOW, steps, "uniform")
    scheduler.set_timesteps(sigmas=FLOW.sigma[times].tolist(), timesteps=times.tolist())
    scheduler.sigmas = torch.cat([FLOW.sigma[times], torch.zeros(1)])
    require_equal(ours("euler", FLOW, "flow", steps), theirs(scheduler), FLOAT32)


@pytest.mark.parametrize(("prediction", "steps"), [(kind, 10) for kind in KINDS] + [("velocity", 1000)])
def test_ddpm_up_to_its_last_step(prediction, steps, monkeypatch):
    """Theirs adds noise in the last of few steps, whose mean is clean already; of all 1000 the last is the same too."""
    scheduler = with_our_tables(DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, variance_type="fixed_large",
        prediction_type=KINDS[prediction],
    ))  # fmt: skip
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=spaced_timesteps(LINEAR, steps, "uniform").tolist())
    count = SimpleNamespace(steps=-1)

    def noise(*_, **__):
        count.steps += 1
        return drawn(count.steps)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    path, other = ours("ddpm", LINEAR, prediction, steps), theirs(scheduler)
    kept = len(path) if steps == LINEAR.steps else -1
    require_equal(path[:kept], other[:kept], 1e-9)
    assert steps == LINEAR.steps or (path[-1] - other[-1]).abs().max() > 1e-3
