"""Position and channel attention of dual attention networks (arXiv 1809.02983, section 3).

Shapes: B batch, C channels, D key width, H W height and width, N = H W positions, M key positions.

Where the paper and the code behind its published numbers differ:
- Channel attention: the paper weighs channels by softmax(A A^T), the released code by
  softmax(max(A A^T) - A A^T), so that the least similar channels weigh most. Both are here,
  `affinity="paper"` and `affinity="reference"`.
- Neither scales scores by 1 / sqrt(D), unlike later attention.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from danet import kernels
from danet.kernels.precision import (
    fast_exact_float32,
    has_autocast,
    least_exponent,
    without_autocast,
)

Affinity = Literal["reference", "paper"]


def position_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Gathers values from all positions by similarity; exact, in O(N) memory in both directions.

    Equations (1) and (2) without the residual: s_ji = exp(B_i . C_j) / sum_i exp(B_i . C_j) and
    E_j = sum_i s_ji D_i, where j runs over the queries and i over the keys and values.

    Args:
        query: B D N, any floating dtype.
        key: B D M.
        value: B C M.

    Returns:
        B C N in the inputs' dtype (autocast's where it is on, except for float64).

    Raises:
        ValueError: shapes do not fit, M is 0, or dtypes or devices differ.
    """
    device_type = query.device.type
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # As torch's autocast, which leaves float64 alone.
        query, key, value = (
            tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (query, key, value)
        )
    _check(query, key, value)
    return kernels.position_attention(query, key, value)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(f"position attention takes B D N, B D M and B C M, not {shapes}")
    if query.shape[:2] != key.shape[:2] or key.shape[::2] != value.shape[::2]:
        raise ValueError(f"position attention: batch, key width or M differ in {shapes}")
    if key.shape[2] == 0:
        raise ValueError(f"position attention: no positions to attend to in {shapes}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            "position attention takes one floating dtype, "
            f"not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"position attention: devices differ ({query.device}, {key.device}, {value.device})"
        )


def channel_attention(features: Tensor, affinity: Affinity = "reference") -> Tensor:
    """Relates every channel to every other.

    Equations (3) and (4) without the residual: with energies e_ji = A_j . A_i,
    E_j = sum_i x_ji A_i, where over i

        affinity="paper":      x_j = softmax(e_j)
        affinity="reference":  x_j = softmax(max(e_j) - e_j), as every released network has it

    Energies are sums over N products, so they are formed in float32 or wider.

    Args:
        features: B C N, any floating dtype.

    Returns:
        B C N in the input's dtype (autocast's where it is on).

    Raises:
        ValueError: not three axes, not floating, no channels, or an unknown affinity.
    """
    if features.ndim != 3 or not features.is_floating_point() or features.shape[1] == 0:
        raise ValueError(
            f"channel attention takes floating B C N, C at least 1, not {features.dtype} "
            f"{tuple(features.shape)}"
        )
    attention_BCC = channel_affinities(features, affinity).to(features.dtype)
    if features.stride(1) == 1:
        # Channels-last features give a result in the same format.
        return (features.transpose(1, 2) @ attention_BCC.transpose(1, 2)).transpose(1, 2)
    return attention_BCC @ features


def channel_affinities(features: Tensor, affinity: Affinity = "reference") -> Tensor:
    """The shares x_ji of equation (3), by which channel j gathers from channel i.

    Args:
        features: B C N, any floating dtype.

    Returns:
        B C C, float32 or wider, rows summing to 1.

    Raises:
        ValueError: an unknown affinity.
    """
    _check_affinity(affinity)
    device = features.device
    with without_autocast(device.type), fast_exact_float32(device):
        exact_BCN = features.to(torch.promote_types(features.dtype, torch.float32))
        energy_BCC = exact_BCN @ exact_BCN.transpose(1, 2)
        if affinity == "reference":
            # softmax does not see a constant added to a row: this is softmax(max - energy).
            energy_BCC = -energy_BCC
        below_BCC = energy_BCC - energy_BCC.amax(-1, keepdim=True).detach()
        return below_BCC.clamp(min=least_exponent(below_BCC.dtype)).softmax(-1)


class PositionAttention(nn.Module):
    """E = alpha * position_attention(query(A), key(A), value(A)) + A, alpha starting at 0 (eq. 2).

    Query, key and value are 1x1 convolutions with bias: the paper's C, B and D, in this order.
    B C H W -> the same shape, any H and W.

    Args:
        channels: C of the input.
        key_channels: width of query and key; channels // 8 as in the paper where None.

    Raises:
        ValueError: a number of channels is below 1.
    """

    def __init__(self, channels: int, key_channels: int | None = None) -> None:
        super().__init__()
        key_channels = max(channels // 8, 1) if key_channels is None else key_channels
        if min(channels, key_channels) < 1:
            raise ValueError(
                f"channels and key_channels must be at least 1, not {channels} and {key_channels}"
            )
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = position_attention
        self.residual_weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to 0; the convolutions have methods of their own."""
        nn.init.zeros_(self.residual_weight)

    def forward(self, features: Tensor) -> Tensor:
        _check_features(features)
        attended = self.attend(
            self.query(features).flatten(2),
            self.key(features).flatten(2),
            self.value(features).flatten(2),
        )
        return _add_residual(attended, self.residual_weight, features)


class ChannelAttention(nn.Module):
    """E = beta * channel_attention(A) + A, with beta starting at 0 (eq. 4).

    B C H W -> the same shape, any H and W.

    Args:
        affinity: see `channel_attention`.

    Raises:
        ValueError: an unknown affinity.
    """

    def __init__(self, affinity: Affinity = "reference") -> None:
        super().__init__()
        _check_affinity(affinity)
        self.affinity: Affinity = affinity
        self.residual_weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets beta to 0."""
        nn.init.zeros_(self.residual_weight)

    def forward(self, features: Tensor) -> Tensor:
        _check_features(features)
        attended = channel_attention(features.flatten(2), self.affinity)
        return _add_residual(attended, self.residual_weight, features)

    def extra_repr(self) -> str:
        return f"affinity={self.affinity!r}"


def _check_affinity(affinity: str) -> None:
    if affinity not in get_args(Affinity):
        raise ValueError(f"affinity must be one of {get_args(Affinity)}, not {affinity!r}")


def _check_features(features: Tensor) -> None:
    """C H W would be taken for a batch of other features, silently."""
    if features.ndim != 4:
        raise ValueError(f"attention modules take B C H W, not {tuple(features.shape)}")


def _add_residual(attended_BCN: Tensor, weight: Tensor, features_BCHW: Tensor) -> Tensor:
    # As a scalar the float32 weight does not promote half-precision features.
    # The features come first: a sum has the memory format of its first operand.
    return features_BCHW + weight.squeeze() * attended_BCN.reshape(features_BCHW.shape)
