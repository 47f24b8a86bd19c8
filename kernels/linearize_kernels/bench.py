"""Checks, then times, the kernels beside their reference and their peers on this GPU.

    python -m linearize_kernels.bench [--csv FILE] [--only training|decode|prefill]

Every row's result is compared with the float64 reference (at a length where that fits) before anything is
timed. The operations and bytes are algorithmic counts: what the method must do, however a kernel does it
(kernels/README.md). The two ceilings, a large copy and a large matrix product, are measured in the same run.
"""

import argparse
import csv
import sys
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import attention_chunked, attention_quadratic


class Shape(NamedTuple):
    """A layer: B rows, H query heads, G kv heads, T tokens, D head and value dim, d map dim."""

    name: str
    B: int
    H: int
    G: int
    T: int
    D: int
    d: int = 16
    window: int = 64
    sinks: int = 4


class Row(NamedTuple):
    """One measurement: milliseconds (shortest and median), GFLOP, GB."""

    operation: str
    shape: str
    implementation: str
    error: float | None
    ms_min: float
    ms: float
    gflop: float
    gb: float


TRAINING = [
    Shape("135M, 2k", 8, 9, 3, 2048, 64),
    Shape("8B, 4k", 4, 32, 8, 4096, 128),
    Shape("8B, 16k", 1, 32, 8, 16384, 128),
]
PREFILL = [Shape(f"8B, {t // 1024}k", 1, 32, 8, t, 128) for t in (2048, 8192, 32768)]
PREFILL += [Shape("135M, 8k", 4, 9, 3, 8192, 64)]
DECODE = [Shape(f"8B, {b} rows", b, 32, 8, 1, 128) for b in (1, 16, 128)] + [
    Shape("135M, 128 rows", 128, 9, 3, 1, 64)
]


def draw(s: Shape, length: int, dtype=torch.bfloat16):
    """Random (inputs, gradient of out) in the layout of a model: heads side by side in memory."""

    def heads(count, size):
        return torch.randn(s.B, length, count, size, device="cuda").transpose(1, 2).to(dtype)

    inputs = dict(
        q=heads(s.H, s.D), k=heads(s.G, s.D), v=heads(s.G, s.D), q_far=heads(s.H, s.d) * 0.5,
        k_far=heads(s.G, s.d) * 0.5, gate=torch.randn(s.B, s.H, length, device="cuda"),
    )  # fmt: skip
    return inputs, heads(s.H, s.D)


def relative(got, expected) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def measure(function, *, warmup=10, rep=80) -> tuple[float, float]:
    """Shortest and median milliseconds, by device events."""
    import triton

    return triton.testing.do_bench(function, warmup=warmup, rep=rep, quantiles=[0.0, 0.5])


def ceilings() -> tuple[float, float]:
    """Measured GB/s of a device copy (read + written) and TFLOP/s of a bfloat16 matrix product."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 2 / measure(lambda: y.copy_(x))[1] / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return copy, 2 * 8192**3 / measure(lambda: a @ b)[1] / 1e9


def hybrid_gflop(s: Shape) -> tuple[float, float]:
    """Quadratic hybrid attention, forward and backward: products over exact and over far pairs.

    Exact pair: forward 2 products over D, backward 5. Far pair: forward one over d and one over D, backward
    two over D (value and weight gradients) and three over d.
    """
    pairs = s.B * s.H * s.T * (s.T + 1) / 2
    exact = min(pairs, s.B * s.H * s.T * (s.window + s.sinks))
    far = pairs - exact
    forward = exact * 4 * s.D + far * 2 * (s.d + s.D)
    return forward / 1e9, (exact * 10 * s.D + far * 2 * (2 * s.D + 3 * s.d)) / 1e9


def bench_training(s: Shape):
    """Forward and backward of the training kernel, SDPA's, and the chunked reference."""
    from .training import attention_training

    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    short = s._replace(B=1, T=min(s.T, 1000))
    error = check_training(short, options)
    inputs, grad = draw(s, s.T)
    forward, backward = hybrid_gflop(s)
    size = sum(x.numel() * x.element_size() for x in inputs.values()) / 1e9
    out_size = grad.numel() * 2 / 1e9
    gb = (size + out_size, 2 * size + 3 * out_size)

    def rows(name, function, tensors, gflops, error):
        with torch.no_grad():
            yield Row(
                "training forward",
                s.name,
                name,
                error,
                *measure(lambda: function(*tensors)),
                gflops[0],
                gb[0],
            )
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        times = measure(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
        yield Row("training backward", s.name, name, error, *times, gflops[1], gb[1])

    triton_tensors = list(inputs.values())
    yield from rows(
        "triton", lambda *x: attention_training(*x, **options), triton_tensors, (forward, backward), error
    )
    if s.T <= 4096:
        chunked = lambda *x: attention_chunked(*x, **options)[0]  # noqa: E731
        yield from rows("reference, chunked", chunked, triton_tensors, (forward, backward), None)
    pairs = s.B * s.H * s.T * (s.T + 1) / 2
    softmax = (pairs * 4 * s.D / 1e9, pairs * 10 * s.D / 1e9)
    repeated = [inputs["q"]] + [inputs[n].repeat_interleave(s.H // s.G, 1) for n in "kv"]
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            sdpa = lambda *x: scaled_dot_product_attention(*x, is_causal=True)  # noqa: E731
            yield from rows(f"softmax, SDPA {name}", sdpa, repeated, softmax, None)


def check_training(s: Shape, options) -> float:
    """Largest relative RMS error of output and gradients; raises AssertionError above 5e-3."""
    from .training import attention_training

    inputs, grad = draw(s, s.T)
    results = []
    for function, dtype in ((attention_quadratic, torch.float64), (attention_training, torch.bfloat16)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs.values()]
        out = function(*leaves, **options)
        out = out[0] if isinstance(out, tuple) else out
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    error = max(relative(got, expected) for expected, got in zip(*results, strict=True))
    assert error < 5e-3, f"training kernel at {s}: {error:.1e}"
    return error


def bench_decode(s: Shape):
    """One token of a layer by graph replay, over enough layers that states do not stay in the L2 cache."""
    from .decode import decode

    options = dict(scaling=s.D**-0.5)
    layers = max(2, -(-(2**28) // (s.B * s.G * 1000 * s.D)))  # about 300 MB or more of states
    for dtype in (torch.float32, torch.bfloat16):
        error, states, inputs = prepare_decode(s, layers, dtype, options)
        out = torch.empty(s.B, s.H, 1, s.D, device="cuda", dtype=torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for state in states:
                decode(**inputs, state=state, **options, out=out)
        times = [ms / layers for ms in measure(graph.replay)]
        state, features = states[0], states[0].total.shape[2]
        # The sum is read each token and read and written once in 64, the window read; 95 slots are held on
        # average.
        held = s.window + 31
        slots = s.B * s.G * (held * (2 * s.D * 2 + s.d * 4) + s.sinks * 4 * s.D)
        gb = (state.total.numel() * state.total.element_size() * (1 + 2 / 64) + slots) / 1e9
        gflop = s.B * s.H * (2 * features * (s.D + 1) + 4 * s.D * (held + s.sinks)) / 1e9
        yield Row("decode a token", s.name, f"triton, {str(dtype)[6:]} state", error, *times, gflop, gb)
    step = prepare_reference_decode(s, options)
    yield Row("decode a token", s.name, "reference", None, *measure(step), gflop, gb)
    for past in (2048, 8192):
        k, v = (torch.randn(s.B, s.G, past, s.D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        attend = lambda: scaled_dot_product_attention(inputs["q"], k, v, enable_gqa=True)  # noqa: B023, E731
        gflop, gb = s.B * s.H * 4 * s.D * past / 1e9, 2 * k.numel() * 2 / 1e9
        yield Row("decode a token", s.name, f"softmax over {past}, SDPA", None, *measure(attend), gflop, gb)


def bench_prefill(s: Shape):
    """From nothing to outputs and a state: the O(T) kernels, the quadratic one, SDPA's and the reference."""
    from .prefill import attention_prefill
    from .training import attention_training

    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    small, _ = draw(s._replace(B=1), 1500)
    expected, _ = attention_quadratic(**{n: x.double() for n, x in small.items()}, **options)
    error = relative(attention_prefill(**small, **options)[0], expected)
    assert error < 5e-3, f"prefill at {s}: {error:.1e}"
    inputs, _ = draw(s, s.T)
    features = 1 + s.d + s.d * (s.d + 1) // 2
    near = s.window + s.sinks
    gflop = s.B * s.T * (s.H * (4 * s.D * near + 2 * features * s.D) + s.G * 2 * features * s.D) / 1e9
    gb = s.B * s.T * (2 * s.H * s.D + 2 * s.G * s.D + (s.H + s.G) * s.d + 2 * s.H) * 2 / 1e9
    quadratic, pairs = hybrid_gflop(s)[0], s.B * s.H * s.T * (s.T + 1) / 2
    calls = {
        "triton, O(T)": (lambda: attention_prefill(**inputs, **options), gflop, error),
        "triton, quadratic": (lambda: attention_training(**inputs, **options), quadratic, None),
    }
    if s.T <= 8192:
        calls["reference, chunked"] = (
            lambda: attention_chunked(**inputs, **options, return_state=True),
            gflop,
            None,
        )
    repeated = [inputs["q"]] + [inputs[n].repeat_interleave(s.H // s.G, 1) for n in "kv"]
    with torch.no_grad():
        for name, (function, count, off) in calls.items():
            yield Row("prefill", s.name, name, off, *measure(function), count, gb)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            times = measure(lambda: scaled_dot_product_attention(*repeated, is_causal=True))
        yield Row("prefill", s.name, "softmax, SDPA cuDNN", None, *times, pairs * 4 * s.D / 1e9, gb)


def _past(s: Shape, options, length=500):
    inputs, _ = draw(s, length)
    small = {n: x[:1] for n, x in inputs.items()}
    window = dict(window=s.window, sinks=s.sinks)
    _, state = attention_chunked(**small, **options, **window, return_state=True)
    return small, state.map(lambda x: x.expand(s.B, *x.shape[1:]).contiguous())


def prepare_decode(s: Shape, layers: int, dtype, options):
    """(Error of 70 tokens against the float64 reference, states after a prompt, inputs of one token)."""
    from .decode import DecodeState, decode

    past, state = _past(s, options)
    states = [DecodeState.from_state(state, window=s.window, dtype=dtype) for _ in range(layers)]
    more, _ = draw(s._replace(B=1), 70)
    whole = {n: torch.cat([past[n], x], 2).double() for n, x in more.items()}
    expected, _ = attention_quadratic(**whole, **options, window=s.window, sinks=s.sinks)
    outputs = []
    for t in range(70):
        token = {
            n: x[:, :, t : t + 1].expand(s.B, *[-1] * (x.ndim - 1)).contiguous() for n, x in more.items()
        }
        outputs.append(decode(**token, state=states[0], **options))
    error = relative(torch.cat(outputs, 2)[-1:], expected[:, :, -70:])
    assert error < 1e-2, f"decode at {s}, {dtype} state: {error:.1e}"
    return error, states, token


def prepare_reference_decode(s: Shape, options):
    past, state = _past(s, options)
    token = {n: x[:, :, -1:].expand(s.B, *[-1] * (x.ndim - 1)).contiguous() for n, x in past.items()}
    options = dict(options, window=s.window, sinks=s.sinks)
    return lambda: attention_quadratic(**token, **options, state=state, return_state=True)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="also write the table here")
    parser.add_argument("--only", choices=["training", "prefill", "decode"])
    choice = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("the benchmark needs a CUDA GPU")
    import triton

    torch.manual_seed(0)
    copy, product = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"CUDA {torch.version.cuda}"
    )
    print(f"measured ceilings: copy {copy:.0f} GB/s, bfloat16 matrix product {product:.0f} TFLOP/s")
    print(f"{'operation':18}{'shape':16}{'implementation':26}{'error':>8}{'min ms':>9}{'ms':>9}"
          f"{'TFLOP/s':>9}{'%':>5}{'GB/s':>7}{'%':>5}")  # fmt: skip
    sections = {
        "training": (bench_training, TRAINING),
        "prefill": (bench_prefill, PREFILL),
        "decode": (bench_decode, DECODE),
    }
    rows = []
    for name, (function, shapes) in sections.items():
        for shape in shapes if choice.only in (None, name) else ():
            for row in function(shape):
                rows.append(row)
                flops, bandwidth = row.gflop / row.ms, row.gb / row.ms * 1e3
                error = "" if row.error is None else f"{row.error:.1e}"
                print(f"{row.operation:18}{row.shape:16}{row.implementation:26}{error:>8}{row.ms_min:9.4f}{row.ms:9.4f}"
                      f"{flops:9.1f}{100 * flops / product:5.0f}{bandwidth:7.0f}{100 * bandwidth / copy:5.0f}",
                      flush=True)  # fmt: skip
    if choice.csv:
        with open(choice.csv, "w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])


if __name__ == "__main__":
    main()
