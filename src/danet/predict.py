"""Segmenting photos."""

import copy
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from danet.config import TestConfig
from danet.devices import autocast, choose_device, uses_bfloat16, warn_of_slow_bfloat16
from danet.errors import UserError
from danet.evaluation.inference import pixels_of, predict_probabilities, views
from danet.evaluation.strips import most_likely_classes
from danet.model import DANet
from danet.model_folder import Metadata
from danet.optimize import optimize_for_inference, require_finite_weights
from danet.segmentation import ImageSource, Segmentation, as_rgb

FINGERPRINT_DIGITS = 16


class Segmenter(Protocol):
    """Interface of `Predictor` and `danet.export.predictor.ExportedPredictor`."""

    @property
    def metadata(self) -> Metadata: ...

    def probabilities(self, image: ImageSource) -> npt.NDArray[np.float32]:
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
    image: ImageSource,
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
        image: ImageSource,
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
    def probabilities(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """The softmax scores of a picture, upright, K H W float32.

        Raises:
            UserError: it is not a readable picture.
        """
        pixels = pixels_of(as_rgb(image)).to(self.device)
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
