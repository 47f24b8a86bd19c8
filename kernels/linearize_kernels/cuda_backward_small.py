"""Backward of training attention with small maps in CUDA C++ (backward_small.cu): any window, several texts a row.

B batch, T tokens, H query heads, G kv heads (and far heads), D head dim, d map dim
"""

import math

import torch
from torch.nn.functional import pad

from . import cuda
from .layout import aligned, alike, like, strides

CHUNK, MOST_DIMS, FEATURES = 64, 4, 16  # as in backward_small.cu
SHARED_BYTES = {"key_sum_kernel": 22528, "query_sum_kernel": 22528, "query_kernel": 42240, "key_kernel": 39488}


def attention_backward_small(q, k, v, q_far, k_far, gate, out, rest, lse, grad, *, scaling, window, sinks,
                             dtypes=None, firsts=None, lasts=None, frozen=False, defines=None):  # fmt: skip
    """As `cuda_backward.attention_backward_cuda`, of maps of up to 4 dims and of any window.

    firsts, lasts [B, T] int32, where rows hold several texts side by side: first and last slot of each slot's text.
    frozen: q, k and v need no gradients; None stands for theirs.
    """
    (batch, heads, length, size), (groups, map_dim) = q.shape, k_far.shape[1::2]
    group, dtypes = heads // groups, dtypes or (q_far.dtype, k_far.dtype)
    q, k, v, grad = (aligned(x.to(q.dtype)) for x in (q, k, v, grad))
    mapped_q, mapped_k = (pad(x.to(q.dtype), (0, 8 - map_dim)) for x in (q_far, k_far))
    out, rest = alike(out, rest)
    delta, weight, dgate = (torch.empty_like(lse) for _ in range(3))
    tiles, number = -(-length // CHUNK), (scaling * math.log2(math.e), scaling)
    known = dict(SINKS=-(-sinks // 8) * 8, DOCUMENTS=int(firsts is not None), FROZEN=int(frozen), **(defines or {}))

    def launch(name, grid, *args, far_dtype=torch.bfloat16):
        defines = {**known, "FAR_FLOAT": int(far_dtype == torch.float32)}
        cuda.kernel("backward_small.cu", name, defines, SHARED_BYTES[name])((*grid, 1), (128, 1, 1), *args)

    def empty_sums(heads):
        shape = batch * heads, tiles, FEATURES
        return q.new_empty(*shape, size), q.new_empty(*shape, dtype=torch.float32)

    has_sums = tiles > 1 + -(-(window - 1) // CHUNK)  # else no tile has keys that are far for all of it
    sums, newer = (empty_sums(groups), empty_sums(heads)) if has_sums else ((None, None), (None, None))
    if has_sums:
        launch("key_sum_kernel", (batch * groups, 1), mapped_k, v, firsts, *sums, *strides(mapped_k, v), length, groups,
               sinks)  # fmt: skip
    dq, dq_far = None if frozen else like(q, heads), like(q_far, heads, dtypes[0], MOST_DIMS)
    launch(
        "query_kernel", (tiles, batch * heads), q, k, v, mapped_q, mapped_k, gate := gate.float(), out, rest, grad, lse,
        firsts, *sums, delta, weight, dq, dq_far, dgate,
        *strides(q, k, v, mapped_q, mapped_k, gate, out, grad, q if frozen else dq, dq_far),
        length, heads, group, window, sinks, *number, far_dtype=dtypes[0],
    )  # fmt: skip
    if has_sums:
        launch("query_sum_kernel", (batch * heads, 1), mapped_q, grad, weight, delta, lasts, *newer,
               *strides(mapped_q, grad), length, heads)  # fmt: skip
    dk, dv = (None if frozen else like(x, groups) for x in (k, v))
    dk_far = like(k_far, groups, dtypes[1], MOST_DIMS)
    launch(
        "key_kernel", (tiles, batch * groups), q, k, v, mapped_q, mapped_k, grad, lse, delta, weight, firsts, lasts,
        *newer, dk, dv, dk_far,
        *strides(q, k, v, mapped_q, mapped_k, grad, *((k, v) if frozen else (dk, dv)), dk_far),
        length, groups, group, window, sinks, *number, far_dtype=dtypes[1],
    )  # fmt: skip
    return dq, dk, dv, dq_far[..., :map_dim], dk_far[..., :map_dim], dgate
