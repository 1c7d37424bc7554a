"""The command: parses, calls one function, prints."""

import logging
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danet.errors import (
    ExportDiffers,
    OutOfMemory,
    TrainingDiverged,
    TrainingStopped,
    UserError,
    first_line,
    printable,
)

if TYPE_CHECKING:
    from danet.config import TestConfig
    from danet.data.check import SplitCheck
    from danet.evaluation.evaluate import Evaluation
    from danet.processes import Share

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Scene segmentation with dual attention networks.",
)
data_app = typer.Typer(no_args_is_help=True, help="Datasets.")
app.add_typer(data_app, name="data")

Model = Annotated[str, typer.Argument(help="A model folder, a run folder, or a hub id.")]
Recipe = Annotated[str, typer.Argument(help="A built-in recipe (danet recipes) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's key.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network first: pays for many pictures.")
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/RECIPE unless given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in it.")] = False,
) -> None:
    """Train a network by a recipe."""
    from danet.config import load_recipe
    from danet.training.loop import train as run_training

    folder = Path("runs") / Path(recipe).stem if out is None else out
    config = load_recipe(recipe, overrides or ())
    try:
        run = run_training(config, folder, resume)
    except OutOfMemory as error:
        problem = str(error)
    else:
        print(f"model: {run.model}")
        return
    # Only here, where the error no longer keeps the tensors that filled the memory.
    from danet.bench.cost import advise_after_running_out
    from danet.processes import Share

    processes = max(config.train.devices, Share.from_environment().processes)
    raise OutOfMemory(f"{problem}; {advise_after_running_out(config, processes)}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Dataset; the model's own unless given.")] = None,
    root: Annotated[Path | None, typer.Option(help="The folder of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    mode: Annotated[str | None, typer.Option(help="whole or slide.")] = None,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="Average over the six published scales.")
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")] = False,
    branches: Annotated[
        bool, typer.Option("--branches", help="Score each branch's classifier too.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the scores.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML report with pictures.")
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write label files as the dataset's server takes them."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Score a model on a dataset by the published protocol. torchrun shares the work."""
    from danet.data import open_dataset
    from danet.evaluation import evaluate as evaluation
    from danet.evaluation.submission import submission_writer
    from danet.predict import Predictor
    from danet.processes import Share
    from danet.progress import ProgressReport
    from danet.training.checkpoint import RunFolder

    _check_precision(precision)
    share = Share.from_environment()
    predictor = Predictor(model, _own_device(device, share), precision, compile_graph=compile_graph)
    test = _changed_test(predictor.test, mode, multi_scale, flip)
    run = RunFolder(Path(model))
    name, folder = _dataset_of(predictor.model.metadata.dataset, run, data, root)
    dataset = open_dataset(name, folder, split)
    write = None if submission is None else submission_writer(name, submission)
    wanted = evaluation.available_branches(predictor.model) if branches else ("fused",)
    own = share.positions(len(dataset))
    title = f"evaluate {name} {split}"
    with share.connected(), ProgressReport(title, len(own), enabled=share.rank == 0) as progress:
        found = evaluation.evaluate(
            predictor.model,
            dataset,
            test,
            precision=precision,
            branches=wanted,
            indices=own,
            on_picture=progress.advance,
            write_prediction=write,
        )
        result = evaluation.merge(share.gather(found))
    if share.rank > 0:
        return
    _print_scores(result)
    if json_file is not None:
        protocol = {"dataset": name, "split": split, "test": test.model_dump(mode="json")}
        evaluation.write_json(json_file, {**evaluation.scores_as_json(result), **protocol})
    if report is not None:
        from danet.evaluation.report import write_report

        facts = {
            "Model": model,
            "Backbone": predictor.model.config.backbone,
            "Dataset": f"{name}, {split}, {len(dataset)} pictures",
            "Protocol": _describe(test),
        }
        write_report(
            report,
            title=f"danet on {name} {split}",
            spec=dataset.spec,
            confusion=result.confusion["fused"],
            branch_mean_iou={b: result.scores(b).mean_iou for b in result.confusion},
            cases=evaluation.report_cases(
                predictor.model, dataset, test, result.pictures, precision=precision
            ),
            history=run.read_metrics(),
            facts=facts,
        )
        print(f"report: {report}")


@app.command()
def predict(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Pictures, films, folders, globs, tars, @LIST."),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the results.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write the picture with the classes over it.")
    ] = False,
    frame_masks: Annotated[
        bool,
        typer.Option("--frame-masks", help="Of films with --overlay, write each frame's mask too."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first broken file.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Segment photos and films: a palette PNG of class ids for each picture, at its own size.

    Of a film, --overlay writes a film with the classes over it instead of its frames' masks. Tar
    archives are read as they are; @LIST is a file that names inputs, a line each. Every picture
    gets a line in manifest.jsonl, and a rerun passes over what is done. torchrun shares the work.
    """
    from danet.atomic import require_writable
    from danet.bulk import segment_inputs
    from danet.inputs import find_inputs
    from danet.predict import Predictor
    from danet.processes import Share
    from danet.progress import ProgressReport

    _check_precision(precision)
    paths, problems = find_inputs(inputs, out)
    if strict and problems:
        raise UserError(problems[0])
    require_writable(out)
    share = Share.from_environment()
    frames: Counter[Path] = Counter()
    written = before = seen = 0
    with ProgressReport("predict", len(share.positions(len(paths)))) as progress:

        def show_frame(film: Path, announced: int) -> None:
            frames[film] += 1
            progress.advance(f"{film.name}: frame {frames[film]}/{announced}", steps=0)

        for problem in problems:
            progress.say(f"error: {problem}")
        if paths:
            model_device = _own_device(device, share)
            outcomes = segment_inputs(
                Predictor(model, model_device, precision, compile_graph=compile_graph),
                paths,
                out,
                overlay=overlay,
                frame_masks=frame_masks,
                share=share,
                on_frame=show_frame,
            )
            for outcome in outcomes:
                seen += 1
                written += outcome.written
                before += not outcome.written and outcome.error is None
                progress.advance()
                if outcome.error is not None:
                    problems.append(outcome.error)
                    progress.say(f"error: {outcome.error}")
                    if strict:
                        raise UserError(outcome.error)
    earlier = f", {before} were before" if before else ""
    print(f"{written} of {seen} pictures and films segmented in {out}{earlier}")
    if problems:
        raise typer.Exit(2)


def _own_device(device: str, share: "Share") -> str:
    from danet.devices import local_device

    return local_device() if device == "auto" and share.processes > 1 else device


@app.command()
def explain(
    model: Model,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    point: Annotated[
        str, typer.Option(metavar="X,Y", help="A pixel of it, from the upper left corner.")
    ],
    out: Annotated[Path, typer.Option(help="The figure: .png, .svg or .pdf.")],
    arrays: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the arrays, as .npz.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Draw what attention looks at: from one pixel, from all, in the channels; and the branches."""
    from danet.data.images import open_image
    from danet.explanation import explain as explain_image
    from danet.figure import check_figure_path
    from danet.predict import Predictor

    _check_precision(precision)
    pixel = _parse_point(point)
    check_figure_path(out)
    picture = open_image(image)
    predictor = Predictor(model, device, precision)
    _note_protocol(predictor.test)
    explanation = explain_image(predictor, picture, pixel)
    explanation.save(out)
    if arrays is not None:
        explanation.save_arrays(arrays)
    name = explanation.class_names[explanation.score.class_id]
    print(f"pixel {point}: {name} ({100 * explanation.score.probability:.0f} %); figure: {out}")


def _note_protocol(test: "TestConfig") -> None:
    """Says where a picture is looked at in another way than `danet predict` segments it."""
    if test.mode == "slide" or test.flip or len(test.ratios) > 1:
        print(
            "note: the model is tested with sliding windows, several scales or mirrored; here "
            "pictures are taken whole, at one scale",
            file=sys.stderr,
        )


def _parse_point(text: str) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        raise UserError(f"--point {text}: write X,Y in pixels, such as 240,180")
    return int(sides[0]), int(sides[1])


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 7860,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name that visitors use, as behind a proxy."),
    ] = None,
    megabytes: Annotated[int, typer.Option(min=1, help="Of one file, at most.")] = 20,
    megapixels: Annotated[int, typer.Option(min=1, help="Of one picture, at most.")] = 12,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve a web page that segments pictures and shows attention, and an HTTP interface."""
    from danet.predict import Predictor

    _check_precision(precision)
    try:
        from danet.web.server import serve as serve_forever
    except ModuleNotFoundError as error:
        raise UserError(f"danet serve needs {error.name}: pip install 'danet[web]'") from error
    from danet.web.studio import Limits

    limits = Limits(megabytes=megabytes, megapixels=megapixels)
    predictor = Predictor(model, device, precision)
    _note_protocol(predictor.test)
    serve_forever(predictor, host, port, limits, names=host_name or (), open_browser=open_browser)


@app.command()
def export(
    model: Model,
    file_format: Annotated[str, typer.Option("--format", help="onnx, torch or openvino.")],
    out: Annotated[Path, typer.Option(help="The file: .onnx, .pt2 or .xml.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit convolutions; onnx and openvino only.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT", help="Typical pictures for --int8: files, folders, globs."),
    ] = None,
) -> None:
    """Write the network as one file for other programs, checked against the model."""
    from danet.export import CHECKED_SIZES, calibration_pictures, check_format
    from danet.export import export as export_model
    from danet.model import DANet

    chosen = check_format(file_format, out)
    if int8 != bool(calibration):
        raise UserError("--int8 goes with --calibration INPUT: some typical pictures, 20 or more")
    pictures = calibration_pictures(calibration) if calibration else None
    network = DANet.from_pretrained(model)
    _note_protocol(network.metadata.test)
    agreement = export_model(network, out, chosen, pictures)
    on = f"{len(CHECKED_SIZES)} sizes" if pictures is None else f"{len(pictures)} pictures"
    print(
        f"{out}: on {on} the same class as the model on {agreement.same_class:.2%} of pixels, "
        f"logits within {agreement.difference:.2g} of the largest"
    )


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Of mmsegmentation or of the authors.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    data: Annotated[
        str | None, typer.Option(help="The dataset whose classes it has, if it names none.")
    ] = None,
) -> None:
    """Turn another code base's checkpoint into a model folder."""
    from danet.atomic import require_writable
    from danet.data import dataset_spec
    from danet.interop.convert import convert as convert_checkpoint

    model = convert_checkpoint(checkpoint, None if data is None else dataset_spec(data))
    require_writable(out)
    model.save_pretrained(out)
    print(f"model: {out} ({model.config.backbone}, {len(model.metadata.classes)} classes)")


@app.command()
def recipes() -> None:
    """List the built-in recipes with their published and measured scores."""
    from rich.console import Console
    from rich.table import Table

    from danet.config import recipe_header, recipe_names

    table = Table("recipe", "what it is", "published", "measured", box=None)
    table.columns[0].no_wrap = True
    for name in recipe_names():
        table.add_row(name, *recipe_header(name))
    Console().print(table)


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with everything it extends resolved, as YAML."""
    from danet.config import load_recipe

    print(load_recipe(recipe, overrides or ()).to_yaml(), end="")


@app.command()
def bench(
    recipe: Recipe = "cityscapes_r50_512x1024_40k",
    overrides: Overrides = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="Of the pictures; the recipe's crop unless given."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    train: Annotated[
        bool, typer.Option("--train", help="Measure training steps instead of prediction.")
    ] = False,
    peer: Annotated[
        bool, typer.Option("--peer", help="Also measure the eager form that holds N x N.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only say what batch fits the memory, without running."),
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB that --estimate may fill; the device's unless given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes for each form.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs in each process.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Measure parameters, operations, memory and speed of a recipe's network."""
    from danet.bench import report
    from danet.bench.workload import Workload
    from danet.config import load_recipe
    from danet.devices import choose_device, memory_limit, uses_bfloat16
    from danet.evaluation.evaluate import write_json

    _check_precision(precision)
    chosen = choose_device(device)
    bfloat16 = uses_bfloat16(precision, chosen)
    config = load_recipe(recipe, overrides or ())
    sizes = [_parse_size(text) for text in size or ()] or [config.data.crop_size]
    workloads = [
        Workload(config, pixels, batch, "training" if train else "prediction") for pixels in sizes
    ]
    if estimate:
        limit = memory_limit(chosen) if memory is None else int(memory * 2**30)
        limits = report.estimate_limits(workloads, str(chosen), bfloat16=bfloat16, limit=limit)
        report.print_limits(limits, limit)
        found: dict[str, Any] = report.limits_as_json(limits, limit)
    else:
        forms = report.forms_to_measure(bfloat16=bfloat16, compile_graph=compile_graph, peer=peer)
        results = []
        for workload in workloads:
            results.append(
                report.benchmark(workload, forms, str(chosen), rounds=rounds, repeats=repeats)
            )
            report.print_benchmark(results[-1])
        found = {"results": results}
    if json_file is not None:
        write_json(json_file, {"recipe": recipe, **found})


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side) <= 65_536 for side in sides):
        raise UserError(f"--size {text}: write WIDTHxHEIGHT in pixels, such as 1024x512")
    return int(sides[0]), int(sides[1])


@data_app.command("list")
def data_list() -> None:
    """List the datasets."""
    from danet.data import dataset_names

    print("\n".join(dataset_names()))


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="A dataset; danet data list names them.")],
    root: Annotated[Path, typer.Argument(help="Its folder.")],
) -> None:
    """Read every image and label, and say what training would fail on."""
    from danet.data import dataset_spec, open_dataset, splits_of
    from danet.data.check import check_pictures, summarize
    from danet.progress import ProgressReport

    spec = dataset_spec(name, root)
    checks: dict[str, SplitCheck] = {}
    fails = False
    for split, official in splits_of(name, root).items():
        try:
            dataset = open_dataset(name, root, split)
        except UserError as error:
            needed = split in ("train", "val")
            fails |= needed
            kind = "error" if needed else "note"
            print(printable(f"{kind}: {split}: {error}"), file=sys.stderr)
            continue
        with ProgressReport(f"check {name} {split}", len(dataset)) as progress:
            checks[split] = check_pictures(dataset, progress.advance)
        expected = "" if official in (None, len(dataset)) else f", officially {official}"
        print(f"{split}: {len(dataset)} pictures{expected}")
        for line in summarize(checks[split].findings):
            fails = True
            print(printable(f"error: {split}: {line}"), file=sys.stderr)
    _print_frequencies(spec.classes, checks)
    if fails:
        raise typer.Exit(2)


def _print_frequencies(classes: tuple[str, ...], checks: "dict[str, SplitCheck]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("share of pixels", *checks, box=None)
    for index, label in enumerate((*classes, "ignored")):
        shares = (check.pixels[index] / max(check.pixels.sum(), 1) for check in checks.values())
        table.add_row(label, *(f"{share:.4f}" for share in shares))
    Console().print(table)


def _check_precision(precision: str) -> None:
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {precision}: use auto, fp32 or bf16")


def _changed_test(
    test: "TestConfig", mode: str | None, multi_scale: bool, flip: bool
) -> "TestConfig":
    from danet.config import PUBLISHED_RATIOS

    if mode not in (None, "whole", "slide"):
        raise UserError(f"--mode {mode}: use whole or slide")
    changes: dict[str, Any] = {} if mode is None else {"mode": mode}
    if multi_scale:
        changes["ratios"] = PUBLISHED_RATIOS
    if flip:
        changes["flip"] = True
    return test.model_copy(update=changes)


def _dataset_of(
    trained_on: str | None, run: Any, data: str | None, root: Path | None
) -> tuple[str, Path | None]:
    """The dataset to score on and its folder, from the options or else from the run's recipe."""
    from danet.config import load_recipe

    name = data or trained_on
    if name is None:
        raise UserError("the model does not say what it was trained on; give --data NAME")
    if root is None and run.recipe.is_file():
        trained_with = load_recipe(run.recipe).data
        root = trained_with.root if trained_with.name == name else None
    return name, root


def _describe(test: "TestConfig") -> str:
    parts = [test.mode if test.mode == "whole" else f"slide {test.window} by {test.stride}"]
    parts.append(f"scales {', '.join(f'{ratio:g}' for ratio in test.ratios)}")
    parts += ["flip"] if test.flip else []
    return ", ".join(parts)


def _print_scores(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    fused = result.scores()
    table = Table("class", "IoU", "accuracy", box=None)
    for name, score in zip(result.spec.classes, fused.per_class, strict=True):
        table.add_row(name, f"{score.iou:.4f}", f"{score.accuracy:.4f}")
    console = Console()
    console.print(table)
    for branch in result.confusion:
        console.print(f"{branch}: mIoU {result.scores(branch).mean_iou:.4f}", highlight=False)
    console.print(
        f"mAcc {fused.mean_accuracy:.4f}  aAcc {fused.overall_accuracy:.4f}  "
        f"{len(result.pictures)} pictures",
        highlight=False,
    )


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(error, 2)
    except (TrainingDiverged, TrainingStopped, ExportDiffers, OutOfMemory) as error:
        _fail(error, 1)
    except (RuntimeError, MemoryError) as error:
        from danet.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "let this process have more, or use smaller pictures or --precision bf16"
        _fail(OutOfMemory(f"out of memory ({first_line(error)}); {advice}"), 1)


def _fail(error: Exception, status: int) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(status)
