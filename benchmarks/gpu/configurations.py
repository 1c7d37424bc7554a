"""Which configurations of the Triton kernels are tried on which GPU.

`compiled_kernels.py` compiles all of them without a GPU: each fits its GPU's memories and none
spills registers, but for one that does with one of two Triton versions (see there).
"""

from collections.abc import Sequence

import torch

from danet.kernels.triton_attention import Configuration

Choices = dict[str, Sequence[Configuration]]
"""For each of the kernels "forward", "key_value" and "query" the configurations to choose from."""

_AMPERE: Choices = {
    "forward": [
        Configuration(64, 32, 512, 8, 3),
        Configuration(64, 32, 256, 4, 3),
        Configuration(64, 64, 256, 8, 3),
        Configuration(128, 64, 128, 8, 3),
    ],
    "key_value": [
        Configuration(32, 32, 512, 8, 2),
        Configuration(32, 32, 256, 4, 2),
        Configuration(128, 64, 128, 8, 2),
    ],
    "query": [
        Configuration(64, 32, 512, 8, 2),
        Configuration(64, 32, 256, 4, 2),
        Configuration(128, 32, 256, 8, 3),
        Configuration(128, 64, 128, 8, 3),
    ],
}

_HOPPER: Choices = {
    "forward": [
        Configuration(64, 64, 512, 8, 2, descriptors=True),
        Configuration(64, 32, 512, 8, 3, descriptors=True),
        Configuration(128, 64, 256, 8, 3, descriptors=True),
        Configuration(128, 64, 256, 8, 3),
        Configuration(128, 128, 256, 8, 2, descriptors=True),
        Configuration(64, 64, 256, 4, 3, descriptors=True),
        Configuration(128, 128, 128, 8, 3, descriptors=True),
        Configuration(128, 64, 128, 4, 3, descriptors=True),
    ],
    "key_value": [
        Configuration(64, 32, 512, 8, 3, descriptors=True),  # Triton 3.9 spills 100 bytes, 3.6 none
        Configuration(128, 32, 256, 8, 3, descriptors=True),
        Configuration(64, 64, 256, 8, 3, descriptors=True),
        Configuration(64, 32, 256, 4, 2, descriptors=True),
        Configuration(64, 32, 256, 4, 3, descriptors=True),
        Configuration(128, 64, 128, 8, 2, descriptors=True),
    ],
    "query": [
        Configuration(64, 64, 512, 8, 2, descriptors=True),
        Configuration(64, 32, 512, 4, 3, descriptors=True),
        Configuration(128, 32, 512, 8, 2, descriptors=True),
        Configuration(128, 64, 256, 8, 3, descriptors=True),
        Configuration(64, 64, 256, 4, 3, descriptors=True),
        Configuration(128, 128, 128, 8, 3, descriptors=True),
    ],
}

# 128 queries of all 512 channels would fill tensor memory and leave the scores none.
_BLACKWELL: Choices = {
    "forward": [
        Configuration(64, 64, 512, 8, 2, descriptors=True),
        Configuration(128, 64, 256, 8, 3, descriptors=True),
        Configuration(128, 128, 256, 8, 2, descriptors=True),
        Configuration(128, 128, 128, 8, 3, descriptors=True),
    ],
    "key_value": [
        Configuration(64, 32, 512, 8, 2, descriptors=True),
        Configuration(128, 32, 256, 8, 2, descriptors=True),
        Configuration(128, 64, 256, 8, 2, descriptors=True),
        Configuration(64, 64, 256, 8, 2, descriptors=True),
        Configuration(128, 64, 128, 8, 2, descriptors=True),
    ],
    "query": [
        Configuration(64, 64, 512, 8, 2, descriptors=True),
        Configuration(128, 64, 256, 8, 2, descriptors=True),
        Configuration(128, 128, 128, 8, 2, descriptors=True),
    ],
}

# Exact float32 products do not run on tensor cores: this is to check the kernels, not for speed.
FLOAT32: Choices = {
    "forward": [Configuration(32, 32, 128, 8, 1)],
    "key_value": [Configuration(32, 16, 64, 4, 1)],
    "query": [Configuration(32, 32, 128, 8, 1)],
}

# Any GPU would run it; small, so that the interpreter's small inputs span several blocks.
INTERPRETED: Choices = {
    name: [Configuration(16, 16, 32, 4, 1)] for name in ("forward", "key_value", "query")
}

HALF_PRECISION: dict[int, Choices] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
"""By compute capability; others take the first's, of which a smaller GPU may refuse some."""


def configurations(device: torch.device, dtype: torch.dtype, width: int | None = None) -> Choices:
    """Those of a device.

    Args:
        width: channels of a program; None for all.
    """
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return FLOAT32
    major, _ = torch.cuda.get_device_capability(device)
    choices = HALF_PRECISION.get(10 * major, _AMPERE)
    if width is None:
        return choices
    return {
        name: [choice for choice in several if choice.width == width]
        for name, several in choices.items()
    }
