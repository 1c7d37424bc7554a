"""Writing a graph in each format, and running it in its own engine."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danet.choices import ExportFormat
from danet.export.graph import (
    WholePicture,
    attend_by_equal_widths,
    attend_in_onnx,
    errors_alone,
    named_sizes,
    traceable_attention,
)

SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
SMALLEST_SIDE = 32
"""Pixels; an exported graph may refuse smaller pictures."""
OPSET = 18
METADATA_KEY = "danet"


def write(
    network: WholePicture,
    path: Path,
    file_format: ExportFormat,
    calibration: Sequence[Tensor] | None,
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
    with (
        traceable_attention(network, attend_by_equal_widths),
        named_sizes(network),
        torch.no_grad(),
    ):
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=axes,
            # Relations of odd sizes that always hold but that export cannot prove.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # Into memory: where the disk is full, torch's writer of files ends the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": _metadata(network)})
    path.write_bytes(content.getbuffer())


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
    program.model.metadata_props[METADATA_KEY] = _metadata(network)
    program.save(path, external_data=False)


def _write_openvino(onnx_path: Path, path: Path, network: WholePicture) -> None:
    import openvino

    converted = openvino.convert_model(onnx_path)
    converted.set_rt_info(_metadata(network), [METADATA_KEY])
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
    with errors_alone(None):  # it advises all to preprocess the graph, which was made to fit
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


class Engine(NamedTuple):
    """An exported file, opened in its runtime.

    Attributes:
        run: pictures float32 B 3 H W in 0..1 -> logits B K H W.
        metadata: what `danet export` wrote about the classes, as JSON; None in foreign files.
    """

    run: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    metadata: str | None


def load(path: Path, file_format: ExportFormat, *, bfloat16: bool = False) -> Engine:
    """Opens an exported file in its own engine, on the CPU.

    Args:
        bfloat16: round to it what the file has in float32; OpenVINO only.
    """
    if file_format == "torch":
        return _open_torch(path)
    if file_format == "onnx":
        return _open_onnx(path)
    return _open_openvino(path, bfloat16=bfloat16)


def _open_torch(path: Path) -> Engine:
    extra = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    return Engine(
        lambda images: np.asarray(module(torch.from_numpy(images)).detach()),
        extra["metadata.json"] or None,
    )


def _open_onnx(path: Path) -> Engine:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Engine(
        lambda images: np.asarray(session.run(["logits"], {"images": images})[0]),
        session.get_modelmeta().custom_metadata_map.get(METADATA_KEY),
    )


def _open_openvino(path: Path, *, bfloat16: bool) -> Engine:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32"}
    model = openvino.Core().read_model(path)
    compiled = openvino.compile_model(model, "CPU", settings)

    def run(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # Threads must not share a request.
        found = compiled.create_infer_request().infer({"images": images})
        return np.array(found["logits"])

    return Engine(
        run,
        model.get_rt_info(METADATA_KEY).astype(str) if model.has_rt_info(METADATA_KEY) else None,
    )
