"""Writing a graph in each format, and running it in its own engine."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danet.export.graph import (
    WholePicture,
    attend_by_equal_widths,
    attend_in_onnx,
    traceable_attention,
)

Format = Literal["onnx", "torch", "openvino"]
SMALLEST_SIDE = 32
"""Pixels; an exported graph may refuse smaller pictures."""
OPSET = 18

Runner = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Pictures B 3 H W -> logits B K H W."""


def write(
    network: WholePicture, path: Path, file_format: Format, calibration: Sequence[Tensor] | None
) -> None:
    """Writes the graph; with pictures to calibrate on, its convolutions in 8 bit."""
    if file_format == "torch":
        _write_torch(network, path)
        return
    onnx_path = path.with_suffix(".onnx")
    _write_onnx(network, onnx_path)
    if calibration is not None:
        _quantize(onnx_path, calibration)
    if file_format == "openvino":
        _write_openvino(onnx_path, path, network)
        onnx_path.unlink()


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
    with traceable_attention(network, attend_by_equal_widths), torch.no_grad():
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=axes,
            # Relations of odd sizes that always hold but that export cannot prove.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    torch.export.save(program, path, extra_files={"metadata.json": _metadata(network)})


def _write_onnx(network: WholePicture, path: Path) -> None:
    from danet.export.onnx_attention import position_attention as position_attention_in_onnx

    example, axes = _example()
    operator = torch.ops.danet.attend_in_onnx.default
    with traceable_attention(network, attend_in_onnx), torch.no_grad():
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


def load(path: Path, file_format: Format) -> Runner:
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
