"""danet predict."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danet.cli.options import (
    Compile,
    Device,
    ModelOrFile,
    Precision,
    folder_option,
    open_exported,
    own_device,
)
from danet.errors import UserError

if TYPE_CHECKING:
    from danet.predict import Segmenter
    from danet.processes import Share


def predict(
    model: ModelOrFile,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Pictures, videos, folders, globs, tars, @LIST."),
    ],
    out: Annotated[Path, folder_option("The folder for the results.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write the picture with the classes over it.")
    ] = False,
    frame_masks: Annotated[
        bool,
        typer.Option(
            "--frame-masks", help="Of videos with --overlay, write each frame's mask too."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first broken file.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Segment photos and videos: a palette PNG of class ids for each picture, at its own size.

    Of a video, --overlay writes a video with the classes over it instead of its frames' masks. Tar
    archives are read as they are; @LIST is a file that names inputs, a line each. Every picture
    gets a line in manifest.jsonl, and a rerun passes over what is done. torchrun shares the work.
    """
    from danet.atomic import require_writable
    from danet.bulk import segment_inputs
    from danet.inputs import Results, find_inputs
    from danet.processes import Share
    from danet.progress import ProgressReport

    results = Results(out, overlay=overlay, frame_masks=frame_masks)
    found, problems = find_inputs(inputs, results)
    if strict and problems:
        raise UserError(problems[0])
    share = Share.from_environment()
    # How many pictures an archive holds, only reading it to its end would tell.
    known = not any(one.is_archive for one in found)
    kinds = Counter(one.is_video for one in found)  # which are shared out each by itself
    total = sum(len(share.positions(count)) for count in kinds.values()) if known else None
    frames: Counter[Path] = Counter()
    written = before = seen = 0
    with share.ending_together(), ProgressReport("predict", total) as progress:

        def show_frame(video: Path, announced: int) -> None:
            frames[video] += 1
            progress.advance(f"{video.name}: frame {frames[video]}/{announced}", steps=0)

        for problem in problems:
            progress.say(f"error: {problem}")
        if found:
            segmenter = _open(model, device, precision, share, compile_graph=compile_graph)
            require_writable(out)
            outcomes = segment_inputs(
                segmenter,
                found,
                results,
                share=share,
                on_frame=show_frame,
            )
            for outcome in outcomes:
                seen += 1
                written += bool(outcome.written)
                before += not outcome.written and outcome.error is None
                progress.advance()
                if outcome.error is not None:
                    if strict:
                        raise UserError(outcome.error)
                    problems.append(outcome.error)
                    progress.say(f"error: {outcome.error}")
    earlier = f", {before} were already done" if before else ""
    print(f"{written} of {seen} pictures and videos segmented in {out}{earlier}")
    if problems:
        raise typer.Exit(2)


def _open(
    model: str, device: str, precision: str, share: "Share", *, compile_graph: bool
) -> "Segmenter":
    from danet.predict import Predictor

    exported = open_exported(model, device, precision, compile_graph=compile_graph)
    if exported is not None:
        return exported
    return Predictor(model, own_device(device, share), precision, compile_graph=compile_graph)
