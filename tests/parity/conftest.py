import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from augmentation import as_tensors
from danet.config import DataConfig
from danet.data import open_dataset
from danet.data.transforms import normalize

PEER_SCRIPT = Path(__file__).with_name("peer")

CAMVID = Path(os.environ.get("DANET_CAMVID", "../shared/camvid"))


def street_pictures() -> list[tuple[str, Path | None]]:
    """Data sets and their roots: generated streets, and real ones where they are at hand."""
    return [("scenes", None), *([("camvid", CAMVID)] if CAMVID.is_dir() else [])]


def street(dataset: str, root: Path | None, index: int = 0) -> tuple[Tensor, Tensor]:
    """A street, uint8 3 H W, and its train ids, uint8 H W."""
    item = open_dataset(dataset, root, split="val")[index]
    image, label = as_tensors(item.image, item.label)
    return image.as_subclass(Tensor), label.as_subclass(Tensor)


def normalized(image: Tensor) -> Tensor:
    """What the networks get: float32, with the published mean and deviation taken out."""
    config = DataConfig()
    return normalize(image, config.mean, config.std)


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs a command of peer/ in the peer's own environment and gives what it prints."""
    python = Path(os.environ.get("DANET_PEER_PYTHON", ".parity-venv/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is missing; make test-slow builds it")
    output = tmp_path_factory.mktemp("peer") / "printed"
    command = [str(python), str(PEER_SCRIPT), "serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(*arguments: object) -> str:
            request = {"arguments": [*map(str, arguments)], "output": str(output)}
            print(json.dumps(request), file=server.stdin)
            assert server.stdout.readline() == "0\n", f"the peer failed: {arguments}"
            return output.read_text()

        yield run
