"""Trainings in processes that may die: forked from one that has loaded everything, so that each takes a second.

    python tests/support/forked.py SCENARIO AUTOENCODER COHORT FOLDER

A script of its own, because a process that has run a backward pass cannot be forked: torch's engine does not survive
it. Prints one JSON object.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from ldm_lib.autoencoder.model import Autoencoder  # noqa: E402
from ldm_lib.data.case import load_case  # noqa: E402
from ldm_lib.data.cohort import find_cases  # noqa: E402
from ldm_lib.data.model_grid import grid_case  # noqa: E402
from ldm_lib.diffusion.latents import LatentSpec, encode_case  # noqa: E402
from ldm_lib.experiment import launch  # noqa: E402
from ldm_lib.experiment.presets import resolve  # noqa: E402
from ldm_lib.model_io import load_model  # noqa: E402
from ldm_lib.training import checkpoints, validation  # noqa: E402
from ldm_lib.training import step as trainer  # noqa: E402
from ldm_lib.training import train as training  # noqa: E402
from ldm_lib.training.initialise import new_model  # noqa: E402
from ldm_lib.training.validation import Validation  # noqa: E402

SMALL = {"base_width": 8, "multipliers": "1", "attention_rates": "1", "precision": "32", "device": "cpu",
         "num_inference_steps": 2, "save_samples_every": 0, "warmup_steps": 2, "latent_crop": 5, "ema_decay": 0.9,
         "learning_rate": 1e-3, "log_every": 1, "max_epochs": 4, "val_every": 2, "batch_size": 4}  # fmt: skip
_, scenario, autoencoder_folder, cohort_folder, work = sys.argv
AUTOENCODER, FOLDER = Path(autoencoder_folder), Path(work)
NETWORK = load_model(AUTOENCODER, Autoencoder)
CASES = find_cases(cohort_folder)


Validation._draw = lambda self, data, filled, epoch: None  # pictures take longer than these trainings
validation.LEVELS = 1  # and so would the other four noise levels


def encode(case):
    on_grid = grid_case(load_case(case), NETWORK.factor)
    return encode_case(on_grid, NETWORK, LatentSpec(), device=torch.device("cpu"), precision="32")


LATENTS = {case.key: encode(case) for case in CASES}
VALIDATION = CASES[3:]  # three, so that two processes have different numbers


def train(name, **changes):
    """Train in outputs `name`, and write the model when this process is the only one."""
    config = resolve("smoke", SMALL | changes)["04_training"]
    folder = FOLDER / name / "04_training"
    folder.mkdir(parents=True, exist_ok=True)
    variants = {case.key: [LATENTS[case.key]] for case in CASES}
    trained = training.train(
        new_model(AUTOENCODER, config, LatentSpec()),
        variants,
        [load_case(case) for case in VALIDATION],
        [LATENTS[case.key] for case in VALIDATION],
        config,
        folder,
    )
    if trained.processes.world == 1:
        training.save_trained(trained, AUTOENCODER, folder / "model")


def spawn(work, world=1):
    """Fork `world` processes that do `work(rank)` as `torchrun` would start them; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            with (FOLDER / f"printed-{rank}.txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            if world > 1:
                variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
                        "GROUP_RANK": 0}  # fmt: skip
                os.environ.update({name: str(value) for name, value in variables.items()})
            status = 99
            try:
                status = launch.run_process(lambda _, rank=rank: work(rank), "x")
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def ends(pids):
    """Exit statuses, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def printed(rank):
    return [line for line in (FOLDER / f"printed-{rank}.txt").read_text().splitlines() if line.startswith("ERROR")]


def at_step(step, do):
    """Do something when a trainer has done so many steps."""
    advance = trainer.Trainer.advance

    def advance_and_do(self, data):
        if self.step == step:
            do()
        advance(self, data)

    trainer.Trainer.advance = advance_and_do


TWO = {"batch_size": 2, "devices": 2}


def pair():
    """One process, two, and two of which one dies, before the same command goes on."""
    both = spawn(lambda _: train("one")), spawn(lambda _: train("two", **TWO), 2)  # at the same time
    found = {"one": ends(both[0]), "two": ends(both[1])}

    def dies(rank):
        if rank == 1:
            at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train("dead", **TWO)

    started = time.monotonic()
    found["dead"], found["dead_s"] = ends(spawn(dies, 2)), time.monotonic() - started
    found["dead_printed"] = printed(0)
    found["dead_resumed"] = ends(spawn(lambda _: train("dead", **TWO), 2))
    found["closed"] = ends(spawn(lambda _: train("two", **TWO)))  # one process closes what two have trained
    return found


def stopped():
    """Train in one process and in two; two that get SIGTERM, and the same command again."""
    two = TWO | {"checkpoint_every": 1000}
    found = {"one": ends(spawn(lambda _: train("one"))), "two": ends(spawn(lambda _: train("two", **two), 2))}

    def receives(rank):
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train("stopped", **two)

    found["stopped"], found["printed"] = ends(spawn(receives, 2)), printed(0)
    found["saved"] = [path.name for path in checkpoints.resumable(FOLDER / "stopped" / "04_training" / "checkpoints")]
    found["resumed"] = ends(spawn(lambda _: train("stopped", **two), 2))
    return found


def sweep():
    """SIGKILL at twenty moments of a training, whatever it is doing, and the same command again until it ends."""
    often = {"checkpoint_every": 1, "val_every": 1, "log_every": 2, "max_epochs": 4}
    started = time.monotonic()
    found = {"whole": ends(spawn(lambda _: train("whole", **often)))}
    whole_s = time.monotonic() - started
    rng, moments = random.Random(0), []
    for k in range(20):
        name, deaths = f"killed-{k}", 0
        delay = whole_s * (k + rng.random()) / 21
        while True:
            (pid,) = spawn(lambda _, n=name: train(n, **often))
            end = time.monotonic() + delay
            while time.monotonic() < end and not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                time.sleep(0.001)
            if not ended[0]:
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
            status = os.waitstatus_to_exitcode(ended[1])
            if status != -signal.SIGKILL:
                break
            deaths += 1
            kept = checkpoints.resumable(FOLDER / name / "04_training/checkpoints")
            whole = [path.name for path in kept if (path.with_name(path.name + ".sha256")).exists()]
            moments.append({"run": k, "after_s": round(delay, 3), "to resume from": whole[:1]})
            delay = whole_s * (0.3 + rng.random()) if deaths < 3 else 1e9  # die again a few times, then live
        found[name] = status
    found["moments"] = moments
    return found


print(json.dumps({"pair": pair, "stopped": stopped, "sweep": sweep}[scenario]()))
