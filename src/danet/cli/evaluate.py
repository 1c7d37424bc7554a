"""danet evaluate."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danet.choices import TestMode
from danet.cli.options import (
    Compile,
    Device,
    ModelOrFile,
    Precision,
    folder_option,
    open_exported,
    own_device,
    say_on_stderr,
)
from danet.errors import UserError, printable

if TYPE_CHECKING:
    from danet.evaluation.evaluate import Evaluation


def evaluate(
    model: ModelOrFile,
    data: Annotated[str | None, typer.Option(help="Dataset; the model's own unless given.")] = None,
    root: Annotated[
        Path | None, folder_option("The dataset's folder; the run's own unless given.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    mode: Annotated[
        TestMode | None, typer.Option(help="Whole pictures or sliding windows.")
    ] = None,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="Average over the six published scales.")
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="test.KEY=VALUE",
            help="Change the test: test.window=[769,769].",
        ),
    ] = None,
    branches: Annotated[
        bool, typer.Option("--branches", help="Score each branch's classifier too.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML report with pictures.")
    ] = None,
    submission: Annotated[
        Path | None,
        folder_option("Write label files as the dataset's server takes them."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Score a model on a dataset by the published protocol. torchrun shares the work.

    An exported .onnx or .xml file is scored as it predicts: whole pictures at its own scale.
    """
    from danet.atomic import require_writable_files, write_json
    from danet.evaluation.run import evaluate_model
    from danet.model_folder import files_of
    from danet.predict import Predictor
    from danet.processes import Share
    from danet.progress import ProgressReport

    share = Share.from_environment()
    speaks = share.rank == 0
    if speaks:
        require_writable_files(json_file, report, sources=files_of(model))
    exported = open_exported(model, device, precision, compile_graph=compile_graph)
    subject = (
        exported
        or Predictor(model, own_device(device, share), precision, compile_graph=compile_graph).model
    )
    result = evaluate_model(
        subject,
        data,
        root,
        split,
        mode=mode,
        multi_scale=multi_scale,
        flip=flip,
        settings=dict(map(_test_setting, overrides or ())),
        branches=branches,
        precision=precision,
        run=model,
        submission=submission,
        share=share,
        progress=partial(ProgressReport, enabled=speaks),
        say=say_on_stderr if speaks else lambda _: None,
    )
    if not speaks:
        return
    if json_file is not None:
        write_json(json_file, result.to_json())
    _print_scores(result.evaluation)
    print(f"protocol: {result.facts['Protocol']}")
    if report is not None:
        result.write_report(report, model)
    for what, where in (("label files", submission), ("report", report)):
        if where is not None:
            print(f"{what}: {where}")


def _test_setting(override: str) -> tuple[str, Any]:
    from danet.recipes import parse_override

    section, key, value = parse_override(override)
    if section != "test":
        raise UserError(f"--set {override}: only the test can be changed, test.KEY=VALUE")
    return key, value


def _print_scores(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not result.confusion["fused"].any():
        print(f"no scores, because no pixel is labelled  {len(result.pictures)} pictures")
        return
    fused = result.scores()
    table = Table("class", "IoU", "accuracy", box=None)
    for name, score in zip(result.spec.classes, fused.per_class, strict=True):
        table.add_row(Text(printable(name)), f"{score.iou:.4f}", f"{score.accuracy:.4f}")
    console = Console()
    console.print(table)
    for branch in result.confusion:
        console.print(f"{branch}: mIoU {result.scores(branch).mean_iou:.4f}", highlight=False)
    console.print(
        f"mAcc {fused.mean_accuracy:.4f}  aAcc {fused.overall_accuracy:.4f}  "
        f"{len(result.pictures)} pictures",
        highlight=False,
    )
