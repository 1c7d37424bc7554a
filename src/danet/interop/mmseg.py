"""mmsegmentation's DANet checkpoints, versions 0.x and 1.x."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from danet.config import Size
from danet.errors import UserError
from danet.interop.foreign import literal_config
from danet.interop.layout import BODY, Translated, names_and_colors, renamed, resnet_name
from danet.interop.mmseg_backbone import read_dilation, require_known_epsilon

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
        UserError: the backbone is no known ResNet, or the config describes a network that this
            package has not.
    """
    known, unknown = renamed(state, _PREFIXES)
    backbone = resnet_name(known)
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, dict) else {}
    classes, palette = names_and_colors(
        meta.get("CLASSES", dataset.get("classes")), meta.get("PALETTE", dataset.get("palette"))
    )
    text = meta.get("config", meta.get("cfg"))
    config = literal_config(text) if isinstance(text, str) else {}
    dilation = read_dilation(config, backbone, known)
    for head in ("decode_head", "auxiliary_head"):
        require_known_epsilon(_section(config, f"model.{head}"), head)
    normalization = _normalization(config)
    return Translated(
        state=known,
        unknown=unknown,
        backbone=backbone,
        output_stride=dilation.output_stride,
        multi_grid=dilation.multi_grid,
        align_corners=_section(config, "model.decode_head").get("align_corners") is True,
        test=_test_settings(config),
        classes=classes,
        palette=palette,
        mean=_channels(normalization.get("mean")),
        std=_channels(normalization.get("std")),
        notes=_notes(config),
    )


def _section(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    section: Any = config
    for key in path.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _normalization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The normalization settings: in the test pipeline of 0.x, in the model of 1.x.

    Raises:
        UserError: they stay BGR, as mmsegmentation reads them.
    """
    preprocessor = _section(config, "model.data_preprocessor") or _section(
        config, "data_preprocessor"
    )
    steps = _steps(_test_pipeline(config))
    step = next((step for step in steps if step.get("type") == "Normalize"), {})
    if preprocessor and not step:
        key = "model.data_preprocessor.bgr_to_rgb"
        given = {name: value for name, value in preprocessor.items() if value is not None}
        normalization = {"mean": [0, 0, 0], "std": [1, 1, 1], **given}
        # Either swaps the first and the last channel.
        to_rgb = normalization.get("bgr_to_rgb") or normalization.get("rgb_to_bgr")
    else:
        key = "to_rgb"
        normalization = {**_section(config, "img_norm_cfg"), **step}
        to_rgb = normalization.get("to_rgb", True)
    if not to_rgb:
        raise UserError(
            f"checkpoint: its config leaves pictures BGR ({key} is not True), but networks here "
            "take RGB; reverse mean, std and the first convolution's input channels, and set it"
        )
    return normalization


def _test_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    section = _section(config, "model.test_cfg") or _section(config, "test_cfg")
    window, stride = _size(section.get("crop_size")), _size(section.get("stride"))
    settings: dict[str, Any] = {}
    if section.get("mode") == "slide" and window is not None and stride is not None:
        settings |= {"mode": "slide", "window": window, "stride": stride}
    for step in _steps(_test_pipeline(config)):
        kind, ratios = step.get("type"), step.get("img_ratios")
        if kind in ("Resize", "MultiScaleFlipAug"):
            scale = _bounds(step.get("img_scale", step.get("scale")))
            if scale is not None:
                settings.setdefault("scale", scale)
        if kind == "MultiScaleFlipAug":
            settings["flip"] = step.get("flip") is True
            if ratios:
                settings["ratios"] = ratios if isinstance(ratios, list) else [ratios]
    return settings


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    # 1.x, which says scale, stretches by default, 0.x does not.
    stretches = [
        step.get("keep_ratio", "scale" not in step) is False
        for step in _steps(_test_pipeline(config))
        if step.get("type") == "Resize"
    ]
    if not any(stretches):
        return ()
    return (
        "its test pipeline stretches pictures to its scale (keep_ratio=False); here they keep "
        "their aspect ratio, so scores may differ",
    )


def _test_pipeline(config: Mapping[str, Any]) -> Any:
    """The transforms of the test data, in 1.x or 0.x, or else the config's `test_pipeline`."""
    for path in ("test_dataloader.dataset", "data.test"):
        pipeline = _section(config, path).get("pipeline")
        if isinstance(pipeline, list):
            return pipeline
    return config.get("test_pipeline")


def _steps(pipeline: Any) -> Iterator[Mapping[str, Any]]:
    """The steps in their order, those within MultiScaleFlipAug after itself."""
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, Mapping):
            yield step
            yield from _steps(step.get("transforms"))


def _bounds(scale: Any) -> Size | None:
    """Long and short side from theirs, which come in any order; one number stands for both."""
    match scale:
        case [int(one), int(other)]:
            return max(one, other), min(one, other)
        case [[int(one), int(other)]]:  # a list of one scale; several have no counterpart here
            return max(one, other), min(one, other)
        case int(side):
            return side, side
    return None


def _size(height_width: Any) -> Size | None:
    match height_width:
        case [int(height), int(width)] if min(height, width) >= 1:
            return width, height
    return None


def _channels(values: Any) -> tuple[float, ...] | None:
    match values:
        case [int() | float(), int() | float(), int() | float()]:
            return tuple(values)
    return None
