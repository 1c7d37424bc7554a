"""Options and messages that several commands share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danet import choices
from danet.errors import UserError, printable

if TYPE_CHECKING:
    from danet.config import TestConfig
    from danet.export.predictor import ExportedPredictor
    from danet.processes import Share

Model = Annotated[str, typer.Argument(help="A model or run folder, a hub id, or street-small.")]
ModelOrFile = Annotated[
    str,
    typer.Argument(
        help="A model or run folder, a hub id, street-small, or an exported .onnx, .xml."
    ),
]
Recipe = Annotated[str, typer.Argument(help="A built-in recipe (danet recipes) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe."),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")]
Precision = Annotated[choices.Precision, typer.Option(help="auto, fp32 or bf16.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network first: for many pictures on a GPU.")
]


def folder_option(help_text: str) -> Any:
    """An option that names a folder."""
    return typer.Option(parser=named_folder, metavar="DIR", help=help_text)


def named_folder(text: str) -> Path:
    """The folder of this name."""
    # Path("") is the working folder, which is not what an unset variable of a shell means.
    if not text:
        raise typer.BadParameter("it is empty; give a folder")
    return Path(text)


def own_device(device: str, share: "Share") -> str:
    """The device to compute on; each of several processes on a machine gets its own."""
    from danet.devices import local_device

    return local_device(device) if share.processes > 1 else device


def open_exported(
    model: str, device: str, precision: str, *, compile_graph: bool
) -> "ExportedPredictor | None":
    """Opens a model that is an exported file; None for folders and hub ids."""
    from danet.export.predictor import ExportedPredictor, is_exported

    if not is_exported(model):
        return None
    if device not in ("auto", "cpu") or compile_graph:
        raise UserError(f"{model} runs on the CPU as it was exported; omit --device and --compile")
    return ExportedPredictor(model, precision)


def say_on_stderr(message: str) -> None:
    """Prints a line on stderr, apart from the command's output."""
    print(printable(message), file=sys.stderr)


def note_protocol(test: "TestConfig") -> None:
    """Notes on stderr if `danet predict` takes pictures otherwise than the command.

    That takes them whole, fitted into the test scale, once.
    """
    scaled = test.ratios != (1.0,) or (test.ratios_of == "image" and test.scale is not None)
    if test.mode == "slide" or test.flip or scaled:
        say_on_stderr(
            "note: the model's test protocol uses windows, several scales or flips; here each "
            "picture is taken whole, at one scale"
        )
