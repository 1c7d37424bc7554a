"""danet bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from danet.cli.options import Compile, Device, Overrides, Precision, Recipe
from danet.errors import UserError


def bench(
    recipe: Recipe = "cityscapes_r50_512x1024_40k",
    overrides: Overrides = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the pictures; the recipe's crop size unless given.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures at a time; 1 unless given.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Measure training steps instead of prediction.")
    ] = False,
    peer: Annotated[
        bool, typer.Option("--peer", help="Also measure the eager form that holds N x N.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only say what batch fits the memory, without running."),
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB that --estimate may fill; the device's unless given.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Fresh processes for each form; 3 unless given.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs in each process; 3 unless given.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_graph: Compile = False,
) -> None:
    """Measure parameters, operations, memory and speed of a recipe's network."""
    from danet.atomic import require_writable_files, write_json
    from danet.bench import report
    from danet.bench.workload import Workload
    from danet.devices import choose_device, memory_limit, uses_bfloat16, warn_of_slow_bfloat16
    from danet.recipes import load_recipe

    how = {"peer": peer, "rounds": rounds, "repeats": repeats}
    given = [f"--{name}" for name, value in {**how, "compile": compile_graph}.items() if value]
    if estimate and given:
        raise UserError(
            f"--estimate measures nothing; leave it out, or leave out {' and '.join(given)}"
        )
    if memory is not None and not estimate:
        raise UserError("--memory goes with --estimate, which says what batch fits it")
    # A million GiB is more than any machine has; nan is in no range.
    if memory is not None and not 0 < memory <= 1e6:
        raise UserError(f"--memory {memory:g}: give GiB above 0, such as 24")
    require_writable_files(json_file, sources=[Path(recipe)])
    chosen = choose_device(device)
    bfloat16 = uses_bfloat16(precision, chosen)
    # The recipe knows what compilation excludes.
    compiled = ["train.compile=true"] if train and compile_graph else []
    config = load_recipe(recipe, [*(overrides or ()), *compiled])
    sizes = [_parse_size(text) for text in size or ()] or [config.data.crop_size]
    workloads = [
        Workload(config, pixels, batch or 1, "training" if train else "prediction")
        for pixels in sizes
    ]
    if estimate:
        limit = memory_limit(chosen) if memory is None else int(memory * 2**30)
        limits = report.estimate_limits(workloads, str(chosen), bfloat16=bfloat16, limit=limit)
        report.print_limits(limits, limit, str(chosen))
        found: dict[str, Any] = report.limits_as_json(limits, limit, str(chosen))
    else:
        if bfloat16:
            warn_of_slow_bfloat16(chosen)
        forms = report.forms_to_measure(bfloat16=bfloat16, compile_graph=compile_graph, peer=peer)
        results = []
        for workload in workloads:
            results.append(
                report.benchmark(
                    workload, forms, str(chosen), rounds=rounds or 3, repeats=repeats or 3
                )
            )
            report.print_benchmark(results[-1])
        found = {"results": results}
    if json_file is not None:
        write_json(json_file, {"recipe": recipe, **found})


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side) <= 65_536 for side in sides):
        raise UserError(f"--size {text}: write WIDTHxHEIGHT in pixels, such as 1024x512")
    return int(sides[0]), int(sides[1])
