"""Which arithmetic is fast and exact on this CPU."""

import functools
import platform
from pathlib import Path

import torch


def has_amx() -> bool:
    """Whether there are units for matrices, whose bfloat16 products take an eighth of the time."""
    return _has("amx_tile")


def has_avx2_alone() -> bool:
    """Whether this is an x86 CPU that torch takes to have AVX2 but not AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies float32 exactly even where it may round to bfloat16.

    Its AVX-512 kernels do; its kernels for AMX and for ARM round.
    """
    return platform.machine() in ("x86_64", "AMD64") and not has_amx()


def has_onednn() -> bool:
    """Whether torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 here: not with AVX2 alone.

    Without it products take hundreds of times as long (AVX2: 0.3 against 130 GFLOP/s in float32).
    """
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_bfloat16_fast() -> bool:
    """Whether bfloat16 products are faster than float32 ones here, not merely possible.

    They are with AMX, and with AVX512-BF16 on AMD (900 against 440 GFLOP/s). On an Intel core
    without AMX they are slower (150 against 240 GFLOP/s): it has one unit for them and two for
    float32. Emulated bfloat16 is slower everywhere.
    """
    return has_amx() or (_has("avx512_bf16") and not is_intel())


def _has(instructions: str) -> bool:
    """Whether the CPU has them; False where torch lacks this private function."""
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)())


@functools.cache
def is_intel() -> bool:
    """Whether Intel made the CPU; False where its maker cannot be found out."""
    processors = Path("/proc/cpuinfo")
    name = processors.read_text() if processors.exists() else platform.processor()
    return "GenuineIntel" in name
