"""The page, made of Gradio's parts."""

import functools
import html
import itertools
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from PIL import Image

from danet.data.scenes import render
from danet.errors import UserError
from danet.heads import Branch
from danet.inspection import Inspection, Point, share_by_class
from danet.result_names import mask_name, overlay_name
from danet.segmentation import OVERLAY_OPACITY
from danet.web import drawings
from danet.web.sessions import Sessions

MAX_SHOWN_SIDE = 1024
"""Larger pictures are shrunk on the page; downloads are not."""

_CLASSES = "classes"
_ATTENTION = "attention of a pixel"
_RECEIVED = "attention of all pixels"
_DISAGREEMENT = "where branches disagree"
_BRANCHES: dict[Branch, str] = {"position": "position branch", "channel": "channel branch"}
_SCALE_OF_ATTENTION = "Attention is drawn on a logarithmic scale: the most is yellow."
_LEAST_SHARE = 0.01
"""Of a pixel's attention: classes with less are not named."""
_SCENES = (3, 8, 21)

# Fonts of the system: nothing is fetched from outside.
THEME = gr.themes.Default(
    primary_hue="teal",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; font-size: 0.9rem; }
.legend span { white-space: nowrap; }
.legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em;
            border: 1px solid #0006; vertical-align: -0.1em; }
.downloads { display: flex; flex-wrap: wrap; gap: 0.6rem; }
.downloads a { padding: 0.5rem 1rem; border-radius: 0.4rem; text-decoration: none;
               border: 1px solid var(--border-color-primary); color: var(--body-text-color); }
.downloads a:hover { background: var(--background-fill-secondary); }
#shown img { cursor: crosshair; }
"""


def build_page(sessions: Sessions) -> gr.Blocks:
    """The page for one model."""
    metadata = sessions.predictor.metadata
    page: gr.Blocks
    with gr.Blocks(title="danet", analytics_enabled=False, delete_cache=(1800, 1800)) as page:
        gr.Markdown(
            f"# danet\nScene segmentation with dual attention: {len(metadata.classes)} classes, "
            f"{sessions.predictor.model.config.backbone}"
            + (f", trained on {metadata.dataset}." if metadata.dataset else ".")
        )
        with gr.Tab("One picture"):
            _build_picture_tab(sessions)
        with gr.Tab("Many pictures"):
            _build_batch_tab(sessions)
        with gr.Tab("For scripts"):
            gr.Markdown(_SCRIPT_HELP)
    page.queue(max_size=sessions.limits.waiting, default_concurrency_limit=2, api_open=False)
    return page


def _build_picture_tab(sessions: Sessions) -> None:
    branches = sessions.predictor.model.branches
    views = [_CLASSES, *(_BRANCHES[branch] for branch in branches if branch in _BRANCHES)]
    views += [_DISAGREEMENT] if len(branches) > 1 else []
    views += [_ATTENTION, _RECEIVED] if "position" in branches else []
    actions = _Actions(sessions)
    name = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            source = gr.Image(
                label="Drop a photo here, or choose one",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=[],
                height=300,
            )
            source.preprocess = _uploaded_path  # type: ignore[method-assign]
            gr.Examples(_example_pictures(sessions.folder), source, label="Generated scenes")
        with gr.Column(scale=2, min_width=300):
            shown = gr.Image(
                label="Click a pixel to see its class"
                + (" and where it looks" if "position" in branches else ""),
                elem_id="shown",
                interactive=False,
                format="jpeg",
                type="filepath",
                buttons=["fullscreen"],
            )
            facts = gr.Markdown("", elem_id="facts")
            legend = gr.HTML("", elem_id="legend")
            view = gr.Radio(
                views,
                value=_CLASSES,
                label="Show",
                info=_SCALE_OF_ATTENTION if _ATTENTION in views else None,
            )
            with gr.Row():
                column, row = (
                    gr.Number(None, label=label, precision=0, minimum=0, min_width=100)
                    for label in ("Column of the pixel", "Row of the pixel")
                )
            opacity = gr.Slider(0, 1, OVERLAY_OPACITY, step=0.05, label="Opacity of the classes")
            downloads = gr.HTML("", elem_id="downloads")
    pixel = [column, row]
    looked_at = [name, *pixel, view, opacity]
    redraw: dict[str, Any] = {
        "fn": actions.draw,
        "inputs": looked_at,
        "outputs": [facts, shown],
        "queue": False,
        "show_progress": "hidden",
    }
    source.change(
        actions.segment,
        [source, opacity],
        [name, *pixel, view, shown, facts, legend, downloads],
        concurrency_limit=1,
    )
    shown.select(
        actions.click,
        [name, view, opacity],
        [*pixel, view, facts, shown],
        queue=False,
        show_progress="hidden",
    )
    for number in pixel:
        number.submit(
            actions.look, looked_at, [view, facts, shown], queue=False, show_progress="hidden"
        )
    view.input(**redraw)
    # By keyboard, too, which releases nothing.
    opacity.change(**redraw, trigger_mode="always_last")
    for changed in (view.change, opacity.change):
        changed(
            _downloads,
            [name, view, opacity],
            downloads,
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
        )


def _uploaded_path(payload: ImageData | None) -> str | None:
    """The file, unopened: of what is not a picture Gradio would show its own error and paths."""
    return None if payload is None else payload.path


def _build_batch_tab(sessions: Sessions) -> None:
    sources = gr.File(
        label=f"Up to {sessions.limits.batch} photos of {sessions.limits.megabytes} MB each",
        file_count="multiple",
        file_types=["image"],
        height=180,
        elem_id="batch",
    )
    start = gr.Button("Segment", variant="primary")
    table = gr.Dataframe(headers=["picture", "result"], label="Results", interactive=False)
    archive = gr.File(label="Masks and overlays", interactive=False, elem_id="archive")
    start.click(
        functools.partial(_segment_batch, sessions, archive),
        sources,
        [table, archive],
        api_name="segment_batch",
        concurrency_limit=1,
    )


class _Actions:
    """What happens when a visitor does something."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def segment(self, source: str | None, opacity: float) -> tuple[Any, ...]:
        if source is None:
            return None, None, None, _CLASSES, None, "", "", ""
        try:
            inspection = self.sessions.inspect(Path(source))
        except UserError as error:
            raise gr.Error(_told(error, Path(source)), print_exception=False) from error
        name = self.sessions.keep(inspection)
        return (
            name,
            None,
            None,
            _CLASSES,
            _shrunk(drawings.overlay(inspection, "fused", opacity)),
            "Click a pixel of the picture, or type where it is.",
            _legend(inspection),
            _downloads(name, _CLASSES, opacity),
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


def _segment_batch(
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
        view = _ATTENTION
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
    if view == _ATTENTION:
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


def _downloads(name: str | None, view: str, opacity: float) -> str:
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


def _example_pictures(folder: Path) -> list[str]:
    paths = []
    for index in _SCENES:
        path = folder / f"scene-{index}.jpg"
        render(2, index)[0].save(path, quality=92)
        paths.append(str(path))
    return paths


_SCRIPT_HELP = """
The same model answers scripts over HTTP. Send a picture, get its classes and an `id` to ask more
(this page's own address in place of 127.0.0.1:7860):

```bash
curl -F image=@photo.jpg http://127.0.0.1:7860/api/segment
curl -o mask.png    http://127.0.0.1:7860/api/pictures/ID/mask.png
curl -o overlay.jpg "http://127.0.0.1:7860/api/pictures/ID/overlay.jpg?opacity=0.5"
curl -o looks.jpg   "http://127.0.0.1:7860/api/pictures/ID/attention.jpg?x=240&y=180"
curl                "http://127.0.0.1:7860/api/pictures/ID/pixel?x=240&y=180"
```

```python
import httpx

with httpx.Client(base_url="http://127.0.0.1:7860") as client, open("photo.jpg", "rb") as photo:
    picture = client.post("/api/segment", files={"image": photo}).raise_for_status().json()
    print(picture["classes"])
    mask = client.get(f"/api/pictures/{picture['id']}/mask.png").raise_for_status().content
```

Everything it takes and gives is described in [openapi.json](/openapi.json).
"""
