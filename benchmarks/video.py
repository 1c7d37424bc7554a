"""Frames a second of a video with overlay, against the same frames as single pictures.

python benchmarks/video.py street-small
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image
from results_file import add_results_option, commit, write_rows

import danet
from danet.bench.report import hardware
from danet.data.scenes import render
from danet.segmentation import write_segmentation
from danet.video import segment_video


def make_video(path: Path, pictures: list[np.ndarray]) -> None:
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("model")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    predictor = danet.Predictor(args.model)
    pictures = [np.asarray(render(2, index)[0]) for index in range(args.frames)]
    rates: dict[str, list[float]] = {"video": [], "single pictures": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_video(folder / "video.mp4", pictures)
        predictor(pictures[0])
        for _ in range(args.rounds):
            start = time.perf_counter()
            segment_video(
                predictor, folder / "video.mp4", folder, "video", overlay=True, masks=False
            )
            rates["video"].append(args.frames / (time.perf_counter() - start))
            start = time.perf_counter()
            for picture in pictures:
                write_segmentation(predictor(picture), Image.fromarray(picture), folder, "picture")
            rates["single pictures"].append(args.frames / (time.perf_counter() - start))
    height, width = pictures[0].shape[:2]
    rows = []
    for form, values in rates.items():
        row = {"commit": commit(), "model": args.model, "form": form}
        row |= {"width": width, "height": height}
        row |= {"frames_per_second": round(statistics.median(values), 2), "rounds": args.rounds}
        rows.append({**row, "hardware": hardware("cpu")})
        print(rows[-1], flush=True)
    write_rows(args.results / "video.csv", rows)


if __name__ == "__main__":
    main()
