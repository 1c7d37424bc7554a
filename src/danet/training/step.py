"""One step of training: an update of the weights by one batch."""

import torch
from torch import Tensor

from danet.data.loader import Batch, derive_seed
from danet.training.launch import reduce_over_processes
from danet.training.loss import loss_divisor, segmentation_losses
from danet.training.schedule import learning_rate
from danet.training.state import TrainingState

_DROPOUT = 2


def take_step(state: TrainingState, step: int, batch: Batch) -> dict[str, Tensor]:
    """Updates the weights.

    Args:
        step: the number of steps taken before, by which dropout is seeded and the learning rate
            and the average's decay are set.
        batch: this process's share.

    Returns:
        This process's losses by name, still on the device.
    """
    fabric, settings = state.fabric, state.settings
    torch.manual_seed(derive_seed(settings.seed, _DROPOUT, step, fabric.global_rank))
    if state.dropout is not None:
        state.dropout.manual_seed(derive_seed(settings.seed, _DROPOUT, step, 0))
    rate = learning_rate(step, settings)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    state.network.train()
    images, labels = fabric.to_device((batch.images, batch.labels))
    images = images.contiguous(memory_format=torch.channels_last)
    # Gradients are averaged over processes, so dividing by the average of their divisors is
    # dividing the sum over all of them by the sum of all pixels.
    divisor = reduce_over_processes(fabric, loss_divisor(labels, settings), "mean")
    totals: dict[str, Tensor] = {}
    parts = zip(images.chunk(settings.accumulate), labels.chunk(settings.accumulate), strict=True)
    for index, (some_images, some_labels) in enumerate(parts, start=1):
        with fabric.no_backward_sync(state.network, enabled=index < settings.accumulate):
            output = state.network(some_images)
            losses = segmentation_losses(
                output, some_labels, divisor, state.model.upsample, settings
            )
            fabric.backward(losses["loss"])
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update(state.model, step=step)
    return totals
