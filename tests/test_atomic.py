import errno
import json
import os
from pathlib import Path

import pytest

from danet import atomic
from danet.atomic import (
    replacing,
    require_writable,
    require_writable_files,
    staging,
    write_json,
)
from danet.errors import UserError
from danet.model_folder import files_of


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_json_is_whole_and_ends_in_a_newline(tmp_path: Path) -> None:
    tree = {"mIoU": None, "classes": ["a", "b"]}
    write_json(tmp_path / "a.json", tree)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == tree
    assert text.endswith("}\n")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fails() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        require_writable(tmp_path / "file" / "folder")


def test_probing_leaves_nothing_behind(tmp_path: Path) -> None:
    require_writable(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_probed_without_touching_it(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    require_writable_files(tmp_path / "old", None, tmp_path / "new/new")
    assert (tmp_path / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "new").mkdir()
    for name in ("new", "old/a", "x" * 300, "."):
        with pytest.raises(UserError, match="cannot be written"):
            require_writable_files(tmp_path / "old", tmp_path / name)


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "recipe.yaml"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "model/config.json")
    (tmp_path / "same").hardlink_to(tmp_path / "model/config.json")
    sources = files_of(tmp_path / "model")
    for name in ("model/config.json", "model/recipe.yaml", "link", "same"):
        with pytest.raises(UserError, match="is an input and would be overwritten"):
            require_writable_files(tmp_path / name, sources=sources)
    require_writable_files(tmp_path / "model/scores.json", sources=sources)
    assert Path("x.bin") in files_of("x.xml")
    assert files_of(".")


def test_two_results_are_not_written_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    require_writable_files(tmp_path / "a.json", tmp_path / "a.html")
    for other in ("a.json", "link/a.json"):
        with pytest.raises(UserError, match="is named twice; one would replace the other"):
            require_writable_files(tmp_path / "a.json", None, tmp_path / other)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fills_the_disk() -> None:
        with replacing(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        fills_the_disk()


def test_several_files_appear_with_the_named_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_killed_run = tmp_path / ".m.xml.tmp"
    left_by_a_killed_run.mkdir()
    (left_by_a_killed_run / "old.bin").touch()
    moved: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    with staging(tmp_path / "m.xml") as path:
        for name in ("m.xml", "m.bin", "z.txt"):
            path.with_name(name).touch()
    assert moved == ["m.bin", "z.txt", "m.xml"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.bin", "m.xml", "z.txt"]


def test_what_is_written_is_on_the_disk_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(atomic, "fsync", lambda path: flushed.append(path.name))
    with replacing(tmp_path / "a.txt") as path:
        path.touch()
    with staging(tmp_path / "m.xml") as path:
        path.touch()
    assert flushed == [".a.tmp.txt", "m.xml"]


def test_probing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp.json").symlink_to(tmp_path / "elsewhere")
    require_writable_files(tmp_path / "a.json")
    assert not (tmp_path / "elsewhere").exists()
