"""danet evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danet.cli.options import Compile, Device, Model, Precision, check_precision, own_device
from danet.errors import UserError

if TYPE_CHECKING:
    from danet.config import TestConfig
    from danet.evaluation.evaluate import Evaluation


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

    check_precision(precision)
    share = Share.from_environment()
    predictor = Predictor(model, own_device(device, share), precision, compile_graph=compile_graph)
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
