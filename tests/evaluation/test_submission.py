from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danet.data import open_dataset
from danet.errors import UserError
from danet.evaluation.submission import submission_writer

CLASSES = np.array([[0, 1, 18]], np.uint8)


@pytest.mark.parametrize(
    ("dataset", "name", "file", "ids"),
    [
        ("cityscapes", "ulm_000000_000019", "ulm_000000_000019_pred_labelIds.png", [7, 8, 33]),
        ("ade20k", "ADE_val_00000001", "ADE_val_00000001.png", [1, 2, 19]),
    ],
)
def test_ids_and_names_are_the_servers(
    dataset: str, name: str, file: str, ids: list[int], tmp_path: Path
) -> None:
    submission_writer(dataset, tmp_path / "out")(name, CLASSES)
    written = np.asarray(Image.open(tmp_path / "out" / file))
    assert written.tolist() == [ids]


def test_vocs_files_have_the_devkits_colours(tmp_path: Path) -> None:
    submission_writer("voc", tmp_path)("2008_000006", np.array([[0, 1, 20]], np.uint8))
    with Image.open(tmp_path / "2008_000006.png") as image:
        assert image.mode == "P"
        assert np.asarray(image).tolist() == [[0, 1, 20]]
        colors = np.asarray(image.convert("RGB"))[0].tolist()
        everywhere = np.array(image.getpalette("RGB")).reshape(-1, 3)
    assert colors == [[0, 0, 0], [128, 0, 0], [0, 64, 128]]
    assert everywhere[255].tolist() == [224, 224, 192]


def test_other_datasets_have_no_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="camvid has no server"):
        submission_writer("camvid", tmp_path)


def test_a_submission_read_back_as_labels_is_the_prediction(tmp_path: Path) -> None:
    """The same files in the dataset's own layout are the truth of those predictions."""
    name = "ulm_000000_000019"
    classes = np.arange(19, dtype=np.uint8)[None]
    submission_writer("cityscapes", tmp_path / "out")(name, classes)
    (tmp_path / "leftImg8bit/val/ulm").mkdir(parents=True)
    (tmp_path / "gtFine/val/ulm").mkdir(parents=True)
    Image.new("RGB", (19, 1)).save(tmp_path / f"leftImg8bit/val/ulm/{name}_leftImg8bit.png")
    (tmp_path / f"out/{name}_pred_labelIds.png").rename(
        tmp_path / f"gtFine/val/ulm/{name}_gtFine_labelIds.png"
    )
    label = open_dataset("cityscapes", tmp_path, "val")[0].label
    np.testing.assert_array_equal(label, classes)
