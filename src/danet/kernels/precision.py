"""In which precision attention is computed, and torch's settings for that."""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch

from danet.kernels.cpu import onednn_keeps_float32

# Asked once: older compilers cannot trace the question, and would break a graph there, after which
# they compiled in every call.
_AUTOCAST_DEVICES = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "xla", "privateuseone")
    if torch.amp.is_autocast_available(device_type)
)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def least_exponent(dtype: torch.dtype) -> float:
    """The lower bound of scores, minus their row's maximum, before they are exponentiated.

    Its exponential, 1e-19 in float32, adds nothing to a sum of weights that is at least 1. The
    bound keeps denormal numbers away, which some CPUs multiply thirty times more slowly: trained
    networks have scores that far apart, random ones do not.
    """
    return math.log(torch.finfo(dtype).tiny) / 2


class _OneDNNProducts:
    """The setting of the whole process, on while any thread wants it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before = ""

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                inherited = torch.backends.mkldnn.fp32_precision
                before = self._matmul().fp32_precision
                # What was only inherited must not become the operator's own.
                self.before = "none" if before == inherited else before
                self._matmul().fp32_precision = "bf16"
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            # Another value was set by the user meanwhile.
            if self.users == 0 and self._matmul().fp32_precision == "bf16":
                self._matmul().fp32_precision = self.before

    def _matmul(self) -> Any:
        return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


_onednn_products = _OneDNNProducts()


@contextlib.contextmanager
def fast_exact_float32(device: torch.device) -> Iterator[None]:
    """Runs a CPU's float32 products on oneDNN, which is up to twice as fast as MKL on AMD.

    The setting allows bfloat16 products; where oneDNN would take them, nothing is changed.
    """
    # A compiled graph does not hold such settings.
    if torch.compiler.is_compiling() or device.type != "cpu" or not onednn_keeps_float32():
        yield
        return
    with _onednn_products:
        yield


def has_autocast(device_type: str) -> bool:
    """Whether torch has an autocast for a type of device."""
    return device_type in _AUTOCAST_DEVICES


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """For arithmetic that chooses its own dtypes."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
