"""Segmenting all that was given: pictures decoded ahead, batched by size, a manifest's line each.

Several processes started by torchrun share the work; each writes a manifest of its own. A rerun
passes over what an earlier one finished with the same model, if the input is still the same file
and no later run wrote over its mask.
"""

import datetime
import errno
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from danet.atomic import explaining
from danet.data.images import IMAGE_SUFFIXES, open_image
from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.inputs import VIDEO_SUFFIXES, output_stems
from danet.jsonl import read_whole_lines
from danet.predict import Segmenter, write_segmentation
from danet.processes import Share

TAR_SUFFIX = ".tar"
BATCH = 4
"""Pictures of one size that go through the network together."""
DECODED_AHEAD = 16
"""Decoded pictures that wait for others of their size at most; half as many again are decoded."""
_THREADS = 2
_LONGEST_NAME = 100
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Origin(NamedTuple):
    """Tells a file from others of its name, and from what it was before a change.

    Attributes:
        path: resolved; of a picture in a tar archive the archive's, and the member's name.
        size: bytes of the file, or of the archive.
        mtime_ns: when that was last modified, nanoseconds since the epoch.
    """

    path: str
    size: int
    mtime_ns: int


class Picture(NamedTuple):
    """A picture, or a film, to segment.

    Attributes:
        name: what it is called in the manifest.
        stem: of its results' file names.
        source: its path, its bytes, or what is wrong with it.
        origin: None of a film, and of what cannot be read.
    """

    name: str
    stem: str
    source: Path | bytes | UserError
    origin: Origin | None

    @property
    def mask(self) -> str:
        """The mask's file name."""
        return f"{self.stem}.png"

    @property
    def overlay(self) -> str:
        """The file name of the picture with the classes over it."""
        return f"{self.stem}_overlay.jpg"


class Outcome(NamedTuple):
    """What became of a picture or film.

    Attributes:
        error: why it, or the rest of a film, could not be segmented; None if it was.
        written: whether anything was, this time.
    """

    picture: Picture
    error: str | None
    written: bool


def segment_inputs(
    predictor: Segmenter,
    paths: Sequence[Path],
    folder: Path,
    *,
    overlay: bool,
    frame_masks: bool,
    share: Share,
    on_frame: Callable[[Path, int], None],
) -> Iterator[Outcome]:
    """Segments this process's share of pictures, tar archives and films.

    Args:
        frame_masks: write the masks of films' frames too where `overlay` makes films.
        on_frame: called after each frame of a film with how many frames the film announces.
    """
    films = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    files = [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
    yield from segment_pictures(
        predictor, list_pictures(files), folder, overlay=overlay, share=share
    )
    stems = output_stems(films)
    for path in films[share.rank :: share.processes]:
        film = Picture(str(path), stems[path], path, origin=None)
        masks = frame_masks or not overlay
        try:
            problem = _segment_film(predictor, film, folder, overlay, masks, on_frame)
            yield Outcome(film, problem, written=True)
        except UserError as error:
            yield Outcome(film, str(error), written=False)


def _segment_film(
    predictor: Segmenter,
    film: Picture,
    folder: Path,
    overlay: bool,
    masks: bool,
    on_frame: Callable[[Path, int], None],
) -> str | None:
    """Returns what could not be read of it."""
    path = Path(film.name)
    try:
        from danet.video import segment_video  # noqa: PLC0415 - few have what it needs
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: films need {error.name}: pip install 'danet[video]'") from error
    return segment_video(
        predictor,
        path,
        folder,
        film.stem,
        overlay=overlay,
        masks=masks,
        on_frame=lambda announced: on_frame(path, announced),
    ).problem


def list_pictures(paths: Sequence[Path]) -> Iterator[Picture]:
    """The pictures that files hold: themselves, or the pictures in tar archives."""
    stems = output_stems(paths)
    for path in paths:
        try:
            found = path.stat()
            origin = Origin(str(path.resolve()), found.st_size, found.st_mtime_ns)
        except OSError as error:
            problem = UserError(f"{path}: cannot be read ({error.strerror})")
            yield Picture(str(path), stems[path], problem, None)
            continue
        if path.suffix.lower() == TAR_SUFFIX:
            yield from _pictures_of_tar(path, stems[path], origin)
        else:
            yield Picture(str(path), stems[path], path, origin)


def _pictures_of_tar(path: Path, stem: str, archived: Origin) -> Iterator[Picture]:
    try:
        with tarfile.open(path) as archive:
            for index, member in enumerate(archive):
                name = Path(member.name)
                if not member.isfile() or name.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                file = archive.extractfile(member)
                assert file is not None
                # Its number, for names may occur twice; not its folders, for an archive must not
                # choose where files are written.
                own = f"{stem}_{index:06}_{name.stem[:_LONGEST_NAME]}"
                origin = archived._replace(path=f"{archived.path}:{member.name}")
                yield Picture(f"{path}:{member.name}", own, file.read(), origin)
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = UserError(f"{path}: damaged or no tar archive ({error})")
        yield Picture(str(path), stem, problem, None)


def segment_pictures(
    predictor: Segmenter,
    pictures: Iterator[Picture],
    folder: Path,
    *,
    overlay: bool,
    share: Share,
) -> Iterator[Outcome]:
    """Segments this process's share, writes results and manifest, and tells of each picture.

    The manifest names the model by its weights and each input by its `Origin`, so that results of
    other models and of other files of the same name are made anew.
    """
    model = predictor.fingerprint()
    suffix = f"-{share.rank}-of-{share.processes}" if share.processes > 1 else ""
    finished = _finished(folder, model, overlay=overlay)
    own = islice(pictures, share.rank, None, share.processes)
    with (
        _Manifest(folder / f"manifest{suffix}.jsonl") as manifest,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        waiting: dict[tuple[int, int], list[tuple[Picture, Image.Image]]] = {}
        for picture, image in _decoded(own, folder, finished, overlay, pool):
            if image is None or isinstance(image, str):
                outcomes = [Outcome(picture, image, written=False)]
            else:
                same_size = waiting.setdefault(image.size, [])
                same_size.append((picture, image))
                if len(same_size) < BATCH and sum(map(len, waiting.values())) < DECODED_AHEAD:
                    continue
                largest = max(waiting, key=lambda size: len(waiting[size]))
                outcomes = _segment_batch(predictor, waiting.pop(largest), folder, overlay, pool)
            yield from _noted(outcomes, manifest, model, overlay=overlay)
        for batch in waiting.values():
            for first in range(0, len(batch), BATCH):
                part = batch[first : first + BATCH]
                outcomes = _segment_batch(predictor, part, folder, overlay, pool)
                yield from _noted(outcomes, manifest, model, overlay=overlay)


class _Manifest:
    """A file to whose end whole lines are written at once; use as a context manager.

    Raises:
        UserError: it cannot be written, or is a link, which may lead anywhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explaining(path):
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_LINKS, 0o666)
            last = b"\n"
            if os.lseek(self._file, 0, os.SEEK_END) > 0:
                os.lseek(self._file, -1, os.SEEK_END)
                last = os.read(self._file, 1)
        # A process that was killed, or a full disk, may have left a line unfinished.
        self._separator = b"" if last == b"\n" else b"\n"

    def __enter__(self) -> "_Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, entry: dict[str, str | int]) -> None:
        line = self._separator + json.dumps(entry).encode() + b"\n"
        with explaining(self.path):
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._separator = b""


def _noted(
    outcomes: Sequence[Outcome], manifest: _Manifest, model: str, *, overlay: bool
) -> Iterator[Outcome]:
    for outcome in outcomes:
        if outcome.written or outcome.error is not None:
            picture = outcome.picture
            line: dict[str, str | int] = {"input": picture.name, "model": model}
            if outcome.error is None:
                line |= {"status": "ok", "mask": picture.mask}
                line |= {"overlay": picture.overlay} if overlay else {}
            else:
                line |= {"status": "error", "error": outcome.error}
            line["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            line |= {} if picture.origin is None else picture.origin._asdict()
            manifest.write(line)
        yield outcome


def _finished(folder: Path, model: str, *, overlay: bool) -> dict[str, Origin]:
    """The masks that this model made last, and of what, as earlier runs' manifests say.

    A mask's last line counts, whichever manifest it is in: another model, or another input of the
    same name, may have written over what an earlier line tells of. Lines of danet before it noted
    an input's origin prove nothing, so what they tell of is segmented again.

    Args:
        overlay: leave out masks that were made without an overlay.
    """
    last: dict[str, tuple[str, Origin | None]] = {}
    for path in folder.glob("manifest*.jsonl"):
        for entry in read_whole_lines(path):
            mask, time = str(entry.get("mask")), str(entry.get("time", ""))
            if entry.get("status") != "ok" or time < last.get(mask, ("", None))[0]:
                continue
            valid = entry.get("model") == model and (not overlay or "overlay" in entry)
            last[mask] = time, _origin(entry) if valid else None
    return {mask: origin for mask, (_, origin) in last.items() if origin is not None}


def _origin(entry: dict[str, Any]) -> Origin | None:
    known = all(name in entry for name in Origin._fields)
    return Origin(*(entry[name] for name in Origin._fields)) if known else None


def _decoded(
    pictures: Iterator[Picture],
    folder: Path,
    finished: dict[str, Origin],
    overlay: bool,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Picture, Image.Image | str | None]]:
    """Each picture decoded, or what is wrong with it, or None if it was finished before."""
    ahead: deque[tuple[Picture, Future[Image.Image | str] | None]] = deque()
    for picture in pictures:
        results = [picture.mask, picture.overlay] if overlay else [picture.mask]
        done = (
            picture.origin is not None
            and finished.get(picture.mask) == picture.origin
            and all((folder / result).exists() for result in results)
        )
        ahead.append((picture, None if done else pool.submit(_decode, picture)))
        if len(ahead) >= BATCH * 2:
            first, future = ahead.popleft()
            yield first, None if future is None else future.result()
    for picture, future in ahead:
        yield picture, None if future is None else future.result()


def _decode(picture: Picture) -> Image.Image | str:
    try:
        if isinstance(picture.source, UserError):
            raise picture.source
        return open_image(picture.source)
    except UserError as error:
        message = str(error)
        return message if picture.name in message else f"{picture.name}: {message}"


def _segment_batch(
    predictor: Segmenter,
    batch: Sequence[tuple[Picture, Image.Image]],
    folder: Path,
    overlay: bool,
    pool: ThreadPoolExecutor,
) -> list[Outcome]:
    found = None
    try:
        found = predictor.segment_batch(np.stack([np.asarray(image) for _, image in batch]))
    except (RuntimeError, MemoryError, UserError) as error:
        too_large = is_out_of_memory(error)
        if not (too_large or isinstance(error, UserError)):
            raise
        if len(batch) == 1:
            picture, image = batch[0]
            advice = f"out of memory at {image.width}x{image.height}; make it smaller"
            problem = advice if too_large else str(error)
            return [Outcome(picture, f"{picture.name}: {problem}", written=False)]
    if found is None:
        # Not in the handler, where the error keeps the batch's tensors alive.
        alone = [_segment_batch(predictor, [one], folder, overlay, pool) for one in batch]
        return [outcome for outcomes in alone for outcome in outcomes]
    written = [
        pool.submit(write_segmentation, one, image if overlay else None, folder, picture.stem)
        for one, (picture, image) in zip(found, batch, strict=True)
    ]
    return [_written(picture, one) for (picture, _), one in zip(batch, written, strict=True)]


def _written(picture: Picture, future: Future[None]) -> Outcome:
    """What became of a picture; raises a UserError if the next one would fare the same."""
    try:
        future.result()
    except UserError as error:
        reason = error.__cause__
        if not (isinstance(reason, OSError) and reason.errno == errno.ENAMETOOLONG):
            raise
        problem = f"{picture.name}: its results' names would be too long; give it a shorter one"
        return Outcome(picture, problem, written=False)
    return Outcome(picture, None, written=True)
