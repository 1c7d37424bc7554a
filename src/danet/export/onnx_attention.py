"""Position attention as an ONNX function: a loop over blocks of queries.

Shapes: B batch, D key width, C value width, N queries, M keys.
"""

import onnx
from onnxscript import BOOL, FLOAT, INT64, graph, script
from onnxscript import opset18 as op

QUERY_BLOCK = 512
"""Queries taken at a time; M times as many scores are in memory."""

_ALWAYS = onnx.helper.make_tensor("always", onnx.TensorProto.BOOL, [], [1])


@script()
def position_attention(query: FLOAT, key: FLOAT, value: FLOAT) -> FLOAT:
    """Query B D N, key B D M, value B C M -> B C N."""
    queries = op.Shape(query, start=2, end=3)
    length = op.Constant(value_ints=[QUERY_BLOCK])
    one = op.Constant(value_ints=[1])
    blocks = op.Div(op.Sub(op.Add(queries, length), one), length)
    missing = op.Sub(op.Mul(blocks, length), queries)
    zeros = op.Constant(value_ints=[0, 0, 0, 0, 0])
    filled = op.Pad(query, op.Concat(zeros, missing, axis=0))
    split_shape = op.Concat(op.Shape(query, start=0, end=2), blocks, length, axis=0)
    stacked = op.Transpose(op.Reshape(filled, split_shape), perm=[2, 0, 3, 1])
    transposed_value = op.Transpose(value, perm=[0, 2, 1])

    @graph()
    def attend_block(index: INT64, goes_on: BOOL):  # noqa: ANN202 - onnxscript takes none
        """A block's number -> whether to go on, B block C."""
        some_queries = op.Gather(stacked, index, axis=0)
        scores = op.Softmax(op.MatMul(some_queries, key), axis=-1)
        gathered = op.MatMul(scores, transposed_value)
        still = op.Identity(goes_on)
        return still, gathered

    always = op.Constant(value=_ALWAYS)
    gathered = op.Loop(op.Squeeze(blocks), always, body=attend_block)
    channels_first = op.Transpose(gathered, perm=[1, 3, 0, 2])
    joined_shape = op.Concat(op.Shape(value, start=0, end=2), op.Mul(blocks, length), axis=0)
    joined = op.Reshape(channels_first, joined_shape)
    start = op.Constant(value_ints=[0])
    axis = op.Constant(value_ints=[2])
    return op.Slice(joined, start, queries, axis)
