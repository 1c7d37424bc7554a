"""Videos for tests."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from danet.data.scenes import render

RATE = Fraction(30000, 1001)


def make_video(
    path: Path,
    frames: int = 10,
    size: tuple[int, int] = (96, 64),
    times: list[int] | None = None,
    codec: str = "libx264",
) -> Path:
    """A video of generated scenes, a new one in every frame; times in 1/1000 s if given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"crf": "10", "g": "3"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            picture = np.asarray(render(2, index)[0].resize(size))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
