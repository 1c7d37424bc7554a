"""Finding the inputs of a command."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from danet.data.images import is_picture_name
from danet.errors import UserError, explaining_lookup
from danet.manifest import earlier_results
from danet.result_names import member_pattern, picture_results, video_results

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg"}
)
"""Suffixes of the files that `danet predict` treats as videos."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
"""Of archives of pictures, which are read as they are."""
_GLOB_CHARACTERS = frozenset("*?[")


class Input(NamedTuple):
    """A file to segment.

    Attributes:
        stem: the beginning of its results' names; unique, except that a video and a picture may
            share one, because their results end differently.
    """

    path: Path
    stem: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def is_archive(self) -> bool:
        return self.path.name.lower().endswith(TAR_SUFFIXES)


class Results(NamedTuple):
    """Where results go, and which are wanted besides pictures' masks.

    Attributes:
        overlay: pictures and videos with the classes over them.
        frame_masks: with `overlay`, the masks of videos' frames too; without, there are always.
    """

    folder: Path
    overlay: bool
    frame_masks: bool

    def of(self, one: Input) -> dict[str, str]:
        """The names of a picture's or a video's results, by kind."""
        if one.is_video:
            masks = self.frame_masks or not self.overlay
            return video_results(one.stem, overlay=self.overlay, masks=masks)
        return picture_results(one.stem, overlay=self.overlay)


def find_inputs(
    inputs: Sequence[str], results: Results | None = None
) -> tuple[list[Input], list[str]]:
    """Finds the files that paths, folders and globs name, with a message for each mistake.

    Folders are searched for pictures with all their subfolders. `@FILE` stands for the inputs that
    the file names, one a line.

    Args:
        results: files in their folder are skipped when a folder around it is searched; files that
            earlier runs wrote there, by their manifests, are skipped in any search. It is a mistake
            if an input's results would be written over an input, or over a file or folder beside
            it, such as its label, that no earlier run wrote.
    """
    found: dict[Path, Path] = {}  # as they are named, by their absolute paths
    problems: list[str] = []
    earlier = set() if results is None else earlier_results(results.folder)
    for text in _unlisted(inputs, problems):
        if not text:
            problems.append("an input is empty; name a picture, a video, a folder or an archive")
            continue
        try:
            matches = _matches(text, problems)
        except UserError as error:
            problems.append(str(error))
            continue
        if results is not None and not _is_file(text):
            matches = _without_results(matches, results.folder.resolve(), _searched(text), earlier)
        for match in matches:
            found.setdefault(Path(os.path.abspath(match)), match)
        problems += [] if matches else [f"{text}: holds only results of earlier runs"]
    named = _named(list(found.values()))
    if results is not None:
        folder = results.folder.resolve()
        over = {
            one: f"{place}, which is not of an earlier run"
            for one in named
            if (place := _foreign(one, folder, results.of(one), earlier)) is not None
        }
        for writer, picture in _overwriting(named, folder).items():
            over[writer] = "it" if writer is picture else str(picture.path)
        problems += [
            f"{one.path}: results would be written over {what}; choose another --out"
            for one, what in over.items()
        ]
        named = [one for one in named if one not in over]
    return named, problems


def _foreign(one: Input, folder: Path, names: Mapping[str, str], earlier: set[Path]) -> Path | None:
    """What lies beside a picture or video where its results go, and no earlier run wrote.

    Args:
        folder, earlier: resolved paths.
        names: of its results.
    """
    with explaining_lookup(one.path):
        if one.is_archive or one.path.resolve().parent != folder:
            return None
    for place in (folder / name for name in names.values()):
        with explaining_lookup(place):
            if place.exists() and place not in earlier:
                return place
    return None


def _named(paths: Sequence[Path]) -> list[Input]:
    videos = [path for path in paths if Input(path, "").is_video]
    others = [path for path in paths if not Input(path, "").is_video]
    stems = output_stems(others) | output_stems(videos)
    return [Input(path, stems[path]) for path in paths]


def _overwriting(named: Sequence[Input], results: Path) -> dict[Input, Input]:
    """Maps each input whose results may be written over an input to the latter.

    Args:
        results: the folder, resolved.
    """
    writers: dict[Path, Input] = {}  # of files, and of the folders of videos' masks
    archives = []
    for one in named:
        if one.is_archive:
            archives.append((one, re.compile(member_pattern(one.stem))))
            continue
        written = Results(results, overlay=True, frame_masks=True).of(one)
        writers |= {results / name: one for name in written.values()}
    found: dict[Input, Input] = {}
    for one in named:
        path = one.path.resolve()
        known = [writers[place] for place in (path, path.parent) if place in writers]
        if path.parent == results:
            known += [archive for archive, member in archives if member.match(path.name)]
        found |= dict.fromkeys(known, one)
    return found


def _is_file(text: str) -> bool:
    with explaining_lookup(text):
        return Path(text).is_file()


def _searched(text: str) -> Path:
    """The folder that is searched, resolved: the given one, or the part before a pattern."""
    parts = Path(text).parts
    plain = next((i for i, part in enumerate(parts) if _GLOB_CHARACTERS & set(part)), len(parts))
    folder = Path(text) if Path(text).exists() else Path(*parts[:plain])
    return folder.resolve()


def _without_results(
    matches: list[Path], results: Path, searched: Path, earlier: set[Path]
) -> list[Path]:
    """The matches that are not results of earlier runs.

    Args:
        results, searched, earlier: resolved paths; `matches` need not be.
    """
    around = searched in results.parents
    return [
        match
        for match in matches
        if earlier.isdisjoint((match.resolve(), match.resolve().parent))
        and not (around and match.resolve().is_relative_to(results))
    ]


def _matches(text: str, problems: list[str]) -> list[Path]:
    """The files that a path, folder or glob names; raises a UserError if there are none.

    Args:
        problems: gets the subfolders that cannot be searched.
    """
    path = Path(text)
    with explaining_lookup(text):
        if path.is_dir():
            matches = [p for p in sorted(_files_below(path, problems)) if is_picture_name(p.name)]
            problem = "no pictures in this folder"
        elif path.exists() or not _GLOB_CHARACTERS & set(text):
            matches = [path] if path.exists() else []
            problem = "no such file or folder"
        else:
            anchor = Path(path.anchor)
            try:
                matches = sorted(anchor.glob(str(path.relative_to(anchor))))
            except ValueError as error:
                raise UserError(
                    f"{text}: not a pattern that can be searched for ({error})"
                ) from error
            problem = "nothing matches"
    files = [match for match in matches if _may_be_file(match)]
    if not files:
        raise UserError(f"{text}: {problem}")
    return files


def _files_below(folder: Path, problems: list[str]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be searched ({error.strerror})")

    for where, _, names in os.walk(folder, onerror=note):
        yield from (Path(where, name) for name in names)


def _may_be_file(path: Path) -> bool:
    """Returns False only for what is known not to be a file.

    Unreadable paths and broken links pass, and are reported when they are read.
    """
    try:
        return path.is_file() or (path.is_symlink() and not path.exists())
    except OSError:
        return True


def _unlisted(inputs: Sequence[str], problems: list[str]) -> Iterator[str]:
    for text in inputs:
        if not text.startswith("@"):
            yield text
            continue
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{text}: not a list of files ({error})")
            continue
        yield from (line.strip() for line in lines if line.strip())


def output_stems(paths: Sequence[Path]) -> dict[Path, str]:
    """A unique stem for each input's results: the file's own, or its path where two share one."""
    counts = Counter(path.stem for path in paths)
    stems: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        stem = path.stem if counts[path.stem] == 1 else _path_in_one_word(path)
        while stem in taken:
            stem += "_"
        taken.add(stem)
        stems[path] = stem
    return stems


def _path_in_one_word(path: Path) -> str:
    parts = [part for part in path.parts if part not in (path.anchor, "..", ".")]
    return "_".join(parts).replace(".", "_")
