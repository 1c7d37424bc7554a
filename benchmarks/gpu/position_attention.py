"""One visit to a GPU: checks every exact way to position attention against float64, then times it.

    export PYTHONPATH=src
    python benchmarks/gpu/position_attention.py --out FOLDER
    TRITON_INTERPRET=1 python benchmarks/gpu/position_attention.py --tiny --out FOLDER  # on a CPU

Writes checks.csv, attention.csv and tuning.csv, row by row, and prints the tables that decide;
where FOLDER has such files it goes on where they end. Measuring happens in a process of its own: a
candidate that breaks it, or says nothing for too long, gets a row that says so and the rest goes
on. After --minutes nothing new is started.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from results_file import read_rows

WORKER = [sys.executable, __file__, "--worker"]
PATIENCE_SECONDS = 150
"""How long the measuring process may say nothing: FlexAttention takes its time to compile."""
OVERTIME_SECONDS = 30
"""What a measurement may take after the time is up."""


def supervise(args: argparse.Namespace) -> None:
    """Runs the measuring process until it is through, without what broke it."""
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "state.json"
    deadline = time.time() + 60 * args.minutes
    state.write_text(json.dumps({"deadline": deadline, "broken": [], "now": None}))
    status: int | None = None
    while status != 0 and time.time() < deadline:
        status = _measuring_process(state, deadline)
        found = json.loads(state.read_text())
        if found["now"] is not None:
            why = "hung" if status is None else f"ended its process with status {status}"
            found["broken"].append({**found["now"], "why": why})
            found["now"] = None
            state.write_text(json.dumps(found))
            print(f"broke: {found['broken'][-1]}", flush=True)
        elif status != 0:
            break  # not a candidate's fault, so that it would happen again
    report(args.out)
    if status != 0:
        sys.exit(f"incomplete: the measuring process ended with status {status}")


def _measuring_process(state: Path, deadline: float) -> int | None:
    """Its exit status; None when it was ended because it hung."""
    process = subprocess.Popen([*WORKER, *sys.argv[1:]])
    while process.poll() is None:
        time.sleep(0.2)
        silent = time.time() - state.stat().st_mtime
        if silent > PATIENCE_SECONDS or time.time() > deadline + OVERTIME_SECONDS:
            process.kill()
            process.wait()
            return None
    return process.returncode


def report(out: Path) -> None:
    """Prints what was wrong, all milliseconds, and more of the first shape."""
    checks, rows = read_rows(out / "checks.csv"), read_rows(out / "attention.csv")
    wrong = [row for row in checks if row["verdict"] != "ok"]
    print(f"\n{len(checks) - len(wrong)} checks passed, {len(wrong)} not")
    for row in wrong:
        print(f"  {row['candidate']:16}  {row['case']}: {row['verdict']}")
    groups = ("direction", "dtype", "key_width", "channels")
    for group in dict.fromkeys(tuple(row[column] for column in groups) for row in rows):
        direction, dtype, key_width, channels = group
        of = [row for row in rows if tuple(row[column] for column in groups) == group]
        shapes = list(dict.fromkeys((row["batch"], row["positions"]) for row in of))
        print(f"\n{direction}, milliseconds, {dtype}, widths {key_width} and {channels}")
        print(f"{'batch x positions':18}", end="")
        print("".join(f"{f'{batch} x {positions}':>12}" for batch, positions in shapes))
        for candidate in dict.fromkeys(row["candidate"] for row in of):
            found = {(r["batch"], r["positions"]): r for r in of if r["candidate"] == candidate}
            cells = (found.get(shape, {"milliseconds": ""}) for shape in shapes)
            print(f"{candidate:18}" + "".join(f"{c['milliseconds'] or '-':>12}" for c in cells))
        columns = ("milliseconds", "tflops", "share_of_products", "extra_MiB", "note")
        print(f"\n{direction}, {' x '.join(shapes[0])}: " + ", ".join(columns))
        for row in of:
            if (row["batch"], row["positions"]) == shapes[0]:
                cells = (f"  {row[column] or '-':>9}" for column in columns)
                print(f"{row['candidate']:18}" + "".join(cells))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--candidates", nargs="+", help="all where left out")
    parser.add_argument("--positions", type=int, nargs="+", default=[32768, 9409, 8192, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--times-only", action="store_true", help="check nothing")
    parser.add_argument("--widths", type=int, nargs=2, default=[64, 512], help="of keys, values")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.positions, args.batches, args.widths = [32, 20], [1], [16, 64]
    return args


def main() -> None:
    args = parse_args()
    if not args.worker:
        supervise(args)
        return
    from visit import Visit  # imports torch, which a supervisor need not wait for

    Visit(args).run()


if __name__ == "__main__":
    main()
