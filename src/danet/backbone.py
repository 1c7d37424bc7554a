"""Any timm backbone as a source of c3 and c4 at a given output stride.

Shapes: B batch, H W the image, h w = ceil(H / output stride), ceil(W / output stride).
"""

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers.format import Format
from timm.models import FeatureInfo, FeatureListNet, load_state_dict
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from danet.errors import UserError, explaining_lookup, first_line, why_not_read

OUTPUT_STRIDES = (8, 16, 32)

# How families that cannot be dilated are told to take images of any size, first fit first: plain
# transformers resample their position embeddings, windowed ones move their windows.
_ANY_SIZE_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)

_ONEDNN_CHANNEL_BLOCK = 16

_LISTS = (nn.Sequential, nn.ModuleList)
_PROBE_SIZE = (75, 97)
"""Sides that no stride divides, and that the deepest family's last convolution still fits into."""


class BackboneFeatures(NamedTuple):
    """The last two stages' features, both B C h w."""

    c3: Tensor
    c4: Tensor


class Backbone(nn.Module):
    """A timm network up to its last two stages.

    Families that cannot be dilated (transformers, HRNet, VGG) keep their own stride: the image is
    padded with zeros on the right and below to a multiple of it, and the features are resized
    bilinearly to the output stride and cropped. For families that take one size only (BEiT,
    MLP-Mixer), the image is resized to that size and the features back.

    Args:
        name: a timm model name.
        pretrained: load timm's ImageNet weights from the hub.
        weights: load them from this file instead (safetensors, or a torch file of plain tensors).
        multi_grid: absolute dilations of the blocks of a ResNet's last stage, such as (4, 8, 16)
            in the authors' networks: of all 3x3 convolutions of a block.

    Raises:
        UserError: unknown name, no features, weights out of reach or not fitting.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool,
        output_stride: int = 8,
        multi_grid: Sequence[int] | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            known = timm.list_models()
            near = difflib.get_close_matches(name.lower().replace("-", ""), known, 3, cutoff=0.8)
            close = ", ".join(near or timm.list_models(f"*{name.partition('_')[0]}*")[:5])
            raise UserError(
                f"model.backbone: timm has no {name!r}{'; close: ' + close if close else ''}"
            )
        if output_stride not in OUTPUT_STRIDES:
            raise UserError(f"model.output_stride must be one of {OUTPUT_STRIDES}")
        self.output_stride = output_stride
        options = _pretrained_options(name, pretrained, weights)
        self.body, dilated, info = _build(name, output_stride, options)
        _subsample_before_narrow_pointwise(self.body)
        if len(info.channels()) < 2:
            raise UserError(f"model.backbone: {name} gives fewer than two feature maps")
        self.c3_channels, self.c4_channels = info.channels()[-2:]
        if isinstance(self.body, FeatureListNet):  # which would hold the others while it runs
            self.body.return_layers = dict([*self.body.return_layers.items()][-2:])
        self.size_multiple = 1
        self.fixed_size: tuple[int, int] | None = None
        expected = tuple(-(-side // output_stride) for side in _PROBE_SIZE)
        if not (dilated and self._c4_size(*_PROBE_SIZE) == expected):
            self.size_multiple = math.lcm(output_stride, *info.reduction())
            made_for = _size_made_for(self.body)
            if not self._takes_any_size(made_for):
                if made_for is None:
                    raise UserError(
                        f"model.backbone: {name} takes pictures of one size only, and does not say "
                        "which; choose another backbone"
                    )
                self.fixed_size = made_for
        if multi_grid is not None:
            _set_multi_grid(self.body, name, multi_grid)

    def forward(self, images: Tensor) -> BackboneFeatures:
        """B 3 H W -> c3 and c4."""
        height, width = images.shape[-2:]
        if self.fixed_size is not None:
            images = F.interpolate(images, size=self.fixed_size, mode="bilinear")
        else:
            right, below = -width % self.size_multiple, -height % self.size_multiple
            images = F.pad(images, (0, right, 0, below))
        c3, c4 = self.body(images)[-2:]
        return BackboneFeatures(
            c3=self._resample(self._channels_first(c3), height, width),
            c4=self._resample(self._channels_first(c4), height, width),
        )

    def _takes_any_size(self, made_for: tuple[int, int] | None) -> bool:
        """Tries a small picture, and one that is higher than those that it was made for."""
        multiple = self.size_multiple
        sizes = [(3 * multiple, 4 * multiple)]
        if made_for is not None:
            higher = made_for[0] // multiple + 1
            sizes.append((max(higher, 3) * multiple, 3 * multiple))
        return all(self._c4_size(*size) is not None for size in sizes)

    @torch.no_grad()
    def _c4_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width of c4 for pictures of this size; None where the network refuses it."""
        training = self.body.training
        device = next(self.body.parameters()).device
        try:
            c4 = self.body.eval()(torch.zeros(1, 3, height, width, device=device))[-1]
        # How networks refuse a size: each family in its own way.
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
            return None
        finally:
            self.body.train(training)
        rows, columns = self._channels_first(c4).shape[-2:]
        return rows, columns

    def blocks(self) -> list[nn.Module]:
        """The building blocks of all stages, such as a ResNet's residual blocks."""
        return [block for stage in self._stages() for block in stage]

    def early_blocks(self) -> list[nn.Module]:
        """The blocks before the last stage; of a network with one stage, all but its last block."""
        stages = self._stages()
        return [block for stage in stages[:-1] for block in stage] or self.blocks()[:-1]

    def stem(self) -> list[nn.Module]:
        """What a network of stages computes before the first of them, one after the other.

        Empty where that is not known, or something in between is one of the features.
        """
        if not isinstance(self.body, FeatureListNet):
            return []
        within = {id(block) for block in self.blocks()}
        stem = list(
            itertools.takewhile(
                lambda child: within.isdisjoint(map(id, child[1].modules())),
                self.body.named_children(),
            )
        )
        names = {name for name, _ in stem}
        return [] if names & {*self.body.return_layers} else [module for _, module in stem]

    def _stages(self) -> list[list[nn.Module]]:
        stages = [
            list(stage.children()) if isinstance(stage, _LISTS) else [stage]
            for stage in self._parts()
        ]
        blocks = [
            [block for block in stage if any(True for _ in block.children())] for stage in stages
        ]
        return [stage for stage in blocks if stage]

    def _parts(self) -> list[nn.Module]:
        whole = getattr(self.body, "model", None)
        if not isinstance(whole, nn.Module):
            return list(self.body.children())
        # Of transformers timm calls the parts, whose lists are of blocks, and not the whole.
        return [part for part in whole.children() if isinstance(part, _LISTS)]

    def _channels_first(self, features: Tensor) -> Tensor:
        # Networks of timm that do not name their format have B C H W.
        is_last = getattr(self.body, "output_fmt", None) == Format.NHWC
        return features.permute(0, 3, 1, 2) if is_last else features

    def _resample(self, features: Tensor, height: int, width: int) -> Tensor:
        """To the output stride of an image of this height and width before padding."""
        stride, multiple = self.output_stride, self.size_multiple
        # Of positive numbers, for ONNX divides negative ones towards zero.
        size = [(side + stride - 1) // stride for side in (height, width)]
        if self.fixed_size is not None:
            return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        if multiple > 1:
            padded = [
                (side + multiple - 1) // multiple * multiple // stride for side in (height, width)
            ]
            features = F.interpolate(features, size=padded, mode="bilinear", align_corners=False)
            # A cut, as a negative padding: slices break torch.export of any size.
            features = F.pad(features, (0, size[1] - padded[1], 0, size[0] - padded[0]))
        return features


def _subsample_before_narrow_pointwise(body: nn.Module) -> None:
    """Has strided 1x1 convolutions of few channels see only the pixels that they read.

    RepVGG, MobileOne and FastViT have one on the RGB picture. In channels-last memory on a CPU its
    weight's gradient overwrites foreign memory (oneDNN's issue 6035): wrong, or the process dies.
    """
    for module in body.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.padding == (0, 0)
            and module.in_channels < _ONEDNN_CHANNEL_BLOCK
        ):
            module.register_forward_pre_hook(partial(_subsample, module.stride))
            module.stride = (1, 1)


def _subsample(
    stride: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    rows, columns = stride
    return (inputs[0][..., ::rows, ::columns],)


def _size_made_for(body: nn.Module) -> tuple[int, int] | None:
    """Height and width of the pictures that a network was made for, if it says so."""
    wrapped = getattr(body, "model", None)
    settings = getattr(body, "pretrained_cfg", None) or getattr(wrapped, "pretrained_cfg", None)
    if settings is None:
        return None
    height, width = settings["input_size"][-2:]
    return height, width


def _build(
    name: str, output_stride: int, options: Mapping[str, Any]
) -> tuple[nn.Module, bool, FeatureInfo]:
    """The network, whether it is dilated to the output stride, and its stages."""
    attempts = [{"output_stride": output_stride}, *_ANY_SIZE_OPTIONS]
    refusal = ""
    for attempt in attempts:
        try:
            body = timm.create_model(name, features_only=True, **attempt, **options)
        # How timm's constructors say that they do not know an option, or do not support it.
        except (TypeError, AssertionError, NotImplementedError) as error:
            refusal = first_line(error)
            continue
        # The hub's clients raise many types, and weights that do not fit raise others.
        except Exception as error:
            if not options["pretrained"]:
                raise UserError(
                    f"model.backbone: {name} could not be built ({first_line(error)})"
                ) from error
            raise UserError(
                f"model.backbone: {name} could not be built with its weights "
                f"({first_line(error)}); where the hub cannot be reached, give "
                "model.backbone_weights=FILE or model.pretrained_backbone=false"
            ) from error
        info = body.feature_info
        if isinstance(info, FeatureInfo):
            return body, "output_stride" in attempt, info
        refusal = "its stages are not described"
    raise UserError(f"model.backbone: timm's {name} does not give feature maps ({refusal})")


def _pretrained_options(name: str, pretrained: bool, weights: str | Path | None) -> dict[str, Any]:
    if weights is None:
        if pretrained and not timm.is_model_pretrained(name):
            raise UserError(
                f"model.backbone: timm has no weights for {name}; "
                "set model.pretrained_backbone=false"
            )
        return {"pretrained": pretrained}
    weights = Path(weights)
    with explaining_lookup(f"model.backbone_weights: {weights}"):
        if not weights.is_file():
            raise UserError(f"model.backbone_weights: {weights} is not a file")
    try:
        state = load_state_dict(str(weights), weights_only=True)  # not always the default
    # timm and its readers raise many types on a damaged or foreign file.
    except Exception as error:
        raise UserError(
            f"model.backbone_weights: {weights} is not a checkpoint of plain tensors "
            f"({why_not_read(error)})"
        ) from error
    missing = timm.create_model(name, num_classes=0).state_dict().keys() - state.keys()
    if missing:
        raise UserError(
            f"model.backbone_weights: {weights} lacks {len(missing)} tensors of timm's {name}, "
            f"first {min(missing)}"
        )
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}


def _set_multi_grid(body: nn.Module, name: str, dilations: Sequence[int]) -> None:
    blocks = list(getattr(body, "layer4", ()))
    is_resnet = all(isinstance(block, BasicBlock | Bottleneck) for block in blocks)
    if not is_resnet or len(blocks) != len(dilations):
        raise UserError(
            f"model.multi_grid={list(dilations)}: needs a ResNet whose last stage has "
            f"{len(dilations)} blocks; {name} does not have one"
        )
    for block, dilation in zip(blocks, dilations, strict=True):
        # ResNet-18 and 34 have two 3x3 convolutions a block. timm dilates both; mmsegmentation
        # leaves the second at 1, and the authors at the stage's dilation.
        basic = isinstance(block, BasicBlock)
        for convolution in (block.conv1, block.conv2) if basic else (block.conv2,):
            convolution.dilation = convolution.padding = (dilation, dilation)
