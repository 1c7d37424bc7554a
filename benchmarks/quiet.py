"""Waits for the moments in which a shared machine's neighbours leave it its speed."""

import argparse
import statistics
import subprocess
import time

_SIDE = 2048
_SAMPLES = 15
_TRIES = 40


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --quiet to a benchmark's options."""
    parser.add_argument(
        "--quiet",
        type=float,
        metavar="GFLOPS",
        help="repeat a run unless bfloat16 products reached this rate before and after it",
    )


def output_when_quiet(command: list[str], least: float | None) -> str:
    """What the command prints, run in a moment in which products reach the least rate in GFLOP/s.

    Raises:
        SystemExit: there was no such moment in many tries.
    """
    for _ in range(_TRIES):
        if least is not None and _product_rate() < least:
            time.sleep(1)
            continue
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if least is None or _product_rate() >= least:
            return output
    raise SystemExit(f"bfloat16 products did not stay at {least} GFLOP/s in {_TRIES} tries")


def _product_rate() -> float:
    """GFLOP/s of large bfloat16 products, the median of a few."""
    import torch

    matrix = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / statistics.median(seconds) / 1e9
