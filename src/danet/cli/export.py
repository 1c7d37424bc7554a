"""danet export and danet convert: models into files of other programs, and out of them."""

from pathlib import Path
from typing import Annotated

import typer

from danet.choices import ExportFormat
from danet.cli.options import Model, folder_option, note_protocol, say_on_stderr
from danet.errors import UserError


def export(
    model: Model,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="onnx, torch or openvino.")],
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
    from danet.atomic import require_writable_files
    from danet.export import CHECKED_SIZES, calibration_pictures, check_suffix
    from danet.export import export as export_model
    from danet.model import DANet

    check_suffix(file_format, out)
    if int8 != bool(calibration):
        raise UserError("--int8 goes with --calibration INPUT: some typical pictures, 20 or more")
    pictures = calibration_pictures(calibration) if calibration else None
    require_writable_files(out)
    weights = out.with_suffix(".bin")
    if file_format == "openvino" and weights.exists() and not out.exists():
        raise UserError(f"{weights}: would be overwritten; remove it, or choose another --out")
    network = DANet.from_pretrained(model)
    note_protocol(network.metadata.test)
    agreement = export_model(network, out, file_format, pictures)
    on = f"{len(CHECKED_SIZES)} sizes" if pictures is None else f"{len(pictures)} pictures"
    print(
        f"{out}: on {on} the same class as the model on {agreement.same_class:.2%} of pixels, "
        f"logits within {agreement.difference:.2g} of the largest"
    )


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of mmsegmentation or the authors.")
    ],
    out: Annotated[Path, folder_option("The model folder to write.")],
    data: Annotated[
        str | None, typer.Option(help="The dataset whose classes it has, if it names none.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="With --data folder: where its classes.txt lies.")
    ] = None,
) -> None:
    """Turn another code base's checkpoint into a model folder."""
    from danet.atomic import require_writable
    from danet.data import dataset_spec
    from danet.interop.convert import convert as convert_checkpoint
    from danet.model_folder import RECIPE_FILE, Metadata

    if root is not None and data != "folder":
        raise UserError("--root goes with --data folder, which holds its classes")
    if (out / RECIPE_FILE).exists():
        raise UserError(
            f"--out {out}: holds a run, whose model would be hidden; choose another folder"
        )
    spec = None if data is None else dataset_spec(data, root)
    model = convert_checkpoint(checkpoint, spec, say_on_stderr)
    require_writable(out)
    model.save_pretrained(out)
    names = model.metadata.classes
    if names == Metadata.placeholder(len(names)).classes:
        say_on_stderr(
            f"note: the checkpoint does not name its classes; they are called {names[0]} to "
            f"{names[-1]}. --data NAME gives them the names and colours of that dataset"
        )
    print(f"model: {out} ({model.config.backbone}, {len(model.metadata.classes)} classes)")
