"""Ours against mmsegmentation 1.2.2, in its own environment: time and peak memory, side by side.

ResNet-50, random weights. Every measurement is a fresh process; the two alternate. Needs
`make .parity-venv/ready`.

    python benchmarks/mmsegmentation.py prediction --size 512 512
    python benchmarks/mmsegmentation.py training --size 512 512 --batch 2 --rounds 1 --repeats 1
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from quiet import add_option, output_when_quiet
from results_file import RESULTS, commit, renew_rows

ROOT = Path(__file__).parent.parent
PEER = [str(ROOT / ".parity-venv/bin/python"), str(ROOT / "tests/parity/peer"), "time"]
INT8 = "danet int8 (OpenVINO)"
CHECKPOINTED = {
    "danet bf16, early blocks checkpointed": "early",
    "danet bf16, all blocks checkpointed": "true",
}
"""And the value of train.activation_checkpointing."""
RECIPE = "cityscapes_r50_512x1024_40k"


def our_network(args: argparse.Namespace) -> Callable[[], None]:
    """Prediction up to the label map, or a training step."""
    import torch

    from danet.bench.workload import Workload
    from danet.recipes import load_recipe

    checkpointing = CHECKPOINTED.get(args.measure, "false")
    settings = [f"train.activation_checkpointing={checkpointing}"]
    job = Workload(load_recipe(RECIPE, settings), tuple(args.size), args.batch, args.task)
    compile_graph = args.measure == "danet bf16 compiled"
    return job.prepare(
        torch.device("cpu"), bfloat16="bf16" in args.measure, compile_graph=compile_graph
    ).run


def our_exported_network(args: argparse.Namespace) -> Callable[[], None]:
    """A picture to its label map, by an exported file."""
    import numpy as np

    from danet.export.predictor import ExportedPredictor

    predictor = ExportedPredictor(args.file)
    width, height = args.size
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (args.batch, height, width, 3), dtype=np.uint8)
    return lambda: predictor.segment_batch(pictures) and None


def write_int8(path: Path) -> None:
    """The network with random weights as an OpenVINO file whose convolutions are in 8 bit."""
    from export import generated_pictures, random_r50

    from danet.export import export

    export(random_r50(), path, "openvino", generated_pictures(8))


def our_evaluation(args: argparse.Namespace) -> Callable[[], None]:
    """A picture's file and its label's, at six scales and mirrored, to the confusion matrix."""
    import numpy as np
    import torch
    from PIL import Image

    import danet
    from danet.config import PUBLISHED_RATIOS, TestConfig
    from danet.data import dataset_spec
    from danet.evaluation.metrics import confusion_matrix

    classes = dataset_spec("cityscapes").num_classes
    predictor = danet.Predictor(
        danet.DANet(classes, pretrained_backbone=False),
        precision="bf16" if "bf16" in args.measure else "fp32",
        test=TestConfig(ratios=PUBLISHED_RATIOS, flip=True),
    )

    def run() -> None:
        segmentation = predictor(args.image)
        label = torch.from_numpy(np.array(Image.open(args.label)))
        confusion_matrix(label, torch.from_numpy(segmentation.classes), classes)

    return run


def our_augmentation(args: argparse.Namespace) -> Callable[[], None]:
    """A decoded picture and its label to a normalised crop."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import tv_tensors

    from danet.config import DataConfig
    from danet.data.transforms import training_transform

    width, height = args.size
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    blocks = random.integers(0, 19, (-(-height // 64), -(-width // 64)), dtype=np.uint8)
    label = torch.from_numpy(blocks.repeat(64, 0).repeat(64, 1)[:height, :width].copy())
    transform = training_transform(DataConfig(base_size=(width, height), crop_size=args.crop))
    torch.manual_seed(0)
    return lambda: transform(image, tv_tensors.Mask(label)) and None


def measure(args: argparse.Namespace) -> None:
    """Prints the median seconds and the peak bytes above the start; runs in its own process."""
    import torch

    # Loaded before the start is taken, as the peer's are.
    from danet.bench.measure import resident_bytes

    if args.threads:
        torch.set_num_threads(args.threads)
    tasks = {"evaluation": our_evaluation, "augmentation": our_augmentation}
    before = resident_bytes("VmRSS")
    task = tasks.get(args.task, our_exported_network if args.file else our_network)
    run = task(args)
    run()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resident_bytes("VmHWM") - before
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak}))


def forms_of(args: argparse.Namespace) -> list[str]:
    """What is compared: not bfloat16 where it takes hundreds of times as long."""
    from danet.kernels.cpu import onednn_has_bfloat16

    if args.task == "augmentation":
        return ["mmsegmentation", "danet"]
    ours = ["danet fp32", "danet bf16"]
    if args.task == "training":
        ours += CHECKPOINTED
    if args.task in ("prediction", "training") and args.compiled:
        ours.append("danet bf16 compiled")
    if args.task == "prediction" and args.int8:
        ours.append(INT8)
    forms = ["mmsegmentation fp32", "mmsegmentation autocast", *ours]
    return [
        form for form in forms if onednn_has_bfloat16() or form == INT8 or form.endswith("fp32")
    ]


def in_fresh_process(form: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and peak MiB."""
    options = ["--size", *map(str, args.size), "--batch", str(args.batch)]
    options += ["--crop", *map(str, args.crop), "--repeats", str(args.repeats)]
    options += ["--threads", str(args.threads)] if args.threads else []
    options += ["--image", str(args.image), "--label", str(args.label)] if args.image else []
    if form.startswith("mmsegmentation"):
        command = [*PEER, args.task, *options]
        command += ["--autocast"] if form.endswith("autocast") else []
    else:
        options += ["--file", str(args.file)] if form == INT8 else []
        command = [sys.executable, __file__, args.task, *options, "--measure", form]
    output = output_when_quiet(command, args.quiet)
    result = json.loads(output.splitlines()[-1])
    return result["seconds"], result["peak_bytes"] / 2**20


def write_picture(folder: Path, args: argparse.Namespace) -> None:
    """A picture and a label of the size, as files."""
    import numpy as np
    from PIL import Image

    width, height = args.size
    args.image, args.label = folder / "image.png", folder / "label.png"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(args.image)
    Image.fromarray(random.integers(0, 19, (height, width), dtype=np.uint8)).save(args.label)


def compare(args: argparse.Namespace) -> None:
    """Measures all forms in turns and renews their rows in the results."""
    import torch

    from danet.bench.report import hardware

    with tempfile.TemporaryDirectory() as folder:
        if args.task == "evaluation":
            write_picture(Path(folder), args)
        if INT8 in forms_of(args):
            args.file = Path(folder) / "int8.xml"
            write_int8(args.file)
        runs: dict[str, list[tuple[float, float]]] = {form: [] for form in forms_of(args)}
        for _ in range(args.rounds):
            for form, results in runs.items():
                results.append(in_fresh_process(form, args))
                print(form, *results[-1], flush=True)
    rows = []
    for form, results in runs.items():
        row = {"commit": commit(), "task": args.task, "form": form}
        row |= {"width": args.size[0], "height": args.size[1], "batch": args.batch}
        row["seconds"] = f"{statistics.median(seconds for seconds, _ in results):.4g}"
        row["peak_MiB"] = f"{statistics.median(peak for _, peak in results):.0f}"
        row |= {"rounds": args.rounds, "repeats": args.repeats, "torch": torch.__version__}
        rows.append({**row, "hardware": hardware("cpu")})
    renew_rows(args.out, rows, ("task", "form", "width", "height", "batch", "hardware"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["prediction", "evaluation", "training", "augmentation"])
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], help="width, height")
    parser.add_argument("--crop", type=int, nargs=2, default=[1024, 512], help="width, height")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each form")
    parser.add_argument("--repeats", type=int, default=3, help="runs timed in each process")
    add_option(parser)
    parser.add_argument("--threads", type=int, help="torch's default unless given")
    parser.add_argument("--compiled", action="store_true", help="also measure ours compiled")
    parser.add_argument("--int8", action="store_true", help="also measure an exported 8-bit file")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "mmsegmentation.csv",
        help="CSV file whose rows are renewed",
    )
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--label", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    if not Path(PEER[0]).exists():
        parser.error(f"{PEER[0]} is not there; make .parity-venv/ready installs mmsegmentation")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        measure(arguments)
    else:
        compare(arguments)
