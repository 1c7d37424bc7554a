"""Exported files in their own engines: agreement with the model, size, time and memory.

Each file runs in a process of its own that does not import torch, but for the torch program.

    python benchmarks/export.py street-small --sizes 480x360 2048x1024
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from results_file import add_results_option, commit, renew_rows

if TYPE_CHECKING:
    from torch import Tensor

    from danet import DANet

FORMS = {
    "torch": ("torch", False),
    "onnx": ("onnx", False),
    "onnx int8": ("onnx", True),
    "openvino": ("openvino", False),
    "openvino int8": ("openvino", True),
}
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}


def measure(path: Path, engine: str, width: int, height: int, repeats: int) -> None:
    """Prints the median seconds and the peak memory in MiB; runs in its own process."""
    import statistics

    import numpy as np

    if engine == "torch":
        import torch

        module = torch.export.load(path).module()

        def run(images: np.ndarray) -> object:
            return module(torch.from_numpy(images))
    elif engine == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(images: np.ndarray) -> object:
            return session.run(["logits"], {"images": images})
    else:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(images: np.ndarray) -> object:
            return compiled({"images": images})["logits"]

    images = np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)
    run(images)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - start)
    # Read here, for importing danet's own reader would add torch to what is measured.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([statistics.median(seconds), peak / 1024]))


def random_r50() -> "DANet":
    """ResNet-50 with random weights and Cityscapes' number of classes."""
    import torch

    import danet

    torch.manual_seed(0)
    return danet.DANet(19, "resnet50c", pretrained_backbone=False).eval()


def generated_pictures(count: int) -> list["Tensor"]:
    """Scenes to calibrate 8-bit convolutions on, float32 3 H W in 0..1."""
    import numpy as np
    import torch

    from danet.data.scenes import render

    return [
        torch.from_numpy(np.array(render(2, index)[0])).permute(2, 0, 1).float() / 255
        for index in range(count)
    ]


def main(args: argparse.Namespace) -> None:
    """Exports in every form and measures each."""
    import danet
    from danet.bench.report import hardware
    from danet.export import export

    random = args.model == "random R50"
    model = random_r50() if random else danet.DANet.from_pretrained(args.model)
    pictures = generated_pictures(16)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form in args.forms:
            engine, int8 = FORMS[form]
            path = Path(folder) / f"{form.replace(' ', '_')}{SUFFIXES[engine]}"
            agreement = export(model, path, engine, pictures if int8 else None)
            files = [path, path.with_suffix(".bin")]
            megabytes = sum(file.stat().st_size for file in files if file.exists()) / 1e6
            for size in args.sizes:
                width, height = map(int, size.split("x"))
                command = [sys.executable, __file__, args.model, "--measure", str(path), engine]
                command += ["--sizes", size, "--repeats", str(args.repeats)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                row = {"commit": commit(), "model": args.model, "form": form}
                row |= {"width": width, "height": height, "file_MB": round(megabytes, 1)}
                row |= {"difference": f"{agreement.difference:.1e}"}
                row |= {"same_class": f"{agreement.same_class:.4f}"}
                row |= {"seconds": round(seconds, 4), "peak_MiB": round(peak)}
                rows.append({**row, "hardware": hardware("cpu")})
                print(rows[-1], flush=True)
    renew_rows(args.results / "export.csv", rows, ("model", "form", "width", "height", "hardware"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("model", help='a model, or "random R50"')
    parser.add_argument("--sizes", nargs="+", default=["480x360"], help="WIDTHxHEIGHT")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        file, engine_name = arguments.measure
        sides = map(int, arguments.sizes[0].split("x"))
        measure(Path(file), engine_name, *sides, arguments.repeats)
    else:
        main(arguments)
