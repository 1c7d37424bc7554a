"""Drawing an explanation, fit for print and for colour-blind readers.

Attention is drawn in cividis, which looks alike to everybody, and classes in a palette that
colour-blind readers tell apart (Paul Tol's "muted") as long as it reaches, else in their own.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageColor

from danet.atomic import replacing
from danet.attention_overlay import DISAGREEMENT_COLOR, HEAT, HEAT_OPACITY, log_times_even
from danet.errors import UserError
from danet.inspection import ChannelMap, FloatMap, share_by_class
from danet.palette import highlighted

if TYPE_CHECKING:
    from danet.explanation import Explanation

FORMATS = (".png", ".svg", ".pdf")
MAX_SIDE = 1024
"""Pictures are shrunk to this for drawing."""

_TOL_MUTED = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255"),
    *("#44AA99", "#999933", "#AA4499", "#BBBBBB", "#000000"),
)
_drawing = threading.Lock()
_FONTS = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"),
)
_PANEL_INCHES = 3.0
_LONGEST_NAME = 24
"""Letters of a class's name that fit a panel."""
_SHORT_NAME = 16
"""Letters of names of which six fit a row of the legend."""
_TALLEST = 3
"""Height over width from which on a picture is drawn narrower instead of taller."""
_FLATTEST = 1 / 3
"""Height over width of the lowest panel, for its texts to have room."""


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure in the format of the path's suffix.

    Raises:
        UserError: another suffix, or it cannot be written there.
    """
    check_figure_path(path)
    with replacing(path) as temporary, _text_settings():
        suffix = path.suffix.lower()
        dated = {".svg": "Date", ".pdf": "CreationDate"}.get(suffix, "Software")
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata={dated: None})


def _fonts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return [font for font in _FONTS if font in installed]


@contextmanager
def _text_settings() -> Iterator[None]:
    """Names are no formulas, and have each letter from the first font that has it.

    For one thread at a time: matplotlib's settings are the whole process's.
    """
    with (
        _drawing,
        mpl.rc_context(
            {"text.parse_math": False, "font.family": _fonts(), "svg.hashsalt": "danet"}
        ),
    ):
        yield


def _drawn_names(names: Sequence[str]) -> list[str]:
    """The classes' names, shortened, or their ids where no font has all letters of a name."""
    letters = {
        code
        for font in _fonts()
        for code in font_manager.get_font(font_manager.findfont(font)).get_charmap()
    }
    return [
        _shortened(name) if letters.issuperset(map(ord, name)) else f"class {index}"
        for index, name in enumerate(names)
    ]


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def check_figure_path(path: Path) -> None:
    """Raises a UserError unless the suffix is one of a known format."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{path}: figures are written as {', '.join(FORMATS)}; choose one by suffix"
        )


def draw_explanation(explanation: "Explanation") -> Figure:
    """One row each for the attention of the position, the branches, and the channels."""
    with _text_settings():
        return _draw(_Picture(explanation))


def _draw(picture: "_Picture") -> Figure:
    rows = [_position_panels, _branch_panels]
    if picture.explanation.strongest_channels:
        rows += [_strongest_panels, _selective_panels]
    shape = max(_height_over_width(picture.shown), _FLATTEST)
    panel_height = _PANEL_INCHES * shape + 1.0
    figure = Figure(
        figsize=(4 * _PANEL_INCHES, len(rows) * panel_height + 0.6), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for draw, axes_row in zip(rows, grid, strict=True):
        for axes in axes_row:
            axes.axis("off")
            axes.set_anchor("N")
        draw(picture, list(axes_row))
    figure.legend(
        handles=picture.legend(),
        loc="outside lower center",
        ncols=6 if max(map(len, picture.names)) <= _SHORT_NAME else 4,
        frameon=False,
        fontsize="small",
        title="classes, by their share of the picture",
        title_fontsize="small",
    )
    return figure


def _height_over_width(image: Image.Image) -> float:
    """As it is drawn."""
    return min(image.height / image.width, _TALLEST)


class _Picture:
    """Shared by all panels of an explanation: the picture as drawn and the classes' colours."""

    def __init__(self, explanation: "Explanation") -> None:
        self.explanation = explanation
        self.names = _drawn_names(explanation.class_names)
        image = explanation.image
        self.shown = image.copy()
        self.shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
        self.grey = np.asarray(self.shown.convert("L"))
        self.scale = self.shown.width / image.width
        count = len(explanation.class_names)
        stacked = np.stack(list(explanation.branches.values()))
        self.present = [int(index) for index in np.flatnonzero(np.bincount(stacked.ravel()))]
        fused = explanation.branches["fused"]
        self.shares = np.bincount(fused.ravel(), minlength=count) / fused.size
        self.present.sort(key=lambda index: -self.shares[index])
        self.colors = np.array(explanation.palette, dtype=np.uint8)
        if len(self.present) <= len(_TOL_MUTED):
            for index, color in zip(self.present, _TOL_MUTED, strict=False):
                self.colors[index] = ImageColor.getrgb(color)[:3]

    def colored(self, classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        small = Image.fromarray(classes).resize(self.shown.size, Image.Resampling.NEAREST)
        result: npt.NDArray[np.uint8] = self.colors[np.asarray(small)]
        return result

    def legend(self) -> list[Patch]:
        return [
            Patch(
                facecolor=self.colors[index] / 255,
                edgecolor="black",
                linewidth=0.4,
                # A label that begins with an underscore would be left out.
                label=f"\N{ZERO WIDTH SPACE}{self.names[index]} {100 * self.shares[index]:.1f} %",
            )
            for index in self.present
        ]

    def mark_point(self, axes: Axes) -> None:
        x, y = ((side + 0.5) * self.scale - 0.5 for side in self.explanation.point)
        axes.plot(x, y, "+", color="white", markersize=13, markeredgewidth=3.2)
        axes.plot(x, y, "+", color="black", markersize=12, markeredgewidth=1.4)

    def heat(self, axes: Axes, values: FloatMap, label: str) -> None:
        """A map of the features' size, spread over the grey picture's area, with its scale."""
        axes.imshow(self.grey, cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, self.shown.width - 0.5, self.shown.height - 0.5, -0.5)
        drawn = axes.imshow(
            values, cmap=HEAT, alpha=HEAT_OPACITY, extent=extent, interpolation="bilinear"
        )
        figure = axes.figure
        # As high on every picture.
        inch = 1 / (_PANEL_INCHES * _height_over_width(self.shown))
        # As wide as on pictures that are not drawn narrower than their panel.
        width = 0.7 * max(1.0, self.shown.height / self.shown.width / _TALLEST)
        below = axes.inset_axes((0.5 - width / 2, -0.21 * inch, width, 0.1 * inch))
        ticks = MaxNLocator(nbins=4)
        bar = figure.colorbar(drawn, cax=below, orientation="horizontal", ticks=ticks)
        bar.ax.tick_params(labelsize="x-small")
        bar.ax.xaxis.get_offset_text().set_fontsize("x-small")
        bar.set_label(label, fontsize="x-small")
        if bar.solids is not None:
            bar.solids.set(alpha=1)


def _position_panels(picture: _Picture, axes: Sequence[Axes]) -> None:
    found = picture.explanation
    name = picture.names[found.score.class_id]
    axes[0].imshow(picture.shown)
    picture.mark_point(axes[0])
    column, row = found.point
    axes[0].set_title(
        f"pixel {column},{row}:\n{name} ({100 * found.score.probability:.0f} %)",
        fontsize="medium",
    )
    if found.attention is None or found.received_attention is None:
        axes[1].set_title("(no position attention)", fontsize="medium")
        return
    label = "log10 of times an even share"
    picture.heat(axes[1], log_times_even(found.attention), label)
    picture.mark_point(axes[1])
    axes[1].set_title("where this pixel looks", fontsize="medium")
    picture.heat(axes[2], log_times_even(found.received_attention), label)
    axes[2].set_title("where all pixels look", fontsize="medium")
    by_class = share_by_class(found.attention, found.branches["fused"], len(found.class_names))
    _draw_shares(picture, axes[3], by_class)


def _draw_shares(picture: _Picture, axes: Axes, shares: npt.NDArray[np.float64]) -> None:
    axes.axis("on")
    order = sorted(picture.present, key=lambda index: -shares[index])[:8][::-1]
    places = range(len(order))  # not names, which may be equal when shortened
    colors = [picture.colors[index] / 255 for index in order]
    axes.barh(
        places, [100 * shares[index] for index in order], color=colors, edgecolor="black", lw=0.4
    )
    axes.set_yticks(places, [picture.names[index] for index in order])
    axes.set_xlabel("% of its attention", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("on which classes", fontsize="medium")


def _branch_panels(picture: _Picture, axes: Sequence[Axes]) -> None:
    found = picture.explanation
    fused = "both branches" if len(found.branches) > 2 else "prediction"
    titles = {"fused": fused, "position": "position branch", "channel": "channel branch"}
    panels = list(axes)
    for branch, classes in found.branches.items():
        panel = panels.pop(0)
        panel.imshow(picture.colored(classes))
        panel.set_title(titles[branch], fontsize="medium")
    if len(found.branches) > 1:
        differs = Image.fromarray(found.disagreement).resize(picture.shown.size)
        marked = highlighted(
            picture.shown, np.asarray(differs), DISAGREEMENT_COLOR, gain=0.5, offset=120
        )
        panels[0].imshow(marked)
        share = 100 * found.disagreement.mean()
        panels[0].set_title(f"where they disagree ({share:.1f} %)", fontsize="medium")


def _strongest_panels(picture: _Picture, axes: Sequence[Axes]) -> None:
    _channel_panels(picture, axes, picture.explanation.strongest_channels, "strongest")


def _selective_panels(picture: _Picture, axes: Sequence[Axes]) -> None:
    _channel_panels(picture, axes, picture.explanation.selective_channels, "most selective")


def _channel_panels(
    picture: _Picture, axes: Sequence[Axes], channels: Sequence[ChannelMap], kind: str
) -> None:
    for panel, channel in zip(axes, channels, strict=False):
        picture.heat(panel, channel.response, "response")
        panel.set_title(
            f"{kind}: channel {channel.channel},\nmost on {picture.names[channel.responds_to]}",
            fontsize="small",
        )
    lines = [
        f"channel {channel.channel} (selectivity {channel.selectivity:.2f}) gathers from\n   "
        + ", ".join(f"{index}: {100 * share:.0f} %" for index, share in channel.attends_to[:4])
        for channel in channels
    ]
    axes[3].text(
        0, 0.95, "\n\n".join(lines), va="top", fontsize="small", transform=axes[3].transAxes
    )
