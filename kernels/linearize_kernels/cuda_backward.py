"""Backward of training attention in CUDA C++ (backward.cu), for the shape that most layers have.

B batch, T tokens, H query heads, G kv heads (and far heads), D head dim, d map dim
"""

import math

import torch

from . import cuda
from .cuda_prefill import aligned, strides
from .cuda_prefill import why_not as why_not_prefill

HEAD_DIM = 64
SHARED_BYTES = {"query_gradient_kernel": 110208, "key_gradient_kernel": 114240, "sink_gradient_kernel": 37888}
SINK_SPAN = 1024  # queries of one program that finds the gradients of sinks: a multiple of 64
FEWEST = 132  # rows times heads, below which most of a GPU has nothing to do


def attention_backward_cuda(q, k, v, q_far, k_far, gate, out, rest, lse, grad, *, scaling, window, sinks,
                            dtypes=None, defines=None):  # fmt: skip
    """Gradients of `attention_training` from what its forward leaves: out, rest [B, H, T, D], lse [B, H, T] (base 2).

    grad [B, H, T, D] of out. dtypes: of the gradients of q_far and k_far, bfloat16 or float32 each (None: theirs).
    Returns dq, dk, dv of q's dtype, dq_far, dk_far, and dgate, float32. Arguments must be such that `why_not` finds
    nothing. defines: for measurements, what backward.cu can be told.
    """
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    group, dtypes = heads // groups, dtypes or (q_far.dtype, k_far.dtype)
    q, k, v, mapped_q, mapped_k, grad = (aligned(x.to(q.dtype)) for x in (q, k, v, q_far, k_far, grad))
    out, rest = _alike(out, rest)
    delta, weight, dgate = (torch.empty_like(lse) for _ in range(3))
    sizes, numbers = (length, heads, group, sinks), (scaling * math.log2(math.e), scaling)

    def kernel(name, far_dtype=torch.bfloat16):
        far_float = int(far_dtype == torch.float32)
        known = {"SINKS": -(-sinks // 8) * 8, "FAR_FLOAT": far_float, **(defines or {})}
        return cuda.kernel("backward.cu", name, known, SHARED_BYTES[name])

    dq, dq_far = _like(q, heads), _like(mapped_q, heads, dtypes[0])
    kernel("query_gradient_kernel", dtypes[0])(
        (batch * heads, 1, 1), (256, 1, 1), q, k, v, mapped_q, mapped_k, gate := gate.float(), out, rest, grad, lse,
        delta, weight, dq, dq_far, dgate, *strides(q, k, v, mapped_q, mapped_k, gate, out, grad, dq, dq_far),
        *sizes, *numbers,
    )  # fmt: skip
    dk, dv, dk_far = _like(k, heads), _like(v, heads), _like(mapped_k, heads, dtypes[1])
    kernel("key_gradient_kernel", dtypes[1])(
        (batch * heads, 1, 1), (256, 1, 1), q, k, v, mapped_q, mapped_k, grad, lse, delta, weight, dk, dv, dk_far,
        *strides(q, k, v, mapped_q, mapped_k, grad, dk, dv, dk_far), *sizes, *numbers,
    )  # fmt: skip
    dk, dv, dk_far = (_add_heads(x, group) for x in (dk, dv, dk_far))
    if sinks:
        parts = -(-length // SINK_SPAN)
        sink_k, sink_v = (q.new_empty(parts, batch, groups, group, 16, size, dtype=torch.float32) for _ in range(2))
        kernel("sink_gradient_kernel")(
            (batch * heads, parts, 1), (128, 1, 1), q, k, v, grad, lse, delta, sink_k, sink_v,
            *strides(q, k, v, grad), *sizes, SINK_SPAN, *numbers,
        )  # fmt: skip
        for to, summed in ((dk, sink_k), (dv, sink_v)):
            to[:, :, :sinks] = summed.sum((0, 3))[:, :, : min(sinks, length)]
    return dq, dk, dv, dq_far, dk_far, dgate


def why_not(q, k, v, q_far, k_far, gate, **options) -> str:
    """Why these kernels cannot take the arguments of `attention_training`; empty where they can. Asks nothing of the
    GPU."""
    reason = why_not_prefill(q, k, v, q_far, k_far, gate, **options)
    if reason:
        return reason
    if q.shape[-1] != HEAD_DIM:
        return f"head dim {q.shape[-1]}: {HEAD_DIM}"
    wrong = {q_far.dtype, k_far.dtype} - {torch.bfloat16, torch.float32}
    if wrong:
        return f"maps in {wrong.pop()}: bfloat16 or float32, in which their gradients are written"
    programs = q.shape[0] * q.shape[1]
    return "" if programs >= FEWEST else f"{programs} rows times heads: Triton is faster below {FEWEST}"


def why_not_device(device) -> str:
    """Why a device cannot run these kernels; empty where it can."""
    reason = cuda.why_not(device)
    if reason:
        return reason
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    needed = max(SHARED_BYTES.values())
    return "" if available >= needed else f"{available} bytes of shared memory a block: {needed} are needed"


def _like(x, heads: int, dtype=None):
    """An empty [B, heads, T, size] tensor, in memory [B, T, heads, size]: joining heads copies nothing."""
    batch, _, length, size = x.shape
    return x.new_empty(batch, length, heads, size, dtype=dtype or x.dtype).transpose(1, 2)


def _alike(out, rest):
    """Both with the same strides, in whole pieces of 16 bytes."""
    out, rest = aligned(out), aligned(rest)
    return (out, rest) if out.stride() == rest.stride() else (out.contiguous(), rest.contiguous())


def _add_heads(x, group: int):
    """[B, H, T, size] -> [B, G, T, size], in memory [B, T, G, size]."""
    if group == 1:
        return x
    return x.transpose(1, 2).unflatten(2, (-1, group)).sum(3, dtype=torch.float32).to(x.dtype).transpose(1, 2)
