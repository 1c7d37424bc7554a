"""Segmenting many pictures: decoded ahead, batched by size, one line of a manifest each.

Several processes started by torchrun share the work; each writes a manifest of its own. A rerun
passes over what an earlier one finished with the same model.
"""

import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from danet.data.images import IMAGE_SUFFIXES, open_image
from danet.errors import UserError
from danet.predict import Predictor, output_stems, write_segmentation

TAR_SUFFIX = ".tar"
BATCH = 4
"""Pictures of one size that go through the network together."""
DECODED_AHEAD = 16
"""Pictures in memory at most, those that wait for others of their size among them."""
_THREADS = 2


class Picture(NamedTuple):
    """A picture to segment.

    Attributes:
        name: what it is called in the manifest.
        stem: of its results' file names.
        source: its path, or its bytes.
        modified: seconds since the epoch.
    """

    name: str
    stem: str
    source: Path | bytes
    modified: float


class Outcome(NamedTuple):
    """What became of a picture: an error, or None if it was segmented now or before."""

    picture: Picture
    error: str | None
    done_before: bool = False


class Share(NamedTuple):
    """This process's part of the work, as torchrun numbers processes."""

    rank: int
    processes: int

    @classmethod
    def from_environment(cls) -> "Share":
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def list_pictures(paths: Sequence[Path]) -> Iterator[Picture]:
    """The pictures that files hold: themselves, or the pictures in tar archives.

    Raises:
        UserError: an archive cannot be read.
    """
    stems = output_stems(paths)
    for path in paths:
        if path.suffix.lower() == TAR_SUFFIX:
            yield from _pictures_of_tar(path)
        else:
            yield Picture(str(path), stems[path], path, path.stat().st_mtime)


def _pictures_of_tar(path: Path) -> Iterator[Picture]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name)
                if not member.isfile() or name.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                file = archive.extractfile(member)
                assert file is not None
                # Not the member's folders: an archive must not choose where files are written.
                stem = "_".join([path.stem, *_plain_parts(name.with_suffix(""))])
                yield Picture(f"{path}:{member.name}", stem, file.read(), path.stat().st_mtime)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or no tar archive ({error})") from error


def _plain_parts(name: Path) -> list[str]:
    return [part for part in name.parts if part not in (name.anchor, "..", ".")]


def segment_pictures(
    predictor: Predictor,
    pictures: Iterator[Picture],
    folder: Path,
    *,
    model: str,
    overlay: bool,
    share: Share,
) -> Iterator[Outcome]:
    """Segments this process's share, writes results and manifest, and tells of each picture.

    Args:
        model: how the manifest calls the model; results of another are made anew.
    """
    suffix = f"-{share.rank}-of-{share.processes}" if share.processes > 1 else ""
    finished = _finished(folder, model)
    own = islice(pictures, share.rank, None, share.processes)
    with (
        (folder / f"manifest{suffix}.jsonl").open("a", encoding="utf-8") as manifest,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        waiting: dict[tuple[int, int], list[tuple[Picture, Image.Image]]] = {}
        for picture, image in _decoded(own, folder, finished, pool):
            if image is None or isinstance(image, str):
                outcomes = [Outcome(picture, image, done_before=image is None)]
            else:
                same_size = waiting.setdefault(image.size, [])
                same_size.append((picture, image))
                if len(same_size) < BATCH and sum(map(len, waiting.values())) < DECODED_AHEAD:
                    continue
                largest = max(waiting, key=lambda size: len(waiting[size]))
                outcomes = _segment_batch(predictor, waiting.pop(largest), folder, overlay, pool)
            yield from _noted(outcomes, manifest.write, model)
        for batch in waiting.values():
            for first in range(0, len(batch), BATCH):
                part = batch[first : first + BATCH]
                outcomes = _segment_batch(predictor, part, folder, overlay, pool)
                yield from _noted(outcomes, manifest.write, model)


def _noted(
    outcomes: Sequence[Outcome], write: Callable[[str], object], model: str
) -> Iterator[Outcome]:
    for outcome in outcomes:
        if not outcome.done_before:
            line = {"input": outcome.picture.name, "model": model}
            line |= (
                {"status": "ok", "mask": f"{outcome.picture.stem}.png"}
                if outcome.error is None
                else {"status": "error", "error": outcome.error}
            )
            write(json.dumps(line, ensure_ascii=False) + "\n")
        yield outcome


def _finished(folder: Path, model: str) -> set[str]:
    """What earlier runs' manifests say this model segmented; unfinished lines are passed over."""
    names = set()
    for path in folder.glob("manifest*.jsonl"):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if entry["status"] == "ok" and entry["model"] == model:
                        names.add(entry["input"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
    return names


def _decoded(
    pictures: Iterator[Picture], folder: Path, finished: set[str], pool: ThreadPoolExecutor
) -> Iterator[tuple[Picture, Image.Image | str | None]]:
    """Each picture decoded, or what is wrong with it, or None if it was finished before."""
    ahead: deque[tuple[Picture, Future[Image.Image | str] | None]] = deque()
    for picture in pictures:
        done = picture.name in finished and _is_newer(folder / f"{picture.stem}.png", picture)
        ahead.append((picture, None if done else pool.submit(_decode, picture)))
        if len(ahead) >= BATCH * 2:
            first, future = ahead.popleft()
            yield first, None if future is None else future.result()
    for picture, future in ahead:
        yield picture, None if future is None else future.result()


def _decode(picture: Picture) -> Image.Image | str:
    try:
        return open_image(picture.source)
    except UserError as error:
        message = str(error)
        return message if picture.name in message else f"{picture.name}: {message}"


def _is_newer(mask: Path, picture: Picture) -> bool:
    return mask.exists() and mask.stat().st_mtime >= picture.modified


def _segment_batch(
    predictor: Predictor,
    batch: Sequence[tuple[Picture, Image.Image]],
    folder: Path,
    overlay: bool,
    pool: ThreadPoolExecutor,
) -> list[Outcome]:
    found = predictor.segment_batch(np.stack([np.asarray(image) for _, image in batch]))
    written = [
        pool.submit(write_segmentation, one, image if overlay else None, folder, picture.stem)
        for one, (picture, image) in zip(found, batch, strict=True)
    ]
    for future in written:
        future.result()
    return [Outcome(picture, None) for picture, _ in batch]
