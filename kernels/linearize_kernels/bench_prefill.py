"""How the CUDA prefill cuts texts, and ways to build it: `python -m linearize_kernels.bench_prefill`.

Each way is checked against float64, then timed without a state, whole and by kernel (milliseconds); the fastest with a
state too. What wins goes to cuda_segments.py (segments, parts) and cuda_builds.py (SUM_…). The first way is what is
chosen now.
"""

import argparse

import torch

from .bench_backward import kernel_times
from .bench_measure import count_of, measure, measure_ceilings, poison, relative
from .bench_shapes import SHAPES, Shape, draw, exact_hybrid, hybrid_cost
from .cuda_builds import CHUNK, choose_build
from .cuda_prefill import attention_prefill_cuda
from .cuda_segments import SHORTEST, choose_parts, choose_segments

SUM_BUILDS = [
    {"SUM_STAGES": 3}, {"SUM_STAGES": 5}, {"SUM_SPLIT": 1}, {"SUM_SPLIT": 2}, {"SUM_SPLIT": 2, "SUM_BLOCKS": 2},
    {"SUM_SPLIT": 1, "SUM_BLOCKS": 4},
]  # fmt: skip
LIMIT = 5e-3


def ways(s: Shape, segments: int, parts: int) -> list[dict]:
    """The chosen cut, others around it, and the chosen cut by other builds."""
    most = -(-s.T // CHUNK) // SHORTEST
    cuts = [n for n in (1, segments // 2, segments, segments + 1, 2 * segments) if 1 <= n <= max(1, most)]
    tried = [dict(segments=segments, parts=parts)]
    tried += [dict(segments=n, parts=m) for n in cuts for m in ((1, 2, 3, 4, 6, 8) if n > 1 else (1,))]
    builds = SUM_BUILDS if segments > 1 else []
    tried += [dict(segments=segments, parts=parts, defines=build) for build in builds]
    return [way for n, way in enumerate(tried) if way not in tried[:n]]


def time_way(s: Shape, inputs: dict, way: dict, expected, rep: float) -> tuple[float, float, str]:
    """(error of the last row's last kv head, milliseconds, those by kernel)."""
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, return_state=False, **way)
    poison(inputs["q"])
    error = relative(attention_prefill_cuda(**inputs, **options)[0][-1:, -expected.shape[1] :], expected)
    ms = measure(lambda: attention_prefill_cuda(**inputs, **options), rep=rep)[0]
    kernels = kernel_times(lambda: attention_prefill_cuda(**inputs, **options), repeats=3)
    return error, ms, ", ".join(f"{name} {time:.3f}" for name, time in kernels.items())


@torch.no_grad()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["based", "8b"], default="based")
    parser.add_argument("--tokens", type=count_of, default=65536, help="a call (at least one row)")
    parser.add_argument("--length", type=count_of, default=32768, help="of a row, as 4096 or 4k")
    parser.add_argument("--rep", type=float, default=20, help="milliseconds of a measurement")
    parser.add_argument("--default-only", action="store_true", help="not the other ways")
    choice = parser.parse_args(argv)
    s = SHAPES[choice.shape]._replace(T=choice.length, B=max(1, choice.tokens // choice.length))
    inputs, wrong, fastest = draw(s)[0], 0, []
    expected = exact_hybrid(s, *(x[-1:, -(x.shape[1] // s.G) :] for x in inputs.values()))
    build, chunks, device = choose_build(s.D, s.d, s.window, s.sinks, s.H // s.G), -(-s.T // CHUNK), expected.device
    segments = choose_segments(s.B * s.H, s.B * s.G, chunks, build, device)
    parts = choose_parts(s.B * s.G, segments, chunks, build, device)
    floor = hybrid_cost(s, backward=False).gb / measure_ceilings(rep=20).copy * 1e3
    print(f"{s}, {torch.cuda.get_device_name()}; byte roofline {floor:.3f} ms")
    for way in ways(s, segments, parts)[: 1 if choice.default_only else None]:
        error, ms, kernels = time_way(s, inputs, way, expected, choice.rep)
        wrong += not error < LIMIT
        fastest.append((ms, way))
        print(f"{way}: {ms:.3f} ms, {floor / ms:.0%}, error {error:.1e}; {kernels}", flush=True)
    ms, way = min(fastest, key=lambda x: x[0])
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks, **way)
    with_state = measure(lambda: attention_prefill_cuda(**inputs, **options), rep=choice.rep)[0]
    print(f"fastest: {way}, {ms:.3f} ms; with a state {with_state:.3f} ms, {floor / with_state:.0%}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
