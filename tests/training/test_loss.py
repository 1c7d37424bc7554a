import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danet.config import TrainConfig
from danet.model import DANetOutput
from danet.training.loss import loss_divisor, segmentation_losses


def nearest(logits: Tensor, size) -> Tensor:
    return F.interpolate(logits, size=tuple(size))


def losses(config: TrainConfig, output: DANetOutput, labels: Tensor) -> dict[str, Tensor]:
    divisor = loss_divisor(labels, config.loss_divisor)
    return segmentation_losses(output, labels, divisor, nearest, config)


def test_cross_entropy_by_hand() -> None:
    """Two classes, four pixels, one ignored; logits (0, log 3) give probabilities 1/4, 3/4."""
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    output = DANetOutput(logits, None, None, None)
    labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    summed = -math.log(1 / 4) - 2 * math.log(3 / 4)
    assert losses(TrainConfig(), output, labels)["loss"].item() == pytest.approx(summed / 4)
    valid = losses(TrainConfig(loss_divisor="valid"), output, labels)
    assert valid["loss"].item() == pytest.approx(summed / 3)


def test_the_parts_are_weighted() -> None:
    torch.manual_seed(0)
    output = DANetOutput(*torch.randn(4, 2, 5, 3, 3))
    labels = torch.randint(0, 5, (2, 6, 6)).to(torch.uint8)
    result = losses(TrainConfig(branch_loss_weight=0.5, auxiliary_loss_weight=0.4), output, labels)
    assert result["loss"].item() == pytest.approx(
        (
            result["loss_fused"]
            + 0.5 * (result["loss_position"] + result["loss_channel"])
            + 0.4 * result["loss_auxiliary"]
        ).item(),
        rel=1e-6,
    )
    expected = F.cross_entropy(nearest(output.fused, (6, 6)), labels.long())
    assert result["loss_fused"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("divisor", ["all", "valid"])
def test_nothing_labelled_is_no_loss(divisor: str) -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    result = losses(
        TrainConfig(loss_divisor=divisor), DANetOutput(logits, None, None, None), labels
    )
    result["loss"].backward()
    assert result["loss"].item() == 0
    assert not logits.grad.any()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(1, 3, 2, 2).bfloat16()
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    result = losses(TrainConfig(), DANetOutput(logits, None, None, None), labels)
    assert result["loss"].dtype == torch.float32
