"""The whole network on a GPU beside the eager form that holds N x N, as the public code does.

    PYTHONPATH=src python benchmarks/gpu/network.py --out FOLDER
    PYTHONPATH=src python benchmarks/gpu/network.py --tiny --out FOLDER  # on a CPU

Prediction of whole pictures, with and without label maps, and training steps, on random pictures
with random weights. Forms take turns on the same device in one process. Writes network.csv, row by
row, and with --profile profile.txt: the kernels that a large picture's logits spend time in.
"""

import argparse
import datetime
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1]))
from results_file import append_rows

from danet.bench.workload import Runner, Workload
from danet.config import Size
from danet.model import DANet
from danet.recipes import load_recipe

FORMS: dict[str, dict[str, bool]] = {
    "eager, N x N": {"bfloat16": False, "materialized": True},
    "eager, N x N, autocast": {"bfloat16": True, "materialized": True},
    "danet": {"bfloat16": True},
    "danet, compiled": {"bfloat16": True, "compile_graph": True},
    "eager, N x N, no TF32": {"bfloat16": False, "materialized": True},
}
RECIPES = {
    "resnet50c": "cityscapes_r50_512x1024_40k",
    "resnet101c": "cityscapes_r101_512x1024_40k",
}


class Case(NamedTuple):
    """What is measured; sizes are width, height."""

    mode: str
    backbone: str
    batch: int
    size: Size
    compiled: bool

    def workload(self, tiny: bool) -> Workload:
        name = "demo" if tiny else RECIPES[self.backbone]
        mode = "training" if self.mode == "training step" else "prediction"
        return Workload(load_recipe(name), self.size, self.batch, mode)


CASES = [
    Case("logits", "resnet50c", 1, (2048, 1024), True),
    Case("label maps", "resnet50c", 1, (2048, 1024), True),
    Case("training step", "resnet50c", 2, (1024, 512), True),
    Case("training step", "resnet50c", 2, (769, 769), False),
    Case("training step", "resnet50c", 4, (512, 512), False),
    Case("label maps", "resnet50c", 1, (512, 512), False),
    Case("label maps", "resnet101c", 1, (2048, 1024), False),
    Case("training step", "resnet101c", 2, (769, 769), False),
]
TINY_CASES = [
    Case("logits", "resnet50c", 1, (64, 64), False),
    Case("label maps", "resnet50c", 1, (64, 64), False),
    Case("training step", "resnet50c", 2, (64, 64), False),
]


def prepare(case: Case, form: str, device: torch.device, tiny: bool) -> Runner:
    """The form, ready to run."""
    torch._dynamo.reset()
    # PyTorch lets convolutions of float32 round to TF32, unless told not to.
    torch.backends.cudnn.allow_tf32 = "no TF32" not in form
    to_labels = case.mode != "logits"
    return case.workload(tiny).prepare(device, **FORMS[form], to_labels=to_labels)


def measured(
    case: Case, form: str, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Median milliseconds of a run and peak GiB, weights included; or why there are none."""
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    try:
        runner = prepare(case, form, device, args.tiny)
        for _ in range(args.warmup):
            runner.run()
        _synchronize(device)
        if on_gpu:  # what trying algorithms out took is no part of a step
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(args.repeats):
            _synchronize(device)
            start = time.perf_counter()
            runner.run()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        if args.profile and form == "danet, compiled" and case.mode == "logits":
            profile(runner, args.out / "profile.txt")
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except Exception as error:  # the other forms are still to be measured
        return {"note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    taken = statistics.median(seconds)
    return {
        "milliseconds": f"{1000 * taken:.2f}",
        "images_per_second": f"{case.batch / taken:.2f}",
        "peak_GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else "",
        "weights_norm": weights_norm(runner.model),
    }


def weights_norm(model: DANet) -> str:
    """By which forms that train alike can be told from one that does not."""
    squares = [parameter.detach().double().square().sum() for parameter in model.parameters()]
    return f"{float(torch.stack(squares).sum().sqrt()):.5g}"


def profile(runner: Runner, path: Path) -> None:
    """Writes what the GPU does in a run."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        runner.run()
        torch.cuda.synchronize()
    table = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
    )
    path.write_text(table, encoding="utf-8")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--cases", type=int, nargs="+", help="which of the list; all if left out")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--minutes", type=float, default=9, help="start nothing after that")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help="only fill torch's cache")
    parser.add_argument("--fixed-algorithms", action="store_true", help="let cuDNN try none out")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    # As mmsegmentation's configurations have it.
    torch.backends.cudnn.benchmark = not args.fixed_algorithms
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    cases = TINY_CASES if args.tiny else CASES
    for case in cases if args.cases is None else [cases[index] for index in args.cases]:
        for form in args.forms:
            compiles = FORMS[form].get("compile_graph", False)
            # The eager form always goes on to the label maps.
            left_out = case.mode == "logits" and FORMS[form].get("materialized", False)
            left_out |= "no TF32" in form and case != CASES[1]
            if left_out or (compiles and not case.compiled) or time.monotonic() > deadline:
                continue
            if args.compile_only:
                prepare(case, form, device, args.tiny).compute()
                continue
            row = {
                "mode": case.mode,
                "backbone": case.backbone,
                "batch": case.batch,
                "size": "x".join(map(str, case.size)),
                "form": form,
                "milliseconds": "",
                "images_per_second": "",
                "peak_GiB": "",
                "weights_norm": "",
                "note": "",
                **measured(case, form, device, args),
                "trying_algorithms": not args.fixed_algorithms,
                "hardware": hardware,
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
            append_rows(args.out / "network.csv", [row])
            print("  ".join(map(str, list(row.values())[:10])), flush=True)


if __name__ == "__main__":
    main()
