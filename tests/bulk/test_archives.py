import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import danet
import danet.work_items
from danet.inputs import Results, find_inputs
from networks import tiny_danet
from segmented import masks, picture, predict, segment_all


def test_tar_archives_are_read_as_they_are(model: Path, photos: Path, tmp_path: Path) -> None:
    archive = tmp_path / "shard-000.tar"
    with tarfile.open(archive, "w") as tar:
        for index in range(3):
            tar.add(photos / f"{index:02}.png", f"a/{index:02}.png")
        note = tarfile.TarInfo("a/00.json")
        tar.addfile(note, io.BytesIO(b""))
        evil = tarfile.TarInfo("../../../evil.png")
        content = (photos / "05.png").read_bytes()
        evil.size = len(content)
        tar.addfile(evil, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    out = tmp_path / "deep" / "er" / "out"
    done = predict(model, archive, "--out", out)
    assert done.exit_code == 0, done.output
    assert "predict 1  \n" in done.output  # of how many is not known
    assert set(masks(out)) == {
        *(f"shard-000_{index:06}_{index:02}.png" for index in range(3)),
        "shard-000_000004_evil.png",
    }
    assert not list(tmp_path.glob("evil*"))
    archive.write_bytes(archive.read_bytes()[:3000])
    broken = predict(model, archive, photos / "05.png", "--out", tmp_path / "broken")
    assert broken.exit_code == 2
    assert "damaged, or not a tar archive" in broken.output
    assert "05.png" in masks(tmp_path / "broken")


def test_links_and_hidden_files_in_a_tar(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard links are the file that they stand for; macOS puts hidden files beside pictures."""
    archive, empty = tmp_path / "a.tar", tmp_path / "empty.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos / "03.png", "one.png")
        tar.addfile(tarfile.TarInfo("._one.png"), io.BytesIO(b""))
        for name, target in (("same.png", "one.png"), ("lost.png", "nowhere.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    with tarfile.open(empty, "w"):
        pass
    out = tmp_path / "out"
    done = predict(model, archive, empty, "--out", out)
    assert done.exit_code == 2
    assert "._one" not in done.output
    assert "lost.png: the file that it links to is not in the archive" in done.output
    assert "empty.tar: no pictures in it" in done.output
    assert set(masks(out)) == {"a_000000_one.png", "a_000002_same.png"}
    one, same = (np.asarray(Image.open(out / name)) for name in masks(out))
    np.testing.assert_array_equal(one, same)
    monkeypatch.setattr("danet.work_items.MAX_FILE_BYTES", (photos / "03.png").stat().st_size - 1)
    refused = predict(model, archive, "--out", tmp_path / "refused")
    assert refused.output.count("MiB; refused") == 2


@pytest.mark.parametrize(
    ("name", "compression"), [("a.TAR.GZ", "gz"), ("a.tgz", "gz"), ("a.tar.xz", "xz")]
)
def test_compressed_tars_are_archives_too(
    name: str, compression: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / name, f"w:{compression}") as tar:
        tar.add(photos / "03.png", "one.png")
    done = predict(model, tmp_path / name, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert set(masks(tmp_path / "out")) == {f"{Path(name).stem}_000000_one.png"}


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_a_damaged_compressed_tar_does_not_stop_the_others(
    compression: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    whole, archive = tmp_path / "whole.tar", tmp_path / "damaged.tar"
    with tarfile.open(whole, f"w:{compression}") as tar:
        tar.add(photos / "00.png", "00.png")
    content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(range(200))
    archive.write_bytes(content)
    done = predict(model, archive, photos / "05.png", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "damaged" in done.output
    assert "05.png" in masks(tmp_path / "out")


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"GNU.sparse.size": "abc"}, "damaged, or not a tar archive"),
        ({"size": "9" * 30}, "damaged, or not a tar archive"),
        (None, "damaged, or not a tar archive"),
        ({"path": "b\0.png"}, "its name contains a zero byte"),
    ],
)
def test_headers_of_nonsense_do_not_stop_the_others(
    headers: dict[str, str] | None, told: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "odd.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos / "00.png", "a.png")
        member = tarfile.TarInfo("b.png")
        member.pax_headers = headers or {}
        tar.addfile(member)
    if headers is None:  # each of them waits for the next, which it belongs to
        name = tarfile.TarInfo("././@LongLink")
        name.type = tarfile.GNUTYPE_LONGNAME
        archive.write_bytes(name.tobuf() * 2000)
    done = predict(model, archive, photos / "05.png", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.exception
    assert told in " ".join(done.output.split())
    assert "05.png" in masks(tmp_path / "out")
    assert ("odd_000000_a.png" in masks(tmp_path / "out")) == (headers is not None)


def test_a_tar_may_not_ask_for_any_amount_of_memory(model: Path, tmp_path: Path) -> None:
    member = tarfile.TarInfo("bomb.png")
    member.size = 12 << 30
    archive = tmp_path / "bomb.tar"
    archive.write_bytes(member.tobuf())
    with archive.open("r+b") as file:  # sparse: it takes no space
        file.truncate(tarfile.BLOCKSIZE + member.size + 2 * tarfile.BLOCKSIZE)
    picture(0).save(tmp_path / "good.png")
    done = predict(model, archive, tmp_path / "good.png", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "bomb.tar:bomb.png: unpacks to over 512 MiB; refused" in done.output
    assert "good.png" in masks(tmp_path / "out")


def test_an_archive_has_no_result_of_its_own_name(tmp_path: Path) -> None:
    for name in ("photos.tar", "photos.png"):
        (tmp_path / name).touch()
    results = Results(tmp_path, overlay=False, frame_masks=False)
    found, problems = find_inputs([str(tmp_path / "photos.tar")], results)
    assert (len(found), problems) == (1, [])


def test_long_names_in_an_archive_are_cut(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    name = f"{'x' * 250}.png"
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "a.png", name)
    predictor = danet.Predictor(tiny_danet(3), device="cpu", precision="fp32")
    found = segment_all(predictor, [tmp_path / "t.tar"], tmp_path / "out")
    assert found == [(f"t.tar:{name}", None)]
