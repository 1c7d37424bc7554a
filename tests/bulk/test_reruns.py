import copy
import errno
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import danet
import danet.bulk
import forked
from danet.errors import UserError
from segmented import manifest, masks, picture, predict


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
