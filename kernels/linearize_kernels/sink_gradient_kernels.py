"""The Triton program that finds gradients of a plain batch's sinks, which every query sees.

B batch, T time, G kv heads, D head dim, V value dim, S spans of queries; BM queries a tile
"""

import triton
import triton.language as tl

from .tile_kernels import SINK_TILE, load_tile, store_tile


@triton.jit(do_not_specialize=["length", "span", "sinks", "heads", "group"])
def sink_gradient_kernel(
    q, k, v, grad, lse, delta, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, length, span, sinks, heads, group, scale, scaling,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sixteen sinks of one kv head of a plain batch, for `span` queries: parts of their gradients.

    dk [S, B * G, sinks, D] and dv [S, B * G, sinks, V] float32, one part a span: every query sees the sinks, so that
    one program for all of them would take as long as the text.
    """
    s, bg, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kv_heads, first = heads // group, tl.program_id(2) * SINK_TILE
    b, g = (bg // kv_heads).to(tl.int64), (bg % kv_heads).to(tl.int64)
    dtype = q.dtype.element_ty
    keys = (first + tl.arange(0, SINK_TILE))[:, None]
    x_keys = load_tile(k + b * k_b + g * k_h, k_t, first, sinks, SINK_TILE, D, DP)
    values = load_tile(v + b * v_b + g * v_h, v_t, first, sinks, SINK_TILE, V, VP)
    acc_k = tl.zeros([SINK_TILE, DP], tl.float32)
    acc_v = tl.zeros([SINK_TILE, VP], tl.float32)
    for head in range(group):
        h = g * group + head
        scalars = (b * heads + h) * length
        for start in range(s * span, tl.minimum((s + 1) * span, length), BM):
            spots = start + tl.arange(0, BM)
            x_lse = tl.load(lse + scalars + spots, mask=spots < length, other=float("inf"))
            x_delta = tl.load(delta + scalars + spots, mask=spots < length, other=0.0)
            x_exact = load_tile(q + b * q_b + h * q_h, q_t, start, length, BM, D, DP)
            x_grad = load_tile(grad + b * do_b + h * do_h, do_t, start, length, BM, V, VP).to(dtype)
            scores = tl.dot(x_keys, tl.trans(x_exact), input_precision=PRECISION) * scale
            visible = (spots[None, :] >= keys) & (keys < sinks)
            weights = tl.exp2(tl.where(visible, scores, float("-inf")) - x_lse[None, :])
            acc_v = tl.dot(weights.to(dtype), x_grad, acc_v, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(x_grad), input_precision=PRECISION) - x_delta[None, :]
            acc_k = tl.dot((weights * dp).to(dtype), x_exact, acc_k, input_precision=PRECISION)
    part = (s * num_heads + bg).to(tl.int64) * sinks
    store_tile(dk + part * D, D, first, sinks, acc_k * scaling, SINK_TILE, D, DP)
    store_tile(dv + part * V, V, first, sinks, acc_v, SINK_TILE, V, VP)
