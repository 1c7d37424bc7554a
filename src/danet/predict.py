"""Segmenting photos."""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from danet.atomic import replacing
from danet.config import TestConfig
from danet.data.images import open_image, require_jpeg_size, upright_rgb
from danet.devices import autocast, choose_device, uses_bfloat16, warn_of_slow_bfloat16
from danet.errors import UserError
from danet.evaluation.inference import predict_probabilities, views
from danet.evaluation.strips import most_likely_classes
from danet.inputs import mask_name, overlay_name
from danet.model import DANet
from danet.model_folder import Metadata
from danet.optimize import optimize_for_inference, require_finite_weights
from danet.palette import Color, colored

OVERLAY_OPACITY = 0.55
FINGERPRINT_DIGITS = 16


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
        image: Image.Image | npt.NDArray[np.uint8] | str | Path | None = None,
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


class Segmenter(Protocol):
    """Interface of `Predictor` and `danet.export.predictor.ExportedPredictor`."""

    @property
    def metadata(self) -> Metadata: ...

    def probabilities(
        self, image: Image.Image | npt.NDArray[np.uint8] | str | Path
    ) -> npt.NDArray[np.float32]:
        """The softmax scores of a picture, upright, K H W float32."""
        ...

    def segment_batch(self, images: npt.NDArray[np.uint8]) -> list[Segmentation]:
        """Segments pictures of one size together, uint8 RGB P H W 3."""
        ...

    def fingerprint(self) -> str:
        """Hex digits that differ where the results may."""
        ...


def segment_picture(
    segmenter: Segmenter,
    image: Image.Image | npt.NDArray[np.uint8] | str | Path,
    *,
    probabilities: bool,
) -> Segmentation:
    """Segments one picture, as `Predictor` says."""
    upright = as_rgb(image)
    score = functools.partial(segmenter.probabilities, upright)
    if not probabilities:
        found = segmenter.segment_batch(np.array(upright)[None])[0]
        return dataclasses.replace(found, image=upright, score=score)
    scores = score()
    classes = scores.argmax(0).astype(np.uint8)
    metadata = segmenter.metadata
    found = Segmentation(classes, metadata.classes, metadata.palette, upright, score)
    vars(found)["probabilities"] = scores  # as if they had been asked for
    return found


class Predictor:
    """Segments pictures with a model, one call a picture.

    Args:
        model: a network, which is copied, a model folder, a run folder, or a hub id.
        device: "auto", "cpu", "cuda", "mps".
        precision: "auto" computes in bfloat16 where the device does so in hardware; "fp32", "bf16".
        test: scales, flips and windows; the model's own recipe where None.
        compile_graph: compile the network, for many pictures of one size.

    Raises:
        UserError: there is no such model or device, or its weights are damaged, or it is another
            `Predictor`'s network.
    """

    def __init__(
        self,
        model: DANet | str | Path,
        device: str | torch.device = "auto",
        precision: str = "auto",
        test: TestConfig | None = None,
        compile_graph: bool = False,
    ) -> None:
        if isinstance(model, str | Path):
            network = DANet.from_pretrained(model)
        elif isinstance(model, DANet):
            model.require_original("give")
            network = copy.deepcopy(model)
        else:
            raise UserError(
                f"a model is a DANet, a folder or a hub id, not {type(model).__name__}; of a "
                "wrapped or compiled network give the DANet inside, with compile_graph=True"
            )
        self.device = choose_device(device)
        self.precision = precision
        bfloat16 = uses_bfloat16(precision, self.device)
        if bfloat16:
            warn_of_slow_bfloat16(self.device)
        self.model = optimize_for_inference(
            network.float().to(self.device),
            bfloat16=bfloat16,
            compile_graph=compile_graph,
        )
        require_finite_weights(self.model)
        self.test = network.metadata.test if test is None else test

    @property
    def metadata(self) -> Metadata:
        return self.model.metadata

    def __call__(
        self,
        image: Image.Image | npt.NDArray[np.uint8] | str | Path,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segments one picture.

        Args:
            image: a picture of any mode, an RGB array H W 3 of uint8, or a path. EXIF orientation
                is honoured, so the result is upright.
            probabilities: compute the softmax scores at once, in the same pass.

        Raises:
            UserError: it is not a readable picture.
        """
        return segment_picture(self, image, probabilities=probabilities)

    @torch.inference_mode()
    def probabilities(
        self, image: Image.Image | npt.NDArray[np.uint8] | str | Path
    ) -> npt.NDArray[np.float32]:
        """The softmax scores of a picture, upright, K H W float32.

        Raises:
            UserError: it is not a readable picture.
        """
        pixels = TF.pil_to_tensor(as_rgb(image)).to(self.device)
        with autocast(self.precision, self.device):
            scores = predict_probabilities(self.model, pixels, self.test)
        found: npt.NDArray[np.float32] = scores.float().cpu().numpy()
        return found

    @torch.inference_mode()
    def segment_batch(self, images: npt.NDArray[np.uint8]) -> list[Segmentation]:
        """Segments pictures of one size, which go through the network together.

        Args:
            images: uint8 RGB P H W 3.

        Raises:
            UserError: they are not.
        """
        require_rgb_batch(images)
        if not len(images):
            return []
        # Not all arrays can be tensors: a view in reversed order, as of BGR channels, cannot, and
        # torch warns of those that may not be written.
        pixels = torch.from_numpy(np.require(images, requirements=("C", "W"))).permute(0, 3, 1, 2)
        pixels = pixels.to(self.device)
        with autocast(self.precision, self.device):
            found = [
                most_likely_classes(of_picture)[0]
                for of_picture in views(self.model, pixels, self.test)
            ]
        return [
            Segmentation(classes.cpu().numpy(), self.metadata.classes, self.metadata.palette)
            for classes in found
        ]

    def fingerprint(self) -> str:
        """Hash of the network, metadata, test settings and the weights as they are used."""
        settings = (self.model.config, self.model.metadata, self.test)
        digest = hashlib.sha256("".join(one.model_dump_json() for one in settings).encode())
        for tensor in self.model.state_dict().values():
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:FINGERPRINT_DIGITS]


def require_rgb_batch(images: npt.NDArray[np.uint8]) -> None:
    """Raises a UserError unless they are uint8 P H W 3 with pixels."""
    if not isinstance(images, np.ndarray):
        raise UserError(
            f"pictures must be one array P H W 3 of uint8, not {type(images).__name__}; use "
            "numpy.stack, or segment them one by one"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"pictures must be P H W 3 uint8, not {images.dtype} {images.shape}")
    if 0 in images.shape[1:3]:
        raise UserError(f"pictures must have pixels; these are {images.shape}")


def as_rgb(image: Image.Image | npt.NDArray[np.uint8] | str | Path) -> Image.Image:
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
        # First, for only its name may be too long.
        with replacing(folder / overlay_name(stem)) as path:
            segmentation.overlay(image).save(path, format="JPEG", quality=92)
    with replacing(folder / mask_name(stem)) as path:
        segmentation.mask().save(path, format="PNG")
