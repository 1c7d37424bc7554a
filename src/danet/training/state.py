"""The network in training, and whatever else a checkpoint holds."""

from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3

from danet.config import TrainConfig
from danet.errors import UserError
from danet.model import DANet
from danet.training.build import build_optimizer, prepare_for_training
from danet.training.global_batch import see_global_batch
from danet.training.sharding import gathered, load_optimizer


class TrainingState:
    """A network on its device, with its optimizer, its average and its best score so far.

    Attributes:
        fabric, settings: what it was made with.
        optimizer: over two groups, see `build_optimizer`.
        model: the network, with this process's share of the weights where they are sharded.
        network: `model` as Fabric calls it in a step.
        dropout: what dropout draws from where several processes share a batch.
        average: the moving average of the weights, where the recipe keeps one.
        best: `step` and `mIoU` of the best validation, and of how many `pictures` it was.
        validated_step: after how many steps the last validation was.
    """

    def __init__(self, fabric: Fabric, model: DANet, settings: TrainConfig) -> None:
        self.fabric = fabric
        self.model = model
        self.settings = settings
        self.dropout: torch.Generator | None = None
        if fabric.world_size > 1:
            self.dropout = see_global_batch(
                model, fabric.device, fabric.global_rank, fabric.world_size
            )
        self.network = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(build_optimizer(model, settings))
        assert not isinstance(optimizer, tuple)
        self.optimizer = optimizer
        self.average: ModelEmaV3 | None = None
        if settings.ema_decay is not None:
            self.average = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
        prepare_for_training(model, settings)
        self.best: dict[str, float] | None = None
        self.validated_step = 0

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Plain tensors and numbers after so many steps; every process must ask for them."""
        return {
            "step": step,
            "model": gathered(self.model.state_dict()),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": gathered(self.optimizer.state_dict()),
            "optimizer_name": self.settings.optimizer,
            "best": self.best,
            "validated_step": self.validated_step,
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes over all but the network's weights, which it is built with.

        Raises:
            UserError: the checkpoint is of another optimizer.
        """
        name, saved = self.settings.optimizer, checkpoint["optimizer_name"]
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

    def forget_scores(self) -> None:
        """For validations from now on, which those before do not compare with."""
        self.best = None
        self.validated_step = 0

    def kept_model(self) -> DANet:
        """The network that will become the run's model, whole in every process."""
        if self.average is not None:
            averaged = self.average.module
            assert isinstance(averaged, DANet)
            return averaged
        if self.settings.strategy == "ddp":
            return self.model
        with self.fabric.device:
            model = DANet.from_config(self.model.config, self.model.metadata)
        model.load_state_dict(gathered(self.model.state_dict()))
        return model

    def residual_weights(self) -> dict[str, float]:
        """The learned factors of the attention outputs, alpha and beta of equations (2) and (4)."""
        head = self.model.head
        branches = {"position": head.position_branch, "channel": head.channel_branch}
        return {
            f"residual_{name}": gathered(branch.get_parameter("attention.residual_weight")).item()
            for name, branch in branches.items()
            if branch is not None
        }
