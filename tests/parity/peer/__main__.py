"""Run mmsegmentation's DANet, and cityscapesScripts, on a CPU as independent peers.

Nothing here imports danet. Runs under the environment of `requirements.txt` one folder up:

    python tests/parity/peer COMMAND --help
"""

import argparse
import json
import os
import sys

import stand_ins  # noqa: F401 - before the modules that import mmseg

import augmentation  # isort: skip
import network  # isort: skip
import prediction  # isort: skip
import speed  # isort: skip
import tables  # isort: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """One command."""
    parser = argparse.ArgumentParser(prog="peer", description="mmsegmentation as a peer")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("serve", help="run commands as they come").set_defaults(command=serve)
    for module in (network, prediction, augmentation, tables, speed):
        module.add_commands(commands)
    return parser.parse_args(arguments)


def serve(_: argparse.Namespace) -> None:
    """Run commands as they come, a JSON line each, in forks: they share this process's imports.

    A line holds the arguments and the file for what the command prints. Each is answered by a line
    with the exit status.
    """
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            arguments = parse(request["arguments"])
            arguments.command(arguments)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


arguments = parse()
arguments.command(arguments)
