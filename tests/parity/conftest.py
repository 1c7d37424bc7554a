import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PEER_SCRIPT = Path(__file__).with_name("peer.py")

CAMVID = Path(os.environ.get("DANET_CAMVID", "../shared/camvid"))


def street_pictures() -> list[tuple[str, Path | None]]:
    """Data sets and their roots: generated streets, and real ones where they are at hand."""
    return [("scenes", None), *([("camvid", CAMVID)] if CAMVID.is_dir() else [])]


@pytest.fixture(scope="session")
def peer() -> Callable[..., str]:
    """Runs a command of peer.py in the peer's own environment and gives what it prints."""
    python = Path(os.environ.get("DANET_PEER_PYTHON", ".parity-venv/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is missing; make test-slow builds it")

    def run(*arguments: object) -> str:
        command = [str(python), str(PEER_SCRIPT), *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    return run
