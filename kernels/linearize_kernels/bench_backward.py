"""The kernels of the CUDA backward, one by one, and ways to build them: `python -m linearize_kernels.bench_backward`.

Each way is checked against float64, then timed by the profiler beside Triton's kernels. What wins becomes the default
in backward.cu, backward_small.cu, backward_tiles.cuh or cuda_backward.py.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from . import attention_quadratic, cuda_backward
from .bench_measure import measure, relative
from .bench_shapes import SHAPES, Shape, draw
from .plan import plan_rows
from .training import attention_training

WAYS = [
    {}, {"TILES_AT_ONCE": 1}, {"TILES_AT_ONCE": 5}, {"QUERY_BLOCKS": 1, "KEY_BLOCKS": 1, "TILES_AT_ONCE": 5},
    {"SINK_BLOCKS": 2}, {"SINK_BLOCKS": 4},
]  # fmt: skip
SMALL_WAYS = [  # of small maps
    {}, {"QUERY_BLOCKS": 4, "KEY_BLOCKS": 4}, {"QUERY_BLOCKS": 2, "KEY_BLOCKS": 2, "TILES_AT_ONCE": 2},
    {"TILES_AT_ONCE": 2}, {"TILES_AT_ONCE": 4},
]  # fmt: skip
FROZEN = ("q", "k", "v")
LIMIT = 5e-3


def options_of(s: Shape, texts: int) -> dict:
    """texts: of unequal lengths in each row; 1: a plain batch."""
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    if texts > 1:
        generator = torch.Generator().manual_seed(0)
        starts = torch.rand(s.B, s.T, generator=generator).argsort(1) < texts - 1
        options["segments"] = starts.long().cumsum(1).cuda()
    return options


def trained(s: Shape, backward: str, frozen=(), texts=1) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Output of a training forward on random inputs, those that want gradients, and a gradient of the output."""
    inputs, grad = draw(s)
    leaves = [x.requires_grad_() for name, x in inputs.items() if name not in frozen]
    return attention_training(*inputs.values(), **options_of(s, texts), backward=backward), leaves, grad


def gradients_of(out, leaves, grad):
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def cuda_call(s: Shape, defines: dict, frozen=(), texts=1):
    """(the backward alone as a function of nothing, all inputs, gradient of the output)."""
    out, _, grad = trained(s, "cuda", frozen, texts)
    q, k, v, q_far, k_far, gate, _, *saved = out.grad_fn.saved_tensors
    options, inputs = options_of(s, texts), (q, k, v, q_far, k_far, gate)
    segments = options.pop("segments", None)
    if segments is not None:
        plan = plan_rows(s.T, None, segments, window=s.window, sinks=s.sinks)
        options |= dict(firsts=plan.first, lasts=plan.last)
    options |= dict(frozen=bool(frozen), defines=defines)
    return lambda: cuda_backward.attention_backward_cuda(*inputs, *saved[:3], grad, **options), inputs, grad


def error_of(s: Shape, defines: dict, frozen=(), texts=1) -> float:
    """The largest relative RMS error of a gradient, of one row."""
    s = s._replace(B=1, T=s.window + 636)
    call, inputs, grad = cuda_call(s, defines, frozen, min(texts, 3))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, _ = attention_quadratic(*exact, **options_of(s, min(texts, 3)))
    expected = torch.autograd.grad(out, exact, grad.double())
    return max(relative(x, right) for x, right in zip(call(), expected, strict=True) if x is not None)


def kernel_times(call, repeats: int = 10) -> dict[str, float]:
    """Milliseconds a call of every kernel that takes more than 1 %, by name, longest first."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / 1e3 / repeats for e in profiled.key_averages()}
    total = sum(times.values())
    return {name[:40]: ms for name, ms in sorted(times.items(), key=lambda x: -x[1]) if ms > total / 100}


def show(name: str, call, note: str) -> None:
    fastest = measure(call, rep=100)[0]
    parts = ", ".join(f"{kernel} {ms:.3f}" for kernel, ms in kernel_times(call).items())
    print(f"{name}: {fastest:.3f} ms{note}\n    {parts}", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["based", "135m"], default="based")
    parser.add_argument("--tokens", type=int, default=65536, help="a call")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--map-dim", type=int, default=16)
    parser.add_argument("--packed", type=int, default=1, metavar="TEXTS", help="texts of unequal lengths in a row")
    parser.add_argument("--default-only", action="store_true", help="not the other ways to build")
    choice = parser.parse_args(argv)
    sizes = dict(T=choice.length, B=choice.tokens // choice.length, window=choice.window, d=choice.map_dim)
    s, texts, wrong = SHAPES[choice.shape]._replace(**sizes), choice.packed, 0
    small = s.d <= cuda_backward.MOST_DIMS
    for frozen in ((), FROZEN):
        frozen_too = ", q, k, v frozen" * bool(frozen)
        show("Triton" + frozen_too, gradients_of(*trained(s, "triton", frozen, texts)), "")
        if frozen and not small:
            continue
        for defines in (SMALL_WAYS if small else WAYS)[: 1 if choice.default_only else None]:
            error = error_of(s, defines, frozen, texts)
            wrong += not error < LIMIT
            call = cuda_call(s, defines, frozen, texts)[0]
            show(f"CUDA {defines or 'as it is'}{frozen_too}", call, f", error {error:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
