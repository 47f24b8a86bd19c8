"""Who is timed: our kernels, the eager reference, PyTorch's softmax attention and flash-linear-attention's kernels.

B batch, H query heads, G kv heads, T tokens, D head and value dim, d map dim, F Taylor features

All take tensors [B, heads, T, size]. Softmax and fla's kernels know no shared kv heads: k and v are repeated to H
heads before the clock starts. fla (flash-linear-attention and fla-core on PyPI, here against 0.6) has Taylor attention
without window, sinks and gate, for tensors [B, T, H, size], which is the layout in memory, so nothing is copied for
it. `parallel_based` is O(T²), `fused_chunk_based` and `chunk_linear_attn` are O(T); the last takes features,
which its own layer expands with `TaylorFeatureMap`; 153 of them at d = 16, here padded with zeros to 160, whole
blocks of 16. Each peer is held against its own definition in float64 before it is timed.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from . import attention_chunked
from .bench_shapes import (
    Cost,
    Shape,
    draw,
    exact_hybrid,
    exact_softmax,
    exact_taylor,
    hybrid_cost,
    softmax_cost,
    taylor_cost,
)

PEERS = ("sdpa_cudnn", "sdpa_flash", "fla_parallel", "fla_fused_chunk", "fla_chunk", "reference")
PREFIX = 2048  # tokens of a quadratic definition; causal outputs do not depend on what follows
REFERENCE_LENGTH = 4096  # the eager reference is timed at this length only


class Candidate(NamedTuple):
    """One implementation of a row group."""

    label: str
    role: str  # see Row
    make: Callable  # inputs -> (function, tensors that it takes); imports and preparations that are not timed
    exact: Callable | None  # the same tensors -> out in float64; None: a part, whose whole is another candidate
    prefix: int | None  # so many tokens are compared; None: all
    tolerance: float
    cost: Cost
    checkpoints: bool = False  # has a reentrant checkpoint inside, which autograd.grad refuses


def candidates(operation: str, s: Shape, names) -> list[Candidate]:
    """Ours first, then the peers named. operation: "prefill", "forward" or "forward + backward"."""
    found = _ours(operation, s)
    for name in names:
        if name == "reference":
            found += [_reference(operation, s)] if s.T == REFERENCE_LENGTH else []
        elif name.startswith("sdpa"):
            found.append(_sdpa(name, operation, s))
        else:
            found += _fla(name, operation, s)
    return found


def _backward(operation: str) -> bool:
    return operation == "forward + backward"


def _hybrid(label, role, function, operation, s, *, tolerance=5e-3) -> Candidate:
    def make(inputs):
        return function, list(inputs.values())

    cost = hybrid_cost(s, backward=_backward(operation))
    return Candidate(label, role, make, lambda *x: exact_hybrid(s, *x), None, tolerance, cost)


def _ours(operation: str, s: Shape) -> list[Candidate]:
    from . import cuda_backward
    from .cuda_prefill import attention_prefill_cuda, why_not_text
    from .prefill import attention_prefill
    from .training import attention_training

    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    one = {**draw(s._replace(T=1), device="meta")[0], **options}

    def ours(label, function):
        return _hybrid(label, "ours", function, operation, s)

    def trains(label, **parts):
        return ours(f"linearize training{label}", lambda *x: attention_training(*x, **options, **parts))

    if operation != "prefill":
        found = [trains("", forward="triton", backward="triton")]
        if not why_not_text(**one):
            found.append(trains(", CUDA forward", forward="cuda", backward="triton"))
        if _backward(operation) and not why_not_text(**one) and not cuda_backward.why_not(**one):
            found.append(trains(", CUDA", forward="cuda", backward="cuda"))
        return found
    found = [ours("linearize prefill", lambda *x: attention_prefill(*x, **options)[0])]
    if not why_not_text(**one):
        found.append(ours("linearize prefill, CUDA", lambda *x: attention_prefill_cuda(*x, **options)[0]))
    return found


def _reference(operation: str, s: Shape) -> Candidate:
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, return_state=operation == "prefill")
    return _hybrid("reference, chunked", "", lambda *x: attention_chunked(*x, **options)[0], operation, s)


def _repeat(x, s: Shape):
    return x.repeat_interleave(s.H // s.G, 1) if s.G < s.H else x


def _sdpa(name: str, operation: str, s: Shape) -> Candidate:
    backend = SDPBackend.CUDNN_ATTENTION if name == "sdpa_cudnn" else SDPBackend.FLASH_ATTENTION

    def function(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    def make(inputs):
        return function, [inputs["q"], _repeat(inputs["k"], s), _repeat(inputs["v"], s)]

    label, role = ("softmax, SDPA cuDNN", "cudnn") if name == "sdpa_cudnn" else ("softmax, SDPA flash", "")
    cost = softmax_cost(s, backward=_backward(operation))
    return Candidate(label, role, make, exact_softmax, PREFIX, 1e-2, cost)


def _fla_tensors(inputs, s: Shape):
    """q, k, v for 1 + x + x²/2 of x = q·k / √d: at d = 16, the x of our far term."""
    grow = s.d**0.25
    q, k = inputs["q_far"] * grow, _repeat(inputs["k_far"], s) * grow
    return [_row_major(x) for x in (q, k, _repeat(inputs["v"], s))]


def _row_major(x):
    """The same [B, H, T, size] with [B, T, H, size] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fla(name: str, operation: str, s: Shape) -> list[Candidate]:
    cost = taylor_cost(s, backward=_backward(operation), quadratic=name == "fla_parallel")

    def candidate(label, make, *, role="fla", exact=exact_taylor):
        return Candidate(label, role, make, exact, PREFIX, 3e-2, cost)

    if name != "fla_chunk":
        return [candidate(f"fla {'parallel' if name == 'fla_parallel' else 'fused_chunk'}_based", _make_based(name, s))]
    whole = candidate("fla chunk_linear_attn + features", lambda inputs: (_chunk(s), _fla_tensors(inputs, s)))
    whole = whole._replace(checkpoints=True)
    if operation != "prefill":
        return [whole]
    width, token_heads = s.features + -s.features % 16, s.B * s.T * s.H
    alone = candidate("  its kernels alone", lambda inputs: _make_chunk_alone(inputs, s), role="", exact=None)
    alone = alone._replace(cost=Cost(cost.gflop, token_heads * 2 * (2 * width + 2 * s.D) / 1e9))
    features = candidate("  its features alone", lambda inputs: _make_features(inputs, s), role="", exact=None)
    features = features._replace(cost=Cost(0.0, token_heads * 2 * 2 * (s.d + width) / 1e9))
    return [whole, alone, features]


def _make_based(name: str, s: Shape):
    def make(inputs):
        from fla.ops import based

        operation = based.parallel_based if name == "fla_parallel" else based.fused_chunk_based

        def function(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return operation(q, k, v, scale=s.d**-0.5, use_norm=True).transpose(1, 2)

        return function, _fla_tensors(inputs, s)

    return make


def _feature_map(s: Shape):
    from fla.modules.feature_map import TaylorFeatureMap

    expand = TaylorFeatureMap(head_dim=s.d)
    return lambda x: pad(expand(x), [0, -s.features % 16])


def _attend(q, k, v):
    """Features [B, T, H, F] and values [B, T, H, D] to out [B, H, T, D]."""
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0].transpose(1, 2)


def _chunk(s: Shape):
    expand = _feature_map(s)

    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _attend(expand(q), expand(k), v)

    return function


def _make_chunk_alone(inputs, s: Shape):
    q, k, v = (x.transpose(1, 2) for x in _fla_tensors(inputs, s))
    expand = _feature_map(s)
    return _attend, [expand(q), expand(k), v]


def _make_features(inputs, s: Shape):
    q, k, _ = (x.transpose(1, 2) for x in _fla_tensors(inputs, s))
    expand = _feature_map(s)

    def function(q, k):
        expand(k)
        return expand(q)

    return function, [q, k]
