"""Every snippet of README and pages runs, in the order in which a reader meets them.

Commands that stand in indented blocks need data or hours; of these it is checked that they parse.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from danet.cli import app
from danet.data.scenes import render
from videos import make_video

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_SNIPPETS = [page for page in PAGES if "```" in (ROOT / page).read_text(encoding="utf-8")]
COMMAND = re.compile(r"^ *(?:torchrun .*? -m )?danet ((?:.*\\\n)*.*)$", re.MULTILINE)
FENCED = re.compile(r"^```(python|bash|yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEVER_ENDS = ("serve",)


def snippets(page: str) -> Iterator[tuple[str, str]]:
    for match in FENCED.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield match[1], match[2]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages' readers have: some photos and a video."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "more", "photos"):
        (tmp_path / folder).mkdir()
    for index, path in enumerate(("photo.jpg", "folder/a.jpg", "more/b.png", "photos/c.jpg")):
        render(2, index)[0].save(tmp_path / path)
    make_video(tmp_path / "drive.mp4", frames=3)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    group = get_command(app)
    found = COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))
    for text in found:
        name, *arguments = shlex.split(text.replace("\\\n", " "), comments=True)
        group.commands[name].make_context(name, arguments)
    assert found or page != "README.md"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_run(page: str, workplace: Path) -> None:
    names: dict[str, object] = {}
    for language, text in snippets(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "yaml":
            (workplace / "mine.yaml").write_text(text)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[1] in NEVER_ENDS:
                    continue
                done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
                assert done.exit_code == 0, (line, done.output)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(workplace: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(workplace))
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
        assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in page
    assert "Position attention is exact and never holds the N x N matrix" in page
