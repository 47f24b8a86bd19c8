"""Prefill in CUDA C++, a whole text: `attention_prefill`'s function, faster. Also the forward of training.

B batch, T tokens, H query heads, G kv heads (and far heads), D head dim, V value dim, d map dim, F Taylor features

There are two kernels (cuda_builds.py chooses): prefill.cu for a window of 64 and a map of dim 16, prefill_windows.cu
for any other window and map.
"""

import math

import torch
from torch.nn.functional import pad

from . import cuda
from .cuda_builds import CHUNK, HEAD_DIMS, WINDOWS, choose_build, padded_map_dim
from .cuda_segments import SHORTEST, choose_parts, choose_segments
from .feature_maps import Taylor
from .layout import aligned, like, strides
from .state import State

MOST_MAP_DIM, MOST_SINKS = 16, 16
FEWEST = 264  # rows times heads with several texts each: two for each multiprocessor of a large GPU


def attention_prefill_cuda(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, return_state=True, segments=None,
                           parts=None, defines=None):  # fmt: skip
    """A text from its first token, no padding: arguments as `attention_prefill`.

    Returns (out [B, H, T, V], State, or None unless return_state).

    segments: so many programs share a text, each after a sum over what precedes it, of as many `parts`; None: as
    cuda_segments.py finds best.
    defines: for measurements, what `choose_build` can be told.
    Arguments must be such that `why_not_text` finds nothing.
    """
    groups, size, map_dim = k.shape[1], q.shape[-1], q_far.shape[-1]
    wide = padded_map_dim(map_dim)
    total = q.new_empty(len(q), groups, Taylor.num_features(wide), size + 1, dtype=torch.float32)
    out, k, v = _launch(q, k, v, q_far, k_far, gate, total=total, scaling=scaling, window=window, sinks=sinks,
                        segments=segments, parts=parts, defines=defines)  # fmt: skip
    if return_state and wide > map_dim:
        total = total[:, :, _kept_features(map_dim, wide)]
    state = State.after_text(total, k, v, k_far, sinks=sinks, ring=window - 1) if return_state else None
    return out, state


def attention_forward_cuda(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, ends=None, segments=None,
                           parts=None, defines=None):  # fmt: skip
    """What a backward needs of the same: (out, rest, both [B, H, T, V] with equal strides, lse [B, H, T] float32).

    rest: what rounding took from out. lse: base-2 log of each denominator.
    ends [B, T] int32, where rows hold several texts side by side: the last slot of each slot's text. Programs
    that share a row (segments) then take whole texts.
    """
    batch, heads, length, _ = q.shape
    rest, lse = like(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    out, _, _ = _launch(q, k, v, q_far, k_far, gate, rest=rest, lse=lse, ends=ends, scaling=scaling,
                        window=window, sinks=sinks, segments=segments, parts=parts, defines=defines)  # fmt: skip
    return out, rest, lse


def _launch(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, segments, parts, defines=None, total=None,
            rest=None, lse=None, ends=None):  # fmt: skip
    """Runs the kernels; returns out, and k and v as they took them."""
    batch, heads, length, size = q.shape
    groups, chunks, map_dim = k.shape[1], -(-length // CHUNK), padded_map_dim(q_far.shape[-1])
    q, k, v = (aligned(x.to(q.dtype)) for x in (q, k, v))
    q_far, mapped = (aligned(_widened(x.to(q.dtype), map_dim), map_dim) for x in (q_far, k_far))
    gate = gate.float()
    build = choose_build(size, map_dim, window, sinks, heads // groups, **(defines or {}))
    programs = batch * heads // build.heads
    if segments is None and ends is None:
        segments = choose_segments(programs, batch * groups, chunks, build, q.device)
    segments = segments or -(-chunks // SHORTEST)
    parts = parts or choose_parts(batch * groups, segments, chunks, build, q.device)
    span = -(-chunks // (segments * parts)) * parts
    if ends is None:
        segments = -(-chunks // span)
    out, sums = like(q), None
    if segments > 1 and ends is None:
        number = (segments - 1) * parts
        sums = q.new_empty(batch * groups, number, build.sum_floats, dtype=torch.float32)
        build.sums_kernel()(
            (batch * groups, number, 1), (build.sum_threads, 1, 1), v, mapped, sums, *strides(v, mapped),
            length, groups, sinks, span // parts,
        )  # fmt: skip
    build.kernel(TRAINING=int(lse is not None), DOCUMENTS=int(ends is not None))(
        (programs, segments, 1), (build.threads, 1, 1), q, k, v, q_far, mapped, gate, out, rest, lse, total,
        sums, ends, *strides(q, k, v, q_far, mapped, gate, out),
        length, heads, heads // groups, sinks, span, parts, scaling * math.log2(math.e), *build.more_arguments,
    )  # fmt: skip
    return out, k, v


def why_not_text(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None,
                 segments=None, log_decay=None, softcap=None, sink_logits=None, state=None, **_) -> str:  # fmt: skip
    """Why these kernels cannot take these arguments; empty where they can. Asks nothing of the GPU."""
    tensors, heads, groups = (q, k, v, q_far, k_far, gate), q.shape[1], k.shape[1]
    absent = dict(valid=valid, segments=segments, log_decay=log_decay, softcap=softcap, sink_logits=sink_logits,
                  state=state)  # fmt: skip
    checks = {
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: bfloat16 for all": (
            q.dtype == k.dtype == v.dtype == torch.bfloat16
        ),
        f"head dims {q.shape[-1]} and {v.shape[-1]}: 64 or 128, both alike": (
            q.shape[-1] == v.shape[-1] and q.shape[-1] in HEAD_DIMS
        ),
        f"map dim {q_far.shape[-1]}: 1 to {MOST_MAP_DIM}": 1 <= q_far.shape[-1] <= MOST_MAP_DIM,
        f"window {window}: {WINDOWS[0]} to {WINDOWS[-1]}": window in WINDOWS,
        f"{sinks} sinks: up to {MOST_SINKS}": sinks <= MOST_SINKS,
        f"the feature map is {feature_map}, the kernel knows taylor": feature_map == "taylor",
        f"{heads} query heads, {groups} kv heads, {k_far.shape[1]} far heads": (
            heads % groups == 0 and k_far.shape[1] == groups
        ),
        f"scaling {scaling}: above 0": scaling > 0,
        "a float64 map or gate": torch.float64 not in (q_far.dtype, k_far.dtype, gate.dtype),
        f"{q.shape[0]} rows": q.shape[0] >= 1,
        f"{q.shape[2]} tokens: 1 to {2**24}": 1 <= q.shape[2] <= 2**24,
        "a stride beyond 2**31": all(abs(s) < 2**31 for x in tensors for s in x.stride()),
        **{f"{name} is not built": x is None for name, x in absent.items()},
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def why_not_forward(q, *tensors, segments=None, **options) -> str:
    """As `why_not_text`, of the forward of training: rows of several texts (segments) fit too."""
    reason = why_not_text(q, *tensors, **options)
    if reason or segments is None:
        return reason
    programs = q.shape[0] * q.shape[1]
    few = f"several texts in {programs} rows times heads: Triton is faster below {FEWEST}"
    return "" if programs >= FEWEST else few


def why_not_device(q, k, v, q_far, k_far, gate, *, window, sinks, **_) -> str:
    """Why the device of tensors that fit cannot run the kernel; empty where it can."""
    reason = cuda.why_not(q.device)
    if reason:
        return reason
    available = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    map_dim, group = padded_map_dim(q_far.shape[-1]), q.shape[1] // k.shape[1]
    needed = choose_build(q.shape[-1], map_dim, window, sinks, group).shared_bytes
    return "" if available >= needed else f"{available} bytes of shared memory a block: {needed} are needed"


def _widened(x, map_dim: int):
    """x with columns of zeros up to map_dim."""
    return x if x.shape[-1] == map_dim else pad(x, [0, map_dim - x.shape[-1]])


def _kept_features(map_dim: int, wide: int) -> list[int]:
    """Where the features of the first map_dim entries stand among those of `wide`."""
    pairs = [(i, j) for i in range(wide) for j in range(i, wide)]
    return [*range(1 + map_dim), *(1 + wide + n for n, (_, j) in enumerate(pairs) if j < map_dim)]
