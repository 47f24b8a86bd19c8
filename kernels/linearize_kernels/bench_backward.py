"""The kernels of the CUDA backward, one by one, and ways to build them: `python -m linearize_kernels.bench_backward`.

Each way is checked against float64, then timed by the profiler beside Triton's kernels. What wins becomes the default
in backward.cu, backward_tiles.cuh or cuda_backward.py.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from . import attention_quadratic, cuda_backward
from .bench_measure import measure, relative
from .bench_shapes import SHAPES, Shape, draw
from .training import attention_training

WAYS = [
    {}, {"TILES_AT_ONCE": 1}, {"TILES_AT_ONCE": 5}, {"QUERY_BLOCKS": 1, "KEY_BLOCKS": 1, "TILES_AT_ONCE": 5},
    {"SINK_BLOCKS": 2}, {"SINK_BLOCKS": 4},
]  # fmt: skip
LIMIT = 5e-3


def trained(s: Shape, backward: str, frozen=()) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Output of a training forward on random inputs, those that want gradients, and a gradient of the output."""
    inputs, grad = draw(s)
    leaves = [x.requires_grad_() for name, x in inputs.items() if name not in frozen]
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    return attention_training(*inputs.values(), **options, backward=backward), leaves, grad


def gradients_of(out, leaves, grad):
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def cuda_call(s: Shape, defines: dict):
    """(the backward alone as a function of nothing, inputs, gradient of the output)."""
    out, leaves, grad = trained(s, "cuda")
    q, k, v, q_far, k_far, gate, _, *saved = out.grad_fn.saved_tensors
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, defines=defines)
    tensors = q, k, v, q_far, k_far, gate, *saved[:3], grad
    return lambda: cuda_backward.attention_backward_cuda(*tensors, **options), leaves, grad


def error_of(s: Shape, defines: dict) -> float:
    """The largest relative RMS error of a gradient, of one row of 700 tokens."""
    s = s._replace(B=1, T=700)
    call, leaves, grad = cuda_call(s, defines)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = attention_quadratic(*exact, scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    expected = torch.autograd.grad(out, exact, grad.double())
    return max(relative(x, right) for x, right in zip(call(), expected, strict=True))


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
    parser.add_argument("--default-only", action="store_true", help="not the other ways to build")
    choice = parser.parse_args(argv)
    s, wrong = SHAPES[choice.shape]._replace(T=choice.length, B=choice.tokens // choice.length), 0
    for frozen in ((), ("q", "k", "v")):
        show("Triton" + ", q, k, v frozen" * bool(frozen), gradients_of(*trained(s, "triton", frozen)), "")
    for defines in WAYS[: 1 if choice.default_only else None]:
        error = error_of(s, defines)
        wrong += not error < LIMIT
        show(f"CUDA {defines or 'as it is'}", cuda_call(s, defines)[0], f", error {error:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
