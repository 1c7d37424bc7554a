"""One file that other programs run: ONNX, a torch program, or OpenVINO.

The graph takes pictures of any size and does everything that prediction does at one scale: it
normalises, resizes to the recipe's scale, segments, and brings the logits to the picture's size.
Position attention stays in bounded memory: in ONNX as a loop over blocks of queries, in a torch
program as torch's fused attention.

Shapes: B batch, K classes, H W the picture; D key width, C value width, N queries, M keys.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from timm.layers import padding
from torch import Tensor, nn

from danet.atomic import staging
from danet.attention import PositionAttention
from danet.data.images import open_image
from danet.errors import ExportDiffers, UserError, first_line
from danet.inputs import find_inputs
from danet.kernels.fused import attend_spread
from danet.model import DANet
from danet.optimize import fold_batch_norms

Format = Literal["onnx", "torch", "openvino"]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
CHECKED_SIZES = ((1, 96, 128), (2, 65, 97), (1, 160, 72))
"""Batch, height and width of the pictures that a file is checked on."""
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit, that a file may show."""
CALIBRATION_PICTURES = 64
"""More are not needed to find ranges."""
CALIBRATION_SIDE = 1024
"""Larger pictures are shrunk: all of them are in memory."""
OPSET = 18
SMALLEST_SIDE = 32
"""Pixels; an exported graph may refuse smaller pictures."""

_Runner = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


class Agreement(NamedTuple):
    """How a file compares with the model.

    Attributes:
        difference: the largest of the logits, as a share of the largest logit.
        same_class: share of the pixels whose most likely class is the same, 0..1.
    """

    difference: float
    same_class: float


def export(
    model: DANet, path: Path, file_format: Format, calibration: Sequence[Tensor] | None = None
) -> Agreement:
    """Writes the file, runs it, and keeps it only if it agrees with the model.

    Args:
        model: left as it is.
        calibration: float32 3 H W pictures in 0..1 to find the ranges of 8-bit convolutions on;
            the file is in float32 where None. Not for the torch format.

    Returns:
        How the file compares with the model: on noise of `CHECKED_SIZES`, or in 8 bit on the
        calibration pictures.

    Raises:
        UserError: a package is missing, the path does not fit the format or cannot be written.
        ExportDiffers: the file computes something else; nothing was written.
    """
    check_format(file_format, path)
    if calibration is not None and file_format == "torch":
        raise UserError("--int8 is for onnx and openvino; a torch program stays in float32")
    network = WholePicture(model)
    with _explained(file_format, model.config.backbone), staging(path) as temporary:
        if file_format == "torch":
            _write_torch(network, temporary)
        else:
            onnx_path = temporary.with_suffix(".onnx")
            _write_onnx(network, onnx_path)
            if calibration is not None:
                _quantize(onnx_path, calibration)
            if file_format == "openvino":
                _write_openvino(onnx_path, temporary, network)
                onnx_path.unlink()
        run = load(temporary, file_format)
        if calibration is None:
            agreement = compare(network, run, _noise())
            if agreement.difference > TOLERANCE:
                raise ExportDiffers(
                    f"{path}: the exported graph differs from the model by "
                    f"{agreement.difference:.2g} of its largest logit; nothing was written"
                )
        else:
            agreement = compare(network, run, [picture.unsqueeze(0) for picture in calibration])
    return agreement


@contextmanager
def _explained(file_format: str, backbone: str) -> Iterator[None]:
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch.onnx.OnnxExporterError) as error:
        raise UserError(
            f"--format {file_format}: {backbone} cannot be traced for any picture size "
            f"({first_line(error)}); try another format or backbone"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format {file_format} needs {error.name}: pip install 'danet[export]'"
        ) from error


def check_format(name: str, path: Path) -> Format:
    """The format of this name.

    Raises:
        UserError: there is none, or the path has not its suffix.
    """
    for file_format in get_args(Format):
        if file_format == name:
            if path.suffix != SUFFIXES[name]:
                raise UserError(f"--out {path}: {name} files end in {SUFFIXES[name]}")
            found: Format = file_format
            return found
    raise UserError(f"--format {name}: use {', '.join(get_args(Format))}")


class WholePicture(nn.Module):
    """What is exported: pictures float32 B 3 H W, RGB in 0..1 -> logits B K H W at their size."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: DANet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        fold_batch_norms(self.model)
        self.register_buffer("mean", torch.tensor(model.metadata.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.metadata.std).view(3, 1, 1))
        self.scale = model.metadata.test.scale
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        own_size = images.shape[-2:]
        pixels = (images * 255 - self.mean) / self.std
        if self.scale is not None:
            pixels = F.interpolate(pixels, size=_fitted(own_size, self.scale), mode="bilinear")
        logits = self.model.predict_logits(pixels)
        if self.scale is not None:
            logits = self.model.upsample(logits, own_size)
        return logits


def _fitted(size: Sequence[int], bounds: tuple[int, int]) -> tuple[int, int]:
    """Height and width by `danet.data.transforms.fitted_size`.

    In whole numbers, for a graph computes this itself, from symbols; where exactly half a pixel is
    rounded, floats may have it otherwise.
    """
    height, width = size
    low, high = sorted(bounds)
    long, short = torch.sym_max(height, width), torch.sym_min(height, width)

    def fit(side: int) -> Any:
        by_long = (2 * side * high + long) // (2 * long)
        by_short = (2 * side * low + short) // (2 * short)
        return torch.sym_max(torch.sym_min(by_long, by_short), 1)

    return fit(height), fit(width)


def _same_padding(side: int, kernel: int, stride: int, dilation: int) -> Any:
    """timm's `get_same_padding` in whole numbers: a graph with its division cannot be saved."""
    steps = (side + stride - 1) // stride
    return torch.sym_max((steps - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)


# Position attention in each format


@contextmanager
def _traceable(network: nn.Module, attend: Callable[..., Tensor]) -> Iterator[None]:
    modules = [module for module in network.modules() if isinstance(module, PositionAttention)]
    with ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(patch.object(module, "attend", attend))
        replaced.enter_context(patch.object(padding, "get_same_padding", _same_padding))
        yield


def attend_by_equal_widths(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    """Position attention by torch's fused attention alone: B C N.

    On every device that takes O(N) memory where all widths are equal.
    """
    return attend_spread(query_BDN, key_BDM, value_BCM, width=query_BDN.shape[1])


@torch.library.custom_op("danet::attend_in_onnx", mutates_args=())
def attend_in_onnx(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    """Position attention, B C N; `danet.onnx_attention` is what it becomes."""
    raise NotImplementedError("only exported, never run")


@attend_in_onnx.register_fake
def _(query_BDN: Tensor, _key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    return value_BCM.new_empty(*value_BCM.shape[:2], query_BDN.shape[2])


# Writing


def _example() -> tuple[Tensor, dict[str, Any]]:
    """A picture to trace with, and which of its axes may have any length."""
    axes = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=SMALLEST_SIDE),
        3: torch.export.Dim("width", min=SMALLEST_SIDE),
    }
    return torch.rand(2, 3, 96, 128), {"images": axes}


def _write_torch(network: WholePicture, path: Path) -> None:
    example, axes = _example()
    with _traceable(network, attend_by_equal_widths), torch.no_grad():
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=axes,
            # Relations of odd sizes that always hold but that export cannot prove.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    torch.export.save(program, path, extra_files={"metadata.json": _metadata(network)})


def _write_onnx(network: WholePicture, path: Path) -> None:
    from danet.onnx_attention import position_attention as position_attention_in_onnx

    example, axes = _example()
    operator = torch.ops.danet.attend_in_onnx.default
    with _traceable(network, attend_in_onnx), torch.no_grad():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=axes,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            custom_translation_table={operator: position_attention_in_onnx},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["danet"] = _metadata(network)
    program.save(path, external_data=False)


def _write_openvino(onnx_path: Path, path: Path, network: WholePicture) -> None:
    import openvino

    converted = openvino.convert_model(onnx_path)
    converted.set_rt_info(_metadata(network), ["danet"])
    openvino.save_model(converted, path, compress_to_fp16=False)


def _quantize(path: Path, calibration: Sequence[Tensor]) -> None:
    """Makes the convolutions of an ONNX file compute in 8 bit, in place."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining = iter(calibration)

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            picture = next(self.remaining, None)
            return None if picture is None else {"images": picture.unsqueeze(0).numpy()}

    # What feeds the loop stays in float32: scores are exponentiated, and ONNX Runtime (1.31) dies
    # when it moves conversions into a loop.
    kept = [
        node.name
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv" and ".attention." in node.input[1]
    ]
    quantize_static(
        path,
        path,
        Pictures(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=kept,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _metadata(network: WholePicture) -> str:
    metadata = network.model.metadata
    return json.dumps({"classes": metadata.classes, "palette": metadata.palette})


def calibration_pictures(inputs: Sequence[str]) -> list[Tensor]:
    """The first `CALIBRATION_PICTURES` pictures that paths, folders and globs name, for `export`.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    paths, problems = find_inputs(inputs)
    if problems:
        raise UserError(problems[0])
    pictures = []
    for path in paths[:CALIBRATION_PICTURES]:
        image = open_image(path)
        image.thumbnail((CALIBRATION_SIDE, CALIBRATION_SIDE))
        if min(image.size) >= SMALLEST_SIDE:
            pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    if not pictures:
        raise UserError(f"--calibration: no picture of at least {SMALLEST_SIDE} pixels a side")
    return pictures


# Running and comparing


def load(path: Path, file_format: Format) -> _Runner:
    """A function from pictures to logits that runs an exported file in its own engine."""
    if file_format == "torch":
        module = torch.export.load(path).module()
        return lambda images: np.asarray(module(torch.from_numpy(images)).detach())
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: np.asarray(compiled({"images": images})["logits"])


@torch.inference_mode()
def compare(network: nn.Module, run: _Runner, pictures: Sequence[Tensor]) -> Agreement:
    """Compares on pictures B 3 H W."""
    largest = difference = 0.0
    same = pixels = 0
    for images in pictures:
        expected = network(images)
        found = torch.from_numpy(run(images.numpy()))
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
