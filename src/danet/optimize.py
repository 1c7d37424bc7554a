"""The same network, made fast for inference: fewer passes over memory, fewer operations.

Batch norms are folded into the convolutions before them, memory is channels-last, and on a CPU
wide 3x3 convolutions take Winograd's way, others rectify and add shortcuts in their own pass: in
float32 all of it is the same up to its rounding. Only bfloat16, where it is asked for, rounds more.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danet import winograd
from danet.convolution import (
    Conv2dStandIn,
    ConvReLU2d,
    ResidualBlock,
    WideStridedConv2d,
    can_rectify,
    has_hooks,
)
from danet.errors import UserError
from danet.heads import DualAttentionHead
from danet.kernels.cpu import has_amx
from danet.kernels.memory import MemoryPool
from danet.model import DANet

_PROBE_SIDE = 96
"""Of a picture that every backbone takes: inception_v3 none below 75."""
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
"""Exactly these: other subclasses compute their weight anew in every pass."""
_NORM_FORWARDS = (nn.BatchNorm2d.forward, BatchNormAct2d.forward)
Follower = TypeVar("Follower", bound=nn.Module)


def optimize_for_inference(
    model: DANet, *, bfloat16: bool, compile_graph: bool, runs_on: torch.device | None = None
) -> DANet:
    """Changes the network in place, for inference only, and returns it.

    Args:
        model: on the device to compute on.
        bfloat16: keep the convolutions' weights in bfloat16; to be run under its autocast.
        compile_graph: compile backbone and branches at first use; later processes find the code
            in torch's cache, which the variable TORCHINDUCTOR_CACHE_DIR moves.
        runs_on: the device to compute on, if the network is not on it.
    """
    model.eval().requires_grad_(False)
    model.optimized = True
    model.auxiliary_head = None  # of use in training alone
    fold_batch_norms(model)
    device = runs_on or next(model.parameters()).device
    if not compile_graph and device.type == "cpu":
        _choose_convolutions(model, torch.bfloat16 if bfloat16 else torch.float32)
    convert_parameters(model, bfloat16=bfloat16)
    if compile_graph:
        model.compile_parts()
    return model


def require_finite_weights(model: nn.Module) -> None:
    """Checks weights, of which the logits do not always tell: oneDNN's ReLU makes 0 of nan.

    Raises:
        UserError: one is infinite or nan.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A sum is not finite if any value is not; it takes a tenth of the time of testing each.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(
                f"the network's weights are not finite ({name}): they are damaged; use other ones"
            )


def _choose_convolutions(model: DANet, dtype: torch.dtype) -> None:
    """Replaces convolutions, their ReLUs and residual blocks by what is fastest on this CPU."""
    _join_reductions(model.head, dtype)
    relus = {layer: relu for layer, relu in _pairs(model, nn.ReLU) if type(relu) is nn.ReLU}
    layers: dict[nn.Module, nn.Module] = {}
    pool = MemoryPool()
    for convolution in [module for module in model.modules() if type(module) is nn.Conv2d]:
        relu = relus.get(convolution)
        layer: nn.Conv2d | Conv2dStandIn = convolution
        if winograd.pays(convolution, dtype):
            layer = winograd.WinogradConv2d(convolution, dtype, rectify=relu is not None, pool=pool)
        elif relu is not None and can_rectify(convolution, dtype):
            layer = ConvReLU2d(convolution)
        if relu is not None and layer is not convolution:
            layers[relu] = nn.Identity()
        if dtype == torch.bfloat16 and has_amx() and WideStridedConv2d.concerns(convolution):
            layer = WideStridedConv2d(layer)
        layers[convolution] = layer
    _replace(model, layers)
    blocks = {module: ResidualBlock.of(module, dtype) for module in model.modules()}
    _replace(model, {block: fused for block, fused in blocks.items() if fused is not None})
    for stage in [module for module in model.modules() if type(module) is nn.Sequential]:
        for before, block in itertools.pairwise(stage):
            if isinstance(before, ResidualBlock) and isinstance(block, ResidualBlock):
                block.before = (before,)


class _JointReduction(nn.Module):
    """B C h w -> what each of two branches goes on with, B O h w."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        halves = self.layers(features).chunk(2, dim=1)
        return tuple(half.contiguous(memory_format=torch.channels_last) for half in halves)


def _join_reductions(head: DualAttentionHead, dtype: torch.dtype) -> None:
    """Has both branches' first convolutions done as one where they take Winograd's way.

    They read the same features, the widest of the network, which are so transformed once.
    """
    if head.position_branch is None or head.channel_branch is None:
        return
    branches = (head.position_branch, head.channel_branch)
    convolutions: list[nn.Conv2d] = []
    for branch in branches:
        convolution, norm, activation = branch.reduce
        if (
            not (isinstance(convolution, nn.Conv2d) and winograd.pays(convolution, dtype))
            or type(norm) is not nn.Identity
            or type(activation) is not nn.ReLU
            or any(has_hooks(part) for part in (branch, branch.reduce, norm, activation))
        ):
            return
        convolutions.append(convolution)
    joint = convolutions[0]
    for name in ("weight", "bias"):
        both = torch.cat([getattr(convolution, name) for convolution in convolutions])
        setattr(joint, name, nn.Parameter(both, requires_grad=False))
    joint.out_channels = len(joint.weight)
    head.joint_reduction = _JointReduction(branches[0].reduce)
    for branch in branches:
        branch.reduce = nn.Sequential()


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


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
    for convolution, norm in _pairs(model, nn.BatchNorm2d):
        if norm.running_mean is None or norm.running_var is None:
            continue
        if not _can_be_folded(convolution, norm):
            continue
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
    _replace(model, replaced)


def _can_be_folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether both compute what their classes say, from numbers that no pass changes."""
    return (
        type(norm).forward in _NORM_FORWARDS
        and "forward" not in vars(convolution)
        # Pruning and weight norm compute them anew before every pass.
        and convolution._parameters.keys() >= {"weight", "bias"}
    )


def _pairs(model: DANet, kind: type[Follower]) -> list[tuple[nn.Conv2d, Follower]]:
    """Convolutions and the modules of a kind that alone read their output, each running once."""
    run = _Run(model, kind)
    parameter = next(model.parameters())
    in_place = [
        module for module in model.modules() if isinstance(module, nn.ReLU) and module.inplace
    ]
    try:
        # In place they would return their input, as whose reads later ones would count.
        for relu in in_place:
            relu.inplace = False
        with run:
            model(
                torch.zeros(
                    1, 3, _PROBE_SIDE, _PROBE_SIDE, device=parameter.device, dtype=parameter.dtype
                )
            )
    finally:
        for relu in in_place:
            relu.inplace = True
        run.remove_hooks()
    return run.pairs()


class _Run(TorchDispatchMode, Generic[Follower]):  # type: ignore[no-untyped-call]
    """Watches one run: how often each tensor is read, and what each layer read and wrote.

    What hooks are given counts as read.
    """

    def __init__(self, model: nn.Module, kind: type[Follower]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = kind
        self.reads: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # so that no identity is given twice
        self.convolutions: dict[int, nn.Conv2d] = {}
        self.followers: list[tuple[Follower, int]] = []
        self.runs: Counter[nn.Module] = Counter()
        hooked = [module for module in model.modules() if module._forward_hooks]
        self.handles = [
            module.register_forward_hook(self._note)
            for module in model.modules()
            if type(module) in _CONVOLUTIONS or isinstance(module, kind)
        ] + [module.register_forward_hook(self._note_hook) for module in hooked]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # Tensors without data are asked for their device, which reads nothing.
        for leaf in tree_leaves((args, kwargs)) if func.namespace != "prim" else ():
            if isinstance(leaf, Tensor):
                self.reads[id(leaf)] += 1
        self.alive += [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.runs[module] += 1
        if isinstance(module, self.kind):
            self.followers.append((module, id(inputs[0])))
        elif isinstance(module, nn.Conv2d):
            self.convolutions[id(output)] = module

    def _note_hook(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        self.reads.update(id(leaf) for leaf in tree_leaves(output))

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def pairs(self) -> list[tuple[nn.Conv2d, Follower]]:
        return [
            (convolution, follower)
            for follower, read in self.followers
            if (convolution := self.convolutions.get(read)) is not None
            and self.reads[read] == 1
            and self.runs[follower] == self.runs[convolution] == 1
            and not has_hooks(follower)
        ]
