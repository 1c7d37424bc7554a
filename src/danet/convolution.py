"""Convolutions that do more in one pass, for inference on a CPU: oneDNN's.

With few channels or fast units for products, a pass over memory takes as long as the convolution
before it. oneDNN adds a shortcut and rectifies while it writes a convolution's output.

Shapes: B batch, C and O input and output channels, H W and h w input and output size.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor

from danet.kernels.cpu import has_onednn, onednn_has_bfloat16


def can_rectify(convolution: nn.Module, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes this convolution and its ReLU in one pass here, in a dtype."""
    return (
        has_onednn()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (dtype == torch.float32 or onednn_has_bfloat16())
        and type(convolution) is nn.Conv2d
        and _pads_with_zeros(convolution)
        and not has_hooks(convolution)
    )


def _pads_with_zeros(convolution: nn.Conv2d) -> bool:
    """By given widths, not by those that a size asks for."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else takes part in its call, which what replaces it would not call.

    So timm reads the features of some backbones, and so can users; some assign a forward instead.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Conv2dStandIn(nn.Module):
    """Takes a convolution's place, and has its geometry: some networks ask for it."""

    def __init__(self, convolution: "nn.Conv2d | Conv2dStandIn") -> None:
        super().__init__()
        self.in_channels: int = convolution.in_channels
        self.out_channels: int = convolution.out_channels
        self.kernel_size: tuple[int, ...] = convolution.kernel_size
        self.stride: tuple[int, ...] = convolution.stride
        self.padding: str | tuple[int, ...] = convolution.padding
        self.dilation: tuple[int, ...] = convolution.dilation
        self.groups: int = convolution.groups


class ConvReLU2d(Conv2dStandIn):
    """A convolution and its ReLU, with a shortcut added between them where one is given.

    Computes in the weight's dtype, whatever the input's. It has no gradient.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution)
        self.convolution = convolution

    def forward(
        self, features: Tensor, shortcut: Tensor | None = None, *, in_place: bool = False
    ) -> Tensor:
        """B C H W, and a shortcut B O h w -> B O h w, in the shortcut's memory if so wanted."""
        layer = self.convolution
        features = features.to(layer.weight.dtype)
        one_pass = torch.ops.mkldnn._convolution_pointwise
        weights = (layer.weight, layer.bias)
        shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
        if shortcut is None:
            return one_pass(features, *weights, *shape, "relu", [], "")  # type: ignore[no-any-return]
        shortcut = shortcut.to(layer.weight.dtype)
        if in_place and isinstance(features, FakeTensor):
            return shortcut  # no further memory is needed
        if layer.groups > 1 or not _onednn_adds(features, shortcut):
            output: Tensor = layer(features)
            return output.add_(shortcut).relu_()
        then: tuple[Any, ...] = ("add", 1.0, "relu", [], "")
        if in_place and shortcut.is_contiguous(memory_format=torch.channels_last):
            onto_shortcut = torch.ops.mkldnn._convolution_pointwise_.binary
            return onto_shortcut(  # type: ignore[no-any-return]
                shortcut, features, *weights, *shape, *then
            )
        return one_pass.binary(  # type: ignore[no-any-return]
            features, shortcut, *weights, *shape, *then
        )


def _onednn_adds(features: Tensor, shortcut: Tensor) -> bool:
    """Whether torch has oneDNN add to a convolution of these: of channels-last memory with data.

    Of other memory torch adds by itself, but cannot in bfloat16. To a single pixel torch 2.11
    fails to add, because its memory is of either order.
    """
    return (
        not isinstance(features, FakeTensor)
        and suggest_memory_format(features) == torch.channels_last
        and shortcut.shape[-2:].numel() > 1
    )


class ResidualBlock(nn.Module):
    """A ResNet's block whose last convolution adds the shortcut and rectifies.

    It does so in the shortcut's memory where nobody else reads that: fresh memory takes longer to
    get than to write to.

    Attributes:
        before: the block whose output this one alone reads, if there is one.
    """

    def __init__(self, body: nn.Module, last: ConvReLU2d, downsample: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.last = last
        self.downsample = downsample
        self.before: tuple[ResidualBlock, ...] = ()  # not a submodule

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype) -> Self | None:
        """From timm's block without batch norms; None where its end cannot be done in one pass."""
        if type(block) is Bottleneck:
            body = [block.conv1, block.act1, block.conv2, block.act2, block.aa or nn.Identity()]
            last, norms, activation = block.conv3, [block.bn1, block.bn2, block.bn3], block.act3
        elif type(block) is BasicBlock:
            body = [block.conv1, block.act1, block.aa or nn.Identity()]
            last, norms, activation = block.conv2, [block.bn1, block.bn2], block.act2
        else:
            return None
        dropped = [*norms, block.drop_block, block.drop_path]
        if (
            not can_rectify(last, dtype)
            or type(activation) is not nn.ReLU
            or any(has_hooks(part) for part in (block, activation, *dropped) if part is not None)
            or block.se is not None
            or any(type(norm) is not nn.Identity for norm in norms)
        ):
            return None
        return cls(nn.Sequential(*body), ConvReLU2d(last), block.downsample or nn.Identity())

    def forward(self, features: Tensor) -> Tensor:
        """B C H W -> B O h w."""
        shortcut = self.downsample(features)
        in_place = shortcut is not features or self._owns_features()
        output: Tensor = self.last(self.body(features), shortcut, in_place=in_place)
        return output

    def _owns_features(self) -> bool:
        """Whether nobody else reads them, not even a hook."""
        return any(
            not (has_hooks(self) or has_hooks(block) or has_hooks(block.last))
            for block in self.before
        )


class WideStridedConv2d(Conv2dStandIn):
    """A strided convolution whose output oneDNN makes at least two columns wide.

    With bfloat16 on AMX it leaves parts of a single column unwritten (seen with torch 2.15). Zeros
    to the right of the padding add a second column and leave the first as it is.

    Args:
        layer: the convolution, or what computes it and more.
    """

    def __init__(self, layer: nn.Conv2d | Conv2dStandIn) -> None:
        super().__init__(layer)
        self.layer = layer
        reach = layer.dilation[1] * (layer.kernel_size[1] - 1)
        self.narrowest = reach + 1 + layer.stride[1] - 2 * int(layer.padding[1])
        """The least width whose output has two columns."""

    @classmethod
    def concerns(cls, convolution: nn.Conv2d) -> bool:
        """Whether oneDNN may leave a column of this convolution's output unwritten."""
        return (
            max(convolution.stride) > 1
            and max(convolution.kernel_size) > 1
            and _pads_with_zeros(convolution)
        )

    def forward(self, features: Tensor) -> Tensor:
        """B C H W -> B O h w."""
        if features.shape[-1] >= self.narrowest:
            return self.layer(features)  # type: ignore[no-any-return]
        wider = F.pad(features, (0, self.narrowest - features.shape[-1]))
        return self.layer(wider)[..., :1]  # type: ignore[no-any-return]
