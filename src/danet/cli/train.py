"""danet train."""

from pathlib import Path
from typing import Annotated

import typer

from danet.cli.options import Overrides, Recipe, folder_option
from danet.errors import OutOfMemory, TrainingOutOfMemory, UserError, first_line


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, folder_option("The run folder; runs/RECIPE unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a network by a recipe."""
    from lightning_fabric.utilities import rank_zero_only

    from danet.recipes import load_recipe
    from danet.training.loop import train as run_training

    folder = Path("runs") / Path(recipe).stem if out is None else out
    config = load_recipe(recipe, overrides or ())
    try:
        run = run_training(config, folder, resume)
    except TrainingOutOfMemory as error:
        problem = str(error)
    else:
        rank_zero_only(print)(f"model: {run.model}")
        return
    # Only here, where the error no longer keeps the tensors that filled the memory.
    from torch.distributed import is_torchelastic_launched

    from danet.bench.cost import advise_after_running_out
    from danet.processes import Share

    # Processes that the recipe starts have no RANK.
    by_torchrun = is_torchelastic_launched()
    processes = Share.from_environment().processes if by_torchrun else config.train.devices
    try:
        advice = advise_after_running_out(config, processes)
    except (UserError, RuntimeError) as error:  # not all networks can be estimated
        advice = f"lower train.batch_size or data.crop_size (no estimate: {first_line(error)})"
    raise OutOfMemory(f"{problem}; {advice}")
