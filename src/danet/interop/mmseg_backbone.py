"""Reads the ResNet options of an mmsegmentation config.

Networks that compute different things can have the same names and shapes of weights, so options
without a counterpart here are refused. Missing keys take the defaults of mmsegmentation's
`ResNet`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from danet.errors import UserError
from danet.interop.layout import BODY

_OUTPUT_STRIDES: Mapping[tuple[int, ...], int] = {
    (1, 2, 1, 1): 8,
    (1, 2, 2, 1): 16,
    (1, 2, 2, 2): 32,
}
"""By the stages' strides."""
_DILATIONS: Mapping[int, tuple[int, ...]] = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}
"""The stages' dilations here, by output stride."""
_MAX_DILATION = 64
_VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "ResNet": {},
    "ResNetV1c": {"deep_stem": True, "avg_down": False},
    "ResNetV1d": {"deep_stem": True, "avg_down": True},
}
"""The types of ResNets, and what each fixes."""
_CONVOLUTIONS = (None, "Conv", "Conv2d")
_EPSILON = 1e-5


class Dilation(NamedTuple):
    """Arguments of `danet.DANet`; the defaults are those of the published networks."""

    output_stride: int = 8
    multi_grid: tuple[int, ...] | None = None


def read_dilation(config: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> Dilation:
    """The dilation that the config asks for; the published one where it says nothing of a backbone.

    Args:
        name: timm's name of the ResNet, as the weights have it.
        state: the translated weights.

    Raises:
        UserError: the config contradicts the weights, or networks here cannot compute the same.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or "backbone" not in model:
        return Dilation()
    backbone = model["backbone"]
    if not isinstance(backbone, Mapping):
        raise UserError(
            "checkpoint: its config's model.backbone cannot be read; write it as dict(...) of "
            "literals, as mmsegmentation does when it saves a checkpoint"
        )
    _require_the_weights(backbone, name, state)
    _require_the_same_layers(backbone)
    return _dilation(backbone)


def _require_the_weights(
    backbone: Mapping[str, Any], name: str, state: Mapping[str, Tensor]
) -> None:
    depth = int(name.removeprefix("resnet").rstrip("cds"))
    if backbone.get("depth", depth) != depth:
        raise _refusal("depth", f"is not {depth}, that of the weights; correct the config")
    kind = backbone.get("type")
    if kind is None:
        return
    kind = kind.removeprefix("mmseg.") if isinstance(kind, str) else ""
    if kind not in _VARIANTS:
        raise _refusal("type", f"is not one of those that can be converted: {', '.join(_VARIANTS)}")
    settings = {**backbone, **_VARIANTS[kind]}
    for key, part in (("deep_stem", "conv1.0"), ("avg_down", "layer2.0.downsample.2")):
        said, found = bool(settings.get(key)), f"{BODY}{part}.weight" in state
        if said != found:
            raise _refusal(
                key, f"is {said} ({kind}), but {found} in the weights; correct the config"
            )


def _require_the_same_layers(backbone: Mapping[str, Any]) -> None:
    """Checks the options that cannot be seen in the weights."""
    if backbone.get("style", "pytorch") != "pytorch":
        raise _refusal("style", "is not 'pytorch', the only one that can be converted")
    convolution = backbone.get("conv_cfg")
    if isinstance(convolution, Mapping) and convolution.get("type") not in _CONVOLUTIONS:
        raise _refusal("conv_cfg", "is not Conv2d, the only one that can be converted")
    require_known_epsilon(backbone, "backbone")


def require_known_epsilon(section: Mapping[str, Any], name: str) -> None:
    """Raises a UserError where a part's batch norms add something else to variances than ours."""
    norm = section.get("norm_cfg")
    if isinstance(norm, Mapping) and norm.get("eps", _EPSILON) != _EPSILON:
        raise UserError(
            f"checkpoint: its config's model.{name}.norm_cfg has an eps other than {_EPSILON}, "
            "which networks here have"
        )


def _dilation(backbone: Mapping[str, Any]) -> Dilation:
    strides = _integers(backbone, "strides", (1, 2, 2, 2))
    dilations = _integers(backbone, "dilations", (1, 1, 1, 1))
    output_stride = _OUTPUT_STRIDES.get(strides)
    if output_stride is None:
        known = ", ".join(map(str, _OUTPUT_STRIDES))
        raise _refusal("strides", f"is {strides}, not one of those that can be converted: {known}")
    ours = _DILATIONS[output_stride]
    if dilations[:3] != ours[:3]:
        raise _refusal(
            "dilations",
            f"is {dilations}; with strides {strides} only {ours[:3]} can be converted for the "
            "first three stages",
        )
    contracts = bool(backbone.get("contract_dilation"))
    if ours[2] > 1 and not contracts:
        raise _refusal(
            "contract_dilation",
            "is not True, but here the first block of a dilated third stage has half its dilation",
        )
    last = _blocks(dilations[3], contracts)
    if backbone.get("multi_grid") is not None:
        last = _integers(backbone, "multi_grid", last)
    return Dilation(output_stride, None if last == _blocks(ours[3], contracts=True) else last)


def _blocks(dilation: int, contracts: bool) -> tuple[int, ...]:
    """The dilations of a stage's first three blocks, which are all that a last stage has."""
    first = dilation // 2 if contracts and dilation > 1 else dilation
    return first, dilation, dilation


def _integers(backbone: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """As many numbers as the default has."""
    values = backbone.get(key, default)
    valid = isinstance(values, list | tuple) and len(values) == len(default)
    if not valid or not all(type(v) is int and 1 <= v <= _MAX_DILATION for v in values):
        raise _refusal(key, f"must be {len(default)} whole numbers of 1 to {_MAX_DILATION}")
    return tuple(values)


def _refusal(key: str, problem: str) -> UserError:
    return UserError(f"checkpoint: its config's model.backbone.{key} {problem}")
