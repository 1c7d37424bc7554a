"""`danet` in processes forked from one that has imported it: a start costs no imports."""

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

_MODULES = (
    "danet.cli",
    "danet.bulk",
    "danet.data.catalog.scenes",
    "danet.evaluation.run",
    "danet.model",
    "danet.training.loop",
)
_SECONDS = 500

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*_MODULES])


class Finished(NamedTuple):
    """How the processes ended: 0 where all did so, else one's exit status."""

    status: int
    stdout: str
    stderr: str


class Running(NamedTuple):
    """Processes at work, each the leader of a process group."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends all processes a signal, and those that they started."""
        for process in self.processes:
            assert process.pid is not None
            os.killpg(process.pid, number)

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = _SECONDS) -> Finished:
        """What they said, by rank."""
        for process in self.processes:
            process.join(seconds)
            assert not process.is_alive()
        status = next((process.exitcode for process in self.processes if process.exitcode), 0)
        said = {
            stream: "".join(output.with_suffix(stream).read_text() for output in self.outputs)
            for stream in (".stdout", ".stderr")
        }
        return Finished(status, said[".stdout"], said[".stderr"])


def start(
    folder: Path, *arguments: str, processes: int = 1, scenes: dict[str, int] | None = None
) -> Running:
    """Starts `danet` with these arguments; several processes share the work as torchrun's do.

    What they say goes into files of the folder. `scenes` are how many pictures the splits of the
    data set `scenes` have.
    """
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "forked",
        }
        environments = [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
        ]
    running = Running([], [])
    for rank, environment in enumerate(environments):
        output = folder / f"said{rank}"
        process = _context.Process(target=_run, args=(arguments, output, environment, scenes))
        process.start()
        running.processes.append(process)
        running.outputs.append(output)
    return running


def run(
    folder: Path, *arguments: str, processes: int = 1, scenes: dict[str, int] | None = None
) -> Finished:
    """What `start` starts, when it has ended."""
    return start(folder, *arguments, processes=processes, scenes=scenes).wait()


def _run(
    arguments: tuple[str, ...],
    output: Path,
    environment: dict[str, str],
    scenes: dict[str, int] | None,
) -> None:
    os.setsid()
    os.environ.update(environment)
    for number, stream in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(output.with_suffix(stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from danet.cli import main
    from danet.data.catalog import scenes as catalog

    if scenes is not None:
        catalog._LENGTHS = scenes
    sys.argv = ["danet", *arguments]
    main()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
