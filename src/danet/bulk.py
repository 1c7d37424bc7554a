"""Segmenting many inputs: pictures decoded ahead and batched by size, videos frame by frame.

Each item gets a line in a manifest. Several processes started by torchrun share the work, and each
writes its own manifest. A rerun skips what an earlier run finished with the same model, if the
input is still the same file and no later run overwrote its results.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.inputs import Input, Results
from danet.manifest import Manifest, Origin, earlier_results, finished_results
from danet.predict import Segmenter
from danet.processes import Share
from danet.segmentation import Segmentation, write_segmentation
from danet.threads import map_ahead
from danet.work_items import WorkItem, list_pictures, video_item

BATCH = 4
"""Pictures of one size that go through the network together."""
DECODED_AHEAD = 16
"""Most decoded pictures that wait for others of their size; half as many again are decoded."""
_THREADS = 2


class Outcome(NamedTuple):
    """The outcome for one picture or video.

    Attributes:
        error: why it, or the rest of a video, could not be segmented; None if it was.
        written: the names of the results that this run wrote, by kind.
    """

    item: WorkItem
    error: str | None
    written: Mapping[str, str]


def segment_inputs(
    predictor: Segmenter,
    inputs: Sequence[Input],
    results: Results,
    *,
    share: Share,
    on_frame: Callable[[Path, int], None],
) -> Iterator[Outcome]:
    """Segments this process's share of pictures, tar archives and videos, yielding each outcome.

    The manifest names the model by its fingerprint and each input by its `Origin`, so that results
    of other models, or of other files of the same name, are computed again.

    Args:
        on_frame: called after each frame with the video and its announced number of frames.
    """
    pictures = list_pictures([one for one in inputs if not one.is_video], overlay=results.overlay)
    videos = [video_item(one, results.of(one)) for one in inputs if one.is_video]
    own_pictures = islice(pictures, share.rank, None, share.processes)
    own_videos = videos[share.rank :: share.processes]
    model = predictor.fingerprint()
    finished = finished_results(results.folder, model)
    with Manifest(results.folder, share, model) as manifest:
        run = _Run(predictor, results.folder, finished, manifest)
        for outcome in chain(run.pictures(own_pictures), run.videos(own_videos, on_frame)):
            item, error, written = outcome
            if written or error is not None:  # else it was finished before, and has its line
                manifest.append(item.name, item.origin, written, error)
            yield outcome


class _Run(NamedTuple):
    """What segments the items, and where.

    Attributes:
        folder: of the results.
        finished: the origins of the results that earlier runs with this model finished, by name.
    """

    predictor: Segmenter
    folder: Path
    finished: dict[str, Origin]
    manifest: Manifest

    def _is_done(self, item: WorkItem) -> bool:
        return item.origin is not None and all(
            self.finished.get(result) == item.origin and (self.folder / result).exists()
            for result in item.results.values()
        )

    # Pictures

    def pictures(self, pictures: Iterator[WorkItem]) -> Iterator[Outcome]:
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting: dict[tuple[int, int], list[tuple[WorkItem, Image.Image]]] = {}
            for picture, image in map_ahead(pool, self._decode, pictures, BATCH * 2 - 1):
                if image is None or isinstance(image, str):
                    yield Outcome(picture, image, written={})
                    continue
                same_size = waiting.setdefault(image.size, [])
                same_size.append((picture, image))
                if len(same_size) == BATCH or sum(map(len, waiting.values())) == DECODED_AHEAD:
                    largest = max(waiting, key=lambda size: len(waiting[size]))
                    yield from self._batch(waiting.pop(largest), pool)
            for batch in waiting.values():
                yield from self._batch(batch, pool)

    def _decode(self, picture: WorkItem) -> Image.Image | str | None:
        """The decoded picture, an error message, or None if an earlier run finished it."""
        if self._is_done(picture):
            return None
        try:
            return picture.decoded()
        except UserError as error:
            return str(error)

    def _batch(
        self, batch: Sequence[tuple[WorkItem, Image.Image]], pool: ThreadPoolExecutor
    ) -> Iterator[Outcome]:
        found: list[Segmentation] | None = None
        first, image = batch[0]
        try:
            images = np.stack([np.asarray(image) for _, image in batch])
            found = self.predictor.segment_batch(images)
        except (RuntimeError, MemoryError, UserError) as error:
            too_large = is_out_of_memory(error)
            if not (too_large or isinstance(error, UserError)):
                raise
            advice = f"out of memory at {image.width}x{image.height}; make it smaller"
            problem = advice if too_large else str(error)
        # Not in the handler, where the error keeps the batch's tensors alive.
        if found is None and len(batch) > 1:
            for each in batch:
                yield from self._batch([each], pool)
            return
        if found is None:
            yield Outcome(first, f"{first.name}: {problem}", written={})
            return
        self.manifest.begin((picture.name, picture.origin, picture.results) for picture, _ in batch)
        written = [
            pool.submit(
                write_segmentation,
                one,
                image if "overlay" in picture.results else None,
                self.folder,
                picture.stem,
            )
            for one, (picture, image) in zip(found, batch, strict=True)
        ]
        for (picture, _), writing in zip(batch, written, strict=True):
            yield _written(picture, writing)

    # Videos

    def videos(
        self, videos: Sequence[WorkItem], on_frame: Callable[[Path, int], None]
    ) -> Iterator[Outcome]:
        for video in videos:
            if self._is_done(video):
                yield Outcome(video, None, written={})
            elif isinstance(video.source, UserError):
                yield Outcome(video, str(video.source), written={})
            else:
                yield self._video(video, on_frame)

    def _video(self, video: WorkItem, on_frame: Callable[[Path, int], None]) -> Outcome:
        """The outcome of one video; raises a UserError that would stop the next one too."""
        masks = self.folder.resolve() / video.stem
        renew = masks.is_dir() and masks in earlier_results(self.folder)
        self.manifest.begin([(video.name, video.origin, video.results)])
        frames = 0

        def count(path: Path, announced: int) -> None:
            nonlocal frames
            frames += 1
            on_frame(path, announced)

        try:
            return Outcome(video, self._write_video(video, count, renew=renew), video.results)
        except (RuntimeError, MemoryError, UserError) as error:
            if is_out_of_memory(error):
                problem = (
                    f"{video.name}: out of memory at the size of its frames; make them smaller"
                )
            elif isinstance(error, UserError) and not _is_full_disk(error):
                problem = str(error)
            else:
                raise
        # A video with overlay appears whole or not at all, but frames' masks one by one.
        kept = {kind: name for kind, name in video.results.items() if kind == "frames" and frames}
        return Outcome(video, problem, kept)

    def _write_video(
        self, video: WorkItem, on_frame: Callable[[Path, int], None], *, renew: bool
    ) -> str | None:
        """Returns why the rest of a video could not be read; None if all of it was.

        Args:
            renew: its folder of masks is an earlier run's.
        """
        path = Path(video.name)
        try:
            from danet.video import segment_video  # noqa: PLC0415 - few have what it needs
        except ModuleNotFoundError as error:
            raise UserError(
                f"{path}: videos need {error.name}: pip install 'danet[video]'"
            ) from error
        return segment_video(
            self.predictor,
            path,
            self.folder,
            video.stem,
            overlay="overlay" in video.results,
            masks="frames" in video.results,
            renew=renew,
            on_frame=lambda announced: on_frame(path, announced),
        ).problem


def _is_full_disk(error: UserError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _written(picture: WorkItem, future: Future[None]) -> Outcome:
    """The outcome of writing a picture; raises a UserError that would stop the next one too."""
    try:
        future.result()
    except UserError as error:
        problem = str(error)
        if isinstance(error.__cause__, OSError):
            if error.__cause__.errno != errno.ENAMETOOLONG:
                raise
            problem = "its results' names would be too long; give it a shorter one"
        return Outcome(picture, f"{picture.name}: {problem}", written={})
    return Outcome(picture, None, picture.results)
