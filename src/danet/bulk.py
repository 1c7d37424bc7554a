"""Segmenting many inputs: pictures decoded ahead and batched by size, videos frame by frame.

Each item gets a line in a manifest. Several processes started by torchrun share the work, and each
writes its own manifest. A rerun skips what an earlier run finished with the same model, if the
input is still the same file and no later run overwrote its results.
"""

import errno
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from danet.data.archives import MAX_FILE_BYTES
from danet.data.images import IMAGE_SUFFIXES, open_image
from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.inputs import Input, Results
from danet.manifest import Manifest, Origin, earlier_results, finished_results
from danet.predict import Segmenter
from danet.processes import Share
from danet.result_names import member_stem, picture_results
from danet.segmentation import Segmentation, write_segmentation
from danet.threads import map_ahead

BATCH = 4
"""Pictures of one size that go through the network together."""
DECODED_AHEAD = 16
"""Most decoded pictures that wait for others of their size; half as many again are decoded."""
_THREADS = 2
_LONGEST_NAME = 100
_TAR_DAMAGE = (
    *(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError, RecursionError),
)
"""Raised while a damaged tar archive is read: the latter three from headers made up of nonsense."""


class WorkItem(NamedTuple):
    """A picture or a video to segment.

    Attributes:
        name: in the manifest.
        stem: the beginning of its results' names.
        source: its path, its bytes, or what is wrong with it.
        origin: None where it cannot be looked up.
        results: the names of what is to be written, by kind (`RESULT_KINDS`).
    """

    name: str
    stem: str
    source: Path | bytes | UserError
    origin: Origin | None
    results: dict[str, str]


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
    folder = results.folder
    pictures = list_pictures([one for one in inputs if not one.is_video], overlay=results.overlay)
    videos = [_video(one, results.of(one)) for one in inputs if one.is_video]
    model = predictor.fingerprint()
    finished = finished_results(folder, model)
    own_pictures = islice(pictures, share.rank, None, share.processes)
    own_videos = videos[share.rank :: share.processes]
    with Manifest(folder, share, model) as manifest:
        for outcome in chain(
            _segment_pictures(predictor, own_pictures, folder, finished, manifest),
            _segment_videos(predictor, own_videos, folder, finished, manifest, on_frame),
        ):
            item, error, written = outcome
            if written or error is not None:  # else it was finished before, and has its line
                manifest.append(item.name, item.origin, written, error)
            yield outcome


def _video(video: Input, results: dict[str, str]) -> WorkItem:
    path, stem = video
    try:
        return WorkItem(str(path), stem, path, _origin_of(path), results)
    except UserError as error:
        return WorkItem(str(path), stem, error, None, results)


def _origin_of(path: Path) -> Origin:
    """The origin of a file; raises a UserError if it cannot be looked up."""
    try:
        found = path.stat()
        return Origin(str(path.resolve()), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _segment_videos(
    predictor: Segmenter,
    videos: Sequence[WorkItem],
    folder: Path,
    finished: dict[str, Origin],
    manifest: Manifest,
    on_frame: Callable[[Path, int], None],
) -> Iterator[Outcome]:
    for video in videos:
        if _is_done(video, folder, finished):
            yield Outcome(video, None, written={})
        elif isinstance(video.source, UserError):
            yield Outcome(video, str(video.source), written={})
        else:
            yield _segment_video(predictor, video, folder, manifest, on_frame)


def _segment_video(
    predictor: Segmenter,
    video: WorkItem,
    folder: Path,
    manifest: Manifest,
    on_frame: Callable[[Path, int], None],
) -> Outcome:
    """The outcome of one video; raises a UserError that would stop the next one too."""
    masks = folder.resolve() / video.stem
    renew = masks.is_dir() and masks in earlier_results(folder)
    manifest.begin([(video.name, video.origin, video.results)])
    frames = 0

    def count(path: Path, announced: int) -> None:
        nonlocal frames
        frames += 1
        on_frame(path, announced)

    try:
        problem = _write_video(predictor, video, folder, count, renew=renew)
        return Outcome(video, problem, video.results)
    except (RuntimeError, MemoryError, UserError) as error:
        if is_out_of_memory(error):
            problem = f"{video.name}: out of memory at the size of its frames; make them smaller"
        elif isinstance(error, UserError) and not _is_full_disk(error):
            problem = str(error)
        else:
            raise
    # A video with overlay appears whole or not at all, but frames' masks one by one.
    kept = {kind: name for kind, name in video.results.items() if kind == "frames" and frames}
    return Outcome(video, problem, kept)


def _is_full_disk(error: UserError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_video(
    predictor: Segmenter,
    video: WorkItem,
    folder: Path,
    on_frame: Callable[[Path, int], None],
    *,
    renew: bool,
) -> str | None:
    """Returns why the rest of a video could not be read; None if all of it was.

    Args:
        renew: its folder of masks is an earlier run's.
    """
    path = Path(video.name)
    try:
        from danet.video import segment_video  # noqa: PLC0415 - few have what it needs
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: videos need {error.name}: pip install 'danet[video]'") from error
    return segment_video(
        predictor,
        path,
        folder,
        video.stem,
        overlay="overlay" in video.results,
        masks="frames" in video.results,
        renew=renew,
        on_frame=lambda announced: on_frame(path, announced),
    ).problem


def list_pictures(inputs: Sequence[Input], *, overlay: bool) -> Iterator[WorkItem]:
    """Lists the pictures in files: the files themselves, or the members of tar archives.

    Args:
        overlay: whether overlays are to be written besides masks.
    """
    for one in inputs:
        path, stem = one
        try:
            origin = _origin_of(path)
        except UserError as error:
            yield WorkItem(str(path), stem, error, None, {})
            continue
        if one.is_archive:
            yield from _pictures_of_tar(path, stem, origin, overlay)
        else:
            yield WorkItem(str(path), stem, path, origin, picture_results(stem, overlay=overlay))


def _pictures_of_tar(path: Path, stem: str, archived: Origin, overlay: bool) -> Iterator[WorkItem]:
    try:
        with tarfile.open(path) as archive:
            for index, member in enumerate(archive):
                name = Path(member.name)
                if not member.isfile() or name.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                # Not its folders, for an archive must not choose where files are written.
                own = member_stem(stem, index, name.stem[:_LONGEST_NAME])
                origin = archived._replace(path=f"{archived.path}:{member.name}")
                source: bytes | UserError
                if member.size > MAX_FILE_BYTES:
                    source = UserError(f"unpacks to over {MAX_FILE_BYTES >> 20} MiB; refused")
                elif "\0" in member.name:
                    source = UserError("its name contains a zero byte, which no file name may")
                else:
                    file = archive.extractfile(member)
                    assert file is not None
                    source = file.read()
                results = picture_results(own, overlay=overlay)
                yield WorkItem(f"{path}:{member.name}", own, source, origin, results)
    except _TAR_DAMAGE as error:
        problem = UserError(f"{path}: damaged, or not a tar archive ({error})")
        yield WorkItem(str(path), stem, problem, None, {})


def _segment_pictures(
    predictor: Segmenter,
    pictures: Iterator[WorkItem],
    folder: Path,
    finished: dict[str, Origin],
    manifest: Manifest,
) -> Iterator[Outcome]:
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: dict[tuple[int, int], list[tuple[WorkItem, Image.Image]]] = {}
        decode = partial(_decode, folder=folder, finished=finished)
        for picture, image in map_ahead(pool, decode, pictures, BATCH * 2 - 1):
            if image is None or isinstance(image, str):
                yield Outcome(picture, image, written={})
                continue
            same_size = waiting.setdefault(image.size, [])
            same_size.append((picture, image))
            if len(same_size) == BATCH or sum(map(len, waiting.values())) == DECODED_AHEAD:
                largest = max(waiting, key=lambda size: len(waiting[size]))
                yield from _segment_batch(predictor, waiting.pop(largest), folder, manifest, pool)
        for batch in waiting.values():
            yield from _segment_batch(predictor, batch, folder, manifest, pool)


def _is_done(item: WorkItem, folder: Path, finished: dict[str, Origin]) -> bool:
    return item.origin is not None and all(
        finished.get(result) == item.origin and (folder / result).exists()
        for result in item.results.values()
    )


def _decode(
    picture: WorkItem, folder: Path, finished: dict[str, Origin]
) -> Image.Image | str | None:
    """The decoded picture, an error message, or None if an earlier run finished it."""
    if _is_done(picture, folder, finished):
        return None
    try:
        if isinstance(picture.source, UserError):
            raise picture.source
        return open_image(picture.source)
    except UserError as error:
        message = str(error)
        return message if picture.name in message else f"{picture.name}: {message}"


def _segment_batch(
    predictor: Segmenter,
    batch: Sequence[tuple[WorkItem, Image.Image]],
    folder: Path,
    manifest: Manifest,
    pool: ThreadPoolExecutor,
) -> Iterator[Outcome]:
    found: list[Segmentation] | None = None
    first, image = batch[0]
    try:
        found = predictor.segment_batch(np.stack([np.asarray(image) for _, image in batch]))
    except (RuntimeError, MemoryError, UserError) as error:
        too_large = is_out_of_memory(error)
        if not (too_large or isinstance(error, UserError)):
            raise
        advice = f"out of memory at {image.width}x{image.height}; make it smaller"
        problem = advice if too_large else str(error)
    # Not in the handler, where the error keeps the batch's tensors alive.
    if found is None and len(batch) > 1:
        for each in batch:
            yield from _segment_batch(predictor, [each], folder, manifest, pool)
        return
    if found is None:
        yield Outcome(first, f"{first.name}: {problem}", written={})
        return
    manifest.begin((picture.name, picture.origin, picture.results) for picture, _ in batch)
    written = [
        pool.submit(
            write_segmentation,
            one,
            image if "overlay" in picture.results else None,
            folder,
            picture.stem,
        )
        for one, (picture, image) in zip(found, batch, strict=True)
    ]
    for (picture, _), writing in zip(batch, written, strict=True):
        yield _written(picture, writing)


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
