"""Position attention as Triton kernels: forward, and backward in three parts; never N x M.

Shapes: B batch, D key width, C value width, N query positions, M key positions; lower-case n and m
are blocks of positions, c the channels that one program has.

    scores_NM = query key^T      weights_NM = softmax over M      output_NC = weights value

The softmax is formed online (FlashAttention, arXiv 2205.14135) and the backward pass recomputes
the weights from the log-sum-exp, once for keys and values and once for queries, so that every
gradient is written once and the same inputs give the same bits (arXiv 2307.08691). Scores, weights
and sums are float32; weights are rounded to the inputs' dtype for the products.

What differs from attention as it is usual: scores are not scaled, and the value is eight times
wider than the key. A block of outputs of all 512 channels may exceed what a multiprocessor's
registers hold, so a program may have `WIDTH` channels only. Attention acts on every channel alike,
so channels split exactly, for the price of forming the scores once a part. Backward, where
dS = P (dP - rowsum(G output)) is a sum over channels too, each part has a share of dQ and dK.

All tensors are B N C with channels next to each other and any other strides. `ROWS` are the
positions that a program has, `COLUMNS` those that its loop takes at a time. `EVEN`: these divide
the positions, so nothing is masked. `TMA`: tiles come through tensor descriptors (sm_90 and newer;
strides must be multiples of 16 bytes), which fill up with zeros by themselves.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def open_rows(
    start,
    stride,
    count,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """The matrix of `count` x CHANNELS that `load_rows` reads tiles of ROWS x WIDTH from."""
    if TMA:
        return tl.make_tensor_descriptor(start, [count, CHANNELS], [stride, 1], [ROWS, WIDTH])
    else:
        return start


@triton.jit
def load_rows(
    source,
    stride,
    count,
    first_row,
    first_channel,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile; zeros outside the matrix."""
    if TMA:
        return source.load([first_row, first_channel])
    else:
        row = first_row + tl.arange(0, ROWS)
        channel = first_channel + tl.arange(0, WIDTH)
        pointers = source + row[:, None] * stride + channel[None, :]
        if EVEN and CHANNELS % WIDTH == 0:
            return tl.load(pointers)
        elif CHANNELS % WIDTH == 0:
            return tl.load(pointers, mask=row[:, None] < count, other=0.0)
        else:
            inside = (row[:, None] < count) & (channel[None, :] < CHANNELS)
            return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(
    start,
    stride,
    count,
    first_row,
    first_channel,
    tile,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes what of a tile lies within the matrix."""
    row = first_row + tl.arange(0, ROWS)
    channel = first_channel + tl.arange(0, WIDTH)
    inside = (row[:, None] < count) & (channel[None, :] < CHANNELS)
    pointers = start + row[:, None] * stride + channel[None, :]
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, total):
    """total + a b in float32."""
    if INTERPRETED:
        # The interpreter takes bfloat16 for integers here.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "keys"])
def forward_kernel(
    query,
    key,
    value,
    output,
    logsumexp_BN,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    output_batch,
    output_row,
    queries,
    keys,
    KEY_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Output and log-sum-exp of a block of queries; the grid is query blocks, parts, samples."""
    first = tl.program_id(0) * ROWS
    channel = tl.program_id(1) * WIDTH
    sample = tl.program_id(2).to(tl.int64)
    query += sample * query_batch
    queries_at = open_rows(query, query_row, queries, KEY_WIDTH, ROWS, D, TMA)
    keys_at = open_rows(key + sample * key_batch, key_row, keys, KEY_WIDTH, COLUMNS, D, TMA)
    value += sample * value_batch
    values_at = open_rows(value, value_row, keys, CHANNELS, COLUMNS, WIDTH, TMA)

    query_nD = load_rows(queries_at, query_row, queries, first, 0, KEY_WIDTH, ROWS, D, EVEN, TMA)
    largest_n = tl.full([ROWS], float("-inf"), tl.float32)
    total_n = tl.zeros([ROWS], tl.float32)
    sum_nc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, keys, COLUMNS):
        key_mD = load_rows(keys_at, key_row, keys, start, 0, KEY_WIDTH, COLUMNS, D, EVEN, TMA)
        scores_nm = product(query_nD, tl.trans(key_mD), None)
        if not EVEN:
            inside_m = start + tl.arange(0, COLUMNS) < keys
            scores_nm = tl.where(inside_m[None, :], scores_nm, float("-inf"))
        merged_n = tl.maximum(largest_n, tl.max(scores_nm, 1))
        weights_nm = tl.exp2(scores_nm * LOG2_E - (merged_n * LOG2_E)[:, None])
        shrink_n = tl.exp2((largest_n - merged_n) * LOG2_E)
        total_n = total_n * shrink_n + tl.sum(weights_nm, 1)
        value_mc = load_rows(
            values_at, value_row, keys, start, channel, CHANNELS, COLUMNS, WIDTH, EVEN, TMA
        )
        sum_nc = product(weights_nm.to(value_mc.dtype), value_mc, sum_nc * shrink_n[:, None])
        largest_n = merged_n

    output += sample * output_batch
    sum_nc = sum_nc / total_n[:, None]
    store_rows(output, output_row, queries, first, channel, sum_nc, CHANNELS, ROWS, WIDTH)
    if tl.program_id(1) == 0:
        row = first + tl.arange(0, ROWS)
        logsumexp_n = largest_n + tl.log2(total_n) * LN_2
        tl.store(logsumexp_BN + sample * queries + row, logsumexp_n, mask=row < queries)


@triton.jit(do_not_specialize=["queries"])
def row_dots_kernel(
    grad,
    output,
    row_dots_SBN,
    grad_batch,
    grad_row,
    output_batch,
    output_row,
    queries,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rowsum(G output) of each part's channels; the grid is as in the forward pass."""
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    grad += sample * grad_batch
    output += sample * output_batch
    channel = part * WIDTH
    grad_nc = load_rows(
        grad, grad_row, queries, first, channel, CHANNELS, ROWS, WIDTH, False, False
    ).to(tl.float32)
    output_nc = load_rows(
        output, output_row, queries, first, channel, CHANNELS, ROWS, WIDTH, False, False
    ).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    at = row_dots_SBN + (part * tl.num_programs(2) + sample) * queries + row
    tl.store(at, tl.sum(grad_nc * output_nc, 1), mask=row < queries)


@triton.jit(do_not_specialize=["queries", "keys"])
def key_value_kernel(
    query,
    key,
    value,
    grad,
    logsumexp_BN,
    row_dots_SBN,
    grad_key_SBMD,
    grad_value_BMC,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    grad_batch,
    grad_row,
    queries,
    keys,
    KEY_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """dV = P^T G and a part of dK = dS^T Q of a block of keys; forms all of it transposed."""
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    channel = part * WIDTH
    sample = tl.program_id(2).to(tl.int64)
    plane = part * tl.num_programs(2) + sample
    queries_at = open_rows(
        query + sample * query_batch, query_row, queries, KEY_WIDTH, COLUMNS, D, TMA
    )
    keys_at = open_rows(key + sample * key_batch, key_row, keys, KEY_WIDTH, ROWS, D, TMA)
    value += sample * value_batch
    values_at = open_rows(value, value_row, keys, CHANNELS, ROWS, WIDTH, TMA)
    grads_at = open_rows(
        grad + sample * grad_batch, grad_row, queries, CHANNELS, COLUMNS, WIDTH, TMA
    )

    key_mD = load_rows(keys_at, key_row, keys, first, 0, KEY_WIDTH, ROWS, D, EVEN, TMA)
    value_mc = load_rows(
        values_at, value_row, keys, first, channel, CHANNELS, ROWS, WIDTH, EVEN, TMA
    )
    grad_key_mD = tl.zeros([ROWS, D], tl.float32)
    grad_value_mc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, queries, COLUMNS):
        query_nD = load_rows(
            queries_at, query_row, queries, start, 0, KEY_WIDTH, COLUMNS, D, EVEN, TMA
        )
        grad_nc = load_rows(
            grads_at, grad_row, queries, start, channel, CHANNELS, COLUMNS, WIDTH, EVEN, TMA
        )
        row = start + tl.arange(0, COLUMNS)
        # Rows beyond the last query have weight 1 and a gradient of 0, so they add nothing.
        logsumexp_n = tl.load(logsumexp_BN + sample * queries + row, mask=row < queries, other=0.0)
        row_dot_n = tl.load(row_dots_SBN + plane * queries + row, mask=row < queries, other=0.0)
        scores_mn = product(key_mD, tl.trans(query_nD), None)
        # Exactly computed it is never positive; of huge scores, rounding leaves more.
        exponent_mn = scores_mn * LOG2_E - (logsumexp_n * LOG2_E)[None, :]
        exponent_mn = tl.minimum(exponent_mn, 0.0, tl.PropagateNan.ALL)
        weights_mn = tl.exp2(exponent_mn)
        grad_value_mc = product(weights_mn.to(grad_nc.dtype), grad_nc, grad_value_mc)
        grad_weights_mn = product(value_mc, tl.trans(grad_nc), None)
        grad_scores_mn = weights_mn * (grad_weights_mn - row_dot_n[None, :])
        grad_key_mD = product(grad_scores_mn.to(query_nD.dtype), query_nD, grad_key_mD)

    grad_key_MD = grad_key_SBMD + plane * keys * KEY_WIDTH
    store_rows(grad_key_MD, KEY_WIDTH, keys, first, 0, grad_key_mD, KEY_WIDTH, ROWS, D)
    grad_value_MC = grad_value_BMC + sample * keys * CHANNELS
    store_rows(grad_value_MC, CHANNELS, keys, first, channel, grad_value_mc, CHANNELS, ROWS, WIDTH)


@triton.jit(do_not_specialize=["queries", "keys"])
def query_kernel(
    query,
    key,
    value,
    grad,
    logsumexp_BN,
    row_dots_SBN,
    grad_query_SBND,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    grad_batch,
    grad_row,
    queries,
    keys,
    KEY_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """A part of dQ = dS K of a block of queries."""
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    channel = part * WIDTH
    sample = tl.program_id(2).to(tl.int64)
    plane = part * tl.num_programs(2) + sample
    query += sample * query_batch
    queries_at = open_rows(query, query_row, queries, KEY_WIDTH, ROWS, D, TMA)
    keys_at = open_rows(key + sample * key_batch, key_row, keys, KEY_WIDTH, COLUMNS, D, TMA)
    value += sample * value_batch
    values_at = open_rows(value, value_row, keys, CHANNELS, COLUMNS, WIDTH, TMA)
    grad += sample * grad_batch
    grads_at = open_rows(grad, grad_row, queries, CHANNELS, ROWS, WIDTH, TMA)

    query_nD = load_rows(queries_at, query_row, queries, first, 0, KEY_WIDTH, ROWS, D, EVEN, TMA)
    grad_nc = load_rows(
        grads_at, grad_row, queries, first, channel, CHANNELS, ROWS, WIDTH, EVEN, TMA
    )
    row = first + tl.arange(0, ROWS)
    logsumexp_n = tl.load(logsumexp_BN + sample * queries + row, mask=row < queries, other=0.0)
    row_dot_n = tl.load(row_dots_SBN + plane * queries + row, mask=row < queries, other=0.0)
    grad_query_nD = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, keys, COLUMNS):
        key_mD = load_rows(keys_at, key_row, keys, start, 0, KEY_WIDTH, COLUMNS, D, EVEN, TMA)
        value_mc = load_rows(
            values_at, value_row, keys, start, channel, CHANNELS, COLUMNS, WIDTH, EVEN, TMA
        )
        scores_nm = product(query_nD, tl.trans(key_mD), None)
        exponent_nm = scores_nm * LOG2_E - (logsumexp_n * LOG2_E)[:, None]
        exponent_nm = tl.minimum(exponent_nm, 0.0, tl.PropagateNan.ALL)
        weights_nm = tl.exp2(exponent_nm)
        if not EVEN:
            # Such keys are zeros, but a row's rowsum may be infinite in half precision.
            inside_m = start + tl.arange(0, COLUMNS) < keys
            weights_nm = tl.where(inside_m[None, :], weights_nm, 0.0)
        grad_weights_nm = product(grad_nc, tl.trans(value_mc), None)
        grad_scores_nm = weights_nm * (grad_weights_nm - row_dot_n[:, None])
        grad_query_nD = product(grad_scores_nm.to(key_mD.dtype), key_mD, grad_query_nD)

    grad_query_ND = grad_query_SBND + plane * queries * KEY_WIDTH
    store_rows(grad_query_ND, KEY_WIDTH, queries, first, 0, grad_query_nD, KEY_WIDTH, ROWS, D)
