"""Segmenting videos, a few frames at a time."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from danet.atomic import explaining_write_errors, replacing
from danet.data.images import MAX_PIXELS
from danet.errors import UserError, first_line
from danet.predict import Segmenter
from danet.result_names import video_name
from danet.segmentation import write_segmentation

FRAMES_TOGETHER = 4
"""Frames that go through the network at once, and that are in memory."""
_QUALITY = "20"
"""x264's constant rate factor: 18 looks lossless, 23 is its default."""
_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_WHOLE = 0.95
"""Of its stated length: shorter is not all of a video."""


class SegmentedVideo(NamedTuple):
    """The outcome for one video.

    Attributes:
        frames: segmented and written.
        problem: why the rest could not be read; None if all of it was.
    """

    frames: int
    problem: str | None


def segment_video(
    predictor: Segmenter,
    path: Path,
    folder: Path,
    stem: str,
    *,
    overlay: bool,
    masks: bool,
    renew: bool = False,
    on_frame: Callable[[int], None] = lambda _: None,
) -> SegmentedVideo:
    """Writes `STEM_overlay.mp4`, and `STEM/000000.png` and on, as palette PNGs of class ids.

    The video has the source's size (upright), frame times and rate, and no sound. Of a damaged
    source, what could be read is kept.

    Args:
        overlay: write the video.
        masks: write the class ids.
        renew: the folder of masks is an earlier run's, whose further frames are removed.
        on_frame: called after each frame with the number of frames that the video announces.

    Raises:
        UserError: it is no video that can be read, or nothing can be written there.
    """
    reader = _Reader(path)
    frames = 0
    with ExitStack() as stack:
        stack.enter_context(reader)
        writer = None
        if overlay:
            temporary = stack.enter_context(replacing(folder / video_name(stem)))
            writer = stack.enter_context(_Writer(temporary, reader))
        pending = reader.frames()
        while batch := list(islice(pending, FRAMES_TOGETHER)):
            pictures = np.stack([picture for _, picture in batch])
            for (time, picture), segmentation in zip(
                batch, predictor.segment_batch(pictures), strict=True
            ):
                if writer is not None:
                    writer.write(segmentation.overlay(Image.fromarray(picture)), time)
                if masks:
                    write_segmentation(segmentation, None, folder / stem, f"{frames:06}")
                frames += 1
                on_frame(reader.announced)
        if frames == 0:
            raise UserError(reader.problem or f"{path}: this video has no frames")
        if masks and renew:
            _remove_frames_from(frames, folder / stem)
    return SegmentedVideo(frames, reader.problem)


def _remove_frames_from(first: int, folder: Path) -> None:
    """Removes masks of an earlier, longer video of the same name."""
    with explaining_write_errors(folder):
        for path in folder.glob("*.png"):
            if re.fullmatch(r"\d{6,}", path.stem) and int(path.stem) >= first:
                path.unlink()


class _Timed(NamedTuple):
    """A frame's time in units of the stream's time base, and its upright RGB picture H W 3."""

    time: int
    picture: npt.NDArray[np.uint8]


class _Reader:
    """The frames of a video, upright and all of the first one's size.

    Attributes:
        announced: the number of frames that the video says it has; it may have fewer.
        problem: why not all of it could be read, once `frames` has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        try:
            self._container: InputContainer = av.open(path, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a video that can be read ({first_line(error)})"
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{path}: has no pictures, only {_kinds(self._container)}")
        self._stream: VideoStream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise UserError(f"{path}: no decoder for this video; convert it to MP4 (H.264) first")
        self._stream.thread_type = "AUTO"
        if self._stream.width * self._stream.height > MAX_PIXELS:
            self._container.close()
            raise UserError(f"{path}: frames of more than {MAX_PIXELS // 1_000_000} million pixels")
        self.rate = Fraction(self._stream.average_rate or 25)
        self.time_base = Fraction(self._stream.time_base or 1 / self.rate)
        self._ticks = max(1, round(1 / (self.rate * self.time_base)))  # from frame to frame
        length = self._stream.frames
        if not length and self._container.duration:
            length = round(self._container.duration / av.time_base * self.rate)
        self.announced = max(1, length)
        self._length = _stated_length(self._stream)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self) -> Iterator[_Timed]:
        damaged = count = 0
        size: tuple[int, int] | None = None
        earliest = expected = 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.FFmpegError as error:
                self.problem = f"{self.path}: ends after {count} frames ({first_line(error)})"
                return
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                size = size or (frame.width, frame.height)
                time = expected if frame.pts is None else max(frame.pts, earliest)
                earliest, expected = time + 1, time + self._ticks
                count += 1
                yield _Timed(time, _upright(frame, size))
        if damaged:
            self.problem = f"{self.path}: {damaged} damaged parts were skipped"
        elif self._stream.frames > count:
            self.problem = f"{self.path}: only {count} of {self._stream.frames} frames are there"
        elif self._length and not self._stream.frames:
            end, length = float(expected * self.time_base), float(self._length)
            if end < length - 3 / self.rate and end < _WHOLE * length:
                self.problem = f"{self.path}: ends at {end:.1f} of {length:.1f} s"


def _stated_length(stream: VideoStream) -> Fraction | None:
    """Seconds to the last frame's end; Matroska and WebM may say so, but count no frames."""
    stated = _DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    if stated is None:
        return None
    hours, minutes, seconds = map(Fraction, stated.groups())
    return 3600 * hours + 60 * minutes + seconds


def _upright(frame: VideoFrame, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def _kinds(container: InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


class _Writer:
    """A video of pictures of one size."""

    def __init__(self, path: Path, source: _Reader) -> None:
        self._container: OutputContainer = av.open(path, "w", format="mp4")
        try:
            self._stream: Any = self._container.add_stream(
                "libx264", rate=source.rate, options={"crf": _QUALITY}
            )
        except (av.FFmpegError, ValueError) as error:
            raise UserError(
                "videos with overlay need an FFmpeg with libx264; install the av package's wheel"
            ) from error
        self._stream.codec_context.time_base = source.time_base
        self._time_base = source.time_base
        self._started = False

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._started and kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def write(self, picture: Image.Image, time: int) -> None:
        try:
            self._encode(picture, time)
        except OSError:  # of the file, which PyAV's own errors may be, too
            raise
        except (av.FFmpegError, ValueError) as error:
            width, height = picture.size
            raise UserError(
                f"a video of {width}x{height} cannot be encoded ({first_line(error)}); write the "
                "frames' masks without --overlay"
            ) from error

    def _encode(self, picture: Image.Image, time: int) -> None:
        if not self._started:
            self._stream.width, self._stream.height = picture.size
            # Players want 4:2:0, which needs even sides.
            even = picture.width % 2 == picture.height % 2 == 0
            self._stream.pix_fmt = "yuv420p" if even else "yuv444p"
            self._started = True
        frame = VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        frame.pts, frame.time_base = time, self._time_base
        self._container.mux(self._stream.encode(frame))
