"""Fills Triton's and torch's caches with what `position_attention.py` runs, on all cores at once.

    PYTHONPATH=src python benchmarks/gpu/compile_ahead.py

Compiling takes most of a short visit to a GPU; kernels found in the cache take none of it. Network
and training step are compiled ahead by `network.py --compile-only`.
"""

import argparse
import concurrent.futures
import multiprocessing
import os

import torch
from candidates import candidates, triton_configurations
from exactness import CASES, CONFIGURATION_CASES, TINY_CONFIGURATION_CASES, Case, random_inputs

LARGEST = 1000
"""Queries of the cases that are run: more need no other kernels, but time."""


def run_once(name: str, case: Case) -> str:
    """Runs a candidate forward and backward, and says how that went."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {**candidates(), **triton_configurations(device, torch.bfloat16)}
    inputs, grad = random_inputs(case, device)
    try:
        known[name](*inputs).backward(grad)  # type: ignore[no-untyped-call]
    except Exception as error:  # compilers raise many kinds; the visit will say which
        return f"{name}, {case}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return f"{name}, {case}: compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--configurations", action="store_true", help="only each of the list")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = TINY_CONFIGURATION_CASES if args.tiny else CONFIGURATION_CASES
    jobs = [(n, case) for n in triton_configurations(device, torch.bfloat16) for case in cases]
    if not (args.tiny or args.configurations):
        small = [case for case in CASES if case.queries <= LARGEST]
        compiled = [name for name in candidates() if name.startswith(("triton", "flex"))]
        jobs += [(name, case) for name in compiled for case in small]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for done in concurrent.futures.as_completed(pool.submit(run_once, *job) for job in jobs):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
