"""Going on in a run's folder: whether that can be, from what, and with which settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

from danet.config import RunConfig, differing_keys
from danet.errors import UserError
from danet.recipes import load_recipe
from danet.training.checkpoint import RunFolder

_FIRST_WEIGHTS = {"model.init_from", "model.pretrained_backbone", "model.backbone_weights"}
"""Settings that a resumed run, which goes on from its own weights, does not look at."""
_SCORED = {
    *("data.name", "data.val_split", "data.mean", "data.std"),
    "train.validate_images",
}
"""With all of section test, the settings whose change makes scores incomparable."""


def require_folder(run: RunFolder, resume: bool) -> None:
    """Raises a UserError if the folder holds another run, or something else where one would be.

    Args:
        resume: whether a run that is there is to be continued.
    """
    if run.exists():
        if not resume:
            raise UserError(
                f"{run.path} already holds a run; continue with --resume, or choose another folder "
                "with --out"
            )
    elif (other := run.file_of_another_kind()) is not None:
        raise UserError(
            f"{run.path} holds {other.name}, but no run to resume; choose another folder with --out"
        )


def read_checkpoint(
    run: RunFolder, steps: int, on_damaged: Callable[[str], None]
) -> dict[str, Any] | None:
    """What to go on from, if there is something.

    Args:
        steps: which the run is to have in the end.
        on_damaged: called with a note on each checkpoint that cannot be read.

    Raises:
        UserError: there are results but no checkpoint, or the run has taken more steps.
    """
    checkpoint = run.last_checkpoint(on_damaged)
    if checkpoint is None:
        if run.exists() and (other := run.file_of_another_kind()) is not None:
            raise UserError(
                f"{run.path} holds {other.name} but no checkpoint to continue from; choose "
                "another folder with --out"
            )
    elif steps < checkpoint["step"]:
        raise UserError(
            f"train.steps={steps}, but the run in {run.path} has taken {checkpoint['step']} "
            "steps; set at least as many"
        )
    return checkpoint


class ChangedSettings(NamedTuple):
    """The settings that are not as in a run's recipe.

    Attributes:
        without_effect: that a resumed run does not look at.
        used: by the remaining steps.
    """

    without_effect: list[str]
    used: list[str]

    @classmethod
    def of(cls, run: RunFolder, config: RunConfig) -> "ChangedSettings":
        """Those that differ.

        Raises:
            UserError: the weights are another network's.
        """
        changed = differing_keys(load_recipe(run.recipe), config)
        without_effect = [key for key in changed if key in _FIRST_WEIGHTS]
        used = [key for key in changed if key not in _FIRST_WEIGHTS]
        if of_network := [key for key in used if key.startswith("model.")]:
            raise UserError(
                f"{', '.join(of_network)}: not as in {run.recipe}, whose network the run's "
                "weights belong to; restore them, or start a new run with model.init_from"
            )
        return cls(without_effect, used)

    @property
    def change_scores(self) -> bool:
        """Whether scores before and after do not compare."""
        return any(key in _SCORED or key.startswith("test.") for key in self.used)
