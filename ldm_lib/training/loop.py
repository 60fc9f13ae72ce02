"""A training from where it stands to its end: steps, figures, validations, checkpoints, and how it leaves early."""

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm_lib.diffusion.latents import Latents, collate, on_device
from ldm_lib.errors import InterruptionError, TrainingError
from ldm_lib.process_control import StopRequest, Watchdog
from ldm_lib.training import checkpoints
from ldm_lib.training.batch_plan import TrainingSamples
from ldm_lib.training.step import EPOCH, INTERVAL, NORM, Trainer
from ldm_lib.training.trackers import Trackers
from ldm_lib.training.validation import BY_LEVEL, Validation, mean_of_cases, panel_path

log = logging.getLogger("ldm_lib")

BEST_KEPT = 2
SPOKEN_EVERY_S = 30.0


class TrainingLoop:
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
        trainer: Trainer,
        samples: TrainingSamples,
        cases: Sequence[str],
        validation: Validation,
        figures: Trackers | None,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.trainer, self.samples, self.cases, self.validation = trainer, samples, cases, validation
        self.figures, self.folder, self.identity = figures, folder, identity
        self.config, self.plan, self.processes = trainer.config, trainer.plan, trainer.processes
        self._began = self._spoke = self._logged = time.monotonic()
        self._first = self._logged_step = trainer.step

    def run(self) -> None:
        """Train until nothing is left.

        Raises:
            InterruptionError: it was asked to end, and has saved where it stands.
            TrainingError: a loss is not finite, or a checkpoint did not reach the disk.
        """
        stacks = self.folder / f"stacks-{self.processes.rank}.txt"
        try:
            with StopRequest() as self._wishes, Watchdog(stacks) as self._watchdog:
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
        trainer, config, batches = self.trainer, self.config, self._batches()
        self._close_epoch()
        while not trainer.complete:
            trainer.advance([next(batches) for _ in range(config.accumulate_grad_batches)])
            if trainer.step % config.log_every == 0:
                self._log_interval()
            if trainer.step % config.checkpoint_every == 0:
                self._save()
            self._alive(between_steps=True)
            self._close_epoch()

    def _told_place(self, error: RuntimeError) -> str:
        """Where something went wrong, in whose words, and what there is to go on from."""
        first = str(error).strip().splitlines()[0].rstrip(".")
        return f"after step {self.trainer.step} ({first}); last checkpoint: {self._last_saved()}"

    def _last_saved(self) -> str:
        return next((path.name for path in checkpoints.resumable(self.folder / "checkpoints")), "none yet")

    def _batches(self) -> Iterator[Latents]:
        loader = DataLoader(
            self.samples,
            batch_sampler=self.plan.batches_from(self.trainer.step),
            collate_fn=collate,
            num_workers=self.config.num_workers,
            pin_memory=self.processes.device.type == "cuda",
        )
        return (on_device(batch, self.processes.device) for batch in loader)

    def _close_epoch(self) -> None:
        """At the end of an epoch that was not closed yet: its figures, a validation if one is due, a checkpoint."""
        trainer, config = self.trainer, self.config
        if trainer.step % self.plan.steps_per_epoch or trainer.step == trainer.closed:
            return
        self._require_finite()
        started = time.monotonic()
        loss = float(self.processes.mean(trainer.sums)[EPOCH]) / self.plan.steps_per_epoch
        row = {"epoch": trainer.epoch, "train_loss": loss, "learning_rate": trainer.learning_rate}
        due = trainer.epoch % min(config.val_every, config.max_epochs) == 0
        row |= self._validate() if due else {}
        trainer.sums[EPOCH], trainer.closed = 0, trainer.step
        self._log(row)
        if due:
            self._keep_best(row["val_loss"])
            self._save()
            if self.figures:
                self.figures.panel(panel_path(self.folder, trainer.epoch), trainer.step)
        elif trainer.complete:
            self._save()
        self._speak(row, now=due)
        self._logged += time.monotonic() - started  # the throughput is that of steps

    def _validate(self) -> dict[str, float]:
        share = slice(self.processes.rank, None, self.processes.world)
        model, raw = self.trainer.model, self.trainer.raw
        found = self.validation.scores(model, raw, epoch=self.trainer.epoch, share=share, alive=self._alive)
        return mean_of_cases(self.processes.gathered(found))

    def _keep_best(self, loss: float) -> None:
        """Keep the averaged weights if this validation is among the best, and count how long there was no better."""
        trainer, folder = self.trainer, self.folder / "checkpoints"
        trainer.waited = 0 if not trainer.best or loss < trainer.best[0][0] else trainer.waited + 1
        name = f"brain_mri_inpainting-epoch={trainer.epoch}-val_loss={loss:.6f}.ckpt"
        ranked = sorted([*trainer.best, [loss, name]], key=lambda entry: entry[0])
        trainer.best, dropped = ranked[:BEST_KEPT], ranked[BEST_KEPT:]
        weights = {"average": trainer.averaged_weights(), "step": trainer.step}
        if self.processes.rank == 0:
            if [loss, name] in trainer.best:
                checkpoints.write(folder / name, weights)
            for _, old in dropped:
                checkpoints.remove(folder / old)

    def _log_interval(self) -> None:
        """Means since figures were last logged; the one place where a step waits for a GPU."""
        self._require_finite()
        trainer, every, now = self.trainer, self.config.log_every, time.monotonic()
        means = self.processes.mean(trainer.sums) / every
        steps, seconds = trainer.step - self._logged_step, now - self._logged
        row = {"step_loss": float(means[INTERVAL]), "grad_norm": float(means[NORM])}
        row["samples_per_s"] = steps * self.plan.global_batch / max(seconds, 1e-9)
        trainer.sums[INTERVAL], trainer.sums[NORM] = 0, 0
        self._logged, self._logged_step = now, trainer.step
        self._log(row)
        self._speak(row)

    def _log(self, row: Mapping[str, float]) -> None:
        if self.figures:
            self.figures.log(row, self.trainer.step)

    def _speak(self, row: Mapping[str, float], *, now: bool = False) -> None:
        """One plain line, with the time left at most; a bar of widgets would be blank in a headless notebook."""
        clock, trainer = time.monotonic(), self.trainer
        if self.processes.rank or not (now or clock - self._spoke >= SPOKEN_EVERY_S):
            return
        self._spoke = clock
        told = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if not name.startswith(BY_LEVEL))
        done, left = trainer.step - self._first, self.plan.steps - trainer.step
        minutes = left * (clock - self._began) / max(done, 1) / 60
        line = f"step {trainer.step}/{self.plan.steps}: {told}; {minutes:.0f} min left at most"
        log.info("%s", line)
        print(line, flush=True)

    def _save(self) -> None:
        """A checkpoint to go on from, and no more of them than needed."""
        self._require_finite()
        self._write()
        if self.processes.rank == 0:
            checkpoints.keep_newest(self.folder / "checkpoints")

    def _write(self) -> None:
        content = {"identity": dict(self.identity), **self.trainer.state()}
        if self.processes.rank == 0:
            checkpoints.write(checkpoints.step_path(self.folder / "checkpoints", self.trainer.step), content)

    def _require_finite(self) -> None:
        step = self.trainer.bad_step()
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
        trainer, saved = self.trainer, "where it diverged, not saved"
        if trainer.bad_step(everywhere=False) is None:
            self._write()
            saved = "saved"
        cause = f"asked to end by {asked.name} after step {trainer.step} of {self.plan.steps}, {saved}"
        fix = "give the same command: it goes on from there"
        raise InterruptionError(cause, where="training", fix=fix, status=128 + asked)
