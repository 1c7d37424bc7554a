"""Trains, validates and saves for half an hour and watches the memory of all its processes.

python benchmarks/soak.py --minutes 30
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import add_results_option, commit, write_rows

SETTINGS = (
    "train.steps=1000000",
    "train.lr_power=1e-9",
    "train.validate_every=100",
    "train.validate_images=20",
    "train.checkpoint_every=100",
    "data.workers=1",
    "data.cache=false",
)


def family(process: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(below for child in children for below in family(int(child)))]


def proportional_mebibytes(process: int) -> float:
    """Of a process and all below it; what they share counts once."""
    total = 0
    for member in family(process):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    samples: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "danet", "train", "demo", "--out", str(out)]
        command += [f"--set={setting}" for setting in SETTINGS]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            start = time.monotonic()
            while (now := time.monotonic() - start) < 60 * args.minutes:
                time.sleep(5)
                if process.poll() is not None:
                    sys.exit(f"training ended with status {process.returncode}")
                samples.append((now / 60, proportional_mebibytes(process.pid)))
            process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            process.kill()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The first tenth fills caches and the heap.
    settled = [sample for sample in samples if sample[0] >= args.minutes / 10]
    slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    row = {
        "minutes": args.minutes,
        "steps": max(row["step"] for row in rows),
        "validations": sum("val/mIoU" in row for row in rows),
        "first_half_MiB": round(statistics.median(size for _, size in halves[0])),
        "second_half_MiB": round(statistics.median(size for _, size in halves[1])),
        "peak_MiB": round(max(size for _, size in samples)),
        "slope_MiB_per_hour": round(60 * slope, 1),
        "exit_status_after_SIGTERM": status,
        "commit": commit(),
    }
    print(row)
    write_rows(args.results / "soak.csv", [row])


if __name__ == "__main__":
    main()
