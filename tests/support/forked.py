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

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case  # noqa: E402
from ldm_lib.data.cohort import find_cases  # noqa: E402
from ldm_lib.data.model_grid import grid_case  # noqa: E402
from ldm_lib.diffusion.latents import LatentSpec, encode_case  # noqa: E402
from ldm_lib.experiment import launch  # noqa: E402
from ldm_lib.experiment.presets import resolve  # noqa: E402
from ldm_lib.model_io import load_model  # noqa: E402
from ldm_lib.training import checkpoints, validation  # noqa: E402
from ldm_lib.training import step as trainer
from ldm_lib.training import train as training
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
WATCHED = CASES[3:]  # three, so that two processes have unequal shares


def train(name, **changes):
    """Train in outputs `name`, and write the model when this process is the only one."""
    config = resolve("smoke", SMALL | changes)["04_training"]
    folder = FOLDER / name / "04_training"
    folder.mkdir(parents=True, exist_ok=True)
    variants = {case.key: [LATENTS[case.key]] for case in CASES}
    trained = training.train(
        new_model(AUTOENCODER, config, LatentSpec()),
        variants,
        [load_case(case) for case in WATCHED],
        [LATENTS[case.key] for case in WATCHED],
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
            with (FOLDER / f"said-{rank}.txt").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            if world > 1:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
                        "GROUP_RANK": 0}  # fmt: skip
                os.environ.update({name: str(value) for name, value in told.items()})
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


def said(rank):
    return [line for line in (FOLDER / f"said-{rank}.txt").read_text().splitlines() if line.startswith("ERROR")]


def at_step(step, do):
    """Do something when a learner has done so many steps."""
    advance = trainer.Trainer.advance

    def watched(self, data):
        if self.step == step:
            do()
        advance(self, data)

    trainer.Trainer.advance = watched


TWO = {"batch_size": 2, "devices": 2}


def pair():
    """One process, two, and two of which one dies, before the same command goes on."""
    found = {"one": ends(spawn(lambda _: train("one"))), "two": ends(spawn(lambda _: train("two", **TWO), 2))}

    def dies(rank):
        if rank == 1:
            at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train("dead", **TWO)

    started = time.monotonic()
    found["dead"], found["dead_s"] = ends(spawn(dies, 2)), time.monotonic() - started
    found["dead_said"] = said(0)
    found["dead_resumed"] = ends(spawn(lambda _: train("dead", **TWO), 2))
    found["closed"] = ends(spawn(lambda _: train("two", **TWO)))  # one process closes what two have trained
    return found


def asked():
    """Replicas and shards that get SIGTERM, and the same command again, beside undisturbed ones."""
    found = {"one": ends(spawn(lambda _: train("one")))}
    for name in ("ddp", "fsdp"):
        two = TWO | {"strategy": name, "checkpoint_every": 1000}
        found[name] = ends(spawn(lambda _, n=name, two=two: train(n, **two), 2))

        def hears(rank, name=name, two=two):
            at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train(f"{name}-asked", **two)

        found[f"{name}-asked"], found[f"{name}-said"] = ends(spawn(hears, 2)), said(0)
        kept = checkpoints.resumable(FOLDER / f"{name}-asked" / "04_training" / "checkpoints")
        found[f"{name}-saved"] = [path.name for path in kept]
        found[f"{name}-resumed"] = ends(spawn(lambda _, n=name, two=two: train(f"{n}-asked", **two), 2))
    return found


def sweep():
    """SIGKILL at twenty moments of a training, whatever it is doing, and the same command again until it ends."""
    how = {"checkpoint_every": 1, "val_every": 1, "log_every": 2, "max_epochs": 4}
    started = time.monotonic()
    found = {"whole": ends(spawn(lambda _: train("whole", **how)))}
    whole_s = time.monotonic() - started
    rng, moments = random.Random(0), []
    for k in range(20):
        name, deaths = f"killed-{k}", 0
        delay = whole_s * (k + rng.random()) / 21
        while True:
            (pid,) = spawn(lambda _, n=name: train(n, **how))
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


print(json.dumps({"pair": pair, "asked": asked, "sweep": sweep}[scenario]()))
