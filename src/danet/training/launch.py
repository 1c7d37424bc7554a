"""The processes of a run: how they start, sum up, are told to stop, and what a lost one means."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from danet.config import TrainConfig
from danet.devices import device_counts
from danet.errors import UserError, first_line
from danet.processes import join_process_group
from danet.training.sharding import sharding_strategy

# Fabric sets its own level when it is imported, and tells what the progress report already says.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

_SIGNAL_SECONDS = 0.5
"""How long the signal of a dead data worker may take to arrive."""


def process_counts(settings: TrainConfig) -> tuple[int, int]:
    """Processes on each machine, and machines: as torchrun started them, or the recipe says."""
    if not torch.distributed.is_torchelastic_launched():
        return settings.devices, 1
    on_each = int(os.environ["LOCAL_WORLD_SIZE"])
    return on_each, int(os.environ["WORLD_SIZE"]) // on_each


def launch(settings: TrainConfig, device: torch.device, *, bfloat16: bool) -> Fabric:
    """Fabric over the processes that torchrun started, or else over as many as the recipe says."""
    on_each, machines = process_counts(settings)
    processes = on_each * machines
    _require_devices(on_each, device)
    sharded = sharding_strategy(processes) if settings.strategy == "fsdp" else "ddp"
    fabric = Fabric(
        accelerator=device.type,
        devices=on_each,
        num_nodes=machines,
        strategy=sharded if processes > 1 else "auto",
        precision="bf16-mixed" if bfloat16 else "32-true",
    )
    if torch.distributed.is_torchelastic_launched() and processes > 1:
        join_process_group("nccl" if device.type == "cuda" else "gloo")
    fabric.launch()
    return fabric


def _require_devices(number: int, device: torch.device) -> None:
    """Raises a UserError if there are fewer devices than processes, which may share a CPU only."""
    there = device_counts()[device.type]
    if device.type != "cpu" and number > there:
        raise UserError(
            f"train.devices={number} (or torchrun's --nproc-per-node): PyTorch sees {there} "
            f"devices of type {device.type} on this machine; start at most that many processes"
        )


def reduce_over_processes(fabric: Fabric, tensor: Tensor, operation: str) -> Tensor:
    """The tensor's mean, sum or maximum (`mean`, `sum`, `max`) over all processes."""
    result = fabric.all_reduce(tensor, reduce_op=operation)
    assert isinstance(result, Tensor)
    return result


def holds_anywhere(fabric: Fabric, condition: bool) -> bool:
    """Whether something is so in any process; every process must ask."""
    if fabric.world_size == 1:
        return condition
    found = torch.tensor(float(condition), device=fabric.device)
    return bool(reduce_over_processes(fabric, found, "max"))


def describe_lost_process(error: Exception) -> str | None:
    """Which process was lost, and what to do; None where the error is another one."""
    text = str(error)
    if "DataLoader worker" in text:
        return (
            "a data worker died, as when memory runs out; set data.workers=0 or data.cache=false "
            "if it does so again"
        )
    if isinstance(error, torch.distributed.DistError) or "gloo" in text:
        return f"another process of this run was lost ({first_line(error)}); see its own error"
    return None


@contextmanager
def explaining_worker_death(workers: int) -> Iterator[None]:
    """A data worker that dies while it hands over a batch is a broken connection first."""
    try:
        yield
    except (ConnectionError, EOFError) as error:
        if workers == 0:
            raise
        time.sleep(_SIGNAL_SECONDS)  # in which the loader's signal handler mostly raises this:
        raise RuntimeError("a DataLoader worker died while it handed over a batch") from error


class StopSignal:
    """Notes SIGTERM, with which schedulers announce that a machine is wanted back, and Ctrl-C.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Only the main thread may; elsewhere the signals keep their effect.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self.received is not None:
                raise KeyboardInterrupt
            print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.received = signal.Signals(number).name
