"""The Triton prefill against the float64 reference: outputs and the state it leaves, from nothing or from a
state.

Without a GPU it runs in Triton's interpreter (see conftest.py), in float32.
"""

import itertools

import pytest
import torch

from linearize_kernels import State, attention, attention_chunked, attention_quadratic

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels.configs import CONFIGS, Config, SumTiles, Tiles  # noqa: E402
from linearize_kernels.prefill import attention_prefill  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
SMALL = Config(*[Tiles(16, 16, 16, 4, 1)] * 3, SumTiles(16, 16, 4, 1), 16)
RING = ("sink_k", "sink_v", "ring_k", "ring_v", "ring_far", "ring_valid", "length")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """The interpreter is slow: chunks of 16 tokens instead of 256, so that short texts have some."""
    if not ON_GPU:
        monkeypatch.setitem(CONFIGS, (torch.float32, 128), SMALL)


def make(length=90, batch=1, heads=2, groups=1, head_dim=16, map_dim=4, window=12, sinks=3, decay=False,
         pad=None, large=1.0, extra=0, far_gate=None, dtype=torch.float32, seed=0):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    inputs = dict(
        q=draw(batch, length, heads, head_dim).transpose(1, 2) * large,
        k=draw(batch, groups, length, head_dim) * large,
        v=draw(batch, groups, length, head_dim), q_far=draw(batch, heads, length, map_dim).float() * 0.5,
        k_far=draw(batch, groups, length, map_dim).float() * 0.5, gate=draw(batch, heads, length).float(),
    )  # fmt: skip
    if far_gate is not None:
        inputs["gate"] = torch.full_like(inputs["gate"], far_gate)
    valid = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    if pad:
        valid[0, : length // 3] = False
        valid = valid.flip(1) if pad == "right" else valid
    log_decay = -torch.linspace(0.01, 0.1, groups, device=DEVICE) if decay else None
    num_features = 1 + map_dim + map_dim * (map_dim + 1) // 2
    kinds = [inputs[n] for n in ("k", "v", "k_far")]
    start = State.empty(*kinds, num_features=num_features, sinks=sinks, ring=window - 1 + extra)
    return inputs, dict(scaling=head_dim**-0.5, window=window, sinks=sinks, log_decay=log_decay), valid, start


def check(cuts=(), config=None, **case):
    """The text in pieces, each continuing from the state before, against the reference on the whole. Where it is in one
    piece and nothing of it is padding, also without a state before, which takes another way."""
    inputs, options, valid, state = make(**case)
    exact = {n: x.double() for n, x in inputs.items()}
    expected, last = attention_quadratic(
        **exact, valid=valid, **options, return_state=True,
        state=state.map(lambda x: x.double() if x.is_floating_point() else x),
    )  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        compare(*in_pieces(inputs, valid, state, [0, *cuts, valid.shape[1]], **options, config=config), expected, last)
        if valid.all() and not cuts and state.ring_k.shape[2] == options["window"] - 1:
            compare(*attention_prefill(**inputs, **options, config=config), expected, last)
    finally:
        torch.use_deterministic_algorithms(False)


def in_pieces(inputs, valid, state, edges, **options):
    outputs = []
    for a, b in itertools.pairwise(edges):
        piece = {n: x[:, :, a:b] for n, x in inputs.items()}
        out, state = attention_prefill(**piece, valid=valid[:, a:b], **options, state=state)
        outputs.append(out)
    return torch.cat(outputs, 2), state


def compare(out, state, expected, last):
    tolerance = 1e-4 if out.dtype == torch.float32 else 5e-3
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"output: {error:.1e}"
    assert state.total.dtype == torch.float32
    error = (state.total - last.total).norm() / last.total.norm().clamp_min(1e-30)
    assert error < tolerance, f"total: {error:.1e}"  # exactly 0 where nothing is summed yet
    for name in RING:
        torch.testing.assert_close(getattr(state, name), getattr(last, name).to(getattr(state, name).dtype), msg=name)


CASES = {
    "plain": {},
    "one token": {"length": 1},
    "within the window": {"length": 9, "cuts": (4,)},
    **{f"{t} tokens, window 12, {n} sinks, {'cut' if cuts else 'whole'}": {"length": t, "sinks": n, "cuts": cuts}
       for n, lengths in ((0, (11, 12, 13)), (3, (13, 15, 16))) for t in lengths for cuts in ((), (t - 1,))},
    "gate above all, nothing far": {"length": 15, "cuts": (4, 14), "far_gate": 300.0},
    "gate above all, nothing far, whole": {"length": 15, "far_gate": 300.0},
    "no sinks": {"sinks": 0, "window": 1},
    "window 15": {"window": 15},  # with tiles of 16 an error of one in the tiles' ranges shows at 15 or at 18
    "window 18, cut": {"window": 18, "cuts": (37,)},
    "groups": {"heads": 4, "groups": 2},
    "scores to 240": {"large": 8.0, "cuts": (50,)},
    "scores to 100, gate as high": {"large": 6.0, "cuts": (50,), "far_gate": 30.0},
    "decay, groups": {"decay": True, "heads": 4, "groups": 2, "cuts": (40,)},
    "decay, whole": {"decay": True},
    "left padding": {"batch": 2, "pad": "left"},
    "right padding, cut": {"batch": 2, "pad": "right", "cuts": (32,)},
    "more ring": {"extra": 7, "cuts": (50,)},
    "pieces": {"cuts": (1, 2, 40, 41), "length": 80},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prefill_is_the_reference(name, dtype):
    check(**CASES[name], dtype=dtype)


GPU_CASES = {
    **{f"length {t}": {"length": t} for t in (63, 64, 65, 127, 256, 257, 1000, 4096)},
    **{f"window {w}": {"window": w} for w in (16, 128, 256)},
    **{f"{w} + {more} tokens, window {w}, {n} sinks": {"window": w, "length": w + more, "sinks": n}
       for w in (16, 64, 128, 256) for n in (0, 4) for more in (n - 1, n, n + 1)},  # n + 1: one pair is far
    **{f"head dim {x}": {"head_dim": x} for x in (80, 96, 128)},
    **{f"map dim {x}": {"map_dim": x} for x in (8, 24, 32)},
    **{f"{h} heads, {g} groups": {"heads": h, "groups": g} for h, g in ((3, 3), (9, 3), (8, 2), (16, 2))},
    "cut, decay": {"cuts": (1, 300, 700), "decay": True},
    "left padding, cut": {"pad": "left", "batch": 3, "cuts": (256, 512)},
    "scores to 60": {"large": 4.0},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_table(name, dtype):
    check(**{"length": 900, "heads": 4, "groups": 2, "head_dim": 64, "map_dim": 16, "window": 64, "sinks": 4,
             "dtype": dtype, **GPU_CASES[name]})  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("entry", CONFIGS, ids=str)
def test_every_config(entry, head_dim):
    shape = {"length": 700, "heads": 4, "groups": 2, "map_dim": 16, "window": 64, "sinks": 4, "dtype": entry[0]}
    for extra in ({}, {"map_dim": 4, "window": 214}, {"pad": "left", "cuts": (300,)}, {"decay": True, "cuts": (300,)}):
        check(**{**shape, "head_dim": head_dim, **extra}, config=CONFIGS[entry])


def test_dispatch_takes_and_gives_a_state():
    inputs, options, valid, state = make(length=70)
    expected, last = attention_chunked(**inputs, valid=valid, **options, state=state, return_state=True)
    out, after = attention(**inputs, valid=valid, **options, state=state, return_state=True, implementation="triton")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.total, last.total, rtol=1e-3, atol=1e-4)
