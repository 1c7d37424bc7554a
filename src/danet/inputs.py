"""What a command is given to segment: files, folders, globs and lists of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from danet.data.images import IMAGE_SUFFIXES
from danet.errors import UserError, explaining_lookup

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg"}
)
"""Files that `danet predict` takes for films."""
_GLOB_CHARACTERS = frozenset("*?[")


def find_inputs(inputs: Sequence[str], results: Path | None = None) -> tuple[list[Path], list[str]]:
    """The files that paths, folders and globs name, and a message for each that is wrong.

    Folders are searched for pictures with all their subfolders. `@FILE` stands for the inputs that
    the file names, one a line.

    Args:
        results: a folder whose files are no inputs when a folder around it is searched.

    Raises:
        UserError: results would be written over an input.
    """
    found: dict[Path, None] = {}
    problems: list[str] = []
    for text in _unlisted(inputs, problems):
        try:
            matches = _matches(text)
        except UserError as error:
            problems.append(str(error))
            continue
        if results is not None:
            matches = _outside(matches, results.resolve(), Path(text).resolve())
        found.update(dict.fromkeys(matches))
        problems += [] if matches else [f"{text}: holds only results of earlier runs"]
    return list(found), problems


def _matches(text: str) -> list[Path]:
    """The files that a path, folder or glob names; raises a UserError if there are none."""
    path = Path(text)
    with explaining_lookup(text):
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
            problem = "no pictures in this folder"
        elif path.exists() or not _GLOB_CHARACTERS & set(text):
            matches = [path] if path.exists() else []
            problem = "no such file or folder"
        else:
            anchor = Path(path.anchor)
            try:
                matches = sorted(anchor.glob(str(path.relative_to(anchor))))
            except ValueError as error:
                raise UserError(f"{text}: no pattern that can be searched for ({error})") from error
            problem = "nothing matches"
    files = [match for match in matches if _may_be_file(match)]
    if not files:
        raise UserError(f"{text}: {problem}")
    return files


def _may_be_file(path: Path) -> bool:
    """False of what is known to be none; what cannot be looked at is reported when it is read."""
    try:
        return path.is_file()
    except OSError:
        return True


def _outside(matches: list[Path], results: Path, searched: Path) -> list[Path]:
    """The matches that are not results; raises a UserError if these were asked for as inputs.

    Args:
        results, searched: resolved. Results of earlier runs may lie within a folder that is
            searched.
    """
    within = {match for match in matches if match.resolve().is_relative_to(results)}
    if within and searched not in results.parents:
        raise UserError(
            f"{min(within)}: lies in the folder of the results and would be written over; "
            "choose another --out"
        )
    return [match for match in matches if match not in within]


def _unlisted(inputs: Sequence[str], problems: list[str]) -> Iterator[str]:
    for text in inputs:
        if not text.startswith("@"):
            yield text
            continue
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{text}: not a list of files ({error})")
            continue
        yield from (line.strip() for line in lines if line.strip())


def output_stems(paths: Sequence[Path]) -> dict[Path, str]:
    """A file stem for each input's results: its own, or where two inputs share it, its path's."""
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
