"""mmsegmentation's DANet checkpoints, versions 0.x and 1.x."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from danet.config import Size, TestConfig
from danet.interop.foreign import literal_config
from danet.interop.layout import BODY, Translated, names_and_colors, renamed, resnet_name

_PREFIXES = {
    "backbone.stem.7.": f"{BODY}bn1.",
    "backbone.stem.": f"{BODY}conv1.",
    "backbone.": BODY,
    "decode_head.pam_in_conv.conv.": "head.position_branch.reduce.0.",
    "decode_head.pam_in_conv.bn.": "head.position_branch.reduce.1.",
    "decode_head.pam.query_project.": "head.position_branch.attention.query.",
    "decode_head.pam.key_project.": "head.position_branch.attention.key.",
    "decode_head.pam.value_project.": "head.position_branch.attention.value.",
    "decode_head.pam.gamma.scale": "head.position_branch.attention.residual_weight",
    "decode_head.pam_out_conv.conv.": "head.position_branch.refine.0.",
    "decode_head.pam_out_conv.bn.": "head.position_branch.refine.1.",
    "decode_head.pam_conv_seg.": "head.position_classifier.1.",
    "decode_head.cam_in_conv.conv.": "head.channel_branch.reduce.0.",
    "decode_head.cam_in_conv.bn.": "head.channel_branch.reduce.1.",
    "decode_head.cam.gamma.scale": "head.channel_branch.attention.residual_weight",
    "decode_head.cam_out_conv.conv.": "head.channel_branch.refine.0.",
    "decode_head.cam_out_conv.bn.": "head.channel_branch.refine.1.",
    "decode_head.cam_conv_seg.": "head.channel_classifier.1.",
    "decode_head.conv_seg.": "head.fused_classifier.1.",
    "auxiliary_head.convs.0.conv.": "auxiliary_head.reduce.0.",
    "auxiliary_head.convs.0.bn.": "auxiliary_head.reduce.1.",
    "auxiliary_head.conv_seg.": "auxiliary_head.classifier.1.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights are mmsegmentation's DANet by their names."""
    return "decode_head.pam.gamma.scale" in state


def translate(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> Translated:
    """Renames the weights and reads classes and settings from the checkpoint's metadata.

    Raises:
        UserError: the backbone is no known ResNet.
    """
    known, unknown = renamed(state, _PREFIXES)
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, dict) else {}
    classes, palette = names_and_colors(
        meta.get("CLASSES", dataset.get("classes")), meta.get("PALETTE", dataset.get("palette"))
    )
    text = meta.get("config", meta.get("cfg"))
    config = literal_config(text) if isinstance(text, str) else {}
    normalization = _section(config, "img_norm_cfg") or _section(config, "model.data_preprocessor")
    return Translated(
        state=known,
        unknown=unknown,
        backbone=resnet_name(known),
        multi_grid=None,
        align_corners=_section(config, "model.decode_head").get("align_corners") is True,
        test=_test_config(_section(config, "model.test_cfg") or _section(config, "test_cfg")),
        classes=classes,
        palette=palette,
        mean=_channels(normalization.get("mean")),
        std=_channels(normalization.get("std")),
    )


def _section(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    section: Any = config
    for key in path.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _test_config(section: Mapping[str, Any]) -> TestConfig:
    window, stride = _size(section.get("crop_size")), _size(section.get("stride"))
    if section.get("mode") != "slide" or window is None or stride is None:
        return TestConfig()
    return TestConfig(mode="slide", window=window, stride=stride)


def _size(height_width: Any) -> Size | None:
    match height_width:
        case [int(height), int(width)] if min(height, width) >= 1:
            return width, height
    return None


def _channels(values: Any) -> tuple[float, ...] | None:
    match values:
        case [int() | float(), int() | float(), int() | float()]:
            return tuple(float(value) for value in values)
    return None
