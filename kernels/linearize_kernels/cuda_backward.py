"""Backward of training attention in CUDA C++, for head dim 64: of maps of 16 dims and a window of 64 by backward.cu,
of maps of up to 4 and any window by backward_small.cu.

B batch, T tokens, H query heads, G kv heads (and far heads), D head dim, d map dim
"""

import math

import torch

from . import cuda
from .cuda_backward_small import MOST_DIMS, attention_backward_small
from .cuda_backward_small import SHARED_BYTES as SMALL_SHARED_BYTES
from .layout import aligned, alike, like, strides

HEAD_DIM, MAP_DIM, WINDOW, MOST_SINKS = 64, 16, 64, 16  # WINDOW: of maps of MAP_DIM
WINDOWS = range(2, 513)  # of maps of up to MOST_DIMS
SHARED_BYTES = {"query_gradient_kernel": 110208, "key_gradient_kernel": 114240, "sink_gradient_kernel": 37888}
SINK_SPAN = 1024  # queries of one program that finds the gradients of sinks: a multiple of 64
FEWEST = 132  # rows times heads, below which most of a GPU has nothing to do in backward.cu


def attention_backward_cuda(q, k, v, q_far, k_far, gate, out, rest, lse, grad, *, scaling, window, sinks,
                            dtypes=None, firsts=None, lasts=None, frozen=False, defines=None):  # fmt: skip
    """Gradients of `attention_training` from what its forward leaves: out, rest [B, H, T, D], lse [B, H, T] (base 2).

    grad [B, H, T, D] of out. dtypes: of the gradients of q_far and k_far, bfloat16 or float32 each (None: theirs).
    firsts, lasts [B, T] int32, where rows hold several texts side by side: first and last slot of each slot's text.
    Returns dq, dk, dv of q's dtype, dq_far, dk_far, and dgate, float32. frozen: nobody wants dq, dk and dv, which may
    be None. Arguments must be such that `why_not` finds nothing. defines: for measurements, what a source can be told.
    """
    options = dict(scaling=scaling, window=window, sinks=sinks, dtypes=dtypes, defines=defines)
    if q_far.shape[-1] <= MOST_DIMS:
        tensors = q, k, v, q_far, k_far, gate, out, rest, lse, grad
        return attention_backward_small(*tensors, **options, firsts=firsts, lasts=lasts, frozen=frozen)
    return _attention_backward_large(q, k, v, q_far, k_far, gate, out, rest, lse, grad, **options)


def _attention_backward_large(q, k, v, q_far, k_far, gate, out, rest, lse, grad, *, scaling, window, sinks, dtypes,
                              defines):  # fmt: skip
    """Of maps of MAP_DIM."""
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    group, dtypes = heads // groups, dtypes or (q_far.dtype, k_far.dtype)
    q, k, v, mapped_q, mapped_k, grad = (aligned(x.to(q.dtype)) for x in (q, k, v, q_far, k_far, grad))
    out, rest = alike(out, rest)
    delta, weight, dgate = (torch.empty_like(lse) for _ in range(3))
    sizes, numbers = (length, heads, group, sinks), (scaling * math.log2(math.e), scaling)

    def kernel(name, far_dtype=torch.bfloat16):
        far_float = int(far_dtype == torch.float32)
        known = {"SINKS": -(-sinks // 8) * 8, "FAR_FLOAT": far_float, **(defines or {})}
        return cuda.kernel("backward.cu", name, known, SHARED_BYTES[name])

    dq, dq_far = like(q, heads), like(mapped_q, heads, dtypes[0])
    kernel("query_gradient_kernel", dtypes[0])(
        (batch * heads, 1, 1), (256, 1, 1), q, k, v, mapped_q, mapped_k, gate := gate.float(), out, rest, grad, lse,
        delta, weight, dq, dq_far, dgate, *strides(q, k, v, mapped_q, mapped_k, gate, out, grad, dq, dq_far),
        *sizes, *numbers,
    )  # fmt: skip
    dk, dv, dk_far = like(k, heads), like(v, heads), like(mapped_k, heads, dtypes[1])
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


def why_not(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None, segments=None,
            log_decay=None, softcap=None, sink_logits=None, state=None, **_) -> str:  # fmt: skip
    """Why these kernels cannot take the arguments of `attention_training`; empty where they can. Asks nothing of the
    GPU."""
    tensors, map_dim, small = (q, k, v, q_far, k_far, gate), q_far.shape[-1], q_far.shape[-1] <= MOST_DIMS
    (batch, heads, length, size), groups = q.shape, k.shape[1]
    absent = dict(valid=valid, log_decay=log_decay, softcap=softcap, sink_logits=sink_logits, state=state)
    if not small:
        absent["segments"] = segments
    checks = {
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: bfloat16 for all": (
            q.dtype == k.dtype == v.dtype == torch.bfloat16
        ),
        f"head dim {size}: {HEAD_DIM}": size == HEAD_DIM,
        f"value dim {v.shape[-1]}: {HEAD_DIM}": v.shape[-1] == HEAD_DIM,
        f"map dim {map_dim}: up to {MOST_DIMS}, or {MAP_DIM}": small or map_dim == MAP_DIM,
        f"window {window} with map dim {map_dim}: {WINDOW}": small or window == WINDOW,
        f"window {window}: {WINDOWS[0]} to {WINDOWS[-1]}": window in WINDOWS,
        f"{sinks} sinks: up to {MOST_SINKS}": sinks <= MOST_SINKS,
        f"the feature map is {feature_map}, the kernels know taylor": feature_map == "taylor",
        f"{heads} query heads, {groups} kv heads, {k_far.shape[1]} far heads": (
            heads % groups == 0 and k_far.shape[1] == groups
        ),
        f"scaling {scaling}: above 0": scaling > 0,
        f"maps in {q_far.dtype} and {k_far.dtype}: bfloat16 or float32, in which their gradients are written": (
            {q_far.dtype, k_far.dtype} <= {torch.bfloat16, torch.float32}
        ),
        "a float64 gate": gate.dtype != torch.float64,
        f"{batch} rows": batch >= 1,
        f"{length} tokens: 1 to {2**24}": 1 <= length <= 2**24,
        "a stride beyond 2**31": all(abs(s) < 2**31 for x in tensors for s in x.stride()),
        **{f"{name} is not built": x is None for name, x in absent.items()},
        f"{batch * heads} rows times heads: Triton is faster below {FEWEST}": small or batch * heads >= FEWEST,
        f"{batch * heads} rows times heads: up to 65535": batch * heads <= 65535,
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def why_not_device(device, *, small: bool) -> str:
    """Why a device cannot run these kernels, those of small maps or the others; empty where it can."""
    reason = cuda.why_not(device)
    if reason:
        return reason
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    needed = max((SMALL_SHARED_BYTES if small else SHARED_BYTES).values())
    return "" if available >= needed else f"{available} bytes of shared memory a block: {needed} are needed"


def _add_heads(x, group: int):
    """[B, H, T, size] -> [B, G, T, size], in memory [B, T, G, size]."""
    if group == 1:
        return x
    return x.transpose(1, 2).unflatten(2, (-1, group)).sum(3, dtype=torch.float32).to(x.dtype).transpose(1, 2)
