"""What the benchmark measures: layers, random inputs, definitions in float64, and algorithmic counts.

B rows, H query heads, G kv heads, T tokens, D head and value dim, d map dim, F Taylor features (1 + d + d(d+1)/2),
w window, n sinks

Counts are what a method must do, however a kernel does it; a multiplication and an addition are 2 operations.
Hybrid, O(T), forward:  an exact pair 4 D (scores, values); the query side of the sum 2 F D a token and query head,
its key side 2 F D a token and kv head.
Hybrid, backward:       an exact pair 10 D (scores again; gradients of weights, values, queries, keys); a query head's
token 4 F D (gradient of its features; its part of the sum's gradient); a kv head's token 6 F D (the sum again;
gradients of features and of values).
Bytes, forward:         q, k, v, q_far, k_far, gate read and o written, each once. Backward: the same and o's gradient
read, the inputs' gradients written. State, normalisers and feature expansion are left out: they only lower a rate.
"""

from typing import NamedTuple

import torch

from . import attention_chunked


class Shape(NamedTuple):
    """A layer and a call of it."""

    name: str
    H: int
    G: int
    D: int
    B: int = 1
    T: int = 1
    d: int = 16
    window: int = 64
    sinks: int = 4

    @property
    def features(self) -> int:
        return 1 + self.d + self.d * (self.d + 1) // 2

    @property
    def layer(self) -> str:
        return f"{self.H} heads on {self.G}, D {self.D}"


SHAPES = {
    "based": Shape("based", 32, 32, 64),  # the 1.3B model of BASED (arXiv 2402.18668), all heads alike
    "8b": Shape("8b", 32, 8, 128),  # Llama-3.1-8B
    "135m": Shape("135m", 9, 3, 64),  # SmolLM2-135M; decoding only, unless asked for
}


def draw(s: Shape, *, device="cuda", dtype=torch.bfloat16) -> tuple[dict, torch.Tensor]:
    """Random (inputs, gradient of out) in a model's layout: heads side by side in memory. gate is float32."""

    def heads(count, size):
        return torch.randn(s.B, s.T, count, size, device=device, dtype=dtype).transpose(1, 2)

    inputs = dict(
        q=heads(s.H, s.D), k=heads(s.G, s.D), v=heads(s.G, s.D), q_far=heads(s.H, s.d) * 0.5,
        k_far=heads(s.G, s.d) * 0.5, gate=torch.randn(s.B, s.T, s.H, device=device).transpose(1, 2).contiguous(),
    )  # fmt: skip
    return inputs, heads(s.H, s.D)


def exact_hybrid(s: Shape, *tensors) -> torch.Tensor:
    """The definition in float64 (`attention_chunked`, which the tests hold against `attention_quadratic`)."""
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    return attention_chunked(*(x.double() for x in tensors), **options)[0]


def exact_softmax(q, k, v) -> torch.Tensor:
    """Causal softmax attention in float64; q, k, v [B, H, T, D]."""
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(_future(q), -torch.inf).softmax(-1) @ v.double()


def exact_taylor(q, k, v) -> torch.Tensor:
    """Causal attention with the weights 1 + x + x²/2, x = q·k / √d, in float64: no window, no sinks, no gate."""
    x = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (1 + x + x.square() / 2).masked_fill(_future(q), 0)
    return weights @ v.double() / weights.sum(-1, keepdim=True)


def _future(q) -> torch.Tensor:
    length = q.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)


class Cost(NamedTuple):
    """GFLOP and GB of a call."""

    gflop: float
    gb: float


def pairs(s: Shape) -> float:
    return s.B * s.H * s.T * (s.T + 1) / 2


def exact_pairs(s: Shape) -> float:
    """Pairs in the window or with a sink: query i has min(i + 1, w + n) of them."""
    near = min(s.window + s.sinks, s.T)
    return s.B * s.H * (s.T * near - near * (near - 1) / 2)


def hybrid_cost(s: Shape, *, backward: bool) -> Cost:
    """Of one forward, or of a forward and a backward together."""
    far = s.B * max(0, s.T - s.window - s.sinks)  # queries with far keys; as many keys leave the window
    product = s.features * s.D
    flop = exact_pairs(s) * 4 * s.D + far * (s.H + s.G) * 2 * product
    if backward:
        flop += exact_pairs(s) * 10 * s.D + far * (s.H * 4 + s.G * 6) * product
    inputs = s.B * s.T * (2 * ((s.H + 2 * s.G) * s.D + (s.H + s.G) * s.d) + 4 * s.H)
    return Cost(flop / 1e9, _passes(inputs, s.B * s.T * s.H * s.D * 2, backward) / 1e9)


def softmax_cost(s: Shape, *, backward: bool) -> Cost:
    """Softmax attention with k and v of H heads."""
    head = s.B * s.T * s.H * s.D * 2
    return Cost(pairs(s) * (14 if backward else 4) * s.D / 1e9, _passes(3 * head, head, backward) / 1e9)


def taylor_cost(s: Shape, *, backward: bool, quadratic: bool) -> Cost:
    """Taylor attention alone, with k and v of H heads: over pairs, or by sums over features."""
    if quadratic:
        flop = pairs(s) * 2 * (s.d + s.D) + (pairs(s) * 2 * (2 * s.D + 3 * s.d) if backward else 0)
    else:
        flop = s.B * s.T * s.H * (14 if backward else 4) * s.features * s.D
    token_heads = s.B * s.T * s.H * 2
    return Cost(flop / 1e9, _passes(token_heads * (2 * s.d + s.D), token_heads * s.D, backward) / 1e9)


def _passes(inputs: float, out: float, backward: bool) -> float:
    return 3 * (inputs + out) if backward else inputs + out
