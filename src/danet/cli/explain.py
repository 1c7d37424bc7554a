"""danet explain."""

from pathlib import Path
from typing import Annotated

import typer

from danet.cli.options import Device, Model, Precision, note_protocol
from danet.errors import UserError, printable


def explain(
    model: Model,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    point: Annotated[
        str, typer.Option(metavar="X,Y", help="A pixel of it, from the upper left corner.")
    ],
    out: Annotated[Path, typer.Option(help="The figure: .png, .svg or .pdf.")],
    arrays: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the arrays, as .npz.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Draw what attention looks at: from one pixel, from all, in the channels; and the branches."""
    from danet.atomic import require_writable_files
    from danet.data.images import open_image
    from danet.explanation import explain as explain_image
    from danet.figure import check_figure_path
    from danet.model_folder import files_of
    from danet.predict import Predictor

    pixel = _parse_point(point)
    check_figure_path(out)
    if arrays is not None and arrays.suffix.lower() != ".npz":
        raise UserError(f"--arrays {arrays}: arrays are written as .npz; choose that suffix")
    picture = open_image(image)
    require_writable_files(out, arrays, sources=[image, *files_of(model)])
    predictor = Predictor(model, device, precision)
    note_protocol(predictor.test)
    explanation = explain_image(predictor, picture, pixel)
    explanation.save(out)
    if arrays is not None:
        explanation.save_arrays(arrays)
    name = printable(explanation.class_names[explanation.score.class_id])
    print(f"pixel {point}: {name} ({100 * explanation.score.probability:.0f} %); figure: {out}")


def _parse_point(text: str) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) != 2 or not all(s.strip().isdecimal() and len(s) < 20 for s in sides):
        raise UserError(f"--point {text}: write X,Y in pixels, such as 240,180")
    return int(sides[0]), int(sides[1])
