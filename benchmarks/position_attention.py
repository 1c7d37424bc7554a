"""Position attention against the public implementations' forms, which hold N x N: time and memory.

Every measurement is a fresh process; the forms alternate. Memory is the growth of
the process's peak above what it held with its inputs in place (inputs and their gradients: 0.19
GB at N = 32768 in bfloat16).

    python benchmarks/position_attention.py --positions 9409 --dtype bfloat16 --rounds 5
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quiet import add_option, output_when_quiet
from results_file import RESULTS, commit, renew_rows

KEY_CHANNELS, CHANNELS = 64, 512
FORMS = ("danet", "authors", "mmsegmentation")


def mmsegmentation(query: Any, key: Any, value: Any) -> Any:
    """As mmsegmentation's SelfAttentionBlock does: copies instead, so that nothing is."""
    attention = (query.transpose(1, 2).contiguous() @ key).softmax(-1)
    return (attention @ value.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()


def measure(form: str, positions: int, dtype: str, direction: str, repeats: int) -> None:
    """Prints the median seconds and the extra bytes of one form; runs in its own process."""
    import torch

    from danet.bench.measure import resident_bytes
    from danet.bench.workload import materialized_position_attention
    from danet.functional import position_attention

    forms: dict[str, Callable[..., Any]] = {
        "danet": position_attention,
        "authors": materialized_position_attention,
        "mmsegmentation": mmsegmentation,
    }
    attend = forms[form]
    backward = direction == "forward+backward"

    def inputs(count: int) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(1, width, count, generator=generator)
            .mul(0.3)
            .to(getattr(torch, dtype))
            .requires_grad_(backward)
            for width in (KEY_CHANNELS, KEY_CHANNELS, CHANNELS)
        ]

    def step(tensors: list[Any], grad: Any) -> None:
        output = attend(*tensors)
        if backward:
            output.backward(grad)

    small = inputs(256)
    step(small, torch.zeros_like(small[2]))
    tensors = inputs(positions)
    grad = torch.ones_like(tensors[2])
    for tensor in tensors if backward else ():
        tensor.grad = torch.zeros_like(tensor)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmHWM")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(tensors, grad)
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), resident_bytes("VmHWM") - before)


def in_fresh_process(form: str, args: argparse.Namespace, positions: int) -> tuple[float, int]:
    command = [sys.executable, __file__, "--measure", form, "--positions", str(positions)]
    command += ["--dtype", args.dtype, "--direction", args.direction]
    command += ["--repeats", str(args.repeats)]
    output = output_when_quiet(command, args.quiet)
    seconds, extra = output.split()
    return float(seconds), int(extra)


def compare(args: argparse.Namespace) -> None:
    import torch

    from danet.bench.report import hardware

    forms = FORMS if args.peer else FORMS[:1]
    rows = []
    for positions in args.positions:
        runs: dict[str, list[tuple[float, int]]] = {form: [] for form in forms}
        for _ in range(args.rounds):
            for form in forms:
                runs[form].append(in_fresh_process(form, args, positions))
        for form in forms:
            seconds = statistics.median(run[0] for run in runs[form])
            extra = statistics.median(run[1] for run in runs[form])
            row = {
                "commit": commit(),
                "form": form,
                "positions": positions,
                "dtype": args.dtype,
                "direction": args.direction,
                "seconds": round(seconds, 4),
                "extra_MiB": round(extra / 2**20, 1),
                "rounds": args.rounds,
                "torch": torch.__version__,
                "hardware": hardware("cpu"),
            }
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.out is not None:
        renew_rows(args.out, rows, ("form", "positions", "dtype", "direction", "hardware"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[4096, 9409])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--direction", choices=["forward", "forward+backward"], default="forward+backward"
    )
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each form")
    parser.add_argument("--repeats", type=int, default=3, help="calls timed in each process")
    add_option(parser)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="measure ours only")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "position_attention.csv",
        help="CSV file whose rows are renewed",
    )
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        measure(
            arguments.measure,
            arguments.positions[0],
            arguments.dtype,
            arguments.direction,
            arguments.repeats,
        )
    else:
        compare(arguments)
