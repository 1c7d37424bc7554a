"""Run mmsegmentation's DANet, and cityscapesScripts, on a CPU as independent peers.

Nothing here imports danet. Runs under the environment of `requirements.txt` one folder up:

    python tests/parity/peer COMMAND --help
"""

import argparse

import stand_ins  # noqa: F401 - before the modules that import mmseg

import augmentation  # isort: skip
import network  # isort: skip
import prediction  # isort: skip
import speed  # isort: skip
import tables  # isort: skip


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="peer", description="mmsegmentation as a peer")
    commands = parser.add_subparsers(required=True)
    for module in (network, prediction, augmentation, tables, speed):
        module.add_commands(commands)
    arguments = parser.parse_args()
    arguments.command(arguments)


main()
