"""Training attention in Triton: `attention_quadratic`'s function, forward and backward, without a [T, T] tensor.

B batch, T time, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim, d map dim

Exact pairs go as in flash attention. Far tokens come in through sums over whole chunks, features(k_far) ⊗ v, so that
time is O(T); those of the newest chunk one by one, at one product over d, a polynomial and one product over V a pair.
The gradient of the keys takes the same road from the other side, through sums over queries. Short rows, and rows with
a decay that need gradients, take all far pairs one by one, in O(T²).

Matrix products run in q's dtype and add up in float32; gate, scores and denominators are float32. Kept for the
backward: the output, what its rounding to bfloat16 lost, the keys' sums, and one number a query (the log of its
denominator).
"""

import math

import torch
import triton

from . import forward_kernels, gradient_kernels, sink_gradient_kernels
from .configs import Tiles, config_for, padded, precision
from .cuda_backward import attention_backward_cuda
from .cuda_prefill import attention_forward_cuda, attention_prefill_cuda
from .dispatch import can_backward_cuda, can_forward_cuda, wants_gradients
from .layout import like, row_major, strides
from .picks import make_picks
from .plan import Plan, plain_plan, plan_rows
from .sums import Sums, key_sums, no_sums, query_sums

MAX_QUADRATIC = 32768  # tokens a row with a decay and gradients, where far pairs are taken one by one
MAX_LENGTH = 2**24
SINK_SPAN = 1024  # queries of one program that finds the gradients of sinks
DTYPES = (torch.float32, torch.bfloat16)


def attention_training(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, valid=None, segments=None,
                       log_decay=None, config=None, forward="auto", backward="auto"):  # fmt: skip
    """Hybrid attention with the Taylor map: arguments as `attention_quadratic`. Returns out [B, H, T, V] of
    q's dtype.

    q, k, v of one dtype, float32 or bfloat16; the others of any. Differentiable once in q, k, v, q_far,
    k_far, gate and log_decay. valid and segments as in the reference, the slots of a segment side by side.
    Where neither q, k nor v needs a gradient, Triton's backward skips all that only theirs need.
    config: one of CONFIGS' values, for measurements. forward, backward: "triton" or "cuda" does it; "auto": CUDA where
    `can_forward_cuda` and `can_backward_cuda` agree.
    """
    config = config or config_for(q.dtype, max(q.shape[-1], v.shape[-1]))
    tensors = [q, k, v, q_far, k_far, gate, log_decay]
    if not wants_gradients(tensors):  # ctx.needs_input_grad does not know of no_grad
        tensors = [x if x is None else x.detach() for x in tensors]
    return _Attention.apply(*tensors, valid, segments, scaling, window, sinks, config, forward, backward)


def why_not(q, k, v, q_far, k_far, gate, *, feature_map="taylor", softcap=None, sink_logits=None, log_decay=None,
            **_) -> str:  # fmt: skip
    """Why this kernel cannot take these arguments; empty where it can."""
    heads, groups, far_heads = q.shape[1], k.shape[1], k_far.shape[1]
    in_pairs = log_decay is not None and wants_gradients([q, k, v, q_far, k_far, gate, log_decay])
    longest, whose = (MAX_QUADRATIC, " with a decay and gradients") if in_pairs else (MAX_LENGTH, "")
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
        f"{q.shape[2]} tokens: 1 to {longest}{whose}": 1 <= q.shape[2] <= longest,
        f"{q.shape[0] * heads} rows times heads: up to 65535": q.shape[0] * heads <= 65535,
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def _constants(q, v, q_far, plan: Plan, sums: Sums, log_decay, tiles: Tiles):
    picks = make_picks(q_far.shape[-1], q.dtype, q.device)
    sizes = {"D": q.shape[-1], "V": v.shape[-1], "F": q_far.shape[-1]}
    return dict(
        **sizes, **{name + "P": padded(size) for name, size in sizes.items()},
        BM=tiles.queries, BN=tiles.keys, FB=tiles.features, FN=picks.ones.shape[1],
        CHUNK=sums.chunk, SPANS=sums.has_bases, PLAIN=plan.plain, DECAY=log_decay is not None,
        PRECISION=precision(q.dtype), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **({"maxnreg": tiles.max_registers} if tiles.max_registers else {}),
    )  # fmt: skip


def _heads(q, k, k_far):
    """Query heads, and how many of them share a kv head and a k_far head."""
    heads = q.shape[1]
    return heads, heads // k.shape[1], heads // k_far.shape[1]


def launch_forward(q, k, v, q_far, k_far, gate, log_decay, plan: Plan, sums: Sums, *, scaling, window, sinks, tiles,
                   keep_rest=False, offset=0, past=False):  # fmt: skip
    """Runs the forward kernel. q, q_far, gate [B, ., T, .] stand in slots offset ... L of k, v, k_far [B, ., L, .].

    past: whether the sums' bases hold anything from before slot 0. Returns out [B, H, T, V], what its rounding lost
    (out itself where not kept), log denominators [B, H, T].
    """
    batch, heads, length, _ = q.shape
    picks = make_picks(q_far.shape[-1], q.dtype, q.device)
    out = like(q, size=v.shape[-1])
    rest = torch.empty_like(out) if keep_rest else out
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    forward_kernels.forward_kernel[(triton.cdiv(length, tiles.queries), batch * heads)](
        q, k, v, q_far, k_far, gate, gate if log_decay is None else log_decay, out, rest, lse, *plan[1:],
        picks.columns, picks.ones, *sums.arguments(), *strides(q, k, v, q_far, k_far, gate, out),
        k.shape[2], window, sinks, *_heads(q, k, k_far), offset, int(past), *sums.sizes(), picks.num_features,
        scaling * math.log2(math.e), **_constants(q, v, q_far, plan, sums, log_decay, tiles), REST=keep_rest,
    )  # fmt: skip
    return out, rest, lse


def _forward_cuda(*tensors, plan: Plan, keep, **numbers):
    """(out, rest, log denominators) in CUDA; the last two may be None unless they are to be kept."""
    if keep or not plan.plain:
        return attention_forward_cuda(*tensors, **numbers, ends=None if plan.plain else plan.last)
    return attention_prefill_cuda(*tensors, **numbers, return_state=False)[0], None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_far, k_far, gate, log_decay, valid, segments, scaling, window, sinks, config,
                forward, backward):  # fmt: skip
        far_dtypes = q_far.dtype, k_far.dtype
        q, k, v, q_far, k_far = (row_major(x.to(q.dtype)) for x in (q, k, v, q_far, k_far))
        decay = None if log_decay is None else log_decay.detach().float().contiguous()
        length, differentiable = q.shape[2], any(ctx.needs_input_grad)
        tensors, numbers = (q, k, v, q_far, k_far, gate), dict(scaling=scaling, window=window, sinks=sinks)
        options = dict(**numbers, valid=valid, segments=segments, log_decay=decay)
        if forward == "auto":
            forward = "cuda" if can_forward_cuda(*tensors, **options, backward=differentiable) else "triton"
        if backward == "auto" and differentiable:
            backward = "cuda" if can_backward_cuda(*tensors, **options) else "triton"
        if valid is None and segments is None:
            plan = plain_plan(q.device)
        else:
            plan = plan_rows(length, valid, segments, window=window, sinks=sinks)
        chunked = length > window + config.chunk and not (differentiable and decay is not None)
        sums = no_sums(q.device)
        if forward == "cuda":
            out, rest, lse = _forward_cuda(*tensors, **numbers, plan=plan, keep=differentiable)
        else:
            if chunked:
                sums, _ = key_sums(k_far, v, plan, config, sinks=sinks, log_decay=decay)
            keep_rest = q.dtype != torch.float32 and differentiable
            out, rest, lse = launch_forward(
                *tensors, decay, plan, sums, **numbers, tiles=config.forward, keep_rest=keep_rest
            )
        if backward == "cuda":
            sums = no_sums(q.device)
        ctx.save_for_backward(q, k, v, q_far, k_far, gate, decay, out, rest, lse, *plan[1:], *sums.arguments())
        ctx.settings = (plan.plain, sums[4:], scaling, window, sinks, config, far_dtypes)
        ctx.in_cuda, ctx.lacks_sums = backward == "cuda", chunked and not sums.chunk
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.in_cuda:
            return _backward_in_cuda(ctx, grad)
        plain, sum_settings, scaling, window, sinks, config, far_dtypes = ctx.settings
        q, k, v, q_far, k_far, gate, decay, out, rest, lse, *saved = ctx.saved_tensors
        plan, sums, grad = Plan(plain, *saved[:7]), Sums(*saved[7:], *sum_settings), row_major(grad)
        if ctx.lacks_sums:  # made here they take no memory between forward and backward
            sums, _ = key_sums(k_far, v, plan, config, sinks=sinks)
        length, rates = q.shape[2], gate if decay is None else decay
        delta, weight, dgate = (torch.empty_like(lse) for _ in range(3))
        ddecay = delta if decay is None else torch.empty_like(lse)
        exact = any(ctx.needs_input_grad[:3])  # in matching q, k and v are a frozen model's
        dq, dk, dv = (like(x) if exact else x for x in (q, k, v))  # not exact: never written
        parked = exact and k_far.shape[1] > k.shape[1]  # dk_far is then added to in memory
        dq_far = like(q_far, dtype=far_dtypes[0])
        dk_far = like(k_far, dtype=torch.float32 if parked else far_dtypes[1])
        scale, heads = scaling * math.log2(math.e), _heads(q, k, k_far)
        picks = make_picks(q_far.shape[-1], q.dtype, q.device)

        def constants(tiles):
            return dict(_constants(q, v, q_far, plan, sums, decay, tiles), EXACT=exact)

        tiles = config.query_gradient
        gradient_kernels.query_gradient_kernel[(triton.cdiv(length, tiles.queries), q.shape[0] * q.shape[1])](
            q, k, v, q_far, k_far, gate, rates, out, rest, grad, lse, delta, weight, dq, dq_far, dgate, ddecay,
            *plan[1:], *picks.arguments(), *sums.arguments(),
            *strides(q, k, v, q_far, k_far, gate, out, grad, dq, dq_far),
            length, window, sinks, *heads, *sums.sizes(), picks.num_features, scale, scaling,
            **constants(tiles), REST=q.dtype != torch.float32,
        )  # fmt: skip
        if sums.chunk:
            sums = query_sums(q_far, grad, weight, delta, plan, config, far_heads=k_far.shape[1])
        tiles = config.key_gradient
        gradient_kernels.key_gradient_kernel[(triton.cdiv(length, tiles.keys), k.shape[0] * k.shape[1])](
            q, k, v, q_far, k_far, rates, grad, lse, delta, weight, dk, dv, dk_far,
            plan.segments, plan.codes, plan.last, *picks.arguments(), *sums.arguments(),
            *strides(q, k, v, q_far, k_far, grad, dk, dv, dk_far),
            length, window, sinks, *heads, *sums.sizes(), picks.num_features, scale, scaling, **constants(tiles),
        )  # fmt: skip
        if exact and plan.plain and sinks:
            _put_sink_gradients(dk, dv, q, k, v, grad, lse, delta, sinks=sinks, scale=scale, scaling=scaling)
        if decay is None:
            ddecay = None
        else:
            per_head = ddecay.sum((0, 2))  # [H]
            ddecay = per_head.unflatten(0, (k_far.shape[1], -1)).sum(1)
        gradients = dq_far, dk_far.to(far_dtypes[1]), dgate.to(gate.dtype), ddecay
        return *((dq, dk, dv) if exact else [None] * 3), *gradients, *[None] * 8


def _backward_in_cuda(ctx, grad):
    """All that `_Attention.backward` returns."""
    plain, _, scaling, window, sinks, _, far_dtypes = ctx.settings
    q, k, v, q_far, k_far, gate, _, out, rest, lse, *saved = ctx.saved_tensors
    plan = Plan(plain, *saved[: len(Plan._fields) - 1])
    *gradients, dgate = attention_backward_cuda(
        q, k, v, q_far, k_far, gate, out, rest, lse, grad, scaling=scaling, window=window, sinks=sinks,
        dtypes=far_dtypes, firsts=None if plain else plan.first, lasts=None if plain else plan.last,
        frozen=not any(ctx.needs_input_grad[:3]),
    )  # fmt: skip
    return *gradients, dgate.to(gate.dtype), *[None] * 9


def _put_sink_gradients(dk, dv, q, k, v, grad, lse, delta, *, sinks, scale, scaling):
    """Writes the gradients of a plain batch's sinks into dk and dv."""
    (batch, groups, length, head_dim), value_dim = k.shape, v.shape[-1]
    sinks = min(sinks, length)
    parts = (triton.cdiv(length, SINK_SPAN), batch, groups, sinks)
    part_k, part_v = (k.new_empty(*parts, size, dtype=torch.float32) for size in (head_dim, value_dim))
    heads, tiles = q.shape[1], triton.cdiv(sinks, sink_gradient_kernels.SINK_TILE.value)
    sink_gradient_kernels.sink_gradient_kernel[(parts[0], batch * groups, tiles)](
        q, k, v, grad, lse, delta, part_k, part_v, *strides(q, k, v, grad),
        length, SINK_SPAN, sinks, heads, heads // groups, scale, scaling,
        D=head_dim, V=value_dim, DP=padded(head_dim), VP=padded(value_dim), BM=32 if q.dtype == torch.float32 else 64,
        PRECISION=precision(q.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    dk[:, :, :sinks], dv[:, :, :sinks] = part_k.sum(0), part_v.sum(0)
