"""Layers that see the batch of all processes, so that how many there are does not change a run."""

from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def see_global_batch(
    model: nn.Module, device: torch.device, rank: int, processes: int
) -> torch.Generator:
    """Lets batch norms and dropout treat the batches of all processes as one, in place.

    Batch norms: on a GPU by torch's SyncBatchNorm, which runs nowhere else; elsewhere by
    differentiable sums. Dropout draws for the whole batch everywhere and takes its process's part.

    Returns:
        What dropout draws from; to be seeded alike in all processes before each step.
    """
    generator = torch.Generator()
    if device.type == "cuda":
        convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.__class__ = _SharedDropout
            shared = cast(_SharedDropout, module)
            shared.generator, shared.rank, shared.processes = generator, rank, processes
        elif device.type != "cuda" and isinstance(module, BatchNormAct2d):
            module.__class__ = _SynchronizedBatchNormAct
        elif device.type != "cuda" and isinstance(module, _BatchNorm):
            module.__class__ = _SynchronizedBatchNorm
    return generator


class _SharedDropout(nn.Dropout2d):
    generator: torch.Generator
    rank: int
    processes: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        own, channels = input.shape[:2]
        kept = torch.empty(self.processes * own, channels, 1, 1)
        kept.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return input * kept[self.rank * own : (self.rank + 1) * own].to(input)


class _SynchronizedBatchNorm(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _normalize(self, input) if self.training else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        """It takes the place of batch norms of features with any number of axes."""


class _SynchronizedBatchNormAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]
        return cast(Tensor, self.act(self.drop(_normalize(self, x))))


def _normalize(norm: _BatchNorm, features: Tensor) -> Tensor:
    """Training-mode batch norm with the statistics of all processes, in float32."""
    exact = features.float()
    count = torch.tensor([exact.numel() / exact.shape[1]], device=exact.device)
    axes = [axis for axis in range(exact.ndim) if axis != 1]
    total = _sum_over_processes(torch.cat([exact.sum(axes), count]))
    count = total[-1].detach()
    mean = total[:-1] / count
    shape = [1, -1, *[1] * (exact.ndim - 2)]
    centered = exact - mean.view(shape)
    variance = _sum_over_processes(centered.square().sum(axes)) / count
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        momentum = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
            if momentum is None:
                momentum = 1 / norm.num_batches_tracked.item()
        assert momentum is not None
        unbiased = variance.detach() * count / (count - 1).clamp(min=1)
        norm.running_mean.lerp_(mean.detach(), momentum)
        norm.running_var.lerp_(unbiased, momentum)
    normalized = centered * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normalized = normalized * norm.weight.view(shape) + norm.bias.view(shape)
    result: Tensor = normalized.to(features.dtype)
    return result


class _SumOverProcesses(torch.autograd.Function):
    """The gradient of what all processes see is the sum of what each makes of it.

    torch.distributed.nn's own is deprecated from torch 2.15 and does not compile.
    """

    @staticmethod
    def forward(_: Any, sums: Tensor) -> Tensor:
        return _all_reduced(sums)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _sum_over_processes(sums: Tensor) -> Tensor:
    """Differentiable."""
    return cast(Tensor, _SumOverProcesses.apply(sums))
