"""Measured work: whole prediction, or a training step, of a recipe's network on random pictures.

Weights are random too, which changes neither time nor memory.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danet.attention import PositionAttention
from danet.config import RunConfig, Size
from danet.data import dataset_spec
from danet.evaluation.strips import Resized, Stored, most_likely_classes
from danet.model import DANet
from danet.model_folder import Metadata
from danet.optimize import convert_parameters, optimize_for_inference
from danet.training.build import build_optimizer, prepare_for_training, require_class_weights
from danet.training.loss import loss_divisor, segmentation_losses
from danet.training.probe import explaining_batch_norms


class Runner(NamedTuple):
    """A workload that is ready to go.

    Attributes:
        compute: predicts, or finds the gradients of the loss.
        update: takes the optimizer's step; None for prediction.
    """

    model: DANet
    images: Tensor
    compute: Callable[[], None]
    update: Callable[[], None] | None

    def run(self) -> None:
        """The whole of it, once."""
        self.compute()
        if self.update is not None:
            self.update()


class Workload(NamedTuple):
    """A recipe's network on `batch` pictures of `size` (width, height)."""

    config: RunConfig
    size: Size
    batch: int
    mode: Literal["prediction", "training"]

    def build_model(self) -> DANet:
        """The network with random weights."""
        spec = dataset_spec(self.config.data.name, self.config.data.root)
        require_class_weights(self.config, spec)
        architecture = self.config.model.without_backbone_weights()
        return DANet.from_config(architecture, Metadata.placeholder(spec.num_classes))

    def prepare(
        self,
        device: torch.device,
        *,
        bfloat16: bool,
        materialized: bool = False,
        compile_graph: bool = False,
        to_labels: bool = True,
        runs_on: str | None = None,
        model: DANet | None = None,
    ) -> Runner:
        """Builds the network and its inputs.

        Args:
            materialized: as the public implementations do it: position attention holds its N x N
                matrix, memory is laid out channels-first, batch norms stay, logits of all classes
                are brought to full size.
            to_labels: prediction goes on to the label maps, which takes tensors with data.
            runs_on: the device whose form of the network is built, if not the tensors' own.
            model: what `build_model` made, which is changed; built on the device where None.
        """
        torch.manual_seed(0)
        if model is None:
            with device:
                model = self.build_model()
        width, height = self.size
        images = torch.rand(self.batch, 3, height, width, device=device)
        target = device if runs_on is None else torch.device(runs_on)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        if materialized:
            for module in model.modules():
                if isinstance(module, PositionAttention):
                    module.attend = materialized_position_attention
        if self.mode == "training":
            if not materialized:
                convert_parameters(model, bfloat16=False)
                settings = self.config.train.model_copy(update={"compile": compile_graph})
                prepare_for_training(model, settings, target)
                images = images.contiguous(memory_format=torch.channels_last)
            return Runner(model, images, *self._training_step(model, images, precision))
        if not materialized:
            optimize_for_inference(
                model, bfloat16=bfloat16, compile_graph=compile_graph, runs_on=target
            )
            images = images.contiguous(memory_format=torch.channels_last)
        segment = _all_logits if materialized else _label_maps if to_labels else None
        return Runner(model, images, _prediction(model.eval(), images, precision, segment), None)

    def _training_step(
        self, model: DANet, images: Tensor, precision: torch.autocast
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        settings = self.config.train
        optimizer = build_optimizer(model, settings)
        labels = torch.zeros(
            len(images), *images.shape[-2:], dtype=torch.uint8, device=images.device
        )
        model.train()

        def compute() -> None:
            with precision, explaining_batch_norms():
                output = model(images)
            divisor = loss_divisor(labels, settings)
            losses = segmentation_losses(output, labels, divisor, model.upsample, settings)
            losses["loss"].backward()  # type: ignore[no-untyped-call]

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return compute, update


def _prediction(
    model: DANet,
    images: Tensor,
    precision: torch.autocast,
    segment: Callable[[DANet, Tensor, torch.Size], None] | None,
) -> Callable[[], None]:
    @torch.inference_mode()
    def predict() -> None:
        with precision:
            logits = model.fused_logits(images).float()
            if segment is not None:
                segment(model, logits, images.shape[-2:])

    return predict


def _label_maps(model: DANet, logits: Tensor, size: torch.Size) -> None:
    for of_picture in logits:
        view = Resized(Stored(of_picture.unsqueeze(0)), size, model.config.align_corners)
        most_likely_classes([view])


def _all_logits(model: DANet, logits: Tensor, size: torch.Size) -> None:
    model.upsample(logits, size).argmax(1)


def materialized_position_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The authors' form: holds the N x N matrix, and keeps it for the backward pass."""
    attention = (query.transpose(1, 2) @ key).softmax(-1)
    return value @ attention.transpose(1, 2)
