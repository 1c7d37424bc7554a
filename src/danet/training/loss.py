"""The training loss: cross-entropy on every classifier's logits.

Shapes: B batch, K classes, H W the labels, h w the features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from danet.config import TrainConfig
from danet.data.spec import IGNORE_INDEX
from danet.model import DANetOutput


def loss_divisor(labels: Tensor, divisor: str) -> Tensor:
    """How many pixels of B H W labels the summed cross-entropy is divided by.

    "all" counts ignored pixels too, as mmsegmentation's CrossEntropyLoss does by default; "valid"
    counts labelled pixels, as torch's and the authors' code. At least 1.
    """
    if divisor == "all":
        return torch.tensor(float(labels.numel()), device=labels.device)
    return (labels != IGNORE_INDEX).sum().clamp(min=1).float()


def segmentation_losses(
    output: DANetOutput,
    labels: Tensor,
    divisor: Tensor,
    upsample: Callable[[Tensor, Sequence[int]], Tensor],
    config: TrainConfig,
) -> dict[str, Tensor]:
    """The total under "loss", and its unweighted parts under "loss_fused" and so on.

    Args:
        output: logits B K h w.
        labels: B H W train ids, 255 ignored.
        divisor: pixels to divide by; see `loss_divisor`.
        upsample: logits B K h w and (H, W) -> B K H W.
    """
    weights = {
        "fused": 1.0,
        "position": config.branch_loss_weight,
        "channel": config.branch_loss_weight,
        "auxiliary": config.auxiliary_loss_weight,
    }
    target = labels.long()
    total = labels.new_zeros((), dtype=divisor.dtype)
    parts: dict[str, Tensor] = {}
    for name, logits in output._asdict().items():
        if logits is None:
            continue
        full_size = upsample(logits.float(), labels.shape[-2:])
        summed = F.cross_entropy(full_size, target, ignore_index=IGNORE_INDEX, reduction="sum")
        parts[f"loss_{name}"] = summed / divisor
        total = total + weights[name] * parts[f"loss_{name}"]
    return {"loss": total, **parts}
