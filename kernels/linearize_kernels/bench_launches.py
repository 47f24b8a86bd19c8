"""Which launch of the CUDA decode kernel is fastest here: `python -m linearize_kernels.bench_launches --batch 128`.

Each is checked against float64 and timed as in bench_decode.py, folding included. What wins goes to
`cuda_decode.choose_launch`.
"""

import argparse

import torch

from .bench_decode import LIMITS, decode_cost, past_of, time_ours, token_at
from .bench_measure import attempt, measure_ceilings
from .bench_shapes import SHAPES
from .cuda_decode import Launch, choose_launch, launch_decode
from .decode import DecodeState

# threads, blocks a multiprocessor, staged, unroll
MANY = [
    Launch(256, 4, 6), Launch(256, 4, 8, 4), Launch(256, 4, 9, 4), Launch(256, 4, 11, 4), Launch(256, 3, 10, 4),
    Launch(256, 3, 14, 4), Launch(256, 2, 20, 4), Launch(256, 4, 0, 5), Launch(256, 5, 6, 4), Launch(128, 8, 8, 4),
    Launch(128, 6, 16, 4), Launch(512, 2, 5, 4),
]  # fmt: skip
FEW = [Launch(threads, 1, staged, 4, eager) for threads in (128, 256, 512) for staged in (0, 3, 8) for eager in (0, 1)]


def rate(gb: float, ms: float, copy: float) -> str:
    """copy: the rate of a copy, GB/s."""
    return f"{gb / ms * 1e3:.0f} GB/s, {gb / ms * 1e5 / copy:.0f} %"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sum", choices=["float32", "bfloat16"], default="float32")
    choice = parser.parse_args(argv)
    s, dtype = SHAPES[choice.shape]._replace(B=choice.batch), getattr(torch, choice.sum)
    past, state = past_of(s)
    state = DecodeState.from_state(state, window=s.window, dtype=dtype)
    token = [token_at(s, past, -2)[n] for n in ("q", "k", "v", "q_far", "k_far", "gate")]
    chosen = choose_launch(state, heads=s.H)
    out, gb, copy, wrong = torch.empty_like(token[0]), decode_cost(s, dtype).gb, measure_ceilings(rep=20).copy, 0
    print(f"{s.name}, batch {s.B}, {state.position.numel()} blocks, {gb * 1e3:.1f} MB; copy rate {copy:.0f} GB/s")
    for launch in dict.fromkeys([chosen, *(FEW if chosen.blocks == 1 else MANY)]):
        result = dict(error=None, times=(None, None), note="")
        note = attempt(lambda: time_ours(s, dtype, "cuda", result, launch), 40) or result["note"]  # noqa: B023
        if result["times"][1] is None:
            print(f"{launch}: {note}")
            continue
        kernel = launch_decode(*token, state, s.D**-0.5, None, out, launch)
        wrong += not result["error"] < LIMITS[dtype]
        ms = result["times"][1]
        print(
            f"{launch}: {ms * 1e3:.2f} us, {rate(gb, ms, copy)}, error {result['error']:.1e}, "
            f"{kernel.registers} registers, {kernel.spills} bytes spilled {note}", flush=True,
        )  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
