"""The attention of one picture, as arrays and as a figure."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.atomic import replacing
from danet.errors import UserError
from danet.heads import Branch
from danet.inspection import ChannelMap, FloatMap, Inspection, PixelScore, Point
from danet.model import DANet
from danet.palette import Color
from danet.predict import Predictor
from danet.segmentation import ImageSource

CHANNELS_SHOWN = 3


class Explanation(NamedTuple):
    """The contents of a `danet explain` figure.

    Attributes:
        image: the upright picture, H W.
        point: column and row of the pixel that was asked about.
        score: its class and probability.
        class_names, palette: in the order of the ids.
        branches: H W uint8 ids by "fused", "position" and "channel".
        disagreement: H W bool, where these are not all the same.
        attention: h w shares of the attention that the pixel pays, summing to 1; None without
            position attention.
        received_attention: h w shares of what all pixels together pay, summing to 1; or None.
        strongest_channels: the channels whose maps vary most over the picture.
        selective_channels: those that attend to the fewest channels.
    """

    image: Image.Image
    point: Point
    score: PixelScore
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    branches: dict[Branch, npt.NDArray[np.uint8]]
    disagreement: npt.NDArray[np.bool_]
    attention: FloatMap | None
    received_attention: FloatMap | None
    strongest_channels: list[ChannelMap]
    selective_channels: list[ChannelMap]

    def save(self, path: str | Path) -> None:
        """Draws the figure; the suffix (.png, .svg or .pdf) chooses the format.

        Raises:
            UserError: another suffix, or it cannot be written there.
        """
        from danet.figure import draw_explanation, save_figure  # noqa: PLC0415 - matplotlib is slow

        save_figure(draw_explanation(self), Path(path))

    def save_arrays(self, path: str | Path) -> None:
        """Writes the arrays as a NumPy .npz file, without pickled objects."""
        arrays: dict[str, Any] = {
            "point": np.array(self.point),
            "class_names": np.array(self.class_names),
            "disagreement": self.disagreement,
            **{f"classes_{branch}": classes for branch, classes in self.branches.items()},
        }
        if self.attention is not None and self.received_attention is not None:
            arrays["attention"] = self.attention
            arrays["received_attention"] = self.received_attention
        for kind, channels in (
            ("strongest", self.strongest_channels),
            ("selective", self.selective_channels),
        ):
            if channels:
                arrays[f"{kind}_channels"] = np.array([channel.channel for channel in channels])
                arrays[f"{kind}_responses"] = np.stack([channel.response for channel in channels])
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)


def explain(
    model: DANet | Predictor | str | Path,
    image: ImageSource,
    point: Point,
) -> Explanation:
    """Looks at the attention that a pixel pays, and at the rest of what the network sees.

    Args:
        model: a network, a model folder, a run folder, a hub id, or a predictor that holds one.
        image: as `Predictor` takes it.
        point: column and row of a pixel of the upright picture, from its upper left corner.

    Raises:
        UserError: the model or the picture cannot be read, or the point is outside of it.
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model)
    seen = Inspection(predictor, image)
    channels = seen.channels()
    if not (channels or seen.has_position_attention):
        raise UserError("the model has no attention branch to explain; choose one that has it")
    has_position = seen.has_position_attention
    return Explanation(
        image=seen.image,
        point=seen.pixel(point),
        score=seen.score(point),
        class_names=seen.metadata.classes,
        palette=seen.metadata.palette,
        branches=seen.branches,
        disagreement=seen.disagreement,
        attention=seen.attention(point) if has_position else None,
        received_attention=seen.received_attention() if has_position else None,
        strongest_channels=channels[:CHANNELS_SHOWN],
        selective_channels=sorted(channels, key=lambda c: -c.selectivity)[:CHANNELS_SHOWN],
    )
