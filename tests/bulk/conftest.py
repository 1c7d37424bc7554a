"""What is segmented, and by what."""

from pathlib import Path

import pytest

import danet
from networks import tiny_danet
from segmented import picture


@pytest.fixture(scope="module")
def network() -> danet.DANet:
    return tiny_danet()


@pytest.fixture(scope="module")
def model(network: danet.DANet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(13):
        picture(index).save(folder / f"{index:02}.png")
    return folder
