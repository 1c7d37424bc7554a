"""The command `danet`: parses, calls one function, prints. A module for each of its commands."""

import errno
import io
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

import danet
from danet.cli import bench, data, evaluate, explain, export, predict, recipes, serve, train
from danet.errors import (
    ExportDiffers,
    OutOfMemory,
    TrainingDiverged,
    TrainingStopped,
    UserError,
    first_line,
    printable,
)

# typer has click inside or beside it, by its version, and exports only some of these errors.
_CommandLineError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

_REMEDIES: dict[int | None, str] = {
    errno.EACCES: "check that this user may read it, and its folder, or write there",
    errno.ENOSPC: "free some space",
}
"""What to do about what the system refuses."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Scene segmentation with dual attention networks.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(danet.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    """For all commands."""


for command in (
    *(train.train, evaluate.evaluate, predict.predict, explain.explain, serve.serve),
    *(export.export, export.convert, recipes.recipes, recipes.config, bench.bench),
):
    app.command()(command)
app.add_typer(data.app, name="data")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its logger's level when imported
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal has fewer characters
    try:
        status = app(prog_name="danet", standalone_mode=False)
        sys.stdout.flush()
        _exit(status or 0)
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        # Newer versions of typer have pydantic find some mistakes, which says so first.
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _fail(UserError(f"{message}; see {error.ctx.command_path} --help"), 2)
    except UserError as error:
        _fail(error, 2)
    except (TrainingDiverged, TrainingStopped, ExportDiffers, OutOfMemory) as error:
        _fail(error, 1)
    except (RuntimeError, MemoryError) as error:
        from danet.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "let this process have more, or use smaller pictures"
        _fail(OutOfMemory(f"out of memory ({first_line(error)}); {advice}"), 1)
    except OSError as error:
        if error.filename is not None:
            remedy = _REMEDIES.get(error.errno, "check this path")
            _fail(UserError(f"{error.filename}: {error.strerror}; {remedy}"), 2)
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Nothing is left to be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            place = "standard output or a temporary file"  # which, the system does not say
            _fail(UserError(f"{place}: {error.strerror}; {_REMEDIES[errno.ENOSPC]}"), 2)
        sys.exit(1)  # who read the output, such as head, has seen enough


def _fail(error: Exception, status: int) -> NoReturn:
    # In one piece, for other processes may write, too.
    print(f"error: {printable(str(error))}\n", end="", file=sys.stderr)
    sys.stderr.flush()
    _exit(status)


def _exit(status: int) -> NoReturn:
    if "torch.distributed" not in sys.modules:  # which commands without a network do not import
        sys.exit(status)
    from danet.processes import end_process

    end_process(status)
