"""Segmenting all that was given: pictures decoded ahead and batched by size, films frame by frame.

Each gets a line in a manifest. Several processes started by torchrun share the work; each writes a
manifest of its own. A rerun passes over what an earlier one finished with the same model, if the
input is still the same file and no later run wrote over its results.
"""

import datetime
import errno
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from danet.atomic import explaining
from danet.data.archives import MAX_FILE_BYTES
from danet.data.images import IMAGE_SUFFIXES, open_image
from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.inputs import RESULT_KINDS, Input, film_results, member_stem, picture_results
from danet.jsonl import read_whole_lines
from danet.predict import Segmenter, write_segmentation
from danet.processes import Share

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
        stem: of its results' names.
        source: its path, its bytes, or what is wrong with it.
        origin: None of what cannot be read.
        results: what is to be written, by its kind (`RESULT_KINDS`).
    """

    name: str
    stem: str
    source: Path | bytes | UserError
    origin: Origin | None
    results: dict[str, str]


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
    inputs: Sequence[Input],
    folder: Path,
    *,
    overlay: bool,
    frame_masks: bool,
    share: Share,
    on_frame: Callable[[Path, int], None],
) -> Iterator[Outcome]:
    """Segments this process's share of pictures, tar archives and films, and tells of each.

    The manifest names the model by its fingerprint and each input by its `Origin`, so that results
    of other models and of other files of the same name are made anew.

    Args:
        frame_masks: write the masks of films' frames too where `overlay` makes films.
        on_frame: called after each frame of a film with how many frames the film announces.
    """
    pictures = list_pictures([one for one in inputs if not one.is_film], overlay=overlay)
    masks = frame_masks or not overlay
    films = [_film(one, overlay=overlay, masks=masks) for one in inputs if one.is_film]
    model = predictor.fingerprint()
    finished = _finished(folder, model)
    own_pictures = islice(pictures, share.rank, None, share.processes)
    own_films = films[share.rank :: share.processes]
    with _Manifest(_manifest_path(folder, share)) as manifest:
        for outcome in chain(
            _segment_pictures(predictor, own_pictures, folder, finished),
            _segment_films(predictor, own_films, folder, finished, on_frame),
        ):
            _note(outcome, manifest, model)
            yield outcome


def _film(film: Input, *, overlay: bool, masks: bool) -> Picture:
    path, stem = film
    results = film_results(stem, overlay=overlay, masks=masks)
    try:
        return Picture(str(path), stem, path, _origin_of(path), results)
    except UserError as error:
        return Picture(str(path), stem, error, None, results)


def _origin_of(path: Path) -> Origin:
    """Raises a UserError where the file cannot be looked up."""
    try:
        found = path.stat()
        return Origin(str(path.resolve()), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _segment_films(
    predictor: Segmenter,
    films: Sequence[Picture],
    folder: Path,
    finished: dict[str, Origin],
    on_frame: Callable[[Path, int], None],
) -> Iterator[Outcome]:
    for film in films:
        if _is_done(film, folder, finished):
            yield Outcome(film, None, written=False)
        else:
            yield _segment_film(predictor, film, folder, on_frame)


def _segment_film(
    predictor: Segmenter, film: Picture, folder: Path, on_frame: Callable[[Path, int], None]
) -> Outcome:
    try:
        if isinstance(film.source, UserError):
            raise film.source
        problem = _write_film(predictor, film, folder, on_frame)
        return Outcome(film, problem, written=True)
    except (RuntimeError, MemoryError, UserError) as error:
        if is_out_of_memory(error):
            problem = f"{film.name}: out of memory at the size of its frames; make them smaller"
        elif isinstance(error, UserError):
            problem = str(error)
        else:
            raise
    return Outcome(film, problem, written=False)


def _write_film(
    predictor: Segmenter, film: Picture, folder: Path, on_frame: Callable[[Path, int], None]
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
        overlay="overlay" in film.results,
        masks="frames" in film.results,
        on_frame=lambda announced: on_frame(path, announced),
    ).problem


def list_pictures(inputs: Sequence[Input], *, overlay: bool) -> Iterator[Picture]:
    """The pictures that files hold: themselves, or the pictures in tar archives.

    Args:
        overlay: their overlays are wanted beside their masks.
    """
    for one in inputs:
        path, stem = one
        try:
            origin = _origin_of(path)
        except UserError as error:
            yield Picture(str(path), stem, error, None, {})
            continue
        if one.is_archive:
            yield from _pictures_of_tar(path, stem, origin, overlay)
        else:
            yield Picture(str(path), stem, path, origin, picture_results(stem, overlay=overlay))


def _pictures_of_tar(path: Path, stem: str, archived: Origin, overlay: bool) -> Iterator[Picture]:
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
                else:
                    file = archive.extractfile(member)
                    assert file is not None
                    source = file.read()
                results = picture_results(own, overlay=overlay)
                yield Picture(f"{path}:{member.name}", own, source, origin, results)
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = UserError(f"{path}: damaged or no tar archive ({error})")
        yield Picture(str(path), stem, problem, None, {})


def _segment_pictures(
    predictor: Segmenter, pictures: Iterator[Picture], folder: Path, finished: dict[str, Origin]
) -> Iterator[Outcome]:
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: dict[tuple[int, int], list[tuple[Picture, Image.Image]]] = {}
        for picture, image in _decoded(pictures, folder, finished, pool):
            if image is None or isinstance(image, str):
                yield Outcome(picture, image, written=False)
                continue
            same_size = waiting.setdefault(image.size, [])
            same_size.append((picture, image))
            if len(same_size) == BATCH or sum(map(len, waiting.values())) == DECODED_AHEAD:
                largest = max(waiting, key=lambda size: len(waiting[size]))
                yield from _segment_batch(predictor, waiting.pop(largest), folder, pool)
        for batch in waiting.values():
            yield from _segment_batch(predictor, batch, folder, pool)


def _manifest_path(folder: Path, share: Share) -> Path:
    suffix = f"-{share.rank}-of-{share.processes}" if share.processes > 1 else ""
    return folder / f"manifest{suffix}.jsonl"


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


def _note(outcome: Outcome, manifest: _Manifest, model: str) -> None:
    """A line of the manifest, but for what was finished before."""
    picture, error, written = outcome
    if not written and error is None:
        return
    line: dict[str, str | int] = {"input": picture.name, "model": model}
    line |= {"status": "ok"} if error is None else {"status": "error", "error": error}
    line |= picture.results if written else {}
    line["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    line |= {} if picture.origin is None else picture.origin._asdict()
    manifest.write(line)


def _finished(folder: Path, model: str) -> dict[str, Origin]:
    """The results that this model made last, and of what, as earlier runs' manifests say.

    A result's last line counts, whichever manifest it is in: another model, or another input of the
    same name, may have written over what an earlier line tells of. Lines of danet before it noted
    an input's origin prove nothing, so what they tell of is segmented again.
    """
    last: dict[str, tuple[str, Origin | None]] = {}
    for path in folder.glob("manifest*.jsonl"):
        for entry in read_whole_lines(path):
            time = str(entry.get("time", ""))
            valid = entry.get("status") == "ok" and entry.get("model") == model
            for kind in RESULT_KINDS:
                result = str(entry.get(kind))
                if kind in entry and time >= last.get(result, ("", None))[0]:
                    last[result] = time, _origin(entry) if valid else None
    return {result: origin for result, (_, origin) in last.items() if origin is not None}


def _is_done(picture: Picture, folder: Path, finished: dict[str, Origin]) -> bool:
    return picture.origin is not None and all(
        finished.get(result) == picture.origin and (folder / result).exists()
        for result in picture.results.values()
    )


def _origin(entry: dict[str, Any]) -> Origin | None:
    known = all(name in entry for name in Origin._fields)
    return Origin(*(entry[name] for name in Origin._fields)) if known else None


def _decoded(
    pictures: Iterator[Picture],
    folder: Path,
    finished: dict[str, Origin],
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Picture, Image.Image | str | None]]:
    """Each picture decoded, or what is wrong with it, or None if it was finished before."""
    ahead: deque[tuple[Picture, Future[Image.Image | str] | None]] = deque()
    for picture in pictures:
        done = _is_done(picture, folder, finished)
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
        alone = [_segment_batch(predictor, [one], folder, pool) for one in batch]
        return [outcome for outcomes in alone for outcome in outcomes]
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
