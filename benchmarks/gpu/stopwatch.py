"""Time and memory of a call on a device."""

import statistics
import time
from collections.abc import Callable

import torch
import triton

CPU_REPEATS = 3


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of many calls with a cold cache, or on a CPU of a few."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(run, warmup=25, rep=150, return_mode="median"))
    taken = []
    for _ in range(CPU_REPEATS):
        start = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most that a call holds above what was held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of one large square matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device) / 1e9
