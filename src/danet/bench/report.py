"""Results of `danet bench`, as data and as tables."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from danet.bench.cost import (
    LARGEST_BATCH,
    BatchLimit,
    cost_by_part,
    estimate_peak_bytes,
    largest_batch,
    process_bytes,
)
from danet.bench.measure import Form, measure
from danet.bench.workload import Workload
from danet.kernels.cpu import has_amx, has_avx2_alone
from danet.progress import ProgressReport

_MIB, _GIB = 2**20, 2**30


def forms_to_measure(*, bfloat16: bool, compile_graph: bool, peer: bool) -> list[Form]:
    """Ours, and with `peer` what the public implementations do: in float32 and, where ours is in
    bfloat16, under its autocast too."""
    forms = [Form("danet", bfloat16, compile_graph=compile_graph)]
    if peer:
        forms.append(Form("eager, N x N", False, materialized=True))
        if bfloat16:
            forms.append(Form("eager, N x N, autocast", True, materialized=True))
    return forms


def benchmark(
    workload: Workload, forms: list[Form], device: str, *, rounds: int, repeats: int
) -> dict[str, Any]:
    """Costs by part, the estimated memory of each of our forms, and what was measured."""
    parts = cost_by_part(workload)
    width, height = workload.size
    with ProgressReport(f"measure {width}x{height}", rounds * len(forms)) as progress:
        measured = measure(
            workload, forms, device, rounds=rounds, repeats=repeats, on_run=progress.advance
        )
    rows = []
    for form in forms:
        result = measured[form.name]
        row: dict[str, Any] = {
            "form": form.name,
            "precision": "bf16" if form.bfloat16 else "fp32",
            "compiled": form.compile_graph,
            "seconds": None,
            "images_per_second": None,
            "peak_MiB": None,
            "estimated_MiB": None,
        }
        if result is not None:
            row["seconds"] = result.seconds
            row["images_per_second"] = workload.batch / result.seconds
            row["peak_MiB"] = result.peak_bytes / _MIB
        if not form.materialized:
            estimate = estimate_peak_bytes(workload, device, bfloat16=form.bfloat16)
            row["estimated_MiB"] = estimate / _MIB
        rows.append(row)
    return {
        "mode": workload.mode,
        "size": list(workload.size),
        "batch": workload.batch,
        "weights": "random",
        "parameters": sum(part.parameters for part in parts),
        "GFLOP": sum(part.operations for part in parts) / 1e9,
        "parts": {
            part.name: {"parameters": part.parameters, "GFLOP": part.operations / 1e9}
            for part in parts
        },
        "forms": rows,
        "rounds": rounds,
        "repeats": repeats,
        "torch": torch.__version__,
        "hardware": hardware(device),
    }


def print_benchmark(result: dict[str, Any]) -> None:
    """Parts and forms as two tables."""
    console = Console()
    width, height = result["size"]
    parts = Table("part", "parameters (M)", f"GFLOP at {width}x{height}", box=None)
    total = {"parameters": result["parameters"], "GFLOP": result["GFLOP"]}
    for name, part in {**result["parts"], "all": total}.items():
        parts.add_row(name, f"{part['parameters'] / 1e6:.2f}", f"{part['GFLOP']:.1f}")
    console.print(parts)
    console.print(
        f"\n{result['mode']}, batch {result['batch']}, random weights, {result['hardware']}, "
        f"torch {result['torch']}",
        highlight=False,
        soft_wrap=True,
    )
    forms = Table("form", "precision", "seconds", "images/s", "peak MiB", "estimated", box=None)
    for row in result["forms"]:
        if row["seconds"] is None:
            forms.add_row(row["form"], row["precision"], "out of memory, or crashed", "", "", "")
            continue
        estimate = row["estimated_MiB"]
        forms.add_row(
            row["form"],
            row["precision"],
            f"{row['seconds']:.4g}",
            f"{row['images_per_second']:.4g}",
            f"{row['peak_MiB']:.0f}",
            "" if estimate is None else f"{estimate:.0f}",
        )
    console.print(forms)


def estimate_limits(
    workloads: list[Workload], device: str, *, bfloat16: bool, limit: int
) -> list[tuple[Workload, BatchLimit]]:
    """The largest batch of each workload that fits in a process of `limit` bytes."""
    return [
        (workload, largest_batch(workload, device, bfloat16=bfloat16, limit=limit))
        for workload in workloads
    ]


def print_limits(limits: list[tuple[Workload, BatchLimit]], limit: int, device: str) -> None:
    """The limits as a table."""
    console = Console()
    workload, held = limits[0][0], process_bytes(device)
    console.print(
        f"{workload.mode}: what fits {limit / _GIB:.1f} GiB, "
        + (f"{held / _MIB:.0f} MiB of it for Python and the libraries, " if held else "")
        + "estimated without running",
        highlight=False,
        soft_wrap=True,
    )
    asked = [f"{workload.batch} pictures MiB"] if workload.batch > 1 else []
    columns = ("size", "largest batch", "first picture MiB", "one more MiB", *asked)
    table = Table(*columns, box=None)
    for workload, found in limits:
        width, height = workload.size
        batch = f"{found.batch} or more" if found.batch == LARGEST_BATCH else str(found.batch)
        table.add_row(
            f"{width}x{height}",
            batch if found.batch else "none fits",
            f"{found.first_bytes / _MIB:.0f}",
            f"{found.further_bytes / _MIB:.0f}",
            *(f"{found.given_bytes / _MIB:.0f}" for _ in asked),
        )
    console.print(table)


def limits_as_json(
    limits: list[tuple[Workload, BatchLimit]], limit: int, device: str
) -> dict[str, Any]:
    """The limits as data."""
    return {
        "limit_MiB": limit / _MIB,
        "process_MiB": process_bytes(device) / _MIB,
        "mode": limits[0][0].mode,
        "searched_up_to": LARGEST_BATCH,
        "sizes": [
            {
                "size": list(workload.size),
                "largest_batch": found.batch,
                "first_MiB": found.first_bytes / _MIB,
                "further_MiB": found.further_bytes / _MIB,
                "batch": workload.batch,
                "batch_MiB": found.given_bytes / _MIB,
            }
            for workload, found in limits
        ],
    }


def hardware(device: str) -> str:
    """The name of the GPU, or of the processor with its units for products and usable cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    for line in processors.read_text().splitlines() if processors.exists() else ():
        fact, _, value = line.partition(":")
        facts[fact.strip()] = value.strip()
    name = facts.get("model name", platform.machine())
    # A virtual machine hides AMD's model names, and the family tells the generation.
    if facts.get("vendor_id") == "AuthenticAMD":
        name += f" (family {facts['cpu family']})"
    units = " with AMX" if has_amx() else " with AVX2" if has_avx2_alone() else ""
    # Not everywhere can a process be kept to some of the cores.
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(usable(0))
    return f"{cores} core{'s' if cores > 1 else ''} of {name}{units}"
