"""The same network, made fast for inference: fewer passes over memory, fewer operations.

Batch norms are folded into the convolutions before them, memory is channels-last, and on a CPU
wide 3x3 convolutions take Winograd's way: in float32 all of it is the same up to its rounding. Only
bfloat16, where it is asked for, rounds more.
"""

from collections import Counter, OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danet import winograd
from danet.kernels.cpu import has_amx
from danet.model import DANet

_PROBE_SIDE = 64
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
"""Exactly these: other subclasses compute their weight anew in every pass."""


def optimize_for_inference(model: DANet, *, bfloat16: bool, compile_graph: bool) -> DANet:
    """Changes the network in place, for inference only, and returns it.

    Args:
        model: on the device to compute on.
        bfloat16: keep the convolutions' weights in bfloat16; to be run under its autocast.
        compile_graph: compile backbone and branches at first use; later processes find the code
            in torch's cache, which the variable TORCHINDUCTOR_CACHE_DIR moves.
    """
    model.eval().requires_grad_(False)
    model.optimized = True
    fold_batch_norms(model)
    if not compile_graph and next(model.parameters()).device.type == "cpu":
        _take_winograds_way(model, torch.bfloat16 if bfloat16 else torch.float32)
        if bfloat16 and has_amx():
            _avoid_single_columns(model)
    convert_parameters(model, bfloat16=bfloat16)
    if compile_graph:
        model.compile_parts()
    return model


def _take_winograds_way(model: nn.Module, dtype: torch.dtype) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and winograd.pays(child, dtype):
                setattr(parent, name, winograd.WinogradConv2d(child, dtype))


class _StridedConv2d(nn.Module):
    """A strided convolution whose output oneDNN makes at least two columns wide.

    With bfloat16 on AMX it leaves parts of a single column unwritten (seen with torch 2.15). Zeros
    to the right of the padding add a second column and leave the first as it is.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        reach = convolution.dilation[1] * (convolution.kernel_size[1] - 1)
        self.narrowest = reach + 1 + convolution.stride[1] - 2 * int(convolution.padding[1])
        """The least width whose output has two columns."""

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] >= self.narrowest:
            return self.convolution(features)  # type: ignore[no-any-return]
        wider = F.pad(features, (0, self.narrowest - features.shape[-1]))
        return self.convolution(wider)[..., :1]  # type: ignore[no-any-return]


def _avoid_single_columns(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Conv2d
                and max(child.stride) > 1
                and max(child.kernel_size) > 1
                and child.padding_mode == "zeros"
                and not isinstance(child.padding, str)
            ):
                setattr(parent, name, _StridedConv2d(child))


def convert_parameters(model: nn.Module, *, bfloat16: bool) -> None:
    """Replaces parameters by channels-last ones, those of convolutions and linear layers in
    bfloat16 if so wanted; unlike `Module.to`, also works on tensors without data."""
    for module in model.modules():
        rounded = bfloat16 and type(module) in (*_CONVOLUTIONS, nn.Linear)
        for name, parameter in list(module.named_parameters(recurse=False)):
            converted = parameter.detach().to(
                torch.bfloat16 if rounded else parameter.dtype,
                memory_format=torch.channels_last if parameter.ndim == 4 else torch.preserve_format,
            )
            setattr(module, name, nn.Parameter(converted, parameter.requires_grad))


@torch.no_grad()
def fold_batch_norms(model: DANet) -> None:
    """Folds every batch norm that follows a convolution into its weights, in place.

    Which follows which is read off a run, so that any backbone will do: a pair is folded where a
    convolution's output goes to one batch norm and nowhere else, and each runs once.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for convolution, norm in _pairs_to_fold(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight, convolution.bias = weight, bias
        replaced[norm] = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            replaced[norm] = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, name, replaced[child])


def _pairs_to_fold(model: DANet) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    run = _Run(model)
    parameter = next(model.parameters())
    with run:
        model(
            torch.zeros(
                1, 3, _PROBE_SIDE, _PROBE_SIDE, device=parameter.device, dtype=parameter.dtype
            )
        )
    run.remove_hooks()
    return run.pairs()


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one run: how often each tensor is read, and what each layer read and wrote."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # so that no identity is given twice
        self.convolutions: dict[int, nn.Conv2d] = {}
        self.norms: list[tuple[nn.BatchNorm2d, int]] = []
        self.runs: Counter[nn.Module] = Counter()
        self.handles = [
            module.register_forward_hook(self._note)
            for module in model.modules()
            if type(module) in _CONVOLUTIONS or isinstance(module, nn.BatchNorm2d)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.reads[id(leaf)] += 1
        self.alive += [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.runs[module] += 1
        if isinstance(module, nn.Conv2d):
            self.convolutions[id(output)] = module
        elif isinstance(module, nn.BatchNorm2d):
            self.norms.append((module, id(inputs[0])))

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [
            (convolution, norm)
            for norm, read in self.norms
            if (convolution := self.convolutions.get(read)) is not None
            and self.reads[read] == 1
            and self.runs[norm] == self.runs[convolution] == 1
            and norm.running_mean is not None
        ]
