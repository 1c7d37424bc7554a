import errno
import json
import re
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import danet
from danet.cli import app
from danet.data.scenes import render
from danet.errors import UserError
from danet.video import segment_video
from networks import tiny_danet
from videos import RATE, make_video


@pytest.fixture(scope="module")
def model() -> danet.DANet:
    return tiny_danet()


@pytest.fixture(scope="module")
def predictor(model: danet.DANet) -> danet.Predictor:
    return danet.Predictor(model, device="cpu", precision="fp32")


def read(path: Path) -> tuple[list[np.ndarray], list[float], av.VideoStream]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return (
            [frame.to_ndarray(format="rgb24") for frame in frames],
            [float(frame.time) for frame in frames],
            container.streams.video[0],
        )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("size", [(96, 64), (75, 53)])
def test_rate_size_and_every_frame_are_kept(
    predictor: danet.Predictor, tmp_path: Path, suffix: str, size: tuple[int, int]
) -> None:
    source = make_video(tmp_path / f"a{suffix}", size=size)
    found = segment_video(predictor, source, tmp_path, "a", overlay=True, masks=True)
    assert found.frames == 10
    assert found.problem is None
    before, times, _ = read(source)
    after, new_times, stream = read(tmp_path / "a_overlay.mp4")
    assert (stream.width, stream.height) == size
    assert float(stream.average_rate) == pytest.approx(float(RATE), rel=0.02)
    shift = np.array(new_times) - np.array(times)
    np.testing.assert_allclose(shift - shift[0], 0, atol=2e-3)
    for index, picture in enumerate(before):
        expected = predictor(picture)
        mask = Image.open(tmp_path / "a" / f"{index:06}.png")
        assert mask.mode == "P"
        assert (np.asarray(mask) == expected.classes).mean() > 0.999
        overlay = np.asarray(expected.overlay(Image.fromarray(picture))).astype(int)
        assert np.abs(after[index] - overlay).mean() < 8


def test_frames_of_uneven_times_stay_where_they_are(
    predictor: danet.Predictor, tmp_path: Path
) -> None:
    times = [0, 40, 90, 300, 310, 700]
    source = make_video(tmp_path / "a.mkv", frames=6, times=times)
    segment_video(predictor, source, tmp_path, "a", overlay=True, masks=False)
    np.testing.assert_allclose(read(tmp_path / "a_overlay.mp4")[1], read(source)[1], atol=2e-3)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_segmented_like_single_pictures(model: danet.DANet, flip: bool) -> None:
    test = model.metadata.test.model_copy(update={"flip": flip, "ratios": (0.5, 1.0)})
    predictor = danet.Predictor(model, device="cpu", precision="fp32", test=test)
    pictures = np.stack([np.asarray(render(2, i)[0].resize((60, 44))) for i in range(3)])
    for picture, found in zip(pictures, predictor.segment_batch(pictures), strict=True):
        assert (found.classes == predictor(picture).classes).mean() > 0.999


def test_what_can_be_read_of_a_cut_video_is_kept(
    predictor: danet.Predictor, tmp_path: Path
) -> None:
    whole = make_video(tmp_path / "whole.ts", frames=20).read_bytes()
    cut = tmp_path / "cut.mp4"
    make_video(cut, frames=20)
    (tmp_path / "cut.ts").write_bytes(whole[: len(whole) // 2])
    found = segment_video(predictor, tmp_path / "cut.ts", tmp_path, "cut", overlay=True, masks=True)
    assert 3 <= found.frames < 20
    assert len(read(tmp_path / "cut_overlay.mp4")[0]) == found.frames
    # An MP4's index is at its end: without it nothing can be found.
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a video that can be read"):
        segment_video(predictor, cut, tmp_path, "b", overlay=True, masks=True)
    assert not (tmp_path / "b_overlay.mp4").exists()


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "libx264"), (".webm", "libvpx-vp9")])
def test_a_cut_video_that_counts_no_frames_is_told_by_its_length(
    suffix: str, codec: str, predictor: danet.Predictor, tmp_path: Path
) -> None:
    whole = make_video(tmp_path / f"whole{suffix}", frames=20, codec=codec)
    assert segment_video(predictor, whole, tmp_path, "w", overlay=False, masks=True).problem is None
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = segment_video(predictor, cut, tmp_path, "c", overlay=False, masks=True)
    assert 0 < found.frames < 20
    assert re.fullmatch(rf"{re.escape(str(cut))}: ends at 0\.\d of 0\.7 s", found.problem)


def test_frames_shown_longer_than_others_are_not_missed(
    predictor: danet.Predictor, tmp_path: Path
) -> None:
    times = [0, 33, 66, 100, 900, 933]
    path = make_video(tmp_path / "uneven.mkv", frames=6, times=times)
    assert segment_video(predictor, path, tmp_path, "u", overlay=False, masks=True).problem is None


def test_damaged_parts_are_told(predictor: danet.Predictor, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", frames=20)
    content = bytearray(source.read_bytes())
    start = content.index(b"mdat") + 2000
    rng = np.random.default_rng(0)
    content[start : start + 3000] = rng.integers(0, 256, 3000, dtype=np.uint8).tobytes()
    source.write_bytes(content)
    found = segment_video(predictor, source, tmp_path, "a", overlay=True, masks=False)
    assert 1 <= found.frames < 20
    assert found.problem is not None
    assert "a.mp4" in found.problem


def test_memory_holds_a_few_frames(
    predictor: danet.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video(tmp_path / "a.mp4", frames=11)
    sizes = []
    real = danet.Predictor.segment_batch

    def counted(self: danet.Predictor, images: np.ndarray) -> list[danet.Segmentation]:
        sizes.append(len(images))
        return real(self, images)

    monkeypatch.setattr(danet.Predictor, "segment_batch", counted)
    segment_video(predictor, source, tmp_path, "a", overlay=False, masks=True)
    assert sizes == [4, 4, 3]


def test_predict_writes_overlays_and_masks_of_a_video(model: danet.DANet, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    make_video(tmp_path / "good.mp4", frames=3)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    render(2, 1)[0].resize((60, 40)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    inputs = [str(tmp_path / name) for name in ("good.mp4", "bad.mp4", "photo.png")]
    run = CliRunner()
    command = ["predict", str(tmp_path / "model"), *inputs, "--out", str(out)]
    done = run.invoke(app, [*command, "--overlay"])
    assert done.exit_code == 2
    assert "bad.mp4: not a video that can be read" in done.output
    assert "2 of 3 pictures and videos segmented" in done.output
    names = sorted(path.name for path in out.iterdir())
    assert names == ["good_overlay.mp4", "manifest.jsonl", "photo.png", "photo_overlay.jpg"]
    assert run.invoke(app, command).exit_code == 2
    assert len(list((out / "good").iterdir())) == 3


def predict(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", str(model), *map(str, arguments)])


@pytest.fixture(scope="module")
def model_folder(model: danet.DANet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def test_videos_and_archives_are_not_written_over_pictures(
    model_folder: Path, tmp_path: Path
) -> None:
    make_video(tmp_path / "a.mp4", frames=1)
    make_video(tmp_path / "clip.mp4", frames=1)
    for name in ("a.png", "clip/000000.png", "t_000000_b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        render(2, 1)[0].resize((60, 40)).save(tmp_path / name)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "b.png")
    pictures = [tmp_path / name for name in ("a.png", "clip/000000.png", "t_000000_b.png")]
    before = [path.read_bytes() for path in pictures]
    inputs = [tmp_path / name for name in ("a.mp4", "clip.mp4", "t.tar")]
    refused = predict(model_folder, *pictures, *inputs, "--out", tmp_path)
    assert refused.exit_code == 2
    for name, over in (("a.png", "it"), ("clip.mp4", pictures[1]), ("t.tar", pictures[2])):
        assert f"{name}: results would be written over {over}; choose another" in refused.output
    assert [path.read_bytes() for path in pictures] == before
    assert "2 of 2" in refused.output


def test_a_rerun_passes_over_videos_and_their_masks(model_folder: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", frames=2)
    render(2, 1)[0].resize((60, 40)).save(tmp_path / "photo.jpg")
    inputs = (tmp_path, tmp_path / "clip.mp4", "--out", tmp_path)
    assert "2 of 2" in predict(model_folder, *inputs).output
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    again = predict(model_folder, *inputs)
    assert again.exit_code == 0
    assert "0 of 2 pictures and videos segmented" in again.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == written
    # An overlay was not made yet, and a changed video is another.
    assert "2 of 2" in predict(model_folder, *inputs, "--overlay").output
    make_video(tmp_path / "clip.mp4", frames=3)
    assert "1 of 2" in predict(model_folder, *inputs).output
    assert len(list((tmp_path / "clip").iterdir())) == 3


def test_a_video_that_fails_leaves_the_others(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "large.mp4", frames=1, size=(128, 64))
    make_video(tmp_path / "small.mp4", frames=1)
    real = danet.Predictor.segment_batch

    def little_memory(self: danet.Predictor, images: np.ndarray) -> list[danet.Segmentation]:
        if images.shape[2] == 128:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return real(self, images)

    monkeypatch.setattr(danet.Predictor, "segment_batch", little_memory)
    videos = (tmp_path / "large.mp4", tmp_path / "small.mp4")
    done = predict(model_folder, *videos, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "large.mp4: out of memory at the size of its frames" in done.output
    assert (tmp_path / "out/small/000000.png").exists()


def test_a_video_that_cannot_be_encoded(model_folder: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "long.mkv", frames=1, size=(20_000, 2), codec="ffv1")
    make_video(tmp_path / "small.mp4", frames=1)
    videos = (tmp_path / "long.mkv", tmp_path / "small.mp4")
    done = predict(model_folder, *videos, "--out", tmp_path / "out", "--overlay")
    assert done.exit_code == 2
    assert "a video of 20000x2 cannot be encoded" in done.output
    assert "1 of 2" in done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.jsonl", "small_overlay.mp4"]


def test_frames_of_an_earlier_longer_video_are_removed(model_folder: Path, tmp_path: Path) -> None:
    for frames in (6, 3):
        make_video(tmp_path / "a.mp4", frames=frames)
        done = predict(model_folder, tmp_path / "a.mp4", "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        (tmp_path / "out/a/notes.png").touch()
    names = sorted(path.name for path in (tmp_path / "out/a").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "notes.png"]


@pytest.mark.parametrize("overlay", [False, True])
def test_what_lies_beside_a_video_is_not_written_over(
    overlay: bool, model_folder: Path, tmp_path: Path
) -> None:
    make_video(tmp_path / "a.mp4", frames=3)
    mine = tmp_path / ("a_overlay.mp4" if overlay else "a/000000.png")
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    options = ["--overlay"] if overlay else []
    done = predict(model_folder, tmp_path / "a.mp4", "--out", tmp_path, *options)
    assert done.exit_code == 2
    assert "which is not of an earlier run" in done.output
    assert mine.read_bytes() == b"mine"
    # Other results of it are in nobody's way, and its own may be written anew.
    options = [] if overlay else ["--overlay"]
    for _ in range(2):
        done = predict(model_folder, tmp_path / "a.mp4", "--out", tmp_path, *options)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2),
        (KeyboardInterrupt(), 130),  # which does not live to say so
    ],
)
def test_masks_of_a_video_that_fails_are_not_an_earlier_runs(
    failure: BaseException,
    status: int,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has written over some of them."""
    source = make_video(tmp_path / "a.mp4", frames=6)
    out = tmp_path / "out"
    assert predict(model_folder, source, "--out", out).exit_code == 0
    tiny_danet(4).save_pretrained(tmp_path / "other")
    real = danet.Predictor.segment_batch

    def failing(self: danet.Predictor, images: np.ndarray) -> list[danet.Segmentation]:
        if len(images) < 4:  # the last frames
            raise failure
        return real(self, images)

    with monkeypatch.context() as once:
        once.setattr(danet.Predictor, "segment_batch", failing)
        assert predict(tmp_path / "other", source, "--out", out).exit_code == status
    again = predict(model_folder, source, "--out", out)
    assert "1 of 1" in again.output
    assert "already" not in again.output


def test_processes_share_videos(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [make_video(tmp_path / f"{name}.mp4", frames=1) for name in "abc"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, number in enumerate((2, 1)):
        monkeypatch.setenv("RANK", str(rank))
        done = predict(model_folder, *videos, "--out", tmp_path / "out")
        assert f"{number} of {number}" in done.output
    masks = sorted(path.parent.name for path in (tmp_path / "out").glob("*/000000.png"))
    assert masks == ["a", "b", "c"]


def test_a_full_disk_ends_the_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        make_video(tmp_path / f"{name}.mp4", frames=2)

    def full(*_: object) -> None:
        av.error.err_check(-errno.ENOSPC)

    monkeypatch.setattr("danet.video._Writer._encode", full)
    videos = [tmp_path / f"{name}.mp4" for name in "ab"]
    done = predict(model_folder, *videos, "--out", tmp_path / "out", "--overlay")
    assert isinstance(done.exception, UserError)
    assert "cannot be written (No space left on device)" in str(done.exception)
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_frames_without_times_are_a_frame_apart(predictor: danet.Predictor, tmp_path: Path) -> None:
    """As in a stream without a container."""
    source = make_video(tmp_path / "a.h264", frames=6, codec="libx264")
    with av.open(str(source)) as container:
        assert all(frame.pts is None for frame in container.decode(video=0))
    segment_video(predictor, source, tmp_path, "a", overlay=True, masks=False)
    times = read(tmp_path / "a_overlay.mp4")[1]
    with av.open(str(source)) as container:
        rate = float(container.streams.video[0].average_rate)
    np.testing.assert_allclose(times, np.arange(6) / rate, atol=2e-3)


def test_frames_that_no_run_wrote_stay(model_folder: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", frames=3)
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/000007.png").touch()
    done = predict(model_folder, tmp_path / "a.mp4", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/a/000007.png").exists()


def test_a_video_that_cannot_be_read_has_no_results(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"nothing")
    done = predict(model_folder, tmp_path / "v.mp4", "--out", tmp_path / "out")
    assert done.exit_code == 2
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line).get("frames") for line in lines] == [None]
