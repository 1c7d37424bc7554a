"""A segmented picture: its classes, mask, overlay and files."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.atomic import replacing
from danet.data.images import open_image, require_jpeg_size, upright_rgb
from danet.errors import UserError
from danet.palette import Color, colored
from danet.result_names import mask_name, overlay_name

ImageSource = Image.Image | npt.NDArray[np.uint8] | str | Path
"""A picture of any mode, an RGB array H W 3 of uint8, or a path."""
OVERLAY_OPACITY = 0.55


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented picture.

    Attributes:
        classes: H W uint8 class ids, at the picture's own upright size.
        class_names: in the order of the ids.
        palette: RGB colours in the order of the ids.
        image: the picture, upright RGB; None where it was not kept.
        score: computes `probabilities`; None where nothing can.
    """

    classes: npt.NDArray[np.uint8]
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    image: Image.Image | None = dataclasses.field(default=None, repr=False)
    score: Callable[[], npt.NDArray[np.float32]] | None = dataclasses.field(
        default=None, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without the network: `probabilities` only if they were asked for before."""
        return {**vars(self), "score": None}

    def __copy__(self) -> Self:
        return self._with_state(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copied with the same network, in contrast to pickled."""
        state = copy.deepcopy(self.__getstate__(), memo)
        return self._with_state({**state, "score": self.score})

    def _with_state(self, state: dict[str, Any]) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(state)
        return copied

    @functools.cached_property
    def probabilities(self) -> npt.NDArray[np.float32] | None:
        """K H W float32 softmax scores, None where only classes are known.

        Of `Predictor`'s results they are computed when they are first asked for, which takes the
        time of the segmentation again, unless it was told to give them at once.
        """
        return None if self.score is None else self.score()

    def mask(self) -> Image.Image:
        """A palette image of class ids, coloured by class."""
        return colored(self.classes, self.palette)

    def overlay(
        self,
        image: ImageSource | None = None,
        opacity: float = OVERLAY_OPACITY,
    ) -> Image.Image:
        """The classes' colours over the picture.

        Args:
            image: the picture that was segmented, as `Predictor` takes it; the one that was kept
                where None.
            opacity: of the colours, 0..1.

        Raises:
            UserError: the picture is of another size, or is not given and was not kept, or the
                opacity is out of range.
        """
        if not 0 <= opacity <= 1:
            raise UserError(f"overlay: opacity must be in 0..1, not {opacity:g}")
        image = self.image if image is None else image
        if image is None:
            raise UserError("overlay: the picture was not kept; give the one that was segmented")
        upright = as_rgb(image)
        colors = self.mask().convert("RGB")
        if upright.size != colors.size:
            raise UserError(
                f"overlay: the picture is {upright.width}x{upright.height} but its classes are "
                f"{colors.width}x{colors.height}; give the picture that was segmented"
            )
        return Image.blend(upright, colors, opacity)


def as_rgb(image: ImageSource) -> Image.Image:
    """The upright RGB picture of what `Predictor` takes.

    Raises:
        UserError: it is not a readable picture.
    """
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an image array must be H W 3 uint8, not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image) or not image.width * image.height:
        raise UserError("an image is a path, a Pillow picture with pixels, or an H W 3 uint8 array")
    return upright_rgb(image, "the image")


def write_segmentation(
    segmentation: Segmentation, image: Image.Image | None, folder: Path, stem: str
) -> None:
    """Writes `STEM.png`, ids with the palette, and `STEM_overlay.jpg` where given an image.

    Raises:
        UserError: one cannot be written, or the picture is too large for a JPEG file.
    """
    if image is not None:
        require_jpeg_size(image)
        # First: only its name may be too long.
        with replacing(folder / overlay_name(stem)) as path:
            segmentation.overlay(image).save(path, format="JPEG", quality=92)
    with replacing(folder / mask_name(stem)) as path:
        segmentation.mask().save(path, format="PNG")
