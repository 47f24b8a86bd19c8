"""Training attention in Triton: `attention_quadratic`'s function, forward and backward, without a [T, T]
tensor.

B batch, T time, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim, d map
dim, NT key tiles

Quadratic like flash attention, at less work a pair: older than the window a pair costs one product over d, a
polynomial and one product over V, no exp. Matrix products run in q's dtype and add up in float32; gate,
scores and denominators are float32. Kept for the backward: the output, what its rounding to bfloat16 lost,
and one number a query (the log of its denominator).
"""

import math
from typing import NamedTuple

import torch
import triton

from . import gradient_kernels
from . import training_kernels as kernels
from .feature_maps import Taylor

MAX_LENGTH = 32768  # longer rows are cheaper in O(T)
DTYPES = (torch.float32, torch.bfloat16)


class Tiles(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """The three kernels' tiles."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


# (dtype, largest head dim) -> tiles. Found on an H200 (kernels/README.md); the tests run every entry.
CONFIGS = {
    (torch.float32, 128): Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    (torch.bfloat16, 64): Config(Tiles(64, 32, 4, 4), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    (torch.bfloat16, 128): Config(Tiles(64, 32, 4, 4), Tiles(64, 32, 4, 4), Tiles(32, 64, 4, 4)),
}


def attention_training(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, valid=None, segments=None,
                       log_decay=None, config=None):  # fmt: skip
    """Hybrid attention with the Taylor map: arguments as `attention_quadratic`. Returns out [B, H, T, V] of
    q's dtype.

    q, k, v of one dtype, float32 or bfloat16; the others of any. Differentiable once in q, k, v, q_far,
    k_far, gate and log_decay. valid and segments as in the reference, the slots of a segment side by side.
    config: one of CONFIGS' values, for measurements.
    """
    if config is None:
        small = (q.dtype, 64) in CONFIGS and max(q.shape[-1], v.shape[-1]) <= 64
        config = CONFIGS[q.dtype, 64 if small else 128]
    return _Attention.apply(
        q, k, v, q_far, k_far, gate, log_decay, valid, segments, scaling, window, sinks, config
    )


def why_not(q, k, v, q_far, k_far, gate, *, feature_map="taylor", softcap=None, sink_logits=None, **_) -> str:
    """Why this kernel cannot take these arguments; empty where it can."""
    heads, groups, far_heads = q.shape[1], k.shape[1], k_far.shape[1]
    checks = {
        f"the feature map is {feature_map}, the kernels know taylor": feature_map == "taylor",
        "softcap is not built": softcap is None,
        "sink_logits is not built": sink_logits is None,
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of float32, bfloat16 for all": (
            q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
        ),
        "a float64 map or gate": torch.float64 not in (q_far.dtype, k_far.dtype, gate.dtype),
        f"head dims {q.shape[-1]} and {v.shape[-1]}: 16 to 128": 16 <= min(q.shape[-1], v.shape[-1])
        and max(q.shape[-1], v.shape[-1]) <= 128,
        f"map dim {q_far.shape[-1]}: up to 32": q_far.shape[-1] <= 32,
        f"{heads} query heads, {groups} kv heads, {far_heads} far heads": (
            heads % groups == 0 and far_heads in (groups, heads)
        ),
        f"{q.shape[2]} tokens: 1 to {MAX_LENGTH}": 1 <= q.shape[2] <= MAX_LENGTH,
        f"{q.shape[0] * heads} rows times heads: up to 65535": q.shape[0] * heads <= 65535,
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


class Plan(NamedTuple):
    """Who sees whom, where rows have padding or segments; one-element dummies in a plain batch.

    Slots of one segment number; a key's code is 2 · segment + is_sink, or -1 for padding.
    """

    plain: bool
    segments: torch.Tensor  # [B, T] int32
    codes: torch.Tensor  # [B, T] int32
    has_far: torch.Tensor  # [B, T] int32, whether the query at this slot has any far key
    first: torch.Tensor  # [B, T] int32, first slot of this slot's segment
    last: torch.Tensor  # [B, T] int32, last one


def _make_plan(q, valid, segments, window, sinks) -> Plan:
    batch, length, device = q.shape[0], q.shape[2], q.device
    if valid is None and segments is None:
        return Plan(True, *[torch.zeros(1, dtype=torch.int32, device=device)] * 5)
    slots = torch.arange(length, device=device).expand(batch, length)
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts = slots == 0
    if segments is not None:
        starts = starts | torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], [1, 0])
    ends = torch.nn.functional.pad(starts[:, 1:], [0, 1], value=True)
    first = torch.where(starts, slots, 0).cummax(1).values
    last = torch.where(ends, slots, length).flip(1).cummin(1).values.flip(1)
    number = starts.long().cumsum(1) - 1
    count = torch.nn.functional.pad(valid.long().cumsum(1), [1, 0])  # [B, T + 1] valid slots before
    rank = count[:, :-1] - count.gather(1, first)
    is_sink = valid & (rank < sinks)
    eligible = torch.nn.functional.pad((valid & ~is_sink).long().cumsum(1), [1, 0])
    oldest_exact = torch.maximum(slots - window + 1, first)
    has_far = eligible.gather(1, oldest_exact) > eligible.gather(1, first)
    codes = torch.where(valid, 2 * number + is_sink.long(), -1)
    return Plan(False, *(x.to(torch.int32).contiguous() for x in (number, codes, has_far, first, last)))


def _list_tiles(plan: Plan, size: int):
    """Key tiles without a sink, then those with one, and how many of the latter lie before each tile.

    Returns tiles [B, NT] int32 and before [B, NT + 1] int32 (dummies in a plain batch).
    """
    if plan.plain:
        return plan.codes, plan.codes
    batch, length = plan.codes.shape
    padded = torch.nn.functional.pad(plan.codes, [0, -length % size], value=-1).unflatten(1, (-1, size))
    sinks = ((padded >= 0) & (padded % 2 == 1)).any(-1).int()
    before = torch.nn.functional.pad(sinks.cumsum(1), [1, 0]).to(torch.int32).contiguous()
    return torch.argsort(sinks, dim=1, stable=True).to(torch.int32).contiguous(), before


def _row_major(x):
    """x with its last dim contiguous, as the kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x, shape, dtype=None):
    """An empty [B, heads, T, size] tensor, in memory [B, T, heads, size]: joining heads copies nothing."""
    batch, heads, length, size = shape
    return x.new_empty(batch, length, heads, size, dtype=dtype or x.dtype).transpose(1, 2)


def _strides(*tensors):
    return [s for x in tensors for s in x.stride()[:3]]


def _constants(q, v, q_far, plan, log_decay):
    sizes = {"D": q.shape[-1], "V": v.shape[-1], "F": q_far.shape[-1]}
    padded = {name + "P": max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return dict(
        **sizes, **padded,
        PLAIN=plan.plain, DECAY=log_decay is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def _heads(q, k, k_far):
    """Query heads, and how many of them share a kv head and a k_far head."""
    heads = q.shape[1]
    return heads, heads // k.shape[1], heads // k_far.shape[1]


def _options(tiles: Tiles):
    return dict(BM=tiles.queries, BN=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def launch_forward(q, k, v, q_far, k_far, gate, log_decay, plan, *, scaling, window, sinks, tiles,
                   keep_rest=False, chunk=0, sums=None, norms=None, offset=0):  # fmt: skip
    """Runs the forward kernel. chunk, sums [B, G, N, F, V], norms [B, G, N, F], offset: see the kernel.

    Returns out [B, H, T, V], what its rounding lost (out itself where not kept), log denominators [B, H, T].
    """
    batch, heads, length, _ = q.shape
    listed, before = _list_tiles(plan, tiles.keys)
    decay = gate if log_decay is None else log_decay.detach().float().contiguous()
    out = _like(q, (batch, heads, length, v.shape[-1]))
    rest = torch.empty_like(out) if keep_rest else out
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    kernels.forward_kernel[(triton.cdiv(length, tiles.queries), batch * heads)](
        q, k, v, q_far, k_far, gate, decay, out, rest, lse, *plan[1:5], listed, before,
        lse if sums is None else sums, lse if norms is None else norms,
        *_strides(q, k, v, q_far, k_far, gate, out),
        length, triton.cdiv(length, tiles.keys), window, sinks, *_heads(q, k, k_far),
        0 if sums is None else sums.shape[2], offset, scaling * math.log2(math.e),
        **_constants(q, v, q_far, plan, log_decay), REST=keep_rest, **_options(tiles),
        CHUNK=chunk, NUM_FEATURES=Taylor.num_features(q_far.shape[-1]),
        SUM_PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out, rest, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_far, k_far, gate, log_decay, valid, segments, scaling, window, sinks, config):
        far_dtypes = q_far.dtype, k_far.dtype
        q, k, v, q_far, k_far = (_row_major(x.to(q.dtype)) for x in (q, k, v, q_far, k_far))
        plan = _make_plan(q, valid, segments, window, sinks)
        keep_rest = q.dtype != torch.float32 and any(ctx.needs_input_grad)
        out, rest, lse = launch_forward(
            q, k, v, q_far, k_far, gate, log_decay, plan, scaling=scaling, window=window, sinks=sinks,
            tiles=config.forward, keep_rest=keep_rest,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, q_far, k_far, gate, log_decay, out, rest, lse, *plan[1:])
        ctx.settings = (plan.plain, scaling, window, sinks, config, far_dtypes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plain, scaling, window, sinks, config, far_dtypes = ctx.settings
        q, k, v, q_far, k_far, gate, log_decay, out, rest, lse, *plan = ctx.saved_tensors
        plan, grad = Plan(plain, *plan), _row_major(grad)
        length, decay = q.shape[2], gate if log_decay is None else log_decay.float().contiguous()
        constants = _constants(q, v, q_far, plan, log_decay)
        delta, weight, dgate = (torch.empty_like(lse) for _ in range(3))
        ddecay = delta if log_decay is None else torch.empty_like(lse)
        dq, dk, dv = (_like(x, x.shape) for x in (q, k, v))
        dq_far, dk_far = _like(q_far, q_far.shape, far_dtypes[0]), _like(k_far, k_far.shape, torch.float32)
        scale, heads = scaling * math.log2(math.e), _heads(q, k, k_far)

        tiles, before = _list_tiles(plan, config.query_gradient.keys)
        grid = (triton.cdiv(length, config.query_gradient.queries), q.shape[0] * q.shape[1])
        gradient_kernels.query_gradient_kernel[grid](
            q, k, v, q_far, k_far, gate, decay, out, rest, grad, lse, delta, weight,
            dq, dq_far, dgate, ddecay,
            *plan[1:5], tiles, before,
            *_strides(q, k, v, q_far, k_far, gate, out, grad, dq, dq_far),
            length, triton.cdiv(length, config.query_gradient.keys), window, sinks, *heads, scale, scaling,
            **constants, REST=q.dtype != torch.float32, **_options(config.query_gradient),
        )  # fmt: skip
        grid = (triton.cdiv(length, config.key_gradient.keys), k.shape[0] * k.shape[1])
        gradient_kernels.key_gradient_kernel[grid](
            q, k, v, q_far, k_far, decay, grad, lse, delta, weight, dk, dv, dk_far,
            plan.segments, plan.codes, plan.last,
            *_strides(q, k, v, q_far, k_far, grad, dk, dv, dk_far),
            length, window, sinks, *heads, scale, scaling,
            **constants, **_options(config.key_gradient),
        )  # fmt: skip
        if log_decay is None:
            ddecay = None
        else:
            per_head = ddecay.sum((0, 2))  # [H]
            ddecay = per_head.unflatten(0, (k_far.shape[1], -1)).sum(1).to(log_decay.dtype)
        gradients = dq, dk, dv, dq_far, dk_far.to(far_dtypes[1]), dgate.to(gate.dtype), ddecay
        return *gradients, *[None] * 6
