"""Run a training from its last step to its end: steps, metrics, validations, checkpoints, and early ends."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm_lib.diffusion.latents import Latents, collate, on_device
from ldm_lib.errors import InterruptionError, TrainingError
from ldm_lib.process_control import StopRequest, watchdog
from ldm_lib.progress import Progress
from ldm_lib.training import checkpoints
from ldm_lib.training.batch_plan import TrainingSamples
from ldm_lib.training.step import EPOCH, INTERVAL, NORM, Trainer
from ldm_lib.training.trackers import Trackers
from ldm_lib.training.validation import BY_LEVEL, Validation, mean_of_cases, panel_path

BEST_KEPT = 2


class TrainingLoop:
    """Run the loop around a trainer.

    Args:
        cases: keys of the training cases, in the order of the plan.
        trackers: take the metrics; only the first process has them.
        identity: description of the training that its checkpoints hold.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: TrainingSamples,
        cases: Sequence[str],
        validation: Validation,
        trackers: Trackers | None,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.trainer, self.samples, self.cases, self.validation = trainer, samples, cases, validation
        self.trackers, self.folder, self.identity = trackers, folder, identity
        self.checkpoints = folder / "checkpoints"
        self.config, self.plan, self.processes = trainer.config, trainer.plan, trainer.processes
        self._first, self._progress = trainer.processes.rank == 0, Progress(trainer.plan.steps, done=trainer.step)
        self._logged, self._logged_step = time.monotonic(), trainer.step

    def run(self) -> None:
        """Train until nothing is left to do, see `train.train`."""
        stacks = self.folder / f"stacks-{self.processes.rank}.txt"
        try:
            with StopRequest() as self._stop, watchdog(stacks) as self._restart_watchdog:
                self._run()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                cause = "no memory left on the GPU"
                fix = "lower batch_size and raise accumulate_grad_batches, or use a smaller latent_crop or val_cases"
            elif "DataLoader worker" in str(error):
                cause, fix = "a loader process died", "set num_workers to 0, or give the machine more (shared) memory"
            else:
                raise
            first = str(error).strip().splitlines()[0].rstrip(".")
            cause += f" after step {self.trainer.step} ({first}); last checkpoint: {self._last_saved()}"
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
            self._alive()
            self._close_epoch()

    def _last_saved(self) -> str:
        return next((path.name for path in checkpoints.resumable(self.checkpoints)), "none yet")

    def _batches(self) -> Iterator[Latents]:
        loader = DataLoader(
            self.samples, batch_sampler=self.plan.batches_from(self.trainer.step), collate_fn=collate,
            num_workers=self.samples.workers, pin_memory=self.processes.device.type == "cuda",
        )  # fmt: skip
        return (on_device(batch, self.processes.device) for batch in loader)

    def _close_epoch(self) -> None:
        """Finish an epoch that is not closed yet: its metrics, a validation if one is due, a checkpoint."""
        trainer, config = self.trainer, self.config
        if trainer.step % self.plan.steps_per_epoch or trainer.step == trainer.closed:
            return
        self._require_finite()
        started = time.monotonic()
        loss = float(self.processes.reduce(trainer.sums, "mean")[EPOCH]) / self.plan.steps_per_epoch
        row = {"epoch": trainer.epoch, "train_loss": loss, "learning_rate": trainer.learning_rate}
        due = bool(self.validation.cases) and trainer.epoch % min(config.val_every, config.max_epochs) == 0
        if due:
            mine = slice(self.processes.rank, None, self.processes.world)
            found = self.validation.scores(
                trainer.model, trainer.denoiser, epoch=trainer.epoch, mine=mine, alive=self._alive
            )
            row |= mean_of_cases(self.processes.gathered(found))
        trainer.sums[EPOCH], trainer.closed = 0, trainer.step
        self._log(row)
        if due:
            self._keep_best(row["val_loss"])
        if due or trainer.complete:
            self._save()
        if due and self.trackers:
            self.trackers.panel(panel_path(self.folder, trainer.epoch), trainer.step)
        self._report(row, now=due)
        self._logged += time.monotonic() - started  # samples_per_s measures steps only

    def _keep_best(self, loss: float) -> None:
        """Keep the averaged weights of the best validations, and count the validations since the best."""
        trainer = self.trainer
        trainer.waited = 0 if not trainer.best or loss < trainer.best[0][0] else trainer.waited + 1
        name = f"brain_mri_inpainting-epoch={trainer.epoch}-val_loss={loss:.6f}.ckpt"
        ranked = sorted([*trainer.best, [loss, name]], key=lambda entry: entry[0])
        trainer.best, dropped = ranked[:BEST_KEPT], ranked[BEST_KEPT:]
        if not self._first:
            return
        if [loss, name] in trainer.best:
            weights = {"average": trainer.average.state_dict(), "step": trainer.step}
            checkpoints.write(self.checkpoints / name, weights)
        for _, old in dropped:
            checkpoints.remove(self.checkpoints / old)

    def _log_interval(self) -> None:
        """Log the means since the last interval; nowhere else does a step wait for a GPU."""
        self._require_finite()
        trainer, every, now = self.trainer, self.config.log_every, time.monotonic()
        means = self.processes.reduce(trainer.sums, "mean") / every
        steps, seconds = trainer.step - self._logged_step, now - self._logged
        row = {"step_loss": float(means[INTERVAL]), "grad_norm": float(means[NORM])}
        row["samples_per_s"] = steps * self.plan.global_batch / max(seconds, 1e-9)
        trainer.sums[INTERVAL], trainer.sums[NORM] = 0, 0
        self._logged, self._logged_step = now, trainer.step
        self._log(row)
        self._report(row)

    def _log(self, row: Mapping[str, float]) -> None:
        if self.trackers:
            self.trackers.log(row, self.trainer.step)

    def _report(self, row: Mapping[str, float], *, now: bool = False) -> None:
        if self._first:
            shown = {name: value for name, value in row.items() if not name.startswith(BY_LEVEL)}
            text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self._progress.update(self.trainer.step, text, now=now)

    def _save(self) -> None:
        """Write a checkpoint to resume from, and remove those that are no longer needed."""
        self._require_finite()
        if self._first:
            self._write()
            checkpoints.keep_newest(self.checkpoints)

    def _write(self) -> None:
        content = {"format": checkpoints.FORMAT, "identity": dict(self.identity), **self.trainer.state()}
        checkpoints.write(checkpoints.step_path(self.checkpoints, self.trainer.step), content)

    def _require_finite(self) -> None:
        step = self.trainer.bad_step()
        if step is None:
            return
        cases = ", ".join(sorted({self.cases[case] for *_, case in self.plan.sample_indices(step)}))
        cause = f"loss is not finite in step {step + 1}, cases {cases}; last finite checkpoint: {self._last_saved()}"
        raise TrainingError(cause, where="training", fix="lower learning_rate, or use precision 32")

    def _alive(self) -> None:
        """Restart the watchdog, and save and end if a signal requested it.

        The other processes may already wait for the first one somewhere: they end when it is gone.
        """
        self._restart_watchdog()
        received = self._stop.received
        if not (self._first and received):
            return
        trainer, saved = self.trainer, "not saved, because its loss is not finite"
        if trainer.bad_step(everywhere=False) is None:
            self._write()
            saved = "saved"
        cause = f"stopped by {received.name} after step {trainer.step} of {self.plan.steps}, {saved}"
        fix = "give the same command: it resumes from there"
        raise InterruptionError(cause, where="training", fix=fix, status=128 + received)
