"""A training from where it stands to its end: steps, figures, validations, checkpoints, and how it leaves early."""

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm_lib import checkpoints
from ldm_lib.batches import TrainingSamples
from ldm_lib.errors import InterruptionError, TrainingError
from ldm_lib.latents import Latents, collate, on_device
from ldm_lib.learner import EPOCH, INTERVAL, NORM, Learner
from ldm_lib.signals import Watchdog, Wishes
from ldm_lib.tracking import Trackers
from ldm_lib.validation import BY_LEVEL, Validation, mean_of_cases, panel_path

log = logging.getLogger("ldm_lib")

BEST_KEPT = 2
SPOKEN_EVERY_S = 30.0


class Fit:
    """The loop around a learner.

    Args:
        samples: asked for by places of the learner's plan.
        cases: keys of the training cases, in the order of the plan.
        figures: where they go; only the first process has them.
        folder: of the stage; takes checkpoints/ and panels/.
        identity: what the checkpoints say of what they belong to.
    """

    def __init__(
        self,
        learner: Learner,
        samples: TrainingSamples,
        cases: Sequence[str],
        validation: Validation,
        figures: Trackers | None,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.learner, self.samples, self.cases, self.validation = learner, samples, cases, validation
        self.figures, self.folder, self.identity = figures, folder, identity
        self.config, self.plan, self.processes = learner.config, learner.plan, learner.processes
        self._began = self._spoke = self._logged = time.monotonic()
        self._first = self._logged_step = learner.step

    def run(self) -> None:
        """Train until nothing is left.

        Raises:
            InterruptionError: it was asked to end, and has saved where it stands.
            TrainingError: a loss is not finite, or a checkpoint did not reach the disk.
        """
        stacks = self.folder / f"stacks-{self.processes.rank}.txt"
        try:
            with Wishes() as self._wishes, Watchdog(stacks) as self._watchdog:
                self._run()
        except torch.OutOfMemoryError as error:
            fix = "lower batch_size and raise accumulate_grad_batches, or take a smaller latent_crop or val_cases"
            cause = f"no memory left on the GPU {self._told_place(error)}"
            raise TrainingError(cause, where="training", fix=fix) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            fix = "set num_workers to 0, or give the machine more (shared) memory"
            cause = f"a loader process died {self._told_place(error)}"
            raise TrainingError(cause, where="training", fix=fix) from error

    def _run(self) -> None:
        learner, config, batches = self.learner, self.config, self._batches()
        self._close_epoch()
        while not learner.complete:
            learner.advance([next(batches) for _ in range(config.accumulate_grad_batches)])
            if learner.step % config.log_every == 0:
                self._log_interval()
            if learner.step % config.checkpoint_every == 0:
                self._save()
            self._alive(between_steps=True)
            self._close_epoch()

    def _told_place(self, error: RuntimeError) -> str:
        """Where something went wrong, in whose words, and what there is to go on from."""
        first = str(error).strip().splitlines()[0].rstrip(".")
        return f"after step {self.learner.step} ({first}); last checkpoint: {self._last_saved()}"

    def _last_saved(self) -> str:
        return next((path.name for path in checkpoints.resumable(self.folder / "checkpoints")), "none yet")

    def _batches(self) -> Iterator[Latents]:
        loader = DataLoader(
            self.samples,
            batch_sampler=self.plan.batches_from(self.learner.step),
            collate_fn=collate,
            num_workers=self.config.num_workers,
            pin_memory=self.processes.device.type == "cuda",
        )
        return (on_device(batch, self.processes.device) for batch in loader)

    def _close_epoch(self) -> None:
        """At the end of an epoch that was not closed yet: its figures, a validation if one is due, a checkpoint."""
        learner, config = self.learner, self.config
        if learner.step % self.plan.steps_per_epoch or learner.step == learner.closed:
            return
        self._require_finite()
        started = time.monotonic()
        loss = float(self.processes.mean(learner.sums)[EPOCH]) / self.plan.steps_per_epoch
        row = {"epoch": learner.epoch, "train_loss": loss, "learning_rate": learner.learning_rate}
        due = learner.epoch % min(config.val_every, config.max_epochs) == 0
        row |= self._validate() if due else {}
        learner.sums[EPOCH], learner.closed = 0, learner.step
        self._log(row)
        if due:
            self._keep_best(row["val_loss"])
            self._save()
            if self.figures:
                self.figures.panel(panel_path(self.folder, learner.epoch), learner.step)
        elif learner.complete:
            self._save()
        self._speak(row, now=due)
        self._logged += time.monotonic() - started  # the throughput is that of steps

    def _validate(self) -> dict[str, float]:
        share = slice(self.processes.rank, None, self.processes.world)
        inpainter, raw = self.learner.inpainter, self.learner.raw
        found = self.validation.scores(inpainter, raw, epoch=self.learner.epoch, share=share, alive=self._alive)
        return mean_of_cases(self.processes.gathered(found))

    def _keep_best(self, loss: float) -> None:
        """Keep the averaged weights if this validation is among the best, and count how long there was no better."""
        learner, folder = self.learner, self.folder / "checkpoints"
        learner.waited = 0 if not learner.best or loss < learner.best[0][0] else learner.waited + 1
        name = f"brain_mri_inpainting-epoch={learner.epoch}-val_loss={loss:.6f}.ckpt"
        ranked = sorted([*learner.best, [loss, name]], key=lambda entry: entry[0])
        learner.best, dropped = ranked[:BEST_KEPT], ranked[BEST_KEPT:]
        weights = {"average": learner.averaged_weights(), "step": learner.step}
        if self.processes.rank == 0:
            if [loss, name] in learner.best:
                checkpoints.write(folder / name, weights)
            for _, old in dropped:
                checkpoints.remove(folder / old)

    def _log_interval(self) -> None:
        """Means since figures were last logged; the one place where a step waits for a GPU."""
        self._require_finite()
        learner, every, now = self.learner, self.config.log_every, time.monotonic()
        means = self.processes.mean(learner.sums) / every
        steps, seconds = learner.step - self._logged_step, now - self._logged
        row = {"step_loss": float(means[INTERVAL]), "grad_norm": float(means[NORM])}
        row["samples_per_s"] = steps * self.plan.global_batch / max(seconds, 1e-9)
        learner.sums[INTERVAL], learner.sums[NORM] = 0, 0
        self._logged, self._logged_step = now, learner.step
        self._log(row)
        self._speak(row)

    def _log(self, row: Mapping[str, float]) -> None:
        if self.figures:
            self.figures.log(row, self.learner.step)

    def _speak(self, row: Mapping[str, float], *, now: bool = False) -> None:
        """One plain line, with the time left at most; a bar of widgets would be blank in a headless notebook."""
        clock, learner = time.monotonic(), self.learner
        if self.processes.rank or not (now or clock - self._spoke >= SPOKEN_EVERY_S):
            return
        self._spoke = clock
        told = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if not name.startswith(BY_LEVEL))
        done, left = learner.step - self._first, self.plan.steps - learner.step
        minutes = left * (clock - self._began) / max(done, 1) / 60
        line = f"step {learner.step}/{self.plan.steps}: {told}; {minutes:.0f} min left at most"
        log.info("%s", line)
        print(line, flush=True)

    def _save(self) -> None:
        """A checkpoint to go on from, and no more of them than needed."""
        self._require_finite()
        self._write()
        if self.processes.rank == 0:
            checkpoints.keep_newest(self.folder / "checkpoints")

    def _write(self) -> None:
        content = {"identity": dict(self.identity), **self.learner.state()}
        if self.processes.rank == 0:
            checkpoints.write(checkpoints.step_path(self.folder / "checkpoints", self.learner.step), content)

    def _require_finite(self) -> None:
        step = self.learner.bad_step()
        if step is None:
            return
        cases = ", ".join(sorted({self.cases[case] for *_, case in self.plan.places(step)}))
        cause = f"loss is not finite in step {step + 1}, cases {cases}; last finite checkpoint: {self._last_saved()}"
        raise TrainingError(cause, where="training", fix="lower learning_rate, or use precision 32")

    def _alive(self, *, between_steps: bool = False) -> None:
        """Work goes on, unless somebody asked for its end.

        Weights are the same in every process, so the first saves and leaves alone, without a word to the others, which
        may wait for it somewhere already: they end when it is gone. Shards need all, so all agree first.
        """
        self._watchdog.alive()
        asked, processes = self._wishes.received, self.processes
        if processes.sharded:
            asked = int(processes.largest(asked or 0)) if between_steps else None
        if asked and (processes.sharded or processes.rank == 0):
            self._leave(signal.Signals(asked))

    def _leave(self, asked: signal.Signals) -> None:
        learner, saved = self.learner, "where it diverged, not saved"
        if learner.bad_step(everywhere=False) is None:
            self._write()
            saved = "saved"
        cause = f"asked to end by {asked.name} after step {learner.step} of {self.plan.steps}, {saved}"
        fix = "give the same command: it goes on from there"
        raise InterruptionError(cause, where="training", fix=fix, status=128 + asked)
