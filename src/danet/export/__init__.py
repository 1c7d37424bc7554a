"""One file that other programs run: ONNX, a torch program, or OpenVINO.

The graph takes pictures of any size and does everything that prediction does at one scale: it
normalises, resizes to the recipe's scale, segments, and brings the logits to the picture's size.
Position attention stays in bounded memory: in ONNX as a loop over blocks of queries, in a torch
program as torch's fused attention.

`graph` is what is exported, `files` writes and runs it, and here it is checked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.atomic import staging
from danet.choices import ExportFormat
from danet.data.images import open_image
from danet.devices import is_out_of_memory
from danet.errors import ExportDiffers, UserError, first_line
from danet.evaluation.inference import pixels_of
from danet.export.files import SMALLEST_SIDE, SUFFIXES, Engine, load, write
from danet.export.graph import WholePicture
from danet.inputs import find_inputs
from danet.model import DANet

CHECKED_SIZES = ((1, 96, 128), (2, 65, 97), (1, 160, 72))
"""Batch, height and width of the pictures that a file is checked on."""
OLDEST_TORCH_OF_PROGRAMS = (2, 13)
"""Programs of 2.11 take only sizes like the one that they were traced with."""
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit, that a file may show."""
CALIBRATION_PICTURES = 64
"""More are not needed to find ranges."""
CALIBRATION_SIDE = 1024
"""Larger pictures are shrunk: all of them are in memory."""


class Agreement(NamedTuple):
    """Comparison of an exported file with its model.

    Attributes:
        difference: the largest of the logits, as a share of the largest logit.
        same_class: share of the pixels whose most likely class is the same, 0..1.
    """

    difference: float
    same_class: float


def export(
    model: DANet,
    path: str | Path,
    file_format: ExportFormat,
    calibration: Sequence[Tensor] | None = None,
) -> Agreement:
    """Writes the file, runs it, and keeps it only if it agrees with the model.

    How far a file in 8 bit may differ is not limited: see what is returned.

    Args:
        model: left as it is.
        path: its suffix is .onnx, .pt2 (or .pt) for a torch program, or .xml for OpenVINO.
        file_format: "onnx", "torch" or "openvino".
        calibration: float32 3 H W pictures in 0..1 to find the ranges of 8-bit convolutions on;
            the file is in float32 where None. Not for the torch format.

    Returns:
        How the file compares with the model: on noise of `CHECKED_SIZES`, or in 8 bit on the
        calibration pictures.

    Raises:
        UserError: a package is missing or too old, the path does not fit the format or cannot be
            written, the model is a `Predictor`'s, or the pictures are not as described.
        ExportDiffers: the file does not run, gives no logits of the right size, or, in float32,
            differs from the model; nothing was written.
    """
    path = Path(path)
    check_suffix(file_format, path)
    if calibration is not None and file_format == "torch":
        raise UserError("--int8 is for onnx and openvino; a torch program stays in float32")
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if file_format == "torch" and release < OLDEST_TORCH_OF_PROGRAMS:
        needed = ".".join(map(str, OLDEST_TORCH_OF_PROGRAMS))
        raise UserError(
            f"--format torch needs PyTorch {needed}, and this is {torch.__version__}; update it, "
            "or choose another format"
        )
    model.require_original("export")
    if calibration is not None:
        _require_pictures(calibration)
    network = WholePicture(model)
    with _explaining_export_errors(file_format, model.config.backbone), staging(path) as temporary:
        write(network, temporary, file_format, calibration)
        engine = load(temporary, file_format)
        if calibration is None:
            agreement = compare(network, engine, _noise())
            if agreement.difference > TOLERANCE:
                raise ExportDiffers(
                    f"{path}: the exported graph differs from the model by "
                    f"{agreement.difference:.2g} of its largest logit; nothing was written"
                )
        else:
            agreement = compare(network, engine, [picture.unsqueeze(0) for picture in calibration])
    return agreement


def _require_pictures(calibration: Sequence[Tensor]) -> None:
    if not calibration:
        raise UserError("calibration: no picture; give some typical ones, 20 or more")
    for picture in calibration:
        has_pixels = picture.ndim == 3 and len(picture) == 3 and picture.numel() > 0
        if picture.dtype != torch.float32 or not has_pixels:
            raise UserError(
                "calibration: pictures must be float32 3 H W, not "
                f"{str(picture.dtype).removeprefix('torch.')} {tuple(picture.shape)}"
            )
        if picture.amin() < 0 or picture.amax() > 1:
            raise UserError(
                "calibration: pictures must be in 0..1, not in "
                f"{picture.amin():g}..{picture.amax():g}"
            )


@contextmanager
def _explaining_export_errors(file_format: str, backbone: str) -> Iterator[None]:
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch.onnx.OnnxExporterError) as error:
        cause: Exception = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise UserError(
            f"--format {file_format}: {backbone} cannot be traced for any picture size "
            f"({first_line(cause)}); try another format or backbone"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format {file_format} needs {error.name}: pip install 'danet[export]'"
        ) from error


def check_suffix(file_format: ExportFormat, path: Path) -> None:
    """Checks that a file's name has the suffix of its format.

    Raises:
        UserError: it has another one, or there is no such format.
    """
    if file_format not in SUFFIXES:
        raise UserError(f"--format {file_format}: use {', '.join(SUFFIXES)}")
    suffix = SUFFIXES[file_format]
    if path.suffix != suffix and not (file_format == "torch" and path.suffix == ".pt"):
        raise UserError(f"--out {path}: {file_format} files end in {suffix}")


def calibration_pictures(inputs: Sequence[str]) -> list[Tensor]:
    """The first `CALIBRATION_PICTURES` pictures that paths, folders and globs name, for `export`.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    found, problems = find_inputs(inputs)
    if problems:
        raise UserError(problems[0])
    pictures = []
    for one in found[:CALIBRATION_PICTURES]:
        image = open_image(one.path)
        image.thumbnail((CALIBRATION_SIDE, CALIBRATION_SIDE))
        if min(image.size) >= SMALLEST_SIDE:
            pictures.append(pixels_of(image).float() / 255)
    if not pictures:
        raise UserError(f"--calibration: no picture of at least {SMALLEST_SIDE} pixels a side")
    return pictures


@torch.inference_mode()
def compare(network: nn.Module, engine: Engine, pictures: Sequence[Tensor]) -> Agreement:
    """Compares on pictures B 3 H W."""
    largest = difference = 0.0
    same = pixels = 0
    for images in pictures:
        expected = network(images)
        try:
            found = torch.from_numpy(engine.run(images.numpy()))
        # Each engine has its own types.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ExportDiffers(
                f"the exported graph does not run ({first_line(error)}); nothing was written; try "
                "another format or backbone"
            ) from error
        if found.shape != expected.shape:
            raise ExportDiffers(
                f"the exported graph gives logits {tuple(found.shape)} for {tuple(images.shape)}; "
                "nothing was written"
            )
        if not found.isfinite().all():
            raise ExportDiffers("the exported graph's logits are not finite; nothing was written")
        largest = max(largest, expected.abs().max().item())
        difference = max(difference, (found - expected).abs().max().item())
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        pixels += found[:, 0].numel()
    return Agreement(difference / max(largest, 1e-30), same / pixels)


def _noise() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(b, 3, h, w, generator=generator) for b, h, w in CHECKED_SIZES]
