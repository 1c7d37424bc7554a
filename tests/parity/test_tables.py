"""Classes, colours and label ids against mmsegmentation's and Cityscapes' own tables."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from danet.data import dataset_spec
from danet.data.catalog import cityscapes, coco_stuff

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tables(peer: Callable[..., str]) -> dict[str, Any]:
    return json.loads(peer("tables").splitlines()[-1])


def test_classes_and_colours(tables: dict[str, Any]) -> None:
    assert len(tables["specs"]) == 6
    for name, theirs in tables["specs"].items():
        spec = dataset_spec(name)
        assert spec.classes == tuple(theirs["classes"]), name
        assert spec.palette == tuple(map(tuple, theirs["palette"])), name


def test_cityscapes_label_ids_entry_by_entry(tables: dict[str, Any]) -> None:
    ours = {label_id: train_id for train_id, label_id in enumerate(cityscapes.LABEL_IDS)}
    assert len(tables["cityscapes"]) == 34
    for label_id, train_id in tables["cityscapes"].items():
        assert ours.get(int(label_id), 255) == train_id, label_id


def test_coco_stuff_ids_entry_by_entry(tables: dict[str, Any]) -> None:
    ids = coco_stuff.pixel_map_ids()
    theirs = {int(file_id): train_id for file_id, train_id in tables["coco_stuff_164k"].items()}
    assert theirs.pop(255) == 255
    assert ids == theirs
    # Their 10k files keep 0 for what is unlabelled, so all train ids are larger by one.
    small = {int(file_id): train_id for file_id, train_id in tables["coco_stuff_10k"].items()}
    assert small.pop(0) == 0
    assert {file_id + 1: train_id + 1 for file_id, train_id in ids.items()} == small
