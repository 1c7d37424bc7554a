"""What the page does when a visitor does something: functions that Gradio calls, without layout."""

import html
import itertools
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from danet.errors import UserError
from danet.heads import Branch
from danet.inspection import Inspection, Point, share_by_class
from danet.result_names import mask_name, overlay_name
from danet.web import drawings
from danet.web.sessions import Sessions

MAX_SHOWN_SIDE = 1024
"""Larger pictures are shrunk on the page; downloads are not."""

CLASSES = "classes"
ATTENTION = "attention of a pixel"
_RECEIVED = "attention of all pixels"
_DISAGREEMENT = "where branches disagree"
_BRANCHES: dict[Branch, str] = {"position": "position branch", "channel": "channel branch"}
_LEAST_SHARE = 0.01
"""Of a pixel's attention: classes with less are not named."""


def views_of(branches: Sequence[Branch]) -> list[str]:
    """What can be shown of a picture, by a network with these branches."""
    views = [CLASSES, *(_BRANCHES[branch] for branch in branches if branch in _BRANCHES)]
    views += [_DISAGREEMENT] if len(branches) > 1 else []
    return views + ([ATTENTION, _RECEIVED] if "position" in branches else [])


class Actions:
    """What happens when a visitor does something."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def segment(self, source: str | None, opacity: float) -> tuple[Any, ...]:
        """The picture's name, no pixel, view, picture, facts, legend and downloads."""
        if source is None:
            return None, None, None, CLASSES, None, "", "", ""
        try:
            inspection = self.sessions.inspect(Path(source))
        except UserError as error:
            raise gr.Error(_told(error, Path(source)), print_exception=False) from error
        name = self.sessions.keep(inspection)
        return (
            name,
            None,
            None,
            CLASSES,
            _shrunk(drawings.overlay(inspection, "fused", opacity)),
            "Click a pixel of the picture, or type where it is.",
            _legend(inspection),
            links_to_downloads(name, CLASSES, opacity),
        )

    def click(
        self, name: str | None, view: str, opacity: float, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """Column, row, view, facts and picture; of mistakes, facts alone."""
        try:
            inspection = self._find(name)
            scale = _shown_scale(inspection.image)
            column, row = (
                min(int(position / scale), side - 1)
                for position, side in zip(event.index, inspection.image.size, strict=True)
            )
            return column, row, *_looked_at(inspection, (column, row), view, opacity)
        except UserError as error:
            return gr.skip(), gr.skip(), gr.skip(), str(error), gr.skip()

    def look(
        self, name: str | None, column: int | None, row: int | None, view: str, opacity: float
    ) -> tuple[Any, ...]:
        """As `click`, at a pixel whose place was typed: view, facts and picture."""
        try:
            if column is None or row is None:
                raise UserError("Type a column and a row.")
            return _looked_at(self._find(name), (column, row), view, opacity)
        except UserError as error:
            return gr.skip(), str(error), gr.skip()

    def draw(
        self, name: str | None, column: int | None, row: int | None, view: str, opacity: float
    ) -> tuple[Any, ...]:
        """Facts, where there is a mistake, and picture."""
        if name is None:
            return gr.skip(), None
        point = None if column is None or row is None else (column, row)
        try:
            return gr.skip(), _shrunk(_drawn(self._find(name), point, view, opacity))
        except UserError as error:
            return str(error), gr.skip()

    def _find(self, name: str | None) -> Inspection:
        if name is None:
            raise UserError("Choose a photo first.")
        return self.sessions.find(name)


def segment_batch(
    sessions: Sessions, archive: gr.File, sources: list[str] | None
) -> tuple[list[list[str]], str | None]:
    """Rows of the table, and the archive of results in the component's cache; None if empty."""
    paths = [Path(source) for source in sources or ()]
    if not 0 < len(paths) <= sessions.limits.batch:
        raise gr.Error(f"Choose 1 to {sessions.limits.batch} photos.", print_exception=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path_of_archive = Path(folder) / "danet.zip"
        with zipfile.ZipFile(path_of_archive, "w") as file:
            for path, stem in zip(paths, _distinct([path.stem for path in paths]), strict=True):
                name = f"{stem}{path.suffix}"
                try:
                    inspection = sessions.inspect(path)
                    mask = drawings.encode(inspection.segmentation().mask(), "PNG")
                    overlay = drawings.encode(drawings.overlay(inspection), "JPEG")
                except UserError as error:
                    rows.append([name, _told(error, path)])
                    continue
                file.writestr(mask_name(stem), mask)
                file.writestr(overlay_name(stem), overlay)
                largest = drawings.class_shares(inspection)[:3]
                rows.append([name, ", ".join(f"{s.name} {s.share:.0%}" for s in largest)])
            if not file.namelist():
                return rows, None
        # Where Gradio would copy it to, and deletes it when it is old.
        return rows, archive.move_resource_to_block_cache(path_of_archive)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered from the second of the same name on."""
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        free = (each for each in itertools.chain([name], numbered) if each not in found)
        found[next(free)] = None
    return list(found)


def _told(error: UserError, path: Path) -> str:
    """An error about a visitor's file, without the folder where it lies here."""
    return str(error).replace(str(path), path.name)


def _looked_at(
    inspection: Inspection, point: Point, view: str, opacity: float
) -> tuple[str, str, Image.Image]:
    """The view, what is known of a pixel, and the picture of where it looks."""
    score = inspection.score(point)
    label = inspection.metadata.classes[score.class_id]
    column, row = point
    facts = f"Pixel {column}, {row}: **{label}**, {100 * score.probability:.0f} % sure"
    if inspection.has_position_attention:
        view = ATTENTION
        facts += f"; looks at {_looks_at(inspection, point)}"
    return view, facts, _shrunk(_drawn(inspection, point, view, opacity))


def _looks_at(inspection: Inspection, point: Point) -> str:
    """The classes with most of a pixel's attention."""
    names = inspection.metadata.classes
    shares = share_by_class(inspection.attention(point), inspection.branches["fused"], len(names))
    most = [int(index) for index in np.argsort(-shares)[:3] if shares[index] >= _LEAST_SHARE]
    return ", ".join(f"{names[index]} ({100 * shares[index]:.0f} %)" for index in most)


def _drawn(inspection: Inspection, point: Point | None, view: str, opacity: float) -> Image.Image:
    if view == _DISAGREEMENT:
        return drawings.disagreement(inspection)
    if view == _RECEIVED:
        return drawings.attention(inspection, None)
    if view == ATTENTION:
        width, height = inspection.image.size
        return drawings.attention(inspection, point or (width // 2, height // 2))
    return drawings.overlay(inspection, _branch_of(view), opacity)


def _branch_of(view: str) -> Branch:
    return next((branch for branch, label in _BRANCHES.items() if label == view), "fused")


def _legend(inspection: Inspection) -> str:
    entries = (
        f'<span><i style="background:{share.color}"></i>'
        f"{html.escape(share.name)} {100 * share.share:.1f} %</span>"
        for share in drawings.class_shares(inspection)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def links_to_downloads(name: str | None, view: str, opacity: float) -> str:
    """HTML: the mask and the overlay of the branch that is shown."""
    if name is None:
        return ""
    branch = _branch_of(view)
    links = {
        "Download the mask (PNG)": f"mask.png?branch={branch}",
        "Download the overlay (JPEG)": f"overlay.jpg?branch={branch}&opacity={opacity}",
    }
    anchors = (
        f'<a href="/api/pictures/{name}/{html.escape(link)}" download>{text}</a>'
        for text, link in links.items()
    )
    return f'<div class="downloads">{"".join(anchors)}</div>'


def _shown_scale(image: Image.Image) -> float:
    return min(1.0, MAX_SHOWN_SIDE / max(image.size))


def _shrunk(image: Image.Image) -> Image.Image:
    scale = _shown_scale(image)
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)
