"""Several processes that share work, as torchrun starts them."""

import atexit
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from danet.errors import UserError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)
"""Waiting for the slowest; torchrun ends all processes when one of them dies."""


class Share(NamedTuple):
    """This process's part of the work, as torchrun numbers processes."""

    rank: int
    processes: int

    @classmethod
    def from_environment(cls) -> "Share":
        """The share that RANK and WORLD_SIZE name; all of the work where neither is set.

        Raises:
            UserError: only one of them is set, or they number no process.
        """
        rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None and processes is None:
            return cls(0, 1)
        rank, processes = rank or "empty or not set", processes or "empty or not set"
        if not (rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)):
            raise UserError(
                f"RANK is {rank} and WORLD_SIZE is {processes}, which does not identify a "
                "process: set both as in RANK=0 WORLD_SIZE=2, start with torchrun, or unset both "
                "to work alone"
            )
        return cls(int(rank), int(processes))

    def positions(self, length: int) -> range:
        """Every position below `length` belongs to one process."""
        return range(self.rank, length, self.processes)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """`gather` works in here.

        Raises:
            UserError: nothing says where the other processes are.
        """
        if self.processes == 1:
            yield
            return
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "RANK and WORLD_SIZE are set but not MASTER_ADDR, so processes cannot find each "
                "other; start them with torchrun"
            )
        join_process_group("gloo", timeout=_PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Leaves only when all processes come here: torchrun ends all as soon as one fails."""
        if "MASTER_ADDR" not in os.environ:  # numbered by hand, and nobody watches over them
            yield
            return
        with self.connected():
            yield
            self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.processes == 1:
            return [value]
        values = [value] * self.processes
        dist.all_gather_object(values, value)
        return values


def join_process_group(backend: str, timeout: datetime.timedelta | None = None) -> None:
    """Joins the processes that torchrun started.

    After a restart, torchrun's store still holds the addresses of the processes that died, which
    torch may then call (its issue 167288). Where one machine counts the restarts, each gets a part
    of the store of its own; docs/reliability.md says what several machines need.
    """
    store, rank, processes = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)


def end_process(status: int) -> NoReturn:
    """`sys.exit`, but in a process group over gloo without what Python takes apart at its end.

    Gloo's threads may still let go of tensors then, for which they need the interpreter's lock, and
    are aborted with the process (PyTorch's issue 190489; Python 3.14 lets them wait). Nor can the
    group be taken apart first: caches of sharded tensors hold it.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
