import copy
import errno
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import danet
import danet.bulk
import danet.work_items
import forked
from danet.bulk import DECODED_AHEAD, segment_inputs
from danet.cli import app
from danet.errors import UserError
from danet.inputs import Input, Results, find_inputs, output_stems
from danet.manifest import Manifest, Origin, finished_results
from danet.processes import Share
from danet.work_items import WorkItem
from networks import tiny_danet

SIZES = ((40, 30), (33, 50), (40, 30), (64, 20))


@pytest.fixture(scope="module")
def network() -> danet.DANet:
    return tiny_danet()


@pytest.fixture(scope="module")
def model(network: danet.DANet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return folder


def picture(index: int) -> Image.Image:
    width, height = SIZES[index % len(SIZES)]
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(13):
        picture(index).save(folder / f"{index:02}.png")
    return folder


def predict(model: Path, *arguments: object) -> Result:
    words = ["predict", str(model), *map(str, arguments), "--precision", "fp32"]
    return CliRunner().invoke(app, words)


def manifest(out: Path) -> list[dict[str, Any]]:
    lines = [p.read_text(encoding="utf-8") for p in sorted(out.glob("manifest*.jsonl"))]
    return [json.loads(line) for line in "".join(lines).splitlines()]


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_batches_of_one_size_give_what_single_pictures_give(
    model: Path, network: danet.DANet, photos: Path, tmp_path: Path
) -> None:
    done = predict(model, photos, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    predictor = danet.Predictor(network, device="cpu", precision="fp32")
    for index in range(13):
        found = np.asarray(Image.open(tmp_path / "out" / f"{index:02}.png"))
        assert (found == predictor(picture(index)).classes).mean() > 0.999
    assert sorted(line["input"] for line in manifest(tmp_path / "out")) == sorted(
        str(photos / f"{index:02}.png") for index in range(13)
    )


def test_a_rerun_does_what_is_missing_changed_or_of_another_model(
    model: Path, network: danet.DANet, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(model, photos, "--out", out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "03.png").unlink()
    os.utime(photos / "05.png", (time.time() + 5, time.time() + 5))
    again = predict(model, photos, "--out", out)
    assert "2 of 13 pictures and videos segmented" in again.output
    assert "11 were already done" in again.output
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"03.png", "05.png"}
    os.utime(photos / "05.png", (0, 0))
    assert "13 of 13" in predict(model, photos, "--out", out, "--overlay").output
    assert "13 were already done" in predict(model, photos, "--out", out, "--overlay").output
    network.save_pretrained(tmp_path / "same")
    assert "13 were already done" in predict(tmp_path / "same", photos, "--out", out).output
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.head.fused_classifier[1].weight)
    other.save_pretrained(tmp_path / "other")
    assert "13 of 13" in predict(tmp_path / "other", photos, "--out", out).output


def test_another_file_of_the_same_name_is_segmented(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    found = {}
    for index, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        picture(index).save(tmp_path / folder / "p.png")
        os.utime(tmp_path / folder / "p.png", (1000 - index, 1000 - index))
    # The second file is older than the first one's mask, and in the end its mask lies there.
    for folder in "aba":
        monkeypatch.chdir(tmp_path / folder)
        assert (
            "1 of 1 pictures and videos segmented" in predict(model, "p.png", "--out", out).output
        )
        assert found.setdefault(folder, masks(out)) == masks(out)
    assert "1 were already done" in predict(model, tmp_path / "a" / "p.png", "--out", out).output
    assert found["a"] != found["b"]


def test_a_file_that_was_exchanged_is_segmented(model: Path, photos: Path, tmp_path: Path) -> None:
    """As `cp -p` and rsync do: the time says nothing, or lies before the mask's."""
    path, out = photos / "00.png", tmp_path / "out"
    predict(model, path, "--out", out)
    assert "1 were already done" in predict(model, path, "--out", out).output
    times = path.stat()
    path.write_bytes((photos / "02.png").read_bytes() + b"longer")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "1 of 1" in predict(model, path, "--out", out).output
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns - 1))
    assert "1 of 1" in predict(model, path, "--out", out).output
    archive = tmp_path / "shard.tar"
    for name in ("00", "02"):
        with tarfile.open(archive, "w") as tar:
            tar.add(photos / f"{name}.png", "x.png")
        os.utime(archive, (int(name), int(name)))
        assert "1 of 1" in predict(model, archive, "--out", out).output
        assert "1 were already done" in predict(model, archive, "--out", out).output


def test_what_another_model_wrote_over_is_segmented(
    model: Path, network: danet.DANet, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "out", photos / "00.png"
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.head.fused_classifier[1].weight)
    other.save_pretrained(tmp_path / "other")
    predict(model, path, "--out", out, "--overlay")
    alone = masks(out)
    with monkeypatch.context() as shared:  # whose manifest has another name
        shared.setenv("RANK", "0")
        shared.setenv("WORLD_SIZE", "2")
        assert "1 of 1" in predict(tmp_path / "other", path, "--out", out).output
    assert masks(out) != alone
    # The overlay that lies there is the first model's.
    assert "1 of 1" in predict(tmp_path / "other", path, "--out", out, "--overlay").output
    assert "1 of 1" in predict(model, path, "--out", out).output
    assert masks(out) == alone
    assert "1 were already done" in predict(model, path, "--out", out).output


def test_what_a_stopped_run_wrote_is_segmented_again(
    model: Path, network: danet.DANet, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no line in the manifest, but is not taken for the earlier model's."""
    out = tmp_path / "out"
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.head.fused_classifier[1].weight)
    other.save_pretrained(tmp_path / "other")
    assert predict(model, photos, "--out", out).exit_code == 0
    before = masks(out)
    real = danet.bulk.write_segmentation

    def stopped(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(danet.bulk, "write_segmentation", stopped)
        predict(tmp_path / "other", photos, "--out", out)
    changed = sum(before[name] != content for name, content in masks(out).items())
    assert changed > 0
    again = predict(model, photos / "12.png", "--out", out)  # another one, which forgets nothing
    assert again.exit_code == 0, again.output
    again = predict(model, photos, "--out", out)
    assert again.exit_code == 0, again.output
    assert f"{13 - changed} were already done" in again.output
    assert masks(out) == before
    assert [path.name for path in out.glob("manifest*")] == ["manifest.jsonl"]


def test_a_stopped_run_beside_its_pictures_can_be_run_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        picture(0).save(tmp_path / f"{index}.jpg")
    real = danet.bulk.write_segmentation

    def full(*arguments: Any) -> None:
        real(*arguments)
        if arguments[-1] == "1":
            raise UserError("full") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as once:
        once.setattr(danet.bulk, "write_segmentation", full)
        assert isinstance(predict(model, tmp_path, "--out", tmp_path).exception, UserError)
    assert len(masks(tmp_path)) == 3
    for inputs in (tmp_path, f"{tmp_path}/*.jpg"):
        again = predict(model, inputs, "--out", tmp_path)
        assert again.exit_code == 0, again.output
        assert "of 3" in again.output


def test_a_manifest_names_its_inputs_and_older_ones_prove_nothing(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", photos / "00.png"
    predict(model, path, "--out", out)
    (line,) = manifest(out)
    found = path.stat()
    assert line["input"] == line["path"] == str(path)
    assert (line["mask"], line["status"]) == ("00.png", "ok")
    assert (line["size"], line["mtime_ns"]) == (found.st_size, found.st_mtime_ns)
    before = {name: line[name] for name in ("input", "model", "status", "mask")}
    (out / "manifest.jsonl").write_text(json.dumps(before) + "\n")
    assert "1 of 1" in predict(model, path, "--out", out).output
    assert "1 were already done" in predict(model, path, "--out", out).output


def test_logits_that_are_not_finite_are_an_error_line(
    network: danet.DANet, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an overflow, of which weights do not tell."""
    monkeypatch.setattr("danet.predict.require_finite_weights", lambda _: None)
    damaged = copy.deepcopy(network)
    torch.nn.init.constant_(damaged.head.fused_classifier[1].weight, float("nan"))
    damaged.save_pretrained(tmp_path / "damaged")
    done = predict(tmp_path / "damaged", photos / "00.png", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "00.png: the network's logits are not finite" in done.output
    assert not masks(tmp_path / "out")


def test_inputs_are_never_written_over(model: Path, photos: Path, tmp_path: Path) -> None:
    before = masks(photos)
    for inputs in ((photos,), (photos / "00.png",), (f"{photos}/*.png",)):
        failed = predict(model, *inputs, "--out", photos)
        assert failed.exit_code == 2
        assert "00.png: results would be written over it; choose another --out" in failed.output
    assert masks(photos) == before


def test_labels_beside_pictures_are_not_written_over(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(0).save(tmp_path / f"{name}.jpg")
    (tmp_path / "a.png").write_bytes(b"a label")
    done = predict(model, f"{tmp_path}/*.jpg", "--out", tmp_path)
    assert done.exit_code == 2
    assert "a.jpg: results would be written over" in done.output
    assert (tmp_path / "a.png").read_bytes() == b"a label"
    assert (tmp_path / "b.png").exists()


def test_own_overlays_beside_pictures_are_not_written_over(model: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "a_overlay.jpg").write_bytes(b"mine")
    done = predict(model, tmp_path / "a.jpg", "--out", tmp_path, "--overlay")
    assert done.exit_code == 2
    assert "a_overlay.jpg, which is not of an earlier run" in done.output
    assert (tmp_path / "a_overlay.jpg").read_bytes() == b"mine"
    assert predict(model, tmp_path / "a.jpg", "--out", tmp_path).exit_code == 0


@pytest.mark.parametrize("pattern", ["", "/**/*.png"])
def test_results_are_no_inputs_of_the_next_run(
    model: Path, photos: Path, tmp_path: Path, pattern: str
) -> None:
    out = photos / "out"
    assert "13 of 13" in predict(model, f"{photos}{pattern}", "--out", out, "--overlay").output
    again = predict(model, f"{photos}{pattern}", "--out", out, "--overlay")
    assert "13 were already done" in again.output
    assert again.exit_code == 0


@pytest.mark.parametrize("given", ["a.jpg", "", "*.jpg", "in"])
def test_results_may_lie_beside_their_pictures(model: Path, tmp_path: Path, given: str) -> None:
    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "in/a.jpg")
    picture(0).save(tmp_path / "a.jpg")
    inputs = str(tmp_path / given)
    first = predict(model, inputs, "--out", tmp_path, "--overlay")
    assert first.exit_code == 0, first.output
    pictures = sorted(tmp_path.rglob("*"))
    again = predict(model, inputs, "--out", tmp_path, "--overlay")
    assert again.exit_code == 0, again.output
    assert sorted(tmp_path.rglob("*")) == pictures


def test_a_name_that_is_too_long_for_its_results(model: Path, photos: Path, tmp_path: Path) -> None:
    picture(0).save(photos / f"{'n' * 245}.png")
    done = predict(model, photos, "--out", tmp_path / "out", "--overlay")
    assert done.exit_code == 2
    assert "13 of 14" in done.output
    assert len(list((tmp_path / "out").glob("*.png"))) == 13
    errors = [line for line in manifest(tmp_path / "out") if line["status"] == "error"]
    assert [line["error"].partition(": ")[2] for line in errors] == [
        "its results' names would be too long; give it a shorter one"
    ]


def test_a_picture_too_wide_for_its_overlay(model: Path, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (65_501, 1)).save(photos / "wide.png")
    done = predict(model, photos, "--out", tmp_path / "out", "--overlay")
    assert done.exit_code == 2
    assert "13 of 14" in done.output
    errors = [line["error"] for line in manifest(tmp_path / "out") if line["status"] == "error"]
    assert len(errors) == 1
    assert "wide.png: 65501x1 is too large for a JPEG file" in errors[0]
    assert len(masks(tmp_path / "out")) == 13


def test_a_file_that_vanishes_is_an_error_line(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = danet.bulk.list_pictures

    def vanishing(inputs: list[Input], *, overlay: bool) -> Iterator[WorkItem]:
        (photos / "03.png").unlink()
        return real(inputs, overlay=overlay)

    monkeypatch.setattr("danet.bulk.list_pictures", vanishing)
    done = predict(model, photos, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "03.png: cannot be read" in done.output
    assert len(masks(tmp_path / "out")) == 12


def test_broken_files_are_in_the_manifest_and_strict_stops(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "04.png").write_bytes(b"no picture")
    done = predict(model, photos, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "12 of 13" in done.output
    errors = [line for line in manifest(tmp_path / "out") if line["status"] == "error"]
    assert [line["input"] for line in errors] == [str(photos / "04.png")]
    assert "not a picture" in errors[0]["error"]
    stopped = predict(model, photos, "--out", tmp_path / "strict", "--strict")
    assert isinstance(stopped.exception, UserError)
    assert "not a picture" not in stopped.output  # it is told once, where it ends
    assert len(masks(tmp_path / "strict")) < 12


def test_processes_share_the_work(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(model, photos, "--out", tmp_path / "alone")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        done = predict(model, photos, "--out", tmp_path / "shared")
        assert f"{5 if rank == 0 else 4} of {5 if rank == 0 else 4}" in done.output
    # Batches differ, and with them the last bits: the masks are the same but for ties.
    alone, shared = masks(tmp_path / "alone"), masks(tmp_path / "shared")
    assert alone.keys() == shared.keys()
    for name in alone:
        pair = [np.asarray(Image.open(io.BytesIO(found[name]))) for found in (alone, shared)]
        assert (pair[0] == pair[1]).mean() > 0.999
    assert len(manifest(tmp_path / "shared")) == 13


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


def test_a_picture_named_in_two_ways_is_one(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    name = f"{photos.name}/01.png"
    done = predict(model, name, f"./{name}", photos / "01.png", "--out", tmp_path / "out")
    assert "1 of 1" in done.output
    assert set(masks(tmp_path / "out")) == {"01.png"}


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


def test_lists_of_files(photos: Path, tmp_path: Path) -> None:
    names = [str(photos / "00.png"), "", f"  {photos / '01.png'}", str(photos / "absent.png")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    found, problems = find_inputs([f"@{tmp_path / 'list.txt'}", "@nowhere.txt"])
    assert [one.path for one in found] == [photos / "00.png", photos / "01.png"]
    assert len(problems) == 2


def test_subfolders_that_may_not_be_read_are_told(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = photos / "locked"
    locked.mkdir()
    scan = os.scandir

    def refuse(folder: Path | str) -> Any:
        if Path(folder) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found, problems = find_inputs([str(photos)])
    assert problems == [f"{locked}: cannot be searched (Permission denied)"]
    assert found


def test_names_that_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a line of its own, and the other inputs are found."""
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    real = os.stat

    def guarded(path: object, *arguments: object, **named: object) -> os.stat_result:
        if str(path).endswith("closed/a.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", guarded)
    wrong = ["x" * 300, "foo**.jpg", f"{tmp_path}/closed/a.png", f"{tmp_path}/loop.png"]
    results = Results(tmp_path / "out", overlay=True, frame_masks=True)
    found, problems = find_inputs([*wrong, str(tmp_path / "good.png")], results)
    assert [one.path for one in found] == [tmp_path / "good.png"]
    assert [problem.partition(": ")[0] for problem in problems] == wrong


def test_memory_holds_a_few_pictures(
    network: danet.DANet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture of another size: none fills a batch, yet they do not pile up."""
    for index in range(60):
        Image.new("RGB", (10 + index, 20)).save(tmp_path / f"{index:02}.png")
    predictor = danet.Predictor(network, device="cpu", precision="fp32")
    begun = finished = largest = 0
    real = danet.work_items.open_image

    def counted(source: Path) -> Image.Image:
        nonlocal begun, largest
        begun += 1
        largest = max(largest, begun - finished)
        return real(source)

    monkeypatch.setattr("danet.work_items.open_image", counted)
    pictures, _ = find_inputs([str(tmp_path)])
    out = tmp_path / "out"
    out.mkdir()
    share = Share(0, 1)
    for _ in segment_inputs(
        predictor,
        pictures,
        Results(out, overlay=False, frame_masks=False),
        share=share,
        on_frame=lambda *_: None,
    ):
        finished += 1
    assert finished == 60
    assert largest <= DECODED_AHEAD + 10


def test_pictures_that_do_not_fit_the_memory_are_reported_and_passed_over(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = danet.Predictor.segment_batch

    def little_memory(self: danet.Predictor, images: np.ndarray) -> list[danet.Segmentation]:
        if len(images) > 1 or images.shape[1:3] == (50, 33):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return real(self, images)

    monkeypatch.setattr(danet.Predictor, "segment_batch", little_memory)
    done = predict(model, photos, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert len(masks(tmp_path / "out")) == 10
    errors = [line["error"] for line in manifest(tmp_path / "out") if line["status"] == "error"]
    assert len(errors) == 3
    assert all("out of memory at 33x50; make it smaller" in error for error in errors)


def test_a_manifest_that_is_a_link_is_not_followed(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    for name in ("manifest.jsonl", ".00.tmp.png", "00.png"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    refused = predict(model, photos, "--out", tmp_path / "out")
    assert isinstance(refused.exception, UserError)
    assert "manifest.jsonl: cannot be written" in str(refused.exception)
    (tmp_path / "out" / "manifest.jsonl").unlink()
    assert predict(model, photos, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "00.png").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_manifest_goes_on_after_an_unfinished_line(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert predict(model, photos / "00.png", "--out", out).exit_code == 0
    path = out / "manifest.jsonl"
    path.write_text(path.read_text() + '{"input": "half')
    assert predict(model, photos, "--out", out).exit_code == 0
    lines = path.read_text().splitlines()
    assert lines[1] == '{"input": "half'
    assert [json.loads(line)["status"] for line in lines[:1] + lines[2:]] == ["ok"] * 13


ORIGIN = Origin("/photos/p.jpg", 1, 2)
ALONE, FIRST, SECOND = Share(0, 1), Share(0, 2), Share(1, 2)


def test_the_later_line_of_a_result_counts_in_whichever_manifest_it_is(tmp_path: Path) -> None:
    for share, model, name in (
        (ALONE, "old", "x"),
        (FIRST, "new", "x"),
        (FIRST, "new", "y"),
        (ALONE, "old", "y"),
    ):
        with Manifest(tmp_path, share, model) as lines:
            lines.append(name, ORIGIN, {"mask": f"{name}.png"}, None)
    assert finished_results(tmp_path, "old") == {"y.png": ORIGIN}
    assert finished_results(tmp_path, "new") == {"x.png": ORIGIN}


def test_what_a_process_was_stopped_at_is_not_finished_when_another_ends(tmp_path: Path) -> None:
    """Even if the same model wrote it before."""
    results = {name: {"mask": f"{name}.png"} for name in "ab"}
    stopped, ended = (Manifest(tmp_path, share, "m") for share in (FIRST, SECOND))
    stopped.append("a", ORIGIN, results["a"], None)
    for lines, name in ((stopped, "a"), (ended, "b")):
        lines.begin([(name, ORIGIN, results[name])])
    ended.append("b", ORIGIN, results["b"], None)
    ended.__exit__(None)
    stopped.__exit__(KeyboardInterrupt)
    with Manifest(tmp_path, FIRST, "m"):
        assert finished_results(tmp_path, "m") == {"b.png": ORIGIN}


def test_a_rerun_in_the_folder_of_the_pictures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are known to be its own, though the folder is named by a dot."""
    picture(0).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert "1 of 1" in predict(model, "a.jpg", "--out", ".").output
    again = predict(model, "a.jpg", "--out", ".")
    assert again.exit_code == 0, again.output
    assert "1 were already done" in again.output


def test_file_names_cannot_steer_the_terminal(model: Path, tmp_path: Path) -> None:
    evil = tmp_path / "\x1b[31m\x1b]0;title\x07.png"
    evil.write_text("no picture")
    done = predict(model, evil, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "\\x1b[31m" in done.output
    assert "\x1b" not in done.output


@pytest.mark.slow
def test_killed_at_several_moments_nothing_is_half_written(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    predict(model, photos, "--out", tmp_path / "alone", "--overlay")
    out = tmp_path / "killed"
    arguments = ["predict", str(model), str(photos), f"--out={out}", "--overlay"]
    for moment in (1, 4, 9):
        process = forked.start(tmp_path, *arguments, "--precision=fp32")
        while process.is_alive() and len(list(out.glob("[!.]*.png"))) < moment:
            time.sleep(0.001)
        process.kill()
        process.wait()
        for path in out.glob("[!.]*.png"):
            Image.open(path).load()
    assert forked.run(tmp_path, *arguments, "--precision=fp32").status == 0
    assert masks(out).keys() == masks(tmp_path / "alone").keys()
    assert not list(out.glob(".*"))


def test_hidden_pictures_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png"):
        picture(0).save(tmp_path / name)
    found, _ = find_inputs([str(tmp_path)])
    assert [one.path.name for one in found] == ["a.png"]


def test_an_archive_has_no_result_of_its_own_name(tmp_path: Path) -> None:
    for name in ("photos.tar", "photos.png"):
        (tmp_path / name).touch()
    results = Results(tmp_path, overlay=False, frame_masks=False)
    found, problems = find_inputs([str(tmp_path / "photos.tar")], results)
    assert (len(found), problems) == (1, [])


def test_lists_as_windows_editors_write_them(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'a.png'}\n", encoding="utf-8-sig")
    found, problems = find_inputs([f"@{tmp_path / 'list.txt'}"])
    assert (len(found), problems) == (1, [])


def test_paths_in_one_word_may_be_taken() -> None:
    stems = output_stems([Path("a/b.jpg"), Path("c/b.jpg"), Path("a_b_jpg.png")])
    assert len(set(stems.values())) == 3


def segment_all(
    segmenter: danet.Predictor, inputs: list[Path], out: Path
) -> list[tuple[str, str | None]]:
    out.mkdir()
    results = Results(out, overlay=False, frame_masks=True)
    found, _ = find_inputs([str(path) for path in inputs], results)
    outcomes = segment_inputs(
        segmenter, found, results, share=Share(0, 1), on_frame=lambda *_: None
    )
    return sorted((Path(outcome.item.name).name, outcome.error) for outcome in outcomes)


def test_of_a_pair_that_needs_too_much_memory_both_are_segmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = danet.Predictor(tiny_danet(3), device="cpu", precision="fp32")
    segment = predictor.segment_batch

    def one_at_a_time(images: Any) -> Any:
        if len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return segment(images)

    monkeypatch.setattr(predictor, "segment_batch", one_at_a_time)
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    found = segment_all(predictor, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
    assert found == [("a.png", None), ("b.png", None)]


def test_long_names_in_an_archive_are_cut(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    name = f"{'x' * 250}.png"
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "a.png", name)
    predictor = danet.Predictor(tiny_danet(3), device="cpu", precision="fp32")
    found = segment_all(predictor, [tmp_path / "t.tar"], tmp_path / "out")
    assert found == [(f"t.tar:{name}", None)]
