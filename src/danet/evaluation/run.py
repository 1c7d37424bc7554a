"""Scoring a model on a dataset by name: what `danet evaluate` does."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from danet.choices import Precision, TestMode
from danet.config import PUBLISHED_RATIOS, TestConfig
from danet.data import open_dataset
from danet.data.files import PairedFiles
from danet.data.spec import SegmentationDataset
from danet.devices import uses_bfloat16
from danet.errors import UserError
from danet.evaluation.evaluate import (
    Evaluation,
    Segment,
    check_classes,
    evaluate,
    merge,
    scores_as_json,
    segment_with,
)
from danet.evaluation.report import report_cases, write_report
from danet.evaluation.submission import submission_writer
from danet.heads import Branch
from danet.jsonl import read_metrics
from danet.model import DANet
from danet.model_folder import METRICS_FILE, RECIPE_FILE, Metadata
from danet.processes import Share
from danet.progress import ProgressReport
from danet.recipes import load_recipe
from danet.validation_errors import validation_message

if TYPE_CHECKING:
    from danet.export.predictor import ExportedPredictor

_ALONE = Share(0, 1)
_silent = functools.partial(ProgressReport, enabled=False)


class _Subject(NamedTuple):
    """The model in the form that `evaluate` takes.

    Attributes:
        segment: maps a picture to a label map of each of `branches`.
        test: the protocol; None for an exported file, which has its own built in.
        facts: rows of the report.
    """

    segment: Segment
    metadata: Metadata
    branches: tuple[Branch, ...]
    test: TestConfig | None
    facts: dict[str, str]


class ModelEvaluation(NamedTuple):
    """A model's scores on one split of a dataset, and what a report needs besides.

    Attributes:
        evaluation: confusion matrices and the accuracy of each picture.
        name, split: of the dataset.
        test: the protocol; None for an exported file, which has its own built in.
        segment: maps a picture to its label maps, to show some again.
        facts: rows of the report on the model and the protocol.
        history: rows of the run's `metrics.jsonl`; empty without a run.
    """

    evaluation: Evaluation
    dataset: SegmentationDataset
    name: str
    split: str
    test: TestConfig | None
    segment: Segment
    facts: dict[str, str]
    history: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """The scores, fractions in 0..1, with the dataset and the protocol."""
        test = None if self.test is None else self.test.model_dump(mode="json")
        return {
            **scores_as_json(self.evaluation),
            "dataset": self.name,
            "split": self.split,
            "test": test,
        }

    def write_report(self, path: Path, model: str) -> None:
        """Writes an HTML report with pictures, some of which are segmented again.

        Args:
            model: its name in the report.

        Raises:
            UserError: it cannot be written.
        """
        facts = {
            "Model": model,
            **self.facts,
            "Dataset": f"{self.name}, {self.split}, {len(self.dataset)} pictures",
        }
        write_report(
            path,
            title=f"danet on {self.name} {self.split}",
            spec=self.dataset.spec,
            confusion=self.evaluation.confusion["fused"],
            branch_mean_iou={
                branch: self.evaluation.scores(branch).mean_iou
                for branch in self.evaluation.confusion
            },
            cases=report_cases(self.segment, self.dataset, self.evaluation.pictures),
            history=self.history,
            facts=facts,
        )


def evaluate_model(
    model: "DANet | ExportedPredictor",
    data: str | None = None,
    root: str | Path | None = None,
    split: str = "val",
    *,
    mode: TestMode | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    settings: Mapping[str, Any] | None = None,
    branches: bool = False,
    precision: Precision = "auto",
    run: str | Path | None = None,
    submission: str | Path | None = None,
    share: Share = _ALONE,
    progress: Callable[[str, int], ProgressReport] = _silent,
    say: Callable[[str], None] = lambda _: None,
) -> ModelEvaluation:
    """Scores a model on one split of a dataset by the published protocol.

    Args:
        model: a network in evaluation mode, on the device to compute on, which is tested as its
            metadata say; or an exported file, which is scored as it predicts.
        data: the dataset's name; None for the one that the model was trained on.
        root: the dataset's folder; None for the one in the recipe of `run`, if that names the same
            dataset, and for generated data.
        mode: how pictures go through the network, if not as the metadata say.
        multi_scale: average over the six published scales.
        flip: average with the mirror image.
        settings: other changes of the test settings (`danet.config.TestConfig`), by their keys.
        branches: score each branch's classifier too.
        precision: of a network: "fp32", "bf16", or "auto" for what is faster on the device.
        run: the run folder that the model comes from, for its recipe and its learning curves.
        submission: a folder for label files as the dataset's server takes them; none are written
            where None.
        share: this process's part of the pictures, for several processes under torchrun; each of
            them returns the scores of all pictures.
        progress: given a title and a number of pictures, makes the display of the progress.
        say: called with a note where class names differ from the dataset's.

    Raises:
        UserError: an exported file is to be tested in another way than it predicts, the dataset is
            not known or not there, its classes are not the model's, a picture or label cannot be
            read, the split has no labels and no submission is written, or the dataset has no server
            that takes label files, or they would go where its own are.
    """
    run = None if run is None else Path(run)
    changes = dict(settings or {})
    changes |= {} if mode is None else {"mode": mode}
    changes |= {"ratios": PUBLISHED_RATIOS} if multi_scale else {}
    changes |= {"flip": True} if flip else {}
    if isinstance(model, DANet):
        subject = _network_subject(model, precision, changes, branches=branches)
    else:
        subject = _exported_subject(model, changes, branches=branches)
    name, folder = _dataset_of(subject.metadata.dataset, run, data, root)
    dataset = open_dataset(name, folder, split, needs_labels=submission is None)
    check_classes(subject.metadata, dataset.spec, say)
    write = None if submission is None else _submission_writer(name, dataset, submission)
    own = share.positions(len(dataset))
    with share.connected(), progress(f"evaluate {name} {split}", len(own)) as display:
        found = evaluate(
            subject.segment,
            dataset,
            branches=subject.branches,
            indices=own,
            on_picture=display.advance,
            write_prediction=write,
        )
        evaluation = merge(share.gather(found))
    history = [] if run is None else read_metrics(run / METRICS_FILE)
    return ModelEvaluation(
        evaluation, dataset, name, split, subject.test, subject.segment, subject.facts, history
    )


def _submission_writer(
    name: str, dataset: SegmentationDataset, submission: str | Path
) -> Callable[[str, npt.NDArray[np.uint8]], None]:
    """Raises a UserError, too, where the dataset's own files would be written over."""
    folder = Path(submission)
    if isinstance(dataset, PairedFiles) and folder.resolve() in dataset.folders():
        raise UserError(
            f"--submission {folder}: the dataset's own files are there; choose another folder"
        )
    return submission_writer(name, folder)


def _network_subject(
    model: DANet, precision: str, changes: Mapping[str, Any], *, branches: bool
) -> _Subject:
    try:
        test = TestConfig.model_validate({**dict(model.metadata.test), **changes})
    except ValidationError as error:
        raise UserError(f"test: {validation_message(error, TestConfig)}") from error
    wanted = model.branches if branches else ("fused",)
    device = next(model.parameters()).device
    dtype = "bfloat16" if uses_bfloat16(precision, device) else "float32"
    return _Subject(
        segment_with(model, test, precision, wanted),
        model.metadata,
        wanted,
        test,
        {
            "Backbone": model.config.backbone,
            "Protocol": _describe(test),
            "Precision": f"{dtype} on {device.type}",
        },
    )


def _exported_subject(
    exported: "ExportedPredictor", changes: Mapping[str, Any], *, branches: bool
) -> _Subject:
    if changes not in ({}, {"mode": "whole"}) or branches:
        raise UserError(
            f"{exported.path} is scored as it predicts; omit --mode, --multi-scale, --flip, "
            "--branches and --set, or give the model folder"
        )
    return _Subject(
        lambda sample: [torch.from_numpy(exported(sample.image).classes)],
        exported.metadata,
        ("fused",),
        None,
        {"Protocol": "whole, as exported"},
    )


def _dataset_of(
    trained_on: str | None, run: Path | None, data: str | None, root: str | Path | None
) -> tuple[str, Path | None]:
    """The name and folder of the dataset, as given or else as in the run's recipe."""
    name = data or trained_on
    if name is None:
        raise UserError("the model does not say what it was trained on; give --data NAME")
    if root is not None:
        return name, Path(root)
    if run is None or not (run / RECIPE_FILE).is_file():
        return name, None
    trained_with = load_recipe(run / RECIPE_FILE).data
    found = trained_with.root if trained_with.name == name else None
    if found is not None and not found.exists():
        raise UserError(
            f"{run / RECIPE_FILE}: data.root={found} does not exist (relative paths start at the "
            "current folder); give the dataset's folder with --root DIR"
        )
    return name, found


def _describe(test: TestConfig) -> str:
    windows = "windows of {}x{} every {}x{}".format(*test.window, *test.stride)
    parts = ["whole" if test.mode == "whole" else f"slide, {windows}"]
    if test.scale is not None:
        parts.append(f"pictures fitted into {test.scale[0]}x{test.scale[1]}")
    factors = f"scales {', '.join(f'{ratio:g}' for ratio in test.ratios)}"
    parts.append(factors + (" of the picture" if test.ratios_of == "image" else ""))
    parts += ["flip"] if test.flip else []
    return ", ".join(parts)
