"""3x3 convolutions with fewer multiplications, on a CPU: Winograd's.

In exact arithmetic this is the convolution. float32 takes F(4x4, 3x3) and differs from the direct
one by rounding alone (2e-6 of the output). bfloat16 takes F(2x2, 3x3): what is rounded between the
steps doubles the error of a layer, 3e-3 of its output to 6e-3, and would make it 17e-3 with
F(4x4, 3x3).

`WinogradConv2d` is for inference. `convolve` has gradients, which are computed in the same way.
"""

from danet.winograd.autograd import convolve
from danet.winograd.layer import WinogradConv2d, pays
from danet.winograd.tiles import TiledConvolution

__all__ = ["TiledConvolution", "WinogradConv2d", "convolve", "pays"]
