"""Position attention on torch's fused attention kernels, for NVIDIA GPUs.

These kernels take values of at most 128 channels at full speed. Attention acts on each channel of
the value alike, so the channels are spread over heads that all have the same query and key: exact,
for the price of forming the scores once a head.

Shapes: B batch, D key width, C value width, E heads, N query positions, M key positions.
"""

import contextlib
import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_HEAD_CHANNELS = 128
_ALIGNMENT = 8
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""In the order of preference. The math backend, which holds N x M, is never among them."""
_settings = threading.Lock()
"""Which kernels torch may take is a setting of the whole process."""


def fused_attention_fits(query_BDN: Tensor, value_BCM: Tensor) -> bool:
    """Whether the fused kernels take these inputs."""
    return (
        query_BDN.device.type == "cuda"
        and torch.version.hip is None
        and query_BDN.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query_BDN.device) >= (8, 0)
        and query_BDN.shape[1] % _ALIGNMENT == 0
        and query_BDN.shape[1] <= _HEAD_CHANNELS
        and value_BCM.shape[1] % _ALIGNMENT == 0
        and query_BDN.numel() > 0
        and value_BCM.numel() > 0
    )


def attend_by_heads(
    query_BDN: Tensor,
    key_BDM: Tensor,
    value_BCM: Tensor,
    backends: list[SDPBackend] = _BACKENDS,
    head_channels: int = _HEAD_CHANNELS,
) -> Tensor:
    """Output B C N, by the first of the kernels that takes the inputs.

    Args:
        head_channels: the most that a head has of the value.
    """
    channels = value_BCM.shape[1]
    heads = -(-channels // head_channels)
    width = -(-channels // (heads * _ALIGNMENT)) * _ALIGNMENT
    # Compilers do not trace locks, and take the setting into the graph.
    alone = contextlib.nullcontext() if torch.compiler.is_compiling() else _settings
    with alone, sdpa_kernel(backends, set_priority=True):
        return attend_spread(query_BDN, key_BDM, value_BCM, width)


def attend_spread(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor, width: int) -> Tensor:
    """Output B C N by torch's fused attention, whichever kernel it takes.

    Args:
        width: channels of a head; the last head is filled up with zeros.
    """
    channels = value_BCM.shape[1]
    heads = -(-channels // width)
    if heads * width != channels:
        value_BCM = F.pad(value_BCM, (0, 0, 0, heads * width - channels))
    # Copies, not views of stride 0, which some kernels read wrongly; contiguous, or torch falls
    # back on forming N x M.
    query_BEND = query_BDN.transpose(1, 2).unsqueeze(1).repeat(1, heads, 1, 1)
    key_BEMD = key_BDM.transpose(1, 2).unsqueeze(1).repeat(1, heads, 1, 1)
    value_BEcM = value_BCM.reshape(-1, heads, width, value_BCM.shape[2])
    value_BEMc = value_BEcM.transpose(2, 3).contiguous()
    output_BENc = F.scaled_dot_product_attention(query_BEND, key_BEMD, value_BEMc, scale=1.0)
    output_BCN = output_BENc.transpose(2, 3).flatten(1, 2)
    return output_BCN if heads * width == channels else output_BCN[:, :channels]
