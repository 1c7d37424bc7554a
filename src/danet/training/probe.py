"""What a training pass would meet, found out on tensors without data."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call

from danet.config import Size
from danet.errors import UserError
from danet.model import DANet, DANetOutput


class TooFewValues(UserError):
    """A batch norm has one value per channel, whose variance is none."""


@contextlib.contextmanager
def explaining_batch_norms() -> Iterator[None]:
    """Around a training pass of the network.

    Raises:
        TooFewValues: in place of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TooFewValues(
            "batch norm needs more than one value per channel, but this backbone or crop size "
            "leaves it one pixel of a single crop; choose more crops a pass (train.batch_size over "
            "train.accumulate), or larger crops"
        ) from error


def require_enough_values(model: DANet, crop_size: Size) -> None:
    """Checks that one crop can be trained on by itself; computes nothing.

    Raises:
        TooFewValues: it cannot.
    """
    with FakeTensorMode() as fake, explaining_batch_norms():
        _train_without_data(fake, model, 1, crop_size)


def freeze_unreached(model: DANet, crop_size: Size) -> None:
    """Has no gradient asked for where there is none, in place; computes nothing.

    Some backbones, such as HRNet, have layers that only other features than c3 and c4 come from.
    DDP would wait for their gradients. Nothing is changed where shapes follow from values.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with FakeTensorMode() as fake:
        try:
            without_data, output = _train_without_data(fake, model, 2, crop_size)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return
        sums = [logits.sum() for logits in output if logits is not None]
        wanted = [without_data[name] for name in parameters]
        gradients = torch.autograd.grad(sums, wanted, allow_unused=True)
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _train_without_data(
    fake: FakeTensorMode, model: DANet, crops: int, crop_size: Size
) -> tuple[dict[str, Tensor], DANetOutput]:
    """The network's tensors and its logits of a training pass, of which only shapes are known."""
    width, height = crop_size
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    without_data: dict[str, Tensor] = {name: fake.from_tensor(each) for name, each in tensors}
    images = torch.empty(crops, 3, height, width)
    return without_data, functional_call(model.train(), without_data, (images,))
