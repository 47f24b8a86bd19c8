"""Ways to build the CUDA prefill for any window (prefill_windows.cu): `python -m linearize_kernels.bench_windows`.

Each way is checked against float64, then timed: prefill without a state, and the forward of training. What wins becomes
what cuda_builds.choose_build chooses. Triton's kernels are timed beside them.
"""

import argparse

import torch

from .bench_measure import measure, relative
from .bench_shapes import SHAPES, Shape, draw, exact_hybrid
from .cuda_builds import choose_build, padded_map_dim
from .cuda_prefill import attention_forward_cuda, attention_prefill_cuda
from .prefill import attention_prefill
from .training import attention_training

WAYS = [
    {}, {"SLOTS": 2, "BLOCKS": 3}, {"SLOTS": 2, "BLOCKS": 2}, {"SLOTS": 2, "BLOCKS": 4}, {"HEADS": 2, "BLOCKS": 1},
    {"HEADS": 2, "SLOTS": 2, "BLOCKS": 1}, {"HEADS": 2, "SLOTS": 2, "BLOCKS": 2}, {"HEADS": 3, "BLOCKS": 1},
    {"BLOCKS": 3}, {"ANY_WINDOW": 1},
]  # fmt: skip
LIMIT = 5e-3


def error_of(s: Shape, defines: dict) -> float:
    """Relative RMS error of the last kv head's outputs, of one row of 1500 tokens, in one piece and cut in three."""
    s = s._replace(B=1, T=1500)
    tensors = draw(s)[0].values()
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, defines=defines)
    last = [x[:, -(x.shape[1] // s.G) :] for x in tensors]
    expected = exact_hybrid(s, *last)
    outs = [attention_prefill_cuda(*tensors, **options, segments=n)[0] for n in (1, 3)]
    outs.append(attention_forward_cuda(*tensors, **options)[0])
    return max(relative(out[:, -expected.shape[1] :], expected) for out in outs)


def registers_of(s: Shape, defines: dict) -> str:
    build = choose_build(s.D, padded_map_dim(s.d), s.window, s.sinks, s.H // s.G, **defines)
    kernel = build.kernel(TRAINING=0, DOCUMENTS=0)
    return f"{kernel.registers} registers, {kernel.spills} B of local memory, {build.shared_bytes} B shared"


def time_way(s: Shape, inputs: dict, defines: dict, rep: float) -> str:
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, defines=defines)
    prefill = measure(lambda: attention_prefill_cuda(**inputs, **options, return_state=False), rep=rep)[0]
    forward = measure(lambda: attention_forward_cuda(**inputs, **options), rep=rep)[0]
    return f"prefill {prefill:.3f} ms, training forward {forward:.3f} ms"


@torch.no_grad()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="based")
    parser.add_argument("--tokens", type=int, default=65536, help="a call")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=214)
    parser.add_argument("--map-dim", type=int, default=4)
    parser.add_argument("--rep", type=float, default=50, help="milliseconds of a measurement")
    choice = parser.parse_args(argv)
    s = SHAPES[choice.shape]._replace(window=choice.window, d=choice.map_dim)
    s, wrong = s._replace(T=choice.length, B=max(1, choice.tokens // choice.length)), 0
    inputs, options = draw(s)[0], dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    print(f"{s}, {torch.cuda.get_device_name()}")
    prefill = measure(lambda: attention_prefill(**inputs, **options), rep=choice.rep)[0]
    forward = measure(lambda: attention_training(**inputs, **options, forward="triton"), rep=choice.rep)[0]
    print(f"Triton: prefill (with a state) {prefill:.3f} ms, training forward {forward:.3f} ms", flush=True)
    for defines in WAYS:
        if s.H // s.G % defines.get("HEADS", 1):
            continue
        try:
            error, times = error_of(s, defines), time_way(s, inputs, defines, choice.rep)
        except RuntimeError as failure:  # more shared memory than there is
            print(f"{defines}: {str(failure)[:100]}", flush=True)
            continue
        wrong += not error < LIMIT
        print(f"{defines or 'as it is'}: {times}, error {error:.1e}, {registers_of(s, defines)}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
