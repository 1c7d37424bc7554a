"""The training loop.

Everything random is drawn from (seed, step) and everything else is in the checkpoint, so a run
that was killed and resumed takes the same steps, to the bit on a CPU, as one left alone.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from danet.atomic import replacing
from danet.config import RunConfig, TrainConfig
from danet.data import open_dataset
from danet.data.loader import Batch, StepSampler, training_batches, training_samples
from danet.devices import choose_device, is_out_of_memory, uses_bfloat16, warn_of_slow_bfloat16
from danet.errors import (
    LogitsNotFinite,
    OutOfMemory,
    TrainingDiverged,
    TrainingOutOfMemory,
    TrainingStopped,
    UserError,
)
from danet.progress import ProgressReport
from danet.training.build import build_model
from danet.training.checkpoint import RunFolder, load_checkpoint, model_weights, save_checkpoint
from danet.training.events import Events
from danet.training.launch import (
    StopSignal,
    describe_lost_process,
    explaining_worker_death,
    holds_anywhere,
    launch,
    process_counts,
)
from danet.training.log import MetricsLog
from danet.training.probe import freeze_unreached, require_enough_values
from danet.training.resume import ChangedSettings, read_checkpoint, require_folder
from danet.training.state import TrainingState
from danet.training.step import take_step
from danet.training.validation import Validation


def train(config: RunConfig, out: Path, resume: bool = False) -> RunFolder:
    """Trains by a recipe and leaves the model in `out/model`.

    Args:
        out: the run folder; must not hold a run unless `resume`.
        resume: go on from the run's last checkpoint, or start where there is none yet.

    Raises:
        UserError: the data, the folder or a setting is wrong.
        TrainingDiverged: a loss, or the logits of a validation, were not finite.
        TrainingStopped: SIGTERM or SIGINT arrived, or a data worker or another process died.
        OutOfMemory: the device, the machine or a limit had no memory left.
    """
    run = RunFolder(out)
    require_folder(run, resume)
    with StopSignal() as stop, ExitStack() as at_end:
        try:
            trainer = _Trainer(config, run, stop, at_end)
            with explaining_worker_death(config.data.workers):
                trainer.fit()
        except (TrainingDiverged, TrainingStopped, OutOfMemory):
            raise
        # Raised by the loader's signal handler, wherever training is at that moment, and by gloo.
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TrainingOutOfMemory(
                    f"training: out of memory; {run.path} is as last saved"
                ) from error
            problem = describe_lost_process(error)
            if problem is None:
                raise
            raise TrainingStopped(f"training: {problem}, and continue with --resume") from error
    return run


class _Trainer:
    """What a run is made of, and when its steps, checkpoints and validations are due."""

    def __init__(
        self, config: RunConfig, run: RunFolder, stop: StopSignal, at_end: ExitStack
    ) -> None:
        self.config = config
        self.run = run
        self.stop = stop
        device = choose_device(config.train.device)
        self.bfloat16 = uses_bfloat16(config.train.precision, device)
        if self.bfloat16:
            warn_of_slow_bfloat16(device)
        # What is wrong with the input is told before there are several processes to tell it.
        _check_batch_size(config.train, math.prod(process_counts(config.train)))
        data = config.data
        spec, self.training_data = training_samples(data)
        validated = open_dataset(data.name, data.root, data.val_split, needs_labels=True)
        self.fabric = launch(config.train, device, bfloat16=self.bfloat16)
        self.validation = Validation(config, self.fabric, validated)
        # Another process may still be training here. A new run is locked later, because what is
        # wrong with the input must leave no folder behind.
        begun = run.exists()
        if begun:
            self._lock(at_end)
        self.fabric.barrier()
        notes: list[str] = []
        checkpoint = read_checkpoint(run, config.train.steps, notes.append)
        self.first_step: int = 0 if checkpoint is None else checkpoint["step"]
        self.progress = ProgressReport(
            "train", config.train.steps, done=self.first_step, enabled=self.fabric.is_global_zero
        )
        for note in notes:
            self.progress.say(note)
        resumed = None if checkpoint is None else checkpoint["model"]
        model = build_model(config, spec, resumed, self.progress.say)
        if config.train.batch_size == config.train.accumulate:
            require_enough_values(model, data.crop_size)
        if self.fabric.world_size > 1:
            freeze_unreached(model, data.crop_size)
        self.state = TrainingState(self.fabric, model, config.train)
        if not begun:
            self._lock(at_end)
            if self.fabric.is_global_zero and run.exists():
                raise UserError(
                    f"{run.path}: another process began a run here meanwhile; continue with "
                    "--resume when it has ended, or choose another folder with --out"
                )
        if checkpoint is None:
            self._start_folder()
        else:
            self.state.restore(checkpoint)
            self._go_on_in_folder()
            # All processes have read it, and the next save would put it in place of the good one.
            if notes and self.fabric.is_global_zero:
                run.last.unlink(missing_ok=True)
        events: Events | None = None
        if self.fabric.is_global_zero:
            events = at_end.enter_context(Events(run.path, self.first_step))
        self.log = MetricsLog(self.fabric, run, config.train, events)
        self.told_unlabelled = False

    # Setting up

    def _lock(self, at_end: ExitStack) -> None:
        if self.fabric.is_global_zero:
            at_end.callback(self.run.lock().release)

    def _start_folder(self) -> None:
        if self.fabric.is_global_zero:
            self._write_recipe()
            self.run.forget_metrics_after(-1)
        self._save_last(step=0)

    def _go_on_in_folder(self) -> None:
        """Makes changed settings the run's, tells them, and drops the metrics of lost steps.

        Raises:
            UserError: the weights are another network's.
        """
        changed = ChangedSettings.of(self.run, self.config)
        self.fabric.barrier()  # all have read it
        if changed.without_effect:
            self.progress.say(
                f"note: {', '.join(changed.without_effect)}: without effect, because the run "
                "continues from its own weights"
            )
        if changed.used:
            self.progress.say(
                f"note: {', '.join(changed.used)}: not as in {self.run.recipe}; the remaining "
                "steps use the new settings"
            )
        if changed.change_scores:
            if self.state.best is not None:
                self.progress.say("note: earlier scores do not compare; the best is chosen anew")
            self.state.forget_scores()
        elif "train.keep" in changed.used and self.validation.grows_at_the_end:
            # It decides on how many pictures the last score is.
            self.state.validated_step = 0
        if self.fabric.is_global_zero:
            if changed.used:
                self._write_recipe()
            self.run.forget_metrics_after(self.first_step)

    def _write_recipe(self) -> None:
        with replacing(self.run.recipe) as path:
            path.write_text(self.config.to_yaml(), encoding="utf-8")

    # Running

    def fit(self) -> None:
        with self.progress:
            self._announce()
            if self._validates(self.first_step) and self.state.validated_step != self.first_step:
                self._validate(self.first_step)
            self._take_steps()
            self._export()

    def _announce(self) -> None:
        before = f", continuing after step {self.first_step}" if self.first_step else ""
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        dtype = "bfloat16" if self.bfloat16 else "float32"
        self.progress.say(
            f"{parameters:.1f} M parameters on {self.fabric.device.type} ({dtype}), "
            f"{len(self.training_data)} training pictures, {self.config.train.steps} steps{before}"
        )

    def _batches(self) -> Iterator[Batch]:
        settings = self.config.train
        sampler = StepSampler(
            self.first_step,
            settings.steps,
            settings.batch_size,
            self.fabric.global_rank,
            self.fabric.world_size,
        )
        return training_batches(self.training_data, self.config.data, settings.seed, sampler)

    def _take_steps(self) -> None:
        settings = self.config.train
        saved = done = self.first_step
        self.log.restart_clock()
        try:
            for step, batch in enumerate(self._batches(), start=self.first_step):
                self.log.add(take_step(self.state, step, batch))
                done = step + 1
                validates = self._validates(done)
                saves = validates or done % settings.checkpoint_every == 0
                stops = done < settings.steps and self._stops()
                if done % settings.log_every == 0 or saves or stops:
                    self._write_log(done)
                if saves or stops:
                    self._save_last(done)
                    saved = done
                if stops:
                    raise self._stopped(done)
                if validates:
                    self._validate(done)
                    self.log.restart_clock()
        except UserError as error:  # a broken picture, say, which must not cost the steps before it
            if self.fabric.world_size > 1 or done == saved:
                raise
            if self.log.pending:
                self._write_log(done)
            self._save_last(done)
            raise UserError(
                f"{error}; step {done} is saved: fix this, and continue with --resume"
            ) from error

    def _write_log(self, done: int) -> None:
        steps = self.log.pending
        status = self.log.write_steps(done, self.state.residual_weights())
        if self.log.loss == 0 and not self.told_unlabelled:
            self.told_unlabelled = True
            self.progress.say(
                f"note: the loss of {steps} steps is 0, because no pixel of their crops has a "
                "class; danet data check says what the labels hold"
            )
        self.progress.advance(status, steps=steps)

    def _validates(self, done: int) -> bool:
        """Whether a validation is due after so many steps."""
        settings = self.config.train
        every = settings.validate_every
        return done == settings.steps or (done > 0 and every is not None and done % every == 0)

    def _stops(self) -> bool:
        """Whether any process was told to stop."""
        return holds_anywhere(self.fabric, self.stop.received is not None)

    def _stopped(self, done: int) -> TrainingStopped:
        told_by = self.stop.received or "another process"
        return TrainingStopped(
            f"training: stopped by {told_by} after step {done}, which is saved in "
            f"{self.run.last}; continue with --resume"
        )

    def _validate(self, done: int) -> None:
        """Scores the network after so many steps, which must be saved: this may take long."""
        config, state, validation = self.config, self.state, self.validation
        count = validation.count(done)

        def on_picture(scored: int) -> None:
            if self.stop.received is not None:
                raise self._stopped(done)
            self.progress.advance(f"validating {scored}/{count}", steps=0)

        try:
            result = validation.score(state.kept_model(), done, on_picture)
        except LogitsNotFinite as error:
            # The loss is of the weights before the last update, so this may be the first to tell.
            if self.fabric.is_global_zero:
                self.run.drop_last()
            raise TrainingDiverged.after(self.run.last, str(error), config.train.lr) from error
        self.log.write(
            {
                "step": done,
                "val/mIoU": result.mean_iou,
                "val/mAcc": result.mean_accuracy,
                "val/aAcc": result.overall_accuracy,
                "val/images": count,
            }
        )
        self.progress.say(
            f"step {done}: mIoU {result.mean_iou:.4f} on {count} pictures of "
            f"{config.data.name} {config.data.val_split}"
        )
        is_best = self._is_best(result.mean_iou, count)
        if is_best:
            state.best = {"step": done, "mIoU": result.mean_iou, "pictures": count}
        state.validated_step = done
        checkpoint = state.checkpoint(done)
        if self.fabric.is_global_zero:
            if is_best:
                save_checkpoint(self.run.best, checkpoint)
            self.run.renew_last(checkpoint)

    def _is_best(self, mean_iou: float, count: int) -> bool:
        """Whether weights with this score are the best so far, by the same pictures."""
        best = self.state.best
        if best is None:
            return True
        usual = self.validation.usual_count
        if best.get("pictures", usual) != count:  # older checkpoints do not say
            # The last score, of all pictures, does not count beside those of few before it; it may
            # be the former best, of a run that goes on.
            return count == usual
        # No score is larger than an undefined one, of pictures without any label.
        return math.isnan(best["mIoU"]) or mean_iou > best["mIoU"]

    # Saving

    def _save_last(self, step: int) -> None:
        checkpoint = self.state.checkpoint(step)
        if self.fabric.is_global_zero:
            self.run.save_last(checkpoint)

    def _export(self) -> None:
        model = self.state.kept_model()
        if not self.fabric.is_global_zero:
            return
        if self.config.train.keep == "best":
            model.load_state_dict(model_weights(load_checkpoint(self.run.best)))
        model.save_pretrained(self.run.model)


def _check_batch_size(settings: TrainConfig, processes: int) -> None:
    passes = processes * settings.accumulate
    if settings.batch_size % passes:
        raise UserError(
            f"train.batch_size={settings.batch_size} is not divisible by {passes} "
            "(processes times train.accumulate); choose a multiple"
        )
