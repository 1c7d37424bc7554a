"""The measuring process of `position_attention.py`: checks, then times, row by row.

It takes up where the files in its folder end, so that it can be started again.
"""

import argparse
import datetime
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import tuned_attention
from candidates import Attend, candidates, stand_in, triton_configurations
from exactness import (
    CASES,
    CONFIGURATION_CASES,
    TINY_CASES,
    TINY_CONFIGURATION_CASES,
    TOLERANCES,
    Case,
    errors,
    exact,
    random_inputs,
)
from results_file import append_rows, read_rows
from stopwatch import extra_bytes, milliseconds, product_rate
from torch import Tensor

from danet.kernels.triton_attention import Configuration

CASE_COLUMNS = ("candidate", "batch", "positions", "key_width", "channels", "direction", "dtype")
DIRECTIONS = ("forward", "forward+backward")
ERROR_COLUMNS = ("output_error", "query_error", "key_error", "value_error")


class Visit:
    """Checks and times the candidates that the arguments name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, args.dtype)
        self.candidates = {
            name: attend
            for name, attend in candidates().items()
            if args.candidates is None or name in args.candidates
        }
        self.state_path = args.out / "state.json"
        self.state = json.loads(self.state_path.read_text())
        self.broken: dict[str, str] = {}
        for found in self.state["broken"]:
            if found["configuration"] is None:
                self.broken[found["candidate"]] = found["why"]
            else:
                kernel, numbers = found["configuration"]
                tuned_attention.refused.add((kernel, Configuration(*numbers)))
        tuned_attention.on_trying.append(self._note_configuration)
        self.left_out = 0
        self.tuned = 0

    def run(self) -> None:
        """All of it, as far as time allows."""
        if not self.args.times_only:
            self._check()
        self._time()
        if self.left_out:
            print(f"left out for want of time: {self.left_out} measurements", flush=True)

    def _note(self, candidate: str | None, configuration: Any = None) -> None:
        """Says what is running, for the case that it ends or stops this process."""
        now = {"candidate": candidate, "configuration": configuration}
        self.state["now"] = None if candidate is None else now
        written = self.state_path.with_suffix(".new")
        written.write_text(json.dumps(self.state))
        written.replace(self.state_path)

    def _note_configuration(self, kernel: str, configuration: Configuration | None) -> None:
        tried = None if configuration is None else (kernel, configuration)
        self._note(self.state["now"]["candidate"], tried)

    def _is_late(self, measurements: int = 1) -> bool:
        late = time.time() > self.state["deadline"]
        self.left_out += measurements * late
        return late

    def _attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `run` found, or under "failure" why it found nothing."""
        if name in self.broken:
            return {"failure": self.broken[name]}
        self._note(name)
        try:
            found = run()
        except torch.OutOfMemoryError:
            found = {"failure": "out of memory"}
        except Exception as error:  # a candidate that fails is a row, not the end
            if tuned_attention.is_fatal(error):
                print(f"{name}: {error}", flush=True)
                os._exit(3)
            found = {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        self._note(None)
        self._write_tuning()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _check(self) -> None:
        each = triton_configurations(self.device, torch.bfloat16)
        tiny = self.args.tiny
        for case in TINY_CONFIGURATION_CASES if tiny else CONFIGURATION_CASES:
            if "triton" in self.candidates:
                self._check_case(case, each)
        for case in TINY_CASES if tiny else CASES:
            self._check_case(case, self.candidates)

    def _check_case(self, case: Case, candidates: dict[str, Attend]) -> None:
        path = self.args.out / "checks.csv"
        done = {(row["candidate"], row["case"]) for row in read_rows(path)}
        missing = {n: attend for n, attend in candidates.items() if (n, str(case)) not in done}
        if not missing or self._is_late(len(missing)):
            return
        inputs, grad = random_inputs(case, self.device)
        expected = exact(inputs, grad)
        for name, attend in missing.items():
            if self._is_late():
                continue
            check = functools.partial(self._errors, attend, inputs, grad, expected)
            found = self._attempt(name, check)
            row = self._check_row(name, case, found)
            append_rows(path, [row])
            print(f"check  {name:16} {case}: {row['verdict']}", flush=True)

    @staticmethod
    def _errors(
        attend: Attend, inputs: list[Tensor], grad: Tensor, expected: list[Tensor]
    ) -> dict[str, Any]:
        return {"errors": errors(attend, inputs, grad, expected)}

    def _check_row(self, name: str, case: Case, found: dict[str, Any]) -> dict[str, Any]:
        off = found.get("errors")
        if off is None:
            verdict = found["failure"]
        else:
            verdict = "ok" if all(e < TOLERANCES[case.dtype] for e in off) else "wrong"
        return {
            "candidate": name,
            "case": str(case),
            **{k: f"{e:.2e}" for k, e in zip(ERROR_COLUMNS, off or [math.nan] * 4, strict=True)},
            "verdict": verdict,
            "note": stand_in(name, self.device),
        }

    def _time(self) -> None:
        path = self.args.out / "attention.csv"
        widths, dtype = [str(width) for width in self.args.widths], self.args.dtype
        done = {tuple(row[key] for key in CASE_COLUMNS) for row in read_rows(path)}
        rate = product_rate(self.dtype, self.device)
        print(f"{self.args.dtype} products: {rate:.3g} TFLOP/s", flush=True)
        for batch in self.args.batches:
            for positions in self.args.positions:
                for name in self.candidates:
                    for direction in DIRECTIONS:
                        key = (name, str(batch), str(positions), *widths, direction, dtype)
                        if key in done or self._is_late():
                            continue
                        timed = functools.partial(self._timed, name, batch, positions, direction)
                        found = self._attempt(name, timed)
                        row = self._row(dict(zip(CASE_COLUMNS, key, strict=True)), found, rate)
                        append_rows(path, [row])
                        cells = f"{row['milliseconds']} ms  {row['extra_MiB']} MiB  {row['note']}"
                        print(
                            f"time   {name:16} {batch} x {positions} {direction}: {cells}",
                            flush=True,
                        )

    def _timed(self, name: str, batch: int, positions: int, direction: str) -> dict[str, Any]:
        key_width, channels = self.args.widths
        case = Case(self.dtype, batch, positions, positions, key_width, channels)
        inputs, grad = random_inputs(case, self.device)
        attend = self.candidates[name]

        @torch.no_grad()
        def forward() -> None:
            attend(*inputs)

        def both() -> None:
            for tensor in inputs:
                tensor.grad = None
            attend(*inputs).backward(grad)  # type: ignore[no-untyped-call]

        run = forward if direction == "forward" else both
        run()  # compiles and tunes
        for tensor in inputs:
            tensor.grad = None
        extra = extra_bytes(run, self.device)
        # As few operations as there can be: 2 for every multiply-add, scores formed again once.
        per_score = 2 * (key_width + channels)
        if direction != "forward":
            per_score += 2 * (3 * key_width + 2 * channels)
        return {
            "milliseconds": milliseconds(run, self.device),
            "extra": extra,
            "operations": batch * positions**2 * per_score,
        }

    def _row(self, key: dict[str, str], found: dict[str, Any], rate: float) -> dict[str, Any]:
        taken, extra = found.get("milliseconds"), found.get("extra")
        tflops = None if taken is None else found["operations"] / taken / 1e9
        on_gpu = self.device.type == "cuda"
        return {
            **key,
            "milliseconds": "" if taken is None else f"{taken:.4g}",
            "tflops": "" if tflops is None else f"{tflops:.4g}",
            "share_of_products": "" if tflops is None else f"{tflops / rate:.3f}",
            "products_tflops": f"{rate:.4g}",
            "extra_MiB": "" if extra is None else f"{extra / 2**20:.1f}",
            "note": found.get("failure", stand_in(key["candidate"], self.device)),
            "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        }

    def _write_tuning(self) -> None:
        """Adds what was tuned since the last call."""
        for timing in list(tuned_attention.timings.values())[self.tuned :]:
            taken = timing.milliseconds
            row = {
                "kernel": timing.kernel,
                **timing.problem._asdict(),
                "dtype": timing.dtype,
                **timing.configuration._asdict(),
                "milliseconds": "" if taken is None else f"{taken:.4g}",
                "failure": timing.failure[:200],
            }
            append_rows(self.args.out / "tuning.csv", [row])
            self.tuned += 1
