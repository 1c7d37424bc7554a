"""What a command is given to segment: files, folders, globs and lists of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from danet.data.images import IMAGE_SUFFIXES
from danet.errors import UserError, explaining_lookup
from danet.jsonl import read_whole_lines

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
        results: a folder whose files are no inputs where it is searched along with others, and of
            which what earlier runs wrote, as their manifests say, never is. A picture that its own
            or another's results would be written over is wrong.
    """
    found: dict[Path, None] = {}
    problems: list[str] = []
    earlier = set() if results is None else _earlier_results(results)
    for text in _unlisted(inputs, problems):
        try:
            matches = _matches(text)
        except UserError as error:
            problems.append(str(error))
            continue
        if results is not None and not _is_file(text):
            matches = _without_results(matches, results.resolve(), _searched(text), earlier)
        found.update(dict.fromkeys(matches))
        problems += [] if matches else [f"{text}: holds only results of earlier runs"]
    if results is not None:
        stems = output_stems(list(found))
        written = {results.resolve() / name for stem in stems.values() for name in outputs(stem)}
        for path in [path for path in found if path.resolve() in written]:
            del found[path]
            problems.append(f"{path}: results would be written over it; choose another --out")
    return list(found), problems


def outputs(stem: str) -> tuple[str, ...]:
    """The files that results of this stem may be written to."""
    return f"{stem}.png", f"{stem}_overlay.jpg", f"{stem}_overlay.mp4"


def _earlier_results(folder: Path) -> set[Path]:
    return {
        folder.resolve() / str(line[kind])
        for manifest in folder.glob("manifest*.jsonl")
        for line in read_whole_lines(manifest)
        for kind in ("mask", "overlay")
        if kind in line
    }


def _is_file(text: str) -> bool:
    with explaining_lookup(text):
        return Path(text).is_file()


def _searched(text: str) -> Path:
    """The folder that is searched: itself, or what stands before a pattern; resolved."""
    parts = Path(text).parts
    plain = next((i for i, part in enumerate(parts) if _GLOB_CHARACTERS & set(part)), len(parts))
    folder = Path(text) if Path(text).exists() else Path(*parts[:plain])
    return folder.resolve()


def _without_results(
    matches: list[Path], results: Path, searched: Path, earlier: set[Path]
) -> list[Path]:
    """The matches that are not results of earlier runs; all paths but the matches are resolved."""
    around = searched in results.parents
    return [
        match
        for match in matches
        if match.resolve() not in earlier
        and not (around and match.resolve().is_relative_to(results))
    ]


def _matches(text: str) -> list[Path]:
    """The files that a path, folder or glob names; raises a UserError if there are none."""
    path = Path(text)
    with explaining_lookup(text):
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if _may_be_picture(p)]
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


def _may_be_picture(path: Path) -> bool:
    """By its name; hidden files, as some systems put beside pictures, are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _may_be_file(path: Path) -> bool:
    """False of what is known to be none.

    What cannot be looked at, and a link to nothing, is reported when it is read.
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
