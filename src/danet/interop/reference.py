"""The authors' DANet checkpoints, before and after their refactor."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from danet.interop.layout import BODY, Translated, renamed, resnet_name
from danet.recipes import load_recipe

_RECIPE = "cityscapes_r101_authors"
"""Says of the network that they released what its checkpoint does not."""

_PREFIXES = {
    "pretrained.": BODY,
    "head.conv5a.": "head.position_branch.reduce.",
    "head.sa.query_conv.": "head.position_branch.attention.query.",
    "head.sa.key_conv.": "head.position_branch.attention.key.",
    "head.sa.value_conv.": "head.position_branch.attention.value.",
    "head.sa.gamma": "head.position_branch.attention.residual_weight",
    "head.conv51.": "head.position_branch.refine.",
    "head.conv6.1.": "head.position_classifier.1.",
    "head.conv5c.": "head.channel_branch.reduce.",
    "head.sc.gamma": "head.channel_branch.attention.residual_weight",
    "head.conv52.": "head.channel_branch.refine.",
    "head.conv7.1.": "head.channel_classifier.1.",
    "head.conv8.1.": "head.fused_classifier.1.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights are the authors' DANet by their names."""
    return "head.sa.gamma" in state


def translate(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> Translated:
    """Renames the weights; the ImageNet classifier that came with the backbone is left out.

    Dilation, `align_corners` and how pictures are tested are those of the authors' recipe.

    Raises:
        UserError: the backbone is no known ResNet.
    """
    del content  # the authors' checkpoints say nothing of classes or settings
    used = {name: t for name, t in state.items() if not name.startswith("pretrained.fc.")}
    known, unknown = renamed(used, _PREFIXES)
    recipe = load_recipe(_RECIPE)
    return Translated(
        state=known,
        unknown=unknown,
        backbone=resnet_name(known),
        output_stride=recipe.model.output_stride,
        multi_grid=recipe.model.multi_grid,
        align_corners=recipe.model.align_corners,
        test=recipe.test.model_dump(),
    )
