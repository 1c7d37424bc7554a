"""What the Triton kernels take of a GPU, by compiling them for GPUs that need not be there.

Every configuration, key width 64 and value width 512, with and without masks: shared memory,
tensor memory, registers a thread and bytes of registers spilled, as Triton and ptxas give them.
Rows of another Triton version stay in the file.

    python benchmarks/gpu/compiled_kernels.py
"""

import argparse
import concurrent.futures
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import triton
from configurations import FLOAT32, HALF_PRECISION
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[1]))
from results_file import RESULTS, read_rows, write_rows

from danet.kernels import triton_kernels
from danet.kernels.triton_attention import Configuration

KEY_WIDTH, CHANNELS = 64, 512
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a program may have, by compute capability."""
TENSOR_MEMORY_COLUMNS = 512
PARTIAL_SUMS = ("grad_key_SBMD", "grad_query_SBND")


class Job(NamedTuple):
    """A kernel to compile."""

    kernel: str
    configuration: Configuration
    architecture: int
    dtype: str
    even: bool


def jobs(architectures: list[int]) -> list[Job]:
    """Every configuration of every kernel, with and without masks."""
    lists = [(a, "bf16", HALF_PRECISION[a]) for a in architectures]
    lists += [(a, "fp32", FLOAT32) for a in architectures]
    return [
        Job(kernel, configuration, architecture, dtype, even)
        for architecture, dtype, choices in lists
        for kernel, configurations in choices.items()
        for configuration in configurations
        for even in (True, False)
    ]


def source(job: Job) -> ASTSource:
    """The kernel with its types, as a launch on aligned tensors has them."""
    kernel = getattr(triton_kernels, f"{job.kernel}_kernel")
    rows, columns, width, _, _, descriptors = job.configuration
    values = {
        "KEY_WIDTH": KEY_WIDTH,
        "CHANNELS": CHANNELS,
        "D": KEY_WIDTH,
        "WIDTH": width,
        "ROWS": rows,
        "COLUMNS": columns,
        "EVEN": job.even,
        "TMA": descriptors,
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
            continue
        if name in ("queries", "keys"):
            signature[name] = "i32"
            continue
        attributes[(index,)] = [["tt.divisibility", 16]]
        if name.endswith(("_batch", "_row")):
            signature[name] = "i32"
        elif name in ("logsumexp_BN", "row_dots_SBN"):
            signature[name] = "*fp32"
        else:
            is_sum = name in PARTIAL_SUMS and width < CHANNELS
            signature[name] = "*fp32" if is_sum else f"*{job.dtype}"
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)


def compile_row(job: Job) -> dict[str, Any]:
    """The row of one kernel; compiles it."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    _, _, _, warps, stages, _ = job.configuration
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source(job),
            target=GPUTarget("cuda", job.architecture, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    registers = int(re.findall(r"Used (\d+) registers", log.getvalue())[-1])
    spilled = int(re.findall(r"(\d+) bytes spill stores", log.getvalue())[-1])
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    fits = (
        shared <= SHARED_BYTES[job.architecture]
        and tensor_memory <= TENSOR_MEMORY_COLUMNS
        and spilled == 0
    )
    return {
        "triton": triton.__version__,
        "architecture": f"sm_{job.architecture}",
        "dtype": job.dtype,
        "kernel": job.kernel,
        **job.configuration._asdict(),
        "masked": not job.even,
        "shared_bytes": shared,
        "tensor_memory_columns": tensor_memory,
        "registers": registers,
        "spilled_bytes": spilled,
        "fits": fits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=list(HALF_PRECISION))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "triton_kernels.csv")
    args = parser.parse_args()
    rows = []
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        for row in pool.map(compile_row, jobs(args.architectures)):
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    compiled = {(triton.__version__, row["architecture"]) for row in rows}
    others = read_rows(args.out)
    kept = [row for row in others if (row["triton"], row["architecture"]) not in compiled]
    write_rows(args.out, kept + rows)
    unfit = [row for row in rows if not row["fits"]]
    print(f"{len(rows)} kernels compiled; {len(unfit)} spill or do not fit")


if __name__ == "__main__":
    main()
