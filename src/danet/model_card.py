"""The card of a shared model: what it is, what it was trained by and on, how it scores."""

import html
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import EvalResult, ModelCardData
from pydantic import BaseModel

from danet.config import ModelConfig, RunConfig, TestConfig
from danet.errors import UserError, printable
from danet.jsonl import read_metrics
from danet.model_folder import BEST_CHECKPOINT, METRICS_FILE, RECIPE_FILE, Metadata
from danet.recipes import load_recipe

PICTURE_FILE = "example.jpg"

Model = TypeVar("Model", bound=BaseModel)


def write_model_card(
    folder: Path,
    name: str,
    model: ModelConfig,
    metadata: Metadata,
    *,
    run: Path | None = None,
    scores: dict[str, float] | None = None,
    license_id: str | None = None,
    note: str = "",
) -> None:
    """Writes `README.md` into a model folder; `example.jpg`, if it is there, is shown.

    Args:
        name: of the model.
        run: the run folder that the model comes from, for its recipe and its validation scores.
        scores: in percent, by name, in place of the run's, where its weights were changed since.
        license_id: as the hub names licences, such as "mit".
        note: a paragraph of the owner's.

    Raises:
        UserError: `run` is no run folder.
    """
    if run is not None and not (run / RECIPE_FILE).is_file():
        raise UserError(f"{run}: not a run folder; it has no {RECIPE_FILE}")
    recipe = None if run is None else load_recipe(run / RECIPE_FILE)
    scored_on = "the validation split"
    if scores is None and run is not None and recipe is not None:
        scores, scored_on = _validation(run, recipe), _validated_on(recipe)
    scores = scores or {}
    data = ModelCardData(
        license=license_id,
        library_name="danet",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "dual-attention"],
        datasets=[metadata.dataset] if metadata.dataset else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=metadata.dataset or "unknown",
                dataset_name=metadata.dataset or "unknown",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in scores.items()
        ]
        or None,
    )
    sections = [f"---\n{data.to_yaml()}\n---", f"# {name}", *([note] if note else [])]
    if (folder / PICTURE_FILE).exists():
        sections.append(f"![A picture and its classes]({PICTURE_FILE})")
    sections += [_facts(model, metadata, scores, scored_on), _usage(name)]
    if recipe is not None:
        sections.append(_recipe(recipe))
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _facts(model: ModelConfig, metadata: Metadata, scores: dict[str, float], scored_on: str) -> str:
    branches = [name for name in ("position", "channel") if getattr(model, name)]
    rows = {
        "network": f"dual attention ({' and '.join(branches) or 'no'} attention) on "
        f"{model.backbone}, output stride {model.output_stride}",
        "trained on": metadata.dataset or "not recorded",
        "classes": f"{len(metadata.classes)}: {', '.join(metadata.classes)}",
        "tested": _protocol(metadata.test),
        **{name: f"{value:.2f} on {scored_on}" for name, value in scores.items()},
    }
    cells = {key: html.escape(printable(value)).replace("|", r"\|") for key, value in rows.items()}
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {cell} |" for key, cell in cells.items())


def _protocol(test: TestConfig) -> str:
    scale = "own size" if test.scale is None else f"fitted into {test.scale[0]}x{test.scale[1]}"
    views = f"{len(test.ratios)} scales" if len(test.ratios) > 1 else "one scale"
    return f"{test.mode} pictures, {scale}, {views}{', mirrored too' if test.flip else ''}"


def _usage(name: str) -> str:
    return (
        "## Use\n\n"
        f'```python\nimport danet\n\nsegmentation = danet.Predictor("{name}")("photo.jpg")\n'
        "segmentation.classes  # H W uint8\n```\n\n"
        f"```\ndanet predict {name} photo.jpg --out out --overlay\ndanet serve {name}\n```"
    )


def _validation(run: Path, recipe: RunConfig) -> dict[str, float]:
    """The validation scores of the weights that the run kept, in percent."""
    keys = {name: f"val/{name}" for name in ("mIoU", "mAcc", "aAcc")}
    validated = [row for row in read_metrics(run / METRICS_FILE) if row.keys() >= {*keys.values()}]
    if not validated:
        return {}
    kept = validated[-1]
    if recipe.train.keep == "best":
        # Scores may be of several protocols, one after the other.
        best = _best_step(run)
        of_best = [row for row in validated if row["step"] == best]
        kept = of_best[-1] if of_best else max(validated, key=lambda row: row["val/mIoU"])
    return {name: round(100 * kept[key], 2) for name, key in keys.items()}


def _best_step(run: Path) -> int | None:
    """The step of the best checkpoint; None where that is no more there."""
    try:
        checkpoint = torch.load(
            run / BEST_CHECKPOINT, map_location="cpu", mmap=True, weights_only=True
        )
        step: int = checkpoint["best"]["step"]
    # Of damaged files in particular.
    except Exception:
        return None
    return step


def _validated_on(recipe: RunConfig) -> str:
    count = recipe.train.validate_images
    if recipe.train.keep == "best" and count is not None:
        return f"the first {count} pictures of the validation split"
    return "the validation split"


def _recipe(recipe: RunConfig) -> str:
    """The run's recipe without its machine's paths."""
    started = (
        "Training went on from another model's weights, whose path is left out here.\n\n"
        if recipe.model.init_from
        else ""
    )
    return f"## Recipe\n\n{started}```yaml\n{_without_paths(recipe).to_yaml()}```"


def _without_paths(settings: Model) -> Model:
    """The settings with every path, at any depth, replaced by None."""
    return settings.model_copy(
        update={name: _without_path(value) for name, value in settings if value is not None}
    )


def _without_path(value: Any) -> Any:
    if isinstance(value, Path):
        return None
    if isinstance(value, BaseModel):
        return _without_paths(value)
    if isinstance(value, tuple):
        return tuple(map(_without_path, value))
    return value
