"""danet data list and danet data check."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danet.cli.options import named_folder
from danet.errors import UserError, printable

if TYPE_CHECKING:
    from danet.data.check import SplitCheck

app = typer.Typer(no_args_is_help=True, help="List and check datasets.")


@app.command("list")
def data_list() -> None:
    """List the datasets."""
    from danet.data import dataset_names

    print("\n".join(dataset_names()))


@app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="A dataset; danet data list names them.")],
    root: Annotated[Path, typer.Argument(parser=named_folder, metavar="ROOT", help="Its folder.")],
) -> None:
    """Read every image and label, and say what training would fail on."""
    from danet.data import dataset_spec, open_dataset, splits_of
    from danet.data.check import check_pictures, first_few, left_out, summarize
    from danet.progress import ProgressReport

    spec = dataset_spec(name, root)
    checks: dict[str, SplitCheck] = {}
    fails = False
    for split, official in splits_of(name, root).items():
        needed = split in ("train", "val")  # benchmarks' test splits may lack labels
        kind = "error" if needed else "warning" if split.startswith("train") else "note"
        try:
            dataset = open_dataset(name, root, split)
        except UserError as error:
            fails |= needed
            _say(kind, split, str(error))
            continue
        with ProgressReport(f"check {name} {split}", len(dataset)) as progress:
            checks[split] = check_pictures(dataset, progress.advance)
        expected = "" if official in (None, len(dataset)) else f", officially {official}"
        print(f"{split}: {len(dataset)} pictures{expected}")
        for line in left_out(dataset):
            _say("note", split, line)
        if turned := checks[split].turned:
            _say(
                "note",
                split,
                f"pictures that their EXIF orientation turns: {len(turned)}: {first_few(turned)}; "
                "labels must be of the upright pictures",
            )
        for line in summarize(checks[split].findings):
            fails = True
            _say("error", split, line)
        if checks[split].is_unlabelled:
            fails |= needed
            advice = "correct the labels' ids" if needed else "it cannot be scored"
            _say(kind, split, f"every pixel is ignored, none has a class; {advice}")
        absent = checks[split].absent(spec.classes)
        if absent and split.startswith("train"):
            _say("warning", split, f"classes that no pixel has: {len(absent)}: {first_few(absent)}")
    if checks:
        _print_frequencies(spec.classes, checks)
    if fails:
        raise typer.Exit(2)


def _say(kind: str, split: str, message: str) -> None:
    print(printable(f"{kind}: {split}: {message}"), file=sys.stderr)


def _print_frequencies(classes: tuple[str, ...], checks: "dict[str, SplitCheck]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("share of pixels", *checks, box=None)
    for index, label in enumerate((*classes, "ignored")):
        shares = (check.pixels[index] / max(check.pixels.sum(), 1) for check in checks.values())
        table.add_row(Text(printable(label)), *(f"{share:.4f}" for share in shares))
    Console().print(table)
