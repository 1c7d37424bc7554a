"""Which device to compute on, and in which precision."""

import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import get_args

import torch

from danet.choices import Precision
from danet.errors import OutOfMemory, UserError
from danet.kernels.cpu import has_onednn, multiplies_bfloat16_fast, onednn_has_bfloat16

try:
    import resource
except ModuleNotFoundError:  # Windows, which has no such limits
    resource = None  # type: ignore[assignment]

_OUT_OF_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "Failed to allocate memory", "bad_alloc"),
    *("out of memory", "ALLOC_FAILED"),
)
"""Parts of messages about memory: the machine's, and a GPU's and its libraries'."""


def device_counts() -> dict[str, int]:
    """How many devices of each kind PyTorch sees on this machine."""
    return {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }


def choose_device(name: str | torch.device) -> torch.device:
    """The named device; auto takes a GPU where there is one.

    Raises:
        UserError: the device is not there.
    """
    name = str(name)
    counts = device_counts()
    if name == "auto":
        name = next(candidate for candidate, count in counts.items() if count)
    kind, colon, index = name.partition(":")
    if kind not in counts:
        raise UserError(f"device {name!r} is unknown; use auto, {', '.join(counts)}")
    count = counts[kind]
    if not count:
        raise UserError(f"device {name}: PyTorch finds none on this machine; use auto or cpu")
    if not colon:
        return torch.device(kind)
    if not (index.isdecimal() and int(index) < count):
        known = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise UserError(f"device {name}: no such device on this machine; use {kind} or {known}")
    return torch.device(kind, int(index))


def local_device(name: str) -> str:
    """The named device for one of the processes that torchrun started on this machine: a GPU each.

    The name stays as it is where there is no GPU, or it is another device's.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return name


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as told, or where it makes the device faster.

    Raises:
        UserError: the precision is none of auto, fp32 and bf16.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision {precision}: use auto, fp32 or bf16")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return has_onednn() and multiplies_bfloat16_fast()
    return False


def warn_of_slow_bfloat16(device: torch.device) -> None:
    """To be called where PyTorch will compute in bfloat16."""
    if device.type == "cpu" and not onednn_has_bfloat16():
        warnings.warn(
            "bfloat16 takes hundreds of times as long as float32 on this CPU; use precision auto",
            RuntimeWarning,
            stacklevel=2,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, the machine or a limit on this process had no memory left.

    Not of an `OutOfMemory`, whose message says so and what to do.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # ONNX Runtime's errors are no RuntimeErrors.
    of_runtime = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    if not of_runtime or isinstance(error, OutOfMemory):
        return False
    text = str(error)
    if text == "could not create a primitive":  # oneDNN's code needs room, too
        return _address_space_limit() is not None
    return any(phrase in text for phrase in _OUT_OF_MEMORY)


def memory_limit(device: torch.device) -> int:
    """The bytes that this process may fill: all of a GPU, or of the machine if nothing limits it.

    Limits are those of a container (cgroup) and of the address space (ulimit -v), of which the
    part that libraries take without using it is left out. On Windows none is known.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if resource is None:
        return 2**63 - 1
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += _container_limits()
    if (address_space := _address_space_limit()) is not None:
        limits.append(address_space - _unused_address_space())
    return min(limits)


def _container_limits(root: Path = Path("/")) -> list[int]:
    """The limits of this process's groups (cgroup v1 and v2) and of those around them."""
    own, mounted = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    files = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            folder, name = mounted / group.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mounted / "memory" / group.lstrip("/"), "memory.limit_in_bytes"
        else:
            continue
        # In a container the group's own folder may be outside; then only the mounted one is seen.
        files += [around / name for around in (folder, *folder.parents)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdecimal()]  # else "max"


def _address_space_limit() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _unused_address_space() -> int:
    usage = Path("/proc/self/statm")
    if not usage.is_file():
        return 0
    mapped, resident = (int(pages) for pages in usage.read_text().split()[:2])
    return (mapped - resident) * os.sysconf("SC_PAGE_SIZE")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision on a device; does nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(precision, device))
