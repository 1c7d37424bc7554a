"""Scene segmentation with dual attention networks (DANet, CVPR 2019).

Names are imported when they are first used, so that `import danet` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danet import config, data, export, functional
    from danet.attention import ChannelAttention, PositionAttention
    from danet.errors import UserError
    from danet.explanation import Explanation, explain
    from danet.model import DANet, DANetOutput
    from danet.predict import Predictor
    from danet.segmentation import Segmentation

__all__ = [
    "ChannelAttention",
    "DANet",
    "DANetOutput",
    "Explanation",
    "PositionAttention",
    "Predictor",
    "Segmentation",
    "UserError",
    "config",
    "data",
    "explain",
    "export",
    "functional",
]

_HOME = {
    "ChannelAttention": "danet.attention",
    "DANet": "danet.model",
    "DANetOutput": "danet.model",
    "Explanation": "danet.explanation",
    "PositionAttention": "danet.attention",
    "Predictor": "danet.predict",
    "Segmentation": "danet.segmentation",
    "UserError": "danet.errors",
    "explain": "danet.explanation",
}


def __getattr__(name: str) -> Any:
    if name in ("config", "data", "export", "functional"):
        return importlib.import_module(f"danet.{name}")
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - slower than all else here

        return version("danet")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'danet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
