"""Settings of a few values that recipes, the command and Python functions share.

Nothing is imported here but typing, so that `danet --help` is quick.
"""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
TestMode = Literal["whole", "slide"]
"""How a picture goes through the network: at once, or in sliding windows."""
ExportFormat = Literal["onnx", "torch", "openvino"]
