"""Position attention on torch's fused kernel for CPUs, where these have units for matrices (AMX).

It keeps blocks of scores in the nearest cache through softmax and second product. Key and value
must be equally wide, so query and key are filled up with zeros: exact, and with AMX the products
that this adds cost less than passes over the scores did.

Shapes: B batch, D key width, C value width, N query positions, M key positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from danet.kernels.cpu import has_amx


def fits(query_BDN: Tensor, value_BCM: Tensor) -> bool:
    """Whether the kernel takes these inputs, and is the fastest exact way for them."""
    return (
        query_BDN.device.type == "cpu"
        and query_BDN.dtype == torch.bfloat16
        and query_BDN.shape[1] <= value_BCM.shape[1]
        and query_BDN.numel() > 0
        and value_BCM.numel() > 0
        and has_amx()
    )


def forward(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Output B C N, and the float32 log-sum-exp B N of each row of scores."""
    output_B1NC, logsumexp_B1N = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_one_head(tensor, value_BCM.shape[1]) for tensor in (query_BDN, key_BDM, value_BCM)),
        scale=1.0,
    )
    return output_B1NC.squeeze(1).transpose(1, 2), logsumexp_B1N.squeeze(1)


def _one_head(tensor_BDN: Tensor, width: int) -> Tensor:
    """B 1 N width. Contiguous, for the kernel reads whole rows."""
    rows_BND = tensor_BDN.transpose(1, 2)
    missing = width - rows_BND.shape[2]
    filled_BNw = F.pad(rows_BND, (0, missing)) if missing else rows_BND  # 0 columns: a copy, too
    return filled_BNw.contiguous().unsqueeze(1)
