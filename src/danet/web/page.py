"""The page's layout, made of Gradio's parts."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from danet.data.scenes import render
from danet.segmentation import OVERLAY_OPACITY
from danet.web.actions import (
    ATTENTION,
    CLASSES,
    Actions,
    links_to_downloads,
    segment_batch,
    views_of,
)
from danet.web.sessions import Sessions

_SCENES = (3, 8, 21)
_SCALE_OF_ATTENTION = "Attention is drawn on a logarithmic scale: the most is yellow."

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
    views = views_of(branches)
    actions = Actions(sessions)
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
                value=CLASSES,
                label="Show",
                info=_SCALE_OF_ATTENTION if ATTENTION in views else None,
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
            links_to_downloads,
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
        functools.partial(segment_batch, sessions, archive),
        sources,
        [table, archive],
        api_name="segment_batch",
        concurrency_limit=1,
    )


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
