import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from scipy.sparse import csc_matrix

from danet.data.mat import open_coco_stuff_label, open_sbd_label
from danet.errors import UserError

IDS = np.arange(12).reshape(3, 4)


def saved(content: dict[str, object], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_numbers_of_every_type(dtype: str, compressed: bool, tmp_path: Path) -> None:
    others = {"captions": "a text", "names": np.array(["a", "bc"], object), "z": 1j * np.ones(3)}
    path = tmp_path / "a.mat"
    path.write_bytes(saved({**others, "S": IDS.astype(dtype), "T": IDS}, compressed))
    found = open_coco_stuff_label(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IDS)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_struct_with_other_fields(compressed: bool, tmp_path: Path) -> None:
    """As SBD's: boundaries are a cell array of sparse matrices."""
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [csc_matrix(np.eye(3)) for _ in range(20)]
    classes = {
        "Boundaries": boundaries,
        "Segmentation": IDS.astype(np.uint8),
        "CategoriesPresent": np.array([3.0, 7.0]),
    }
    path = tmp_path / "a.mat"
    path.write_bytes(saved({"GTcls": classes}, compressed))
    np.testing.assert_array_equal(open_sbd_label(path), IDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"S": IDS - 1}, r"must be 0\.\.255, but there are -1\.\.10"),
        ({"S": IDS + 250}, r"must be 0\.\.255, but there are 250\.\.261"),
        ({"S": IDS * np.nan}, "label ids must be"),
        ({"S": "text"}, "holds no label map"),
        ({"S": {"field": IDS}}, "holds no label map"),
        ({"S": IDS * 1j}, "holds no label map"),
        ({"T": IDS}, "holds no label map"),
    ],
)
def test_what_is_no_label_map(content: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(saved(content))
    with pytest.raises(UserError, match=message):
        open_coco_stuff_label(path)
    with pytest.raises(UserError, match="holds no label map"):
        open_sbd_label(path)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(saved({"S": np.zeros((2000, 2000), np.uint8)}, compressed=True))
    assert open_coco_stuff_label(path).shape == (2000, 2000)
    monkeypatch.setattr("danet.data.mat._LARGEST", 1 << 20)
    with pytest.raises(UserError, match="unpacks to over 1 MiB"):
        open_coco_stuff_label(path)


def test_damage_is_one_clear_error(tmp_path: Path) -> None:
    whole = saved({"GTcls": {"Segmentation": IDS}, "S": IDS})
    path = tmp_path / "a.mat"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(
            whole[: random.integers(len(whole))] if random.random() < 0.3 else whole
        )
        for place in random.integers(0, max(len(damaged), 1), 3):
            damaged[place : place + 1] = bytes([random.integers(256)])
        path.write_bytes(damaged)
        for read in (open_sbd_label, open_coco_stuff_label):
            try:
                read(path)
            except UserError:
                refused += 1
    assert refused > 500


def test_files_of_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"S": IDS}, format="4")
    with pytest.raises(UserError, match=r"not a MATLAB 5 to 7\.2 file"):
        open_coco_stuff_label(path)
    with pytest.raises(UserError, match="missing or damaged"):
        open_coco_stuff_label(tmp_path / "none.mat")
