"""Which device to compute on, and in which precision."""

import os
from contextlib import AbstractContextManager
from typing import Literal

import torch

from danet.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """The named device; auto takes a GPU where there is one.

    Raises:
        UserError: the device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(candidate for candidate, there in available.items() if there)
    kind = name.partition(":")[0]
    if kind not in available:
        raise UserError(f"device {name!r} is unknown; use auto, {', '.join(available)}")
    if not available[kind]:
        raise UserError(f"device {name}: PyTorch sees none on this machine; use auto or cpu")
    return torch.device(name)


def local_device() -> str:
    """The device of one of the processes that torchrun started on this machine: a GPU each."""
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return "auto"


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as told, or where the device has it in hardware."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Emulated bfloat16 is slower than float32, so the instructions must be there.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bfloat16_instructions()
    return False


def _has_bfloat16_instructions() -> bool:
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision on a device; does nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(precision, device))
