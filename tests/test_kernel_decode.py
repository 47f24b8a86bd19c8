"""The one-launch decode kernel against the float64 reference, token by token, and its state.

Without a GPU it runs in Triton's interpreter (see conftest.py), in float32.
"""

import functools
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from decode_inputs import DEVICE, make, part, prefilled

from linearize_kernels import State, attention_quadratic, can_decode, dispatch, self_test

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import decode as decode_module  # noqa: E402
from linearize_kernels import map_kernels  # noqa: E402
from linearize_kernels.decode import Launch, choose_splits, decode  # noqa: E402
from linearize_kernels.map_heads import map_heads  # noqa: E402

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
triton_decode = functools.partial(decode, implementation="triton")  # "auto" takes CUDA where that can run
pytestmark = pytest.mark.usefixtures("fold_early")


def check(prompt=10, state_dtype=torch.float32, splits=None, tolerance=1e-5, **case):
    inputs, options, valid = make(prompt=prompt, **case)
    exact = {n: x.double() for n, x in inputs.items()}
    expected, last = attention_quadratic(**exact, valid=valid, **options, return_state=True)
    state = prefilled(inputs, options, valid, prompt, dtype=state_dtype, splits=splits)
    decay = {n: options[n] for n in ("scaling", "log_decay")}
    outputs = []
    for t in range(prompt, expected.shape[2]):
        out = torch.full_like(expected[:, :, :1], float("nan"), dtype=inputs["q"].dtype)
        outputs.append(triton_decode(**part(inputs, t, t + 1), state=state, **decay, out=out))
    error = (torch.cat(outputs, 2).double() - expected[:, :, prompt:]).norm() / expected[:, :, prompt:].norm()
    low = torch.bfloat16 in (inputs["q"].dtype, state_dtype)
    assert error < (5e-3 if low else tolerance), f"{error:.1e}"
    return state.to_state(log_decay=options["log_decay"]), last, options


def test_the_tables_are_of_triton(monkeypatch):
    """Where CUDA can run, "auto" takes it in nearly all of them."""
    monkeypatch.setattr(dispatch, "can_decode_cuda", lambda *_, **__: pytest.fail("CUDA is asked for"))
    check(tokens=1)


FOLDING = {"prompt": 9, "tokens": 68 if ON_GPU else 18, "decay": True, "pad": 4}
CASES = {
    "plain": {},
    "from nothing": {"prompt": 0, "tokens": 9},
    "folding": {"prompt": 5, "tokens": 70 if ON_GPU else 12, "batch": 1},
    "folding, decay, padding": FOLDING,
    "two groups, decay": {"heads": 4, "groups": 2, "batch": 1, "decay": True},
    "padding longer than the window": {"prompt": 12, "pad": 11},
    "gate above all, nothing far": {"prompt": 2, "tokens": 4, "far_gate": 300.0},
    "no sinks": {"sinks": 0},
    "from nothing, no sinks": {"prompt": 0, "tokens": 9, "sinks": 0},
    "scores to 60": {"large": 4.0, "tokens": 12},
    "scores to 240": {"large": 8.0, "tokens": 12, "tolerance": 1e-4},  # exp(88) is beyond float32
    "scores to 60, gate as high": {"large": 4.0, "tokens": 12, "far_gate": 30.0},
    "one head": {"heads": 1, "groups": 1},
    "three heads a group, odd head dim": {"heads": 3, "head_dim": 24, "batch": 1},
    "splits": {"head_dim": 40, "splits": 2, "batch": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decode_is_the_reference(name, dtype):
    check(**CASES[name], dtype=dtype)


def test_state_survives_the_round_trip():
    """What decode leaves behind continues as a `State` would: same outputs after it."""
    state, last, options = check(**FOLDING)
    inputs, _, valid = make(prompt=0, tokens=5, seed=1)
    expected, _ = attention_quadratic(**inputs, **options, state=last.map(lambda x: x), return_state=True)
    got, _ = attention_quadratic(**inputs, **options, state=state, return_state=True)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)
    assert torch.equal(state.length, last.length)


def test_refusals():
    inputs, options, valid = make()
    with pytest.raises(ValueError, match="window - 1"):
        prefilled(inputs, {**options, "window": 6}, valid, 0).from_state(
            State.empty(inputs["k"], inputs["v"], inputs["k_far"], num_features=21, sinks=2, ring=9), window=6
        )


def test_asked_for_the_reference_it_runs_no_kernel(monkeypatch):
    inputs, options, valid = make(tokens=1)
    state = prefilled(inputs, options, valid, 10)
    token = dict(**part(inputs, 10, 11), state=state, scaling=1.0)
    with pytest.raises(RuntimeError, match="as the reference: that is attention with a State"):
        decode(**token, implementation="reference")
    monkeypatch.setenv("LINEARIZE_KERNELS", "reference")
    assert can_decode(state, heads=2) == (False, "reference is asked for")
    with pytest.raises(RuntimeError, match="that is attention with a State"):
        decode(**token)


@pytest.mark.skipif(ON_GPU, reason="there Triton runs")
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_where_no_kernel_runs_the_error_says_why(implementation, monkeypatch):
    inputs, options, valid = make(tokens=1)
    state = prefilled(inputs, options, valid, 10)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="decode cannot run in Triton: on cpu; Triton needs a CUDA GPU"):
        decode(**part(inputs, 10, 11), state=state, scaling=1.0, implementation=implementation)


def test_splits_fill_the_gpu():
    assert choose_splits(8, 128) == 8 and choose_splits(3, 64) == 4 and choose_splits(1024, 128) == 1


GPU_CASES = {
    "common": {},
    "many folds": {"tokens": 300, "window": 16, "batch": 1},
    **{f"head dim {x}": {"head_dim": x} for x in (80, 96, 128)},
    **{f"map dim {x}": {"map_dim": x} for x in (4, 8, 24, 32)},
    **{f"{h} heads, {g} groups": {"heads": h, "groups": g} for h, g in ((3, 3), (9, 3), (8, 2), (16, 2))},
    **{f"window {w}": {"window": w, "prompt": w + 30} for w in (16, 128, 256)},
    **{f"{n} splits": {"splits": n, "head_dim": 128} for n in (1, 2, 8)},
    "no sinks": {"sinks": 0},
    "head dim 256": {"head_dim": 256, "batch": 1},
    "8 heads, 1 group": {"heads": 8, "groups": 1},
    "decay": {"decay": True},
    "large scores": {"large": 4.0},
    "left padding": {"pad": 90, "batch": 3},
}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("state_dtype", DTYPES, ids=lambda d: f"state {d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_table(name, dtype, state_dtype):
    case = {
        "prompt": 100,
        "tokens": 140,
        "head_dim": 64,
        "map_dim": 16,
        "window": 64,
        "sinks": 4,
        **GPU_CASES[name],
    }
    case = {"heads": 4, "groups": 2, **case}
    check(**case, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_graph_replay_equals_eager():
    shape = dict(prompt=70, tokens=200, head_dim=64, map_dim=16, window=64, sinks=4, dtype=torch.bfloat16)
    inputs, options, valid = make(**shape)
    steps = [part(inputs, t, t + 1) for t in range(70, 270)]
    eager_state, state = (prefilled(inputs, options, valid, 70) for _ in range(2))
    eager = [triton_decode(**x, state=eager_state, scaling=options["scaling"]) for x in steps]
    static = {name: x.clone() for name, x in steps[0].items()}
    out = torch.empty_like(eager[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing runs while it is captured
        triton_decode(**static, state=state, scaling=options["scaling"], out=out)
    for x, expected in zip(steps, eager, strict=True):
        for name in static:
            static[name].copy_(x[name])
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("eager", [False, True])
def test_ring_in_several_blocks(eager, monkeypatch):
    launch = Launch(RB=16, FB=8, UNROLL=2, EAGER=eager)
    monkeypatch.setattr("linearize_kernels.decode.choose_launch", lambda *sizes: launch)
    check(prompt=20, tokens=12, window=14, batch=1, decay=True)


@pytest.mark.parametrize("head_dim", [16, 80, 96])
def test_tiles_of_any_value_dim_are_powers_of_two(head_dim):
    """As Triton wants them; the interpreter takes others."""
    inputs, options, valid = make(prompt=0, tokens=1, head_dim=head_dim, batch=1)
    for splits in (1, 2):
        launch = decode_module.launch_of(prefilled(inputs, options, valid, 0, splits=splits), heads=2)
        assert {x.bit_count() for x in (launch.RB, launch.FB)} == {1}, launch


def test_the_self_test_sees_a_wrong_kernel(monkeypatch):
    sizes = dict(heads=4, groups=2, head_dim=16, value_dim=16, map_dim=4, window=8, sinks=2)
    launch = decode_module.choose_launch(2, 41, 16, 16, 2, torch.float32)
    test = self_test.self_test_decode.__wrapped__
    error, allowed = test(torch.device(DEVICE), torch.float32, launch=launch, splits=1, decay=True, **sizes)
    assert error <= allowed
    right = decode_module.decode
    monkeypatch.setattr(decode_module, "decode", lambda *args, **kw: right(*args, **kw) * 1.01)
    error, allowed = test(torch.device(DEVICE), torch.float32, launch=launch, splits=1, **sizes)
    assert error > allowed


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize("shape", [(9, 3, 64), (32, 8, 128), (8, 8, 96)], ids=str)
def test_can_decode_trusts_the_kernels_here(shape, batch):
    heads, groups, head_dim = shape
    k = torch.zeros(batch, groups, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k_far = torch.zeros(batch, groups, 1, 16, device="cuda")
    state = State.empty(k, k, k_far, num_features=153, sinks=4, ring=63)
    state = decode_module.DecodeState.from_state(state, window=64)
    for verdict in (can_decode(state, heads=heads), dispatch.can_decode_triton(state, heads=heads, decay=False)):
        assert verdict, verdict.reason


def test_a_launch_of_many_rows_and_heads_is_within_what_a_gpu_takes(monkeypatch):
    """65,535 programs along the second and third dimension: 2,600 rows of 32 kv heads are more than that."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(decode_module.kernels, "decode_kernel", Kernel())
    inputs, options, valid = make(prompt=0, tokens=1, groups=2)
    few = prefilled(inputs, options, valid, 0)
    wide = {name: x[:1, :1].expand(2600, 32, *x.shape[2:]) for name, x in inputs.items()}
    tensors = {n: getattr(few, n) for n in ("total", "norm", "keys", "values", "ring_far", "ring_kind", "position")}
    tensors = {n: x[:1, :1].expand(2600, 32, *x.shape[2:]) for n, x in tensors.items()}
    many = replace(few, **tensors, offset=few.offset[:1].expand(2600))
    decode_module.launch_decode(*wide.values(), many, 1.0, None, torch.empty_like(wide["v"]))
    (grid,) = grids
    assert math.prod(grid) == 2600 * 32 * few.position.shape[2] and max(grid[1:]) <= 65535


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever the tensors'."""
    current = ["another"]

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device.type)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((args[0].device.type, current[-1]))

    launches, (inputs, options, valid) = [], make(prompt=0, tokens=1)
    state = prefilled(inputs, options, valid, 0)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(decode_module.kernels, "decode_kernel", Kernel())
    monkeypatch.setattr(map_kernels, "map_kernel", Kernel())
    decode(**inputs, state=state, scaling=1.0, implementation="triton")
    map_heads(torch.zeros(1, 2, 1, 16, device=DEVICE), *(torch.zeros(2, n, 5, device=DEVICE) for n in (16, 1)))
    assert launches == [(DEVICE, DEVICE)] * 2
