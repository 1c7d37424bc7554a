"""The training loop.

Everything random is drawn from (seed, step) and everything else is in the checkpoint, so a run
that was killed and resumed takes the same steps, to the bit on a CPU, as one left alone.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from danet.atomic import replacing
from danet.config import RunConfig, differing_keys, load_recipe
from danet.data import open_dataset
from danet.data.loader import Batch, StepSampler, derive_seed, training_batches, training_samples
from danet.devices import choose_device, is_out_of_memory, uses_bfloat16
from danet.errors import (
    LogitsNotFinite,
    OutOfMemory,
    TrainingDiverged,
    TrainingOutOfMemory,
    TrainingStopped,
    UserError,
)
from danet.evaluation.evaluate import evaluate, segment_with
from danet.evaluation.metrics import scores
from danet.model import DANet
from danet.progress import ProgressReport
from danet.training.build import build_model, build_optimizer, prepare_for_training
from danet.training.checkpoint import (
    RunFolder,
    load_checkpoint,
    model_weights,
    save_checkpoint,
)
from danet.training.events import Events
from danet.training.global_batch import see_global_batch
from danet.training.launch import (
    StopSignal,
    broken_handover_told,
    explain_lost_process,
    launch,
)
from danet.training.loss import loss_divisor, segmentation_losses
from danet.training.schedule import learning_rate
from danet.training.sharding import load_optimizer, whole

_DROPOUT = 2
_FIRST_WEIGHTS = {"model.init_from", "model.pretrained_backbone", "model.backbone_weights"}
"""Settings that a resumed run, which goes on from its own weights, does not look at."""


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
    if run.exists():
        if not resume:
            raise UserError(
                f"{out} already holds a run; go on with --resume, or choose another folder with "
                "--out"
            )
    elif (other := run.file_of_another_kind()) is not None:
        raise UserError(
            f"{out} holds {other.name}, which is no part of a run that could go on; choose another "
            "folder with --out"
        )
    with StopSignal() as stop, ExitStack() as at_end:
        trainer = _Trainer(config, run, stop, at_end)
        try:
            with broken_handover_told(config.data.workers):
                trainer.fit()
        # Raised by the loader's signal handler, wherever training is at that moment, and by gloo.
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TrainingOutOfMemory(
                    f"training: out of memory; {run.path} is as last saved"
                ) from error
            problem = explain_lost_process(error)
            if problem is None:
                raise
            raise TrainingStopped(f"training: {problem}, and go on with --resume") from error
    return run


class _Trainer:
    def __init__(
        self, config: RunConfig, run: RunFolder, stop: StopSignal, at_end: ExitStack
    ) -> None:
        self.config = config
        self.run = run
        self.stop = stop
        device = choose_device(config.train.device)
        self.bfloat16 = uses_bfloat16(config.train.precision, device)
        self.fabric = launch(config.train, device, bfloat16=self.bfloat16)
        self._check_batch_size()
        # Another process may still be training here. A new run is locked later, because what is
        # wrong with the input must leave no folder behind.
        begun = run.exists()
        if begun:
            self._lock(at_end)
        self.fabric.barrier()
        notes: list[str] = []
        checkpoint = run.last_checkpoint(notes.append)
        self.first_step: int = 0 if checkpoint is None else checkpoint["step"]
        if config.train.steps < self.first_step:
            raise UserError(
                f"train.steps={config.train.steps}, but the run in {run.path} has taken "
                f"{self.first_step} steps; set at least as many"
            )
        self.validated_step = 0
        self.progress = ProgressReport(
            "train", config.train.steps, done=self.first_step, enabled=self.fabric.is_global_zero
        )
        for note in notes:
            self.progress.say(note)
        data = config.data
        spec, self.training_data = training_samples(data)
        self.validation_data = open_dataset(data.name, data.root, data.val_split)
        resumed = None if checkpoint is None else checkpoint["model"]
        self.model = build_model(config, spec, resumed, self.progress.say)
        self.dropout: torch.Generator | None = None
        if self.fabric.world_size > 1:
            self.dropout = see_global_batch(
                self.model, device, self.fabric.global_rank, self.fabric.world_size
            )
        self.network = self.fabric.setup_module(self.model)
        optimizer = self.fabric.setup_optimizers(build_optimizer(self.model, config.train))
        assert not isinstance(optimizer, tuple)
        self.optimizer = optimizer
        self.average = self._start_average()
        prepare_for_training(self.model, config.train)
        self.best: dict[str, float] | None = None
        if not begun:
            self._lock(at_end)
            if self.fabric.is_global_zero and run.exists():
                raise UserError(
                    f"{run.path}: another process began a run here meanwhile; go on with --resume "
                    "when it has ended, or choose another folder with --out"
                )
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self._start_folder()
        self.events: Events | None = None
        if self.fabric.is_global_zero:
            self.events = at_end.enter_context(Events(run.path, self.first_step))

    # Setting up

    def _lock(self, at_end: ExitStack) -> None:
        if self.fabric.is_global_zero:
            at_end.callback(self.run.lock().release)

    def _check_batch_size(self) -> None:
        settings = self.config.train
        passes = self.fabric.world_size * settings.accumulate
        if settings.batch_size % passes:
            raise UserError(
                f"train.batch_size={settings.batch_size} does not divide by {passes} "
                "(processes times train.accumulate); choose a multiple"
            )
        width, height = self.config.data.crop_size
        one_cell = max(width, height) <= self.config.model.output_stride
        if one_cell and settings.batch_size == settings.accumulate:
            raise UserError(
                f"data.crop_size={width}x{height} is one pixel of the feature map, and batch norm "
                "needs more than one value; choose larger crops, or more of them at a time"
            )

    def _start_average(self) -> ModelEmaV3 | None:
        decay = self.config.train.ema_decay
        return None if decay is None else ModelEmaV3(self.model, decay=decay, use_warmup=True)

    def _start_folder(self) -> None:
        if self.fabric.is_global_zero:
            self._write_recipe()
            self.run.forget_metrics_after(-1)
        self._save_last(step=0)

    def _write_recipe(self) -> None:
        with replacing(self.run.recipe) as path:
            path.write_text(self.config.to_yaml(), encoding="utf-8")

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        name, saved = self.config.train.optimizer, checkpoint["optimizer_name"]
        if name != saved:
            raise UserError(
                f"train.optimizer={name} cannot go on from the checkpoint, which is of a run "
                f"with {saved}; set train.optimizer={saved}, or start a new run from a finished "
                "one's model with model.init_from"
            )
        load_optimizer(self.optimizer.optimizer, checkpoint["optimizer"])
        if self.average is not None and checkpoint["average"] is not None:
            self.average.module.load_state_dict(checkpoint["average"])
        self.best = checkpoint["best"]
        self.validated_step = checkpoint["validated_step"]
        self._take_over_changed_settings()
        if self.fabric.is_global_zero:
            self.run.forget_metrics_after(self.first_step)

    # Running

    def fit(self) -> None:
        with self.progress:
            self._announce()
            if self._validates(self.first_step) and self.validated_step != self.first_step:
                self._validate(self.first_step)
            self._take_steps()
            self._export()

    def _take_steps(self) -> None:
        settings = self.config.train
        history: list[dict[str, Tensor]] = []
        since = time.monotonic()
        saved = done = self.first_step
        try:
            for step, batch in enumerate(self._batches(), start=self.first_step):
                history.append(self._take_step(step, batch))
                done = step + 1
                validates = self._validates(done)
                saves = validates or done % settings.checkpoint_every == 0
                if done % settings.log_every == 0 or saves:
                    status = self._log(done, history, since)
                    self.progress.advance(status, steps=len(history))
                    history, since = [], time.monotonic()
                stops = done < settings.steps and self._stops()
                if stops and history:
                    self._log(done, history, since)
                if saves or stops:
                    self._save_last(done)
                    saved = done
                if stops:
                    raise self._stopped(done)
                if validates:
                    self._validate(done)
                    since = time.monotonic()
        except UserError:  # a broken picture, say, which must not cost the steps before it
            if self.fabric.world_size == 1 and done > saved:
                if history:
                    self._log(done, history, since)
                self._save_last(done)
            raise

    def _validates(self, done: int) -> bool:
        """Whether a validation is due after so many steps."""
        settings = self.config.train
        every = settings.validate_every
        return done == settings.steps or (done > 0 and every is not None and done % every == 0)

    def _stopped(self, done: int) -> TrainingStopped:
        told_by = self.stop.received or "another process"
        return TrainingStopped(
            f"training: stopped by {told_by} after step {done}, which is saved in "
            f"{self.run.last}; go on with --resume"
        )

    def _stops(self) -> bool:
        """Whether any process was told to stop."""
        if self.fabric.world_size == 1:
            return self.stop.received is not None
        told = torch.tensor(float(self.stop.received is not None), device=self.fabric.device)
        return bool(self._reduce(told, "max"))

    def _take_over_changed_settings(self) -> None:
        """Tells which settings differ from the resumed run's, and makes them the run's."""
        changed = differing_keys(load_recipe(self.run.recipe), self.config)
        if ignored := [key for key in changed if key in _FIRST_WEIGHTS]:
            self.progress.say(
                f"note: {', '.join(ignored)}: without effect, for the run goes on from its own "
                "weights"
            )
        if changed := [key for key in changed if key not in _FIRST_WEIGHTS]:
            self.progress.say(
                f"note: {', '.join(changed)}: other than in {self.run.recipe}; the remaining "
                "steps go by the new settings"
            )
            if self.fabric.is_global_zero:
                self._write_recipe()

    def _announce(self) -> None:
        before = f", going on after step {self.first_step}" if self.first_step else ""
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
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

    def _take_step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One update; returns the losses, averaged over processes only when they are logged."""
        settings = self.config.train
        torch.manual_seed(derive_seed(settings.seed, _DROPOUT, step, self.fabric.global_rank))
        if self.dropout is not None:
            self.dropout.manual_seed(derive_seed(settings.seed, _DROPOUT, step, 0))
        rate = learning_rate(step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        self.network.train()
        images, labels = self.fabric.to_device((batch.images, batch.labels))
        images = images.contiguous(memory_format=torch.channels_last)
        # Gradients are averaged over processes, so dividing by the average of their divisors is
        # dividing the sum over all of them by the sum of all pixels.
        divisor = self._reduce(loss_divisor(labels, settings), "mean")
        totals: dict[str, Tensor] = {}
        parts = zip(
            images.chunk(settings.accumulate), labels.chunk(settings.accumulate), strict=True
        )
        for index, (some_images, some_labels) in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.network, enabled=index < settings.accumulate):
                output = self.network(some_images)
                losses = segmentation_losses(
                    output, some_labels, divisor, self.model.upsample, settings
                )
                self.fabric.backward(losses["loss"])
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model, step=step)
        return totals

    def _log(self, done: int, history: list[dict[str, Tensor]], since: float) -> str:
        """Writes the mean of the steps since the last line, and stops if one was not finite."""
        settings = self.config.train
        losses = {
            name: self._reduce(torch.stack([step[name] for step in history]), "mean").tolist()
            for name in history[0]
        }
        for offset, loss in enumerate(losses["loss"]):
            if not math.isfinite(loss):
                step = done - len(history) + offset + 1
                raise self._diverged(f"the loss became {loss} at step {step}")
        rate = learning_rate(done - 1, settings)
        images = len(history) * settings.batch_size
        images_per_second = images / max(time.monotonic() - since, 1e-9)
        row = {
            "step": done,
            **{name: sum(values) / len(values) for name, values in losses.items()},
            **self._residual_weights(),
            "lr": rate,
            "images_per_second": images_per_second,
        }
        self._write_metrics(row)
        return f"loss {row['loss']:.3f}  lr {rate:.4g}  {images_per_second:.1f} images/s"

    def _diverged(self, finding: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"training: {finding}; the checkpoint before is {self.run.last}. Lower train.lr (now "
            f"{self.config.train.lr:g}) or set train.precision=fp32, then go on with --resume; if "
            "it fails again at once, delete that file first, and the one before it is taken"
        )

    def _residual_weights(self) -> dict[str, float]:
        """The learned factors of the attention outputs, alpha and beta of equations (2) and (4)."""
        head = self.model.head
        branches = {"position": head.position_branch, "channel": head.channel_branch}
        return {
            f"residual_{name}": whole(branch.get_parameter("attention.residual_weight")).item()
            for name, branch in branches.items()
            if branch is not None
        }

    def _validate(self, done: int) -> None:
        """Scores the network after so many steps, which must be saved: this may take long."""
        config = self.config
        count = min(len(self.validation_data), config.train.validate_images or 10**9)
        # The best are chosen by the same pictures at every step.
        if done == config.train.steps and config.train.keep == "last":
            count = len(self.validation_data)
        model = self._kept_model().eval()
        scored = itertools.count(1)
        rank, processes = self.fabric.global_rank, self.fabric.world_size

        def on_picture() -> None:
            if self.stop.received is not None:
                raise self._stopped(done)
            self.progress.advance(f"validating {next(scored) * processes}/{count}", steps=0)

        try:
            evaluation = evaluate(
                segment_with(model, config.test, config.train.precision),
                self.validation_data,
                indices=range(rank, count, processes),
                on_picture=on_picture,
            )
        # The loss is of the weights before the last update, so this may be the first to tell.
        except LogitsNotFinite as error:
            if self.fabric.is_global_zero:
                self.run.drop_last()
            raise self._diverged(
                f"the network's logits were not finite in the validation after step {done}"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"training: out of memory in the validation after step {done}, which is saved; set "
                "test.mode=slide, or lower test.batch_size or test.scale, and go on with --resume"
            ) from error
        confusion = evaluation.confusion["fused"].to(self.fabric.device)
        result = scores(self._reduce(confusion, "sum"))
        row = {
            "step": done,
            "val/mIoU": result.mean_iou,
            "val/mAcc": result.mean_accuracy,
            "val/aAcc": result.overall_accuracy,
        }
        self._write_metrics(row)
        self.progress.say(
            f"step {done}: mIoU {result.mean_iou:.4f} on {count} pictures of "
            f"{config.data.name} {config.data.val_split}"
        )
        # No score is larger than an undefined one, of pictures without any label.
        former = math.nan if self.best is None else self.best["mIoU"]
        is_best = math.isnan(former) or result.mean_iou > former
        if is_best:
            self.best = {"step": done, "mIoU": result.mean_iou}
        self.validated_step = done
        checkpoint = self._checkpoint(done)
        if self.fabric.is_global_zero:
            if is_best:
                save_checkpoint(self.run.best, checkpoint)
            self.run.renew_last(checkpoint)

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Over all processes."""
        reduced = self.fabric.all_reduce(tensor, reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _kept_model(self) -> DANet:
        """The network that will become the run's model, whole in every process."""
        if self.average is not None:
            averaged = self.average.module
            assert isinstance(averaged, DANet)
            return averaged
        if self.config.train.strategy == "ddp":
            return self.model
        config = self.model.config.model_copy(update={"pretrained_backbone": False})
        with self.fabric.device:
            model = DANet.from_config(config, self.model.metadata)
        model.load_state_dict(whole(self.model.state_dict()))
        return model

    def _write_metrics(self, row: dict[str, float]) -> None:
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        if self.events is not None:
            self.run.append_metrics(row)
            self.events.write(row)

    # Saving

    def _save_last(self, step: int) -> None:
        checkpoint = self._checkpoint(step)
        if self.fabric.is_global_zero:
            self.run.save_last(checkpoint)

    def _checkpoint(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": whole(self.model.state_dict()),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "optimizer_name": self.config.train.optimizer,
            "best": self.best,
            "validated_step": self.validated_step,
        }

    def _export(self) -> None:
        model = self._kept_model()
        if not self.fabric.is_global_zero:
            return
        if self.config.train.keep == "best":
            model.load_state_dict(model_weights(load_checkpoint(self.run.best)))
        model.save_pretrained(self.run.model)
