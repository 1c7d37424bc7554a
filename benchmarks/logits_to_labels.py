"""Labels of a 2048x1024 picture from logits at stride 8: all logits at full size, and ours.

On noise every class may win everywhere; on areas, as trained networks give, few do. Time is the
median of alternating runs; memory is the peak above the logits, in a process of its own.

    python benchmarks/logits_to_labels.py
"""

import argparse
import statistics
import subprocess
import sys
import time

from results_file import add_results_option, write_rows

SIZE = (1024, 2048)
FORMS = ("full size", "danet")


def measure(form: str, classes: int, kind: str, repeats: int) -> None:
    """Prints the median seconds and the peak bytes; runs in its own process."""
    import torch
    import torch.nn.functional as F

    from danet.bench.measure import resident_bytes
    from danet.evaluation.strips import Resized, Stored, most_likely_classes

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, 128, 256, generator=generator)
    if kind == "areas":
        winners = torch.randint(classes, (1, 8, 16), generator=generator)
        areas = F.one_hot(winners, classes).permute(0, 3, 1, 2) * 20.0
        logits += F.interpolate(areas, size=(128, 256), mode="nearest")

    def run() -> torch.Tensor:
        if form == "danet":
            return most_likely_classes([Resized(Stored(logits), SIZE, align_corners=False)])
        return F.interpolate(logits, size=SIZE, mode="bilinear").argmax(1)

    before = resident_bytes("VmRSS")
    checksum = int(run().long().sum())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), resident_bytes("VmHWM") - before, checksum)


def compare(args: argparse.Namespace) -> None:
    """Measures every case in turns, checks that the labels are the same, writes the results."""
    rows = []
    for classes in (19, 150):
        for kind in ("noise", "areas"):
            runs: dict[str, list[list[float]]] = {form: [] for form in FORMS}
            for _ in range(args.rounds):
                for form in FORMS:
                    command = [sys.executable, __file__, "--measure", form, "--kind", kind]
                    command += ["--classes", str(classes), "--repeats", str(args.repeats)]
                    output = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs[form].append([float(number) for number in output.stdout.split()])
            assert len({run[2] for results in runs.values() for run in results}) == 1
            for form, results in runs.items():
                row = {"classes": classes, "logits": kind, "form": form}
                row["seconds"] = round(statistics.median(run[0] for run in results), 4)
                row["peak_MiB"] = round(statistics.median(run[1] for run in results) / 2**20, 1)
                rows.append(row)
                print(row, flush=True)
    write_rows(args.results / "logits_to_labels.csv", rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each form")
    parser.add_argument("--repeats", type=int, default=5, help="runs timed in each process")
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["noise", "areas"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.classes, arguments.kind, arguments.repeats)
    else:
        compare(arguments)
