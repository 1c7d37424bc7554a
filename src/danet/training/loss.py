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


def loss_divisor(labels: Tensor, config: TrainConfig) -> Tensor:
    """The divisor of the summed cross-entropy of B H W labels; never zero.

    "all" counts every pixel, ignored ones too, as mmsegmentation's CrossEntropyLoss does by
    default; "valid" sums the class weights (1 without) of the labelled pixels, as torch's
    cross_entropy and the authors' code.
    """
    if config.loss_divisor == "all":
        return torch.tensor(float(labels.numel()), device=labels.device)
    valid = labels != IGNORE_INDEX
    weights = _class_weights(config, labels.device)
    # Not labels[valid], whose size the device would have to tell first.
    each = valid if weights is None else weights[labels.where(valid, 0).long()] * valid
    return each.sum(dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)


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
        divisor: see `loss_divisor`.
        upsample: logits B K h w and (H, W) -> B K H W.
    """
    weights = {
        "fused": 1.0,
        "position": config.branch_loss_weight,
        "channel": config.branch_loss_weight,
        "auxiliary": config.auxiliary_loss_weight,
    }
    class_weights = _class_weights(config, labels.device)
    target = labels.long()
    # The hardest are those of the whole batch.
    together = config.hard_example_threshold is not None
    pictures = (
        [slice(0, len(labels))] if together else [slice(i, i + 1) for i in range(len(labels))]
    )

    def score(logits: Tensor, some: slice) -> Tensor:
        full_size = upsample(logits, labels.shape[-2:])
        considered = target[some]
        if config.hard_example_threshold is not None:
            hard = hard_examples(
                full_size, considered, config.hard_example_threshold, config.hard_example_min_kept
            )
            considered = considered.where(hard, IGNORE_INDEX)
        return F.cross_entropy(
            full_size, considered, class_weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )

    total = labels.new_zeros((), dtype=divisor.dtype)
    parts: dict[str, Tensor] = {}
    for name, logits in output._asdict().items():
        if logits is None:
            continue
        # Contiguous, because log_softmax would otherwise copy the logits at full size.
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        summed: Tensor = _SummedScore.apply(exact, score, pictures)
        parts[f"loss_{name}"] = summed / divisor
        total = total + weights[name] * parts[f"loss_{name}"]
    return {"loss": total, **parts}


class _SummedScore(torch.autograd.Function):
    """The sum of a score over pictures, whose gradient is taken in the same pass.

    So logits at the labels' size are held for one picture of one classifier at a time. Kept for the
    backward pass, as is usual, they would be several times those of the network's features.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        score: Callable[[Tensor, slice], Tensor],
        pictures: Sequence[slice],
    ) -> Tensor:
        wanted = logits.requires_grad
        total = logits.new_zeros(())
        gradient = torch.empty_like(logits) if wanted else logits.new_empty(0)
        for some in pictures:
            with torch.set_grad_enabled(wanted):
                leaf = logits[some].detach().requires_grad_(wanted)
                summed = score(leaf, some)
            if wanted:
                (gradient[some],) = torch.autograd.grad(summed, leaf)
            total += summed.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


@torch.no_grad()
def hard_examples(logits: Tensor, target: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Which labelled pixels are hard (mmsegmentation's OHEMPixelSampler).

    Those whose true class has a probability below the threshold, or below that of the
    `B * min_kept`-th hardest pixel where this is larger.

    Args:
        logits: B K H W.
        target: B H W int64, 255 ignored.

    Returns:
        B H W bool.
    """
    valid = target != IGNORE_INDEX
    true_class = target.where(valid, 0).unsqueeze(1)
    probability = logits.softmax(1).gather(1, true_class).squeeze(1)
    rank = min(min_kept * target.shape[0], target.numel() - 1)
    ranked = probability.where(valid, torch.inf).flatten().kthvalue(rank + 1).values
    # Infinite where fewer pixels are labelled: then all but the easiest of them.
    largest = probability.where(valid, 0).amax()
    return valid & (probability < torch.minimum(ranked, largest).clamp(min=threshold))


def _class_weights(config: TrainConfig, device: torch.device) -> Tensor | None:
    if config.class_weights is None:
        return None
    return torch.tensor(config.class_weights, device=device)
