"""When position attention takes our Triton kernels: half precision on NVIDIA GPUs of compute
capability 9.0, where they were measured.

Shapes: B batch, D key width, C value width, N query positions, M key positions.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from danet.errors import first_line

_KEY_WIDTH = 64
"""The widest keys that were measured; a program's share of wider ones may not fit its memory."""
_LARGEST_BATCH = 65_535
"""The third axis of a grid of programs."""
_LARGEST_SAMPLE = 2**31
"""Within a sample the kernels count elements in 32 bits."""

_state = {"usable": find_spec("triton") is not None}


def hopper_kernels_fit(query_BDN: Tensor, value_BCM: Tensor) -> bool:
    """Whether the kernels take these inputs on this machine."""
    return (
        query_BDN.device.type == "cuda"
        and query_BDN.dtype in (torch.float16, torch.bfloat16)
        and query_BDN.shape[1] <= _KEY_WIDTH
        and query_BDN.numel() > 0
        and value_BCM.numel() > 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query_BDN.device) == (9, 0)
        and _state["usable"]
    )


def run_hopper_kernels(function: str, *tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Calls a function of `triton_attention`; None where the tensors are too large or Triton fails.

    Triton compiles at first use, which needs a C compiler and a writable folder. After a failure it
    is not tried again.
    """
    if any(len(t) > _LARGEST_BATCH or t[0].numel() >= _LARGEST_SAMPLE for t in tensors):
        return None
    try:
        module = import_module("danet.kernels.triton_attention")
        result: tuple[Tensor, ...] = getattr(module, function)(*tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise many kinds
        _state["usable"] = False
        warnings.warn(
            f"Triton does not run here ({first_line(error)}), so position attention takes another "
            "way, as exact but slower; it needs a C compiler, and a writable folder "
            "(TRITON_CACHE_DIR)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return result
