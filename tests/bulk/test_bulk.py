import copy
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import danet
import danet.bulk
import danet.work_items
from danet.bulk import DECODED_AHEAD, segment_inputs
from danet.errors import UserError
from danet.inputs import Input, Results, find_inputs, output_stems
from danet.processes import Share
from danet.work_items import WorkItem
from networks import tiny_danet
from segmented import manifest, masks, picture, predict, segment_all


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


def test_a_picture_named_in_two_ways_is_one(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    name = f"{photos.name}/01.png"
    done = predict(model, name, f"./{name}", photos / "01.png", "--out", tmp_path / "out")
    assert "1 of 1" in done.output
    assert set(masks(tmp_path / "out")) == {"01.png"}


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


def test_file_names_cannot_steer_the_terminal(model: Path, tmp_path: Path) -> None:
    evil = tmp_path / "\x1b[31m\x1b]0;title\x07.png"
    evil.write_text("no picture")
    done = predict(model, evil, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "\\x1b[31m" in done.output
    assert "\x1b" not in done.output


def test_hidden_pictures_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png"):
        picture(0).save(tmp_path / name)
    found, _ = find_inputs([str(tmp_path)])
    assert [one.path.name for one in found] == ["a.png"]


def test_lists_as_windows_editors_write_them(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'a.png'}\n", encoding="utf-8-sig")
    found, problems = find_inputs([f"@{tmp_path / 'list.txt'}"])
    assert (len(found), problems) == (1, [])


def test_paths_in_one_word_may_be_taken() -> None:
    stems = output_stems([Path("a/b.jpg"), Path("c/b.jpg"), Path("a_b_jpg.png")])
    assert len(set(stems.values())) == 3


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
