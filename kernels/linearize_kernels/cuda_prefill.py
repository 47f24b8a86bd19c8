"""Prefill in CUDA C++ (prefill.cu), for the shape that most layers have: `attention_prefill`'s function, faster.

B batch, T tokens, H query heads, G kv heads (and far heads), D head dim, V value dim, d map dim, F Taylor features
"""

import math

import torch

from . import cuda
from .state import State

CHUNK, MAP_DIM, NUM_FEATURES, MOST_SINKS = 64, 16, 153, 16  # as in prefill.cu
SHARED_BYTES, SUMS_SHARED_BYTES = {64: 111680, 128: 223296}, {64: 29760, 128: 46144}  # by head dim, as there
PARTS = 2  # sums of one segment
SHORTEST = 8  # chunks of a segment
FEWEST = 264  # rows times heads with several texts each: two for each multiprocessor of a large GPU


def attention_prefill_cuda(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, return_state=True, segments=None,
                           parts=PARTS):  # fmt: skip
    """A text from its first token, no padding: arguments as `attention_prefill`.

    Returns (out [B, H, T, V], State, or None unless return_state).

    segments: so many programs share a text, each after a sum over what precedes it; None: enough to fill the GPU.
    Arguments must be such that `why_not` finds nothing.
    """
    groups, size = k.shape[1], q.shape[-1]
    total = q.new_empty(len(q), groups, NUM_FEATURES, size + 1, dtype=torch.float32)
    out, k, v = _launch(q, k, v, q_far, k_far, gate, total=total, scaling=scaling, sinks=sinks, segments=segments,
                        parts=parts)  # fmt: skip
    state = State.after_text(total, k, v, k_far, sinks=sinks, ring=window - 1) if return_state else None
    return out, state


def attention_forward_cuda(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, ends=None, segments=None,
                           parts=PARTS):  # fmt: skip
    """What a backward needs of the same: (out, rest, both [B, H, T, V] with equal strides, lse [B, H, T] float32).

    rest: what rounding took from out. lse: base-2 log of each denominator. window: as `why_not` allows, 64.
    ends [B, T] int32, where rows hold several texts side by side: the last slot of each slot's text. Programs
    that share a row (segments) then take whole texts.
    """
    batch, heads, length, _ = q.shape
    rest, lse = _like(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    out, _, _ = _launch(q, k, v, q_far, k_far, gate, rest=rest, lse=lse, ends=ends, scaling=scaling, sinks=sinks,
                        segments=segments, parts=parts)  # fmt: skip
    return out, rest, lse


def _launch(q, k, v, q_far, k_far, gate, *, scaling, sinks, segments, parts, total=None, rest=None, lse=None,
            ends=None):  # fmt: skip
    """Runs the kernels; returns out, and k and v as they took them."""
    batch, heads, length, size = q.shape
    groups, chunks = k.shape[1], -(-length // CHUNK)
    q, k, v, q_far, mapped = (aligned(x.to(q.dtype)) for x in (q, k, v, q_far, k_far))
    gate = gate.float()
    if segments is None:
        segments = choose_segments(batch * heads, chunks, size, q.device) if ends is None else -(-chunks // SHORTEST)
    span = -(-chunks // (segments * parts)) * parts
    if ends is None:
        segments = -(-chunks // span)
    out = _like(q)
    sums = None
    if segments > 1 and ends is None:
        number = (segments - 1) * parts
        sums = q.new_empty(batch * groups, number, 160 * size + 272, dtype=torch.float32)
        _kernel("prefill_sums_kernel", size, sinks)(
            (batch * groups, number, 1), (2 * size, 1, 1), v, mapped, sums, *strides(v, mapped),
            length, groups, sinks, span // parts,
        )  # fmt: skip
    _kernel("prefill_kernel", size, sinks, TRAINING=int(lse is not None), DOCUMENTS=int(ends is not None))(
        (batch * heads, segments, 1), (4 * size, 1, 1), q, k, v, q_far, mapped, gate, out, rest, lse, total,
        sums, ends, *strides(q, k, v, q_far, mapped, gate, out),
        length, heads, heads // groups, sinks, span, parts, scaling * math.log2(math.e),
    )  # fmt: skip
    return out, k, v


def why_not(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None, segments=None,
            log_decay=None, softcap=None, sink_logits=None, state=None, **_) -> str:  # fmt: skip
    """Why this kernel cannot take these arguments; empty where it can. Asks nothing of the GPU."""
    tensors, heads, groups = (q, k, v, q_far, k_far, gate), q.shape[1], k.shape[1]
    absent = dict(valid=valid, segments=segments, log_decay=log_decay, softcap=softcap, sink_logits=sink_logits,
                  state=state)  # fmt: skip
    checks = {
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: bfloat16 for all": (
            q.dtype == k.dtype == v.dtype == torch.bfloat16
        ),
        f"head dims {q.shape[-1]} and {v.shape[-1]}: 64 or 128, both alike": (
            q.shape[-1] == v.shape[-1] and q.shape[-1] in SHARED_BYTES
        ),
        f"map dim {q_far.shape[-1]}: 16": q_far.shape[-1] == MAP_DIM,
        f"window {window}: 64": window == CHUNK,
        f"{sinks} sinks: up to {MOST_SINKS}": sinks <= MOST_SINKS,
        f"the feature map is {feature_map}, the kernel knows taylor": feature_map == "taylor",
        f"{heads} query heads, {groups} kv heads, {k_far.shape[1]} far heads": (
            heads % groups == 0 and k_far.shape[1] == groups
        ),
        f"scaling {scaling}: above 0": scaling > 0,
        "a float64 map or gate": torch.float64 not in (q_far.dtype, k_far.dtype, gate.dtype),
        f"{q.shape[2]} tokens: 1 to {2**24}": 1 <= q.shape[2] <= 2**24,
        "a stride beyond 2**31": all(abs(s) < 2**31 for x in tensors for s in x.stride()),
        **{f"{name} is not built": x is None for name, x in absent.items()},
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def why_not_forward(q, *tensors, segments=None, **options) -> str:
    """As `why_not`, of the forward of training: rows of several texts (segments) fit too."""
    reason = why_not(q, *tensors, **options)
    if reason or segments is None:
        return reason
    programs = q.shape[0] * q.shape[1]
    few = f"several texts in {programs} rows times heads: Triton is faster below {FEWEST}"
    return "" if programs >= FEWEST else few


def why_not_device(device, head_dim: int) -> str:
    """Why a device cannot run this kernel for a head dim; empty where it can."""
    reason = cuda.why_not(device)
    if reason:
        return reason
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    needed = SHARED_BYTES[head_dim]
    return "" if available >= needed else f"{available} bytes of shared memory a block: {needed} are needed"


def choose_segments(programs: int, chunks: int, head_dim: int, device) -> int:
    """Into how many segments each of `programs` texts and heads goes, so that the GPU is full."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(processors * 128 // head_dim // programs, chunks // SHORTEST))


def _kernel(name: str, head_dim: int, sinks: int, **more):
    if name == "prefill_sums_kernel":
        return cuda.kernel("prefill.cu", name, {"HEAD_DIM": head_dim}, SUMS_SHARED_BYTES[head_dim])
    defines = {"HEAD_DIM": head_dim, "SINKS": -(-sinks // 8) * 8, **more}
    return cuda.kernel("prefill.cu", name, defines, SHARED_BYTES[head_dim])


def aligned(x):
    """x with rows in one piece that begin on 16 bytes, as asynchronous copies need them."""
    fine = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if fine else x.contiguous()


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def _like(q):
    """An empty tensor of q's shape, in memory [B, T, H, V]: joining heads copies nothing."""
    batch, heads, length, size = q.shape
    return q.new_empty(batch, length, heads, size).transpose(1, 2)
