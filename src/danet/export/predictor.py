"""Segmenting with an exported file, in its own engine."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from danet.choices import ExportFormat
from danet.devices import is_out_of_memory, uses_bfloat16
from danet.errors import UserError, explaining_lookup, first_line
from danet.evaluation.strips import Stored, most_likely_classes, require_finite
from danet.export.files import SMALLEST_SIDE, SUFFIXES, Engine, load
from danet.model_folder import Metadata
from danet.predict import FINGERPRINT_DIGITS, require_rgb_batch, segment_picture
from danet.segmentation import ImageSource, Segmentation, as_rgb

_HEADER_BYTES = 1024
_FORMATS = {suffix: name for name, suffix in SUFFIXES.items() if name != "torch"}


def is_exported(model: str) -> bool:
    """Whether a model is named by a file rather than by a folder or a hub id."""
    path = Path(model)
    with explaining_lookup(f"model {model}"):
        return path.suffix.lower() in SUFFIXES.values() and not path.is_dir()


class ExportedPredictor:
    """Segments pictures with a file that `danet export` wrote, on the CPU.

    A picture is taken whole, at the one scale of the model's recipe. Sides under `SMALLEST_SIDE`
    pixels are filled up with the picture's edge.

    Args:
        path: a .onnx file, or an OpenVINO .xml file beside its .bin. Not a torch program, whose
            format may hold pickled code.
        precision: "auto" lets OpenVINO compute in bfloat16 where the CPU does so in hardware;
            "fp32", "bf16". ONNX Runtime knows fp32 only.

    Raises:
        UserError: it is no such file, its engine is not installed, or it has not this precision.
    """

    def __init__(self, path: str | Path, precision: str = "auto") -> None:
        self.path = Path(path)
        with explaining_lookup(self.path):
            if not self.path.is_file():
                raise UserError(f"{path}: no such file")
        file_format = _FORMATS.get(self.path.suffix.lower())
        if file_format is None:
            raise UserError(
                f"{path}: not an .onnx or .xml file; give one of these, or the model folder"
            )
        # OpenVINO would try its readers of other formats on anything else.
        if file_format == "openvino" and b"<net" not in self._first_bytes():
            raise UserError(f"{path}: not an OpenVINO model")
        weights = self.path.with_suffix(".bin")
        if file_format == "openvino" and not weights.is_file():
            raise UserError(f"{path}: its weights are missing; put {weights.name} beside it")
        if file_format == "onnx" and precision == "bf16":
            raise UserError(
                f"{path}: ONNX Runtime has no bf16 here; use --precision fp32 or an .xml"
            )
        bfloat16 = uses_bfloat16(precision, torch.device("cpu"))
        self._bfloat16 = bfloat16 and file_format == "openvino"
        self._engine = self._open(file_format)
        if self._engine.metadata is None:
            raise UserError(f"{path}: does not say its classes; write it with danet export")
        try:
            self.metadata = Metadata.model_validate_json(self._engine.metadata)
        except ValidationError as error:
            raise UserError(f"{path}: its classes are damaged ({first_line(error)})") from error

    def _first_bytes(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                return file.read(_HEADER_BYTES)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _open(self, file_format: ExportFormat) -> Engine:
        try:
            return load(self.path, file_format, bfloat16=self._bfloat16)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.path} needs {error.name}: pip install 'danet[export]'"
            ) from error
        # The engines raise many types on damaged and foreign files.
        except Exception as error:
            raise UserError(
                f"{self.path}: cannot be opened as {file_format} ({first_line(error)})"
            ) from error

    def __call__(
        self,
        image: ImageSource,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segments one picture, as `danet.Predictor` does."""
        return segment_picture(self, image, probabilities=probabilities)

    def probabilities(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """The softmax scores of a picture, upright, K H W float32.

        Raises:
            UserError: it is not a readable picture, or as `segment_batch`.
        """
        scores = self._pictures_logits(np.array(as_rgb(image))[None])[0].softmax(0)
        found: npt.NDArray[np.float32] = scores.numpy()
        return found

    def segment_batch(self, images: npt.NDArray[np.uint8]) -> list[Segmentation]:
        """Segments pictures of one size together, uint8 RGB P H W 3.

        Raises:
            UserError: they are not, or the graph does not take them, or gives other classes than
                it says.
        """
        require_rgb_batch(images)
        if not len(images):
            return []
        names, palette = self.metadata.classes, self.metadata.palette
        return [
            Segmentation(most_likely_classes([Stored(of_picture)])[0].numpy(), names, palette)
            for of_picture in self._pictures_logits(images).unsqueeze(1)
        ]

    def _pictures_logits(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        """P K H W float32 of uint8 RGB P H W 3."""
        height, width = images.shape[1:3]
        missing = [max(0, SMALLEST_SIDE - side) for side in (height, width)]
        filled = np.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        pixels = filled.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        logits = self._logits(pixels)
        expected = (len(images), len(self.metadata.classes), *pixels.shape[2:])
        if logits.shape != expected:
            raise UserError(f"{self.path}: gives {logits.shape} where {expected} is expected")
        found = torch.from_numpy(logits)
        require_finite(found)
        return found[..., :height, :width]

    def _logits(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        try:
            return self._engine.run(pixels)
        # Each engine has its own types.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{self.path}: does not take pictures as danet export's do ({first_line(error)})"
            ) from error

    def fingerprint(self) -> str:
        """Hash of the file, of the .bin file beside it, and of the precision."""
        digest = hashlib.sha256(b"bf16" if self._bfloat16 else b"fp32")
        for path in (self.path, self.path.with_suffix(".bin")):
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:FINGERPRINT_DIGITS]
