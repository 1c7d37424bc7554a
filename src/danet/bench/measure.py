"""Time and peak memory of workloads, each in a process of its own."""

import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from danet.bench.workload import Workload
from danet.devices import is_out_of_memory


class Form(NamedTuple):
    """A way to do the same work; see `Workload.prepare`."""

    name: str
    bfloat16: bool
    materialized: bool = False
    compile_graph: bool = False


class Measurement(NamedTuple):
    """Medians over rounds.

    Attributes:
        seconds: of one run.
        peak_bytes: above what the process held before, weights included.
    """

    seconds: float
    peak_bytes: int


def measure(
    workload: Workload,
    forms: Sequence[Form],
    device: str,
    *,
    rounds: int,
    repeats: int,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, Measurement | None]:
    """Measures the forms in turns; None for one that ran out of memory.

    Args:
        rounds: fresh processes for each form.
        repeats: runs timed in each process, after one that is not.
        on_run: called after each process.
    """
    runs: dict[str, list[tuple[float, int]]] = {form.name: [] for form in forms}
    failed = set()
    for _ in range(rounds):
        for form in forms:
            if form.name in failed:
                on_run()
                continue
            # A process that has used a lot of memory is no measure of the next one's need.
            with ProcessPoolExecutor(
                1,
                mp_context=get_context("spawn"),
                # Ctrl-C ends it without a word.
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_DFL),
            ) as pool:
                try:
                    runs[form.name].append(
                        pool.submit(_measure_once, workload, form, device, repeats).result()
                    )
                except BrokenProcessPool:  # as where the kernel kills a process for memory
                    failed.add(form.name)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed.add(form.name)
            on_run()
    return {
        name: None
        if name in failed
        else Measurement(
            statistics.median(seconds for seconds, _ in of_form),
            int(statistics.median(peak for _, peak in of_form)),
        )
        for name, of_form in runs.items()
    }


def _measure_once(
    workload: Workload, form: Form, device_name: str, repeats: int
) -> tuple[float, int]:
    """Median seconds and peak bytes; runs in its own process."""
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    before = 0 if on_gpu else resident_bytes("VmRSS")
    runner = workload.prepare(
        device,
        bfloat16=form.bfloat16,
        materialized=form.materialized,
        compile_graph=form.compile_graph,
    )
    runner.run()
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        runner.run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident_bytes("VmHWM")
    return statistics.median(seconds), peak - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def resident_bytes(field: str) -> int:
    """VmRSS, what is held now, or VmHWM, the most so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
