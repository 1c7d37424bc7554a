"""danet evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from danet.choices import TestMode
from danet.cli.options import (
    Compile,
    Device,
    ModelOrFile,
    Precision,
    open_exported,
    own_device,
    say_on_stderr,
)
from danet.errors import UserError

if TYPE_CHECKING:
    from danet.config import TestConfig
    from danet.evaluation.evaluate import Evaluation, Segment
    from danet.export.predictor import ExportedPredictor
    from danet.heads import Branch
    from danet.model_folder import Metadata
    from danet.predict import Predictor


def evaluate(
    model: ModelOrFile,
    data: Annotated[str | None, typer.Option(help="Dataset; the model's own unless given.")] = None,
    root: Annotated[Path | None, typer.Option(help="The folder of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    mode: Annotated[TestMode | None, typer.Option(help="whole or slide.")] = None,
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
    """Score a model on a dataset by the published protocol. torchrun shares the work.

    An exported .onnx or .xml file is scored as it predicts: whole pictures at its own scale.
    """
    from danet.atomic import require_writable_files, write_json
    from danet.data import open_dataset
    from danet.evaluation import evaluate as evaluation
    from danet.evaluation.submission import submission_writer
    from danet.predict import Predictor
    from danet.processes import Share
    from danet.progress import ProgressReport
    from danet.training.checkpoint import RunFolder

    share = Share.from_environment()
    if share.rank == 0:
        require_writable_files(json_file, report)
    exported = open_exported(model, device, precision, compile_graph=compile_graph)
    if exported is None:
        device = own_device(device, share)
        predictor = Predictor(model, device, precision, compile_graph=compile_graph)
        subject = _network_subject(predictor, precision, mode, multi_scale, flip, branches)
    else:
        subject = _exported_subject(exported, mode, multi_scale, flip, branches)
    run = RunFolder(Path(model))
    name, folder = _dataset_of(subject.metadata.dataset, run, data, root)
    dataset = open_dataset(name, folder, split)
    evaluation.check_classes(
        subject.metadata, dataset.spec, say_on_stderr if share.rank == 0 else lambda _: None
    )
    write = None if submission is None else submission_writer(name, submission)
    own = share.positions(len(dataset))
    title = f"evaluate {name} {split}"
    with share.connected(), ProgressReport(title, len(own), enabled=share.rank == 0) as progress:
        found = evaluation.evaluate(
            subject.segment,
            dataset,
            branches=subject.branches,
            indices=own,
            on_picture=progress.advance,
            write_prediction=write,
        )
        result = evaluation.merge(share.gather(found))
    if share.rank > 0:
        return
    if json_file is not None:
        protocol = {"dataset": name, "split": split, "test": subject.test}
        write_json(json_file, {**evaluation.scores_as_json(result), **protocol})
    if report is not None:
        from danet.evaluation.report import write_report

        facts = {
            "Model": model,
            **subject.facts,
            "Dataset": f"{name}, {split}, {len(dataset)} pictures",
        }
        write_report(
            report,
            title=f"danet on {name} {split}",
            spec=dataset.spec,
            confusion=result.confusion["fused"],
            branch_mean_iou={b: result.scores(b).mean_iou for b in result.confusion},
            cases=evaluation.report_cases(subject.segment, dataset, result.pictures),
            history=run.read_metrics(),
            facts=facts,
        )
    _print_scores(result)
    if report is not None:
        print(f"report: {report}")


class _Subject(NamedTuple):
    """What is scored.

    Attributes:
        segment: a picture to a label map of each of `branches`, the fused one first.
        test: the protocol for --json; None for a file, which has its own inside.
        facts: for the report.
    """

    segment: "Segment"
    metadata: "Metadata"
    branches: "tuple[Branch, ...]"
    test: dict[str, Any] | None
    facts: dict[str, str]


def _network_subject(
    predictor: "Predictor",
    precision: str,
    mode: str | None,
    multi_scale: bool,
    flip: bool,
    branches: bool,
) -> _Subject:
    from danet.evaluation.evaluate import segment_with

    model = predictor.model
    test = _changed_test(predictor.test, mode, multi_scale, flip)
    wanted = model.branches if branches else ("fused",)
    return _Subject(
        segment_with(model, test, precision, wanted),
        model.metadata,
        wanted,
        test.model_dump(mode="json"),
        {"Backbone": model.config.backbone, "Protocol": _describe(test)},
    )


def _exported_subject(
    exported: "ExportedPredictor", mode: str | None, multi_scale: bool, flip: bool, branches: bool
) -> _Subject:
    import torch

    if mode not in (None, "whole") or multi_scale or flip or branches:
        raise UserError(
            f"{exported.path} is scored as it predicts; leave --mode, --multi-scale, --flip and "
            "--branches, or give the model folder"
        )
    return _Subject(
        lambda sample: [torch.from_numpy(exported(sample.image).classes)],
        exported.metadata,
        ("fused",),
        None,
        {"Protocol": "whole, as exported"},
    )


def _changed_test(
    test: "TestConfig", mode: str | None, multi_scale: bool, flip: bool
) -> "TestConfig":
    from danet.config import PUBLISHED_RATIOS

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
    from rich.text import Text

    fused = result.scores()
    table = Table("class", "IoU", "accuracy", box=None)
    for name, score in zip(result.spec.classes, fused.per_class, strict=True):
        table.add_row(Text(name), f"{score.iou:.4f}", f"{score.accuracy:.4f}")
    console = Console()
    console.print(table)
    for branch in result.confusion:
        console.print(f"{branch}: mIoU {result.scores(branch).mean_iou:.4f}", highlight=False)
    console.print(
        f"mAcc {fused.mean_accuracy:.4f}  aAcc {fused.overall_accuracy:.4f}  "
        f"{len(result.pictures)} pictures",
        highlight=False,
    )
