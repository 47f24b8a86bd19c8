"""The CUDA decode kernel against the float64 reference, token by token.

Without a GPU the same source runs in the emulator (cuda_on_cpu.h).
"""

import functools
from dataclasses import fields, replace

import cuda_emulator
import decode_inputs
import guarded
import pico
import pytest
import torch
from decode_inputs import DEVICE, part

from linearize.decoding import Decoder
from linearize_kernels import attention_quadratic, cuda, dispatch

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import cuda_decode  # noqa: E402
from linearize_kernels.cuda_decode import Launch, launch_decode  # noqa: E402
from linearize_kernels.decode import FOLD, DecodeState, decode, decode_mapped  # noqa: E402
from linearize_kernels.map_heads import map_heads  # noqa: E402
from linearize_kernels.self_test import self_test_decode  # noqa: E402

ON_GPU = torch.cuda.is_available()
WHY_NOT = cuda.why_not("cuda") if ON_GPU else cuda_emulator.WHY_NOT
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
GUARD = 64  # elements before and after a tensor that must stay as they are
BEHIND = GUARD if ON_GPU else 0  # in the emulator the memory ends with the tensor, and nothing may be touched behind it


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)


make = functools.partial(decode_inputs.make, prompt=12, tokens=2 * FOLD + 6, heads=4, head_dim=64, map_dim=16, sinks=4)


def prefilled(*args, **layout):
    """The state after the prompt, NaN in every slot that holds nothing."""
    state = decode_inputs.prefilled(*args, **layout)
    empty = state.ring_kind == 0
    for x in (state.keys[:, :, state.num_sinks :], state.values[:, :, state.num_sinks :], state.ring_far):
        x[empty] = torch.nan
    return state


def guard(state: DecodeState):
    """(The state in memory with guards around each tensor, a check that they are as they were)."""
    homes = {}
    for name in (f.name for f in fields(state) if f.name != "window"):
        x = getattr(state, name)
        size = GUARD + x.numel() + BEHIND
        home = torch.empty(size, dtype=x.dtype, device=x.device) if ON_GPU else guarded.empty(size, x.dtype)
        homes[name] = home.fill_(77)
        home[GUARD : size - BEHIND] = x.flatten()

    def check():
        for name, home in homes.items():
            before, after = home[:GUARD], home[len(home) - BEHIND :]
            assert (before == 77).all() and (after == 77).all(), f"a write beside {name}"

    views = {n: home[GUARD : len(home) - BEHIND].view(getattr(state, n).shape) for n, home in homes.items()}
    return replace(state, **views), check


def step(token, state, options, launch=None):
    """One token's output, in memory that held NaN, with guards around it."""
    q, v = token["q"], token["v"]
    home = torch.full((q.shape[0] + 2, q.shape[1], 1, v.shape[-1]), torch.nan, dtype=q.dtype, device=DEVICE)
    kernel = launch_decode(
        *(token[n] for n in ("q", "k", "v", "q_far", "k_far", "gate")),
        state, options["scaling"], options["log_decay"], home[1:-1], launch,
    )  # fmt: skip
    if not ON_GPU:
        most = cuda_decode._static_bytes(state, q.shape[1] // state.keys.shape[1])
        assert kernel.static_bytes <= most, "more shared memory than `why_not` knows of"
    assert home[0].isnan().all() and home[-1].isnan().all(), "a write beside the output"
    return home[1:-1]


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def check(prompt=12, sum_dtype=torch.float32, splits=1, launch=None, tolerance=1e-5, **case):
    inputs, options, valid = make(prompt=prompt, **case)
    if not ON_GPU:
        inputs = {n: guarded.copy(x) for n, x in inputs.items()}
    exact = {n: x.double() for n, x in inputs.items()}
    expected, last = attention_quadratic(**exact, valid=valid, **options, return_state=True)
    state, unharmed = guard(prefilled(inputs, options, valid, prompt, dtype=sum_dtype, splits=splits))
    assert not cuda_decode.why_not(state, heads=inputs["q"].shape[1])
    outputs = [step(part(inputs, t, t + 1), state, options, launch) for t in range(prompt, expected.shape[2])]
    unharmed()
    error = relative(torch.cat(outputs, 2), expected[:, :, prompt:])
    assert error < (5e-3 if torch.bfloat16 in (inputs["q"].dtype, sum_dtype) else tolerance), f"{error:.1e}"
    after = state.to_state(log_decay=options["log_decay"])
    assert torch.equal(after.length, last.length)
    return after, last


BF16, FLOAT = torch.bfloat16, torch.float32
EAGER = Launch(staged=3, eager=True)
CASES = {  # in the emulator each is a compilation of a second
    "4 heads a group, head dim 128, bfloat16": {"head_dim": 128, "dtype": BF16},
    "1 head a group, decay, padding": {"heads": 2, "groups": 2, "decay": True, "pad": 9},
    "3 heads a group, head dim 80, 2 splits": {"heads": 6, "groups": 2, "head_dim": 80, "splits": 2, "dtype": BF16},
    "head dim 80": {"heads": 2, "head_dim": 80, "sinks": 1},
    "8 heads a group, head dim 96, no sinks": {"heads": 8, "head_dim": 96, "sinks": 0, "dtype": BF16},
    "head dim 128, values 40 in 4 splits, window 2": {
        "head_dim": 128, "value_dim": 40, "splits": 4, "window": 2, "batch": 1,
    },  # fmt: skip
    "values 112 in 8 splits, one of none": {
        "head_dim": 16, "heads": 2, "value_dim": 112, "splits": 8, "batch": 1, "dtype": BF16,
    },  # fmt: skip
    "values 36 in 4 splits, one of none, eager": {
        "head_dim": 16, "heads": 2, "value_dim": 36, "splits": 4, "tokens": 8, "launch": EAGER,
    },  # fmt: skip
    "8 splits, eager": {"head_dim": 128, "splits": 8, "dtype": BF16, "far_dtype": BF16, "launch": EAGER},
    "from nothing, eager": {"prompt": 0, "splits": 2, "launch": EAGER},
    "12 heads a group, sums in bfloat16": {"heads": 12, "sum_dtype": BF16, "batch": 1, "tokens": FOLD + 6},
    "nothing staged, 128 threads, keys in two rounds": {
        "prompt": 70, "tokens": FOLD + 6, "window": 64, "head_dim": 128, "dtype": BF16,
        "launch": Launch(threads=128, staged=0, unroll=3),
    },  # fmt: skip
    "two pieces staged, bfloat16": {
        "head_dim": 64, "dtype": BF16, "tokens": 3 * FOLD, "launch": Launch(staged=2),
    },  # fmt: skip
    "sinks 3, a short prompt": {"window": 40, "prompt": 20, "sinks": 3, "batch": 1, "launch": Launch()},
    "head and map dim 8": {
        "head_dim": 8, "map_dim": 8, "groups": 2, "batch": 3, "window": 16, "sinks": 2, "decay": True, "pad": 9,
        "prompt": 21, "dtype": BF16,
    },  # fmt: skip
    "head and map dim 8, 2 splits of many": {
        "head_dim": 8, "map_dim": 8, "groups": 2, "window": 16, "sinks": 2, "decay": True, "prompt": 3, "dtype": BF16,
        "splits": 2, "launch": Launch(),
    },  # fmt: skip
    "gate above all, nothing far": {"prompt": 2, "tokens": 4, "far_gate": 300.0},
    "from nothing, no sinks": {"prompt": 0, "sinks": 0, "tokens": FOLD + 12, "dtype": BF16},
    **{f"scores to 60, {dtype}": {"large": 4.0, "dtype": dtype} for dtype in (BF16, FLOAT)},
    **{f"scores to 240, {dtype}": {"large": 8.0, "dtype": dtype, "tolerance": 1e-4}
       for dtype in (BF16, FLOAT)},  # exp(88) is beyond float32
    "window and map dim of the recipes": {
        "window": 192, "map_dim": 4, "prompt": 210, "tokens": FOLD + 6, "batch": 1, "head_dim": 64, "dtype": BF16,
        "far_dtype": BF16,
    },  # fmt: skip
}


@pytest.mark.parametrize("name", CASES)
def test_decode_is_the_reference(name):
    check(**CASES[name])


@pytest.mark.skipif(ON_GPU, reason="the emulator's order of threads")
@pytest.mark.parametrize("launch", [Launch(), EAGER], ids=["", "eager"])
def test_the_order_of_threads_means_nothing(launch, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=True))
    check(tokens=FOLD + 6, launch=launch, dtype=BF16)


def test_a_decay_of_another_dtype_is_the_same_decay():
    """Kernels are given its address alone, so that bfloat16 read as float32 is another decay, or anything at all."""
    inputs, options, valid = make(prompt=12, tokens=8, heads=2, groups=2, decay=True)
    log_decay, outputs = options["log_decay"].bfloat16(), []
    for x in (log_decay.float(), log_decay, torch.stack([log_decay.float()] * 2, 1)[:, 0]):
        state, how = prefilled(inputs, options, valid, 12), dict(scaling=options["scaling"], launch=Launch())
        steps = [decode(**part(inputs, t, t + 1), state=state, log_decay=x, **how) for t in range(12, 20)]
        outputs.append(torch.cat(steps, 2))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with pytest.raises(AssertionError, match="log_decay"):
        step(part(inputs, 12, 13), state, {**options, "log_decay": log_decay})


def test_a_model_in_bfloat16_decodes_as_with_its_own_cache(monkeypatch):
    """Given tokens, so that no rounding is multiplied by another choice."""
    if not ON_GPU:
        monkeypatch.setattr(cuda, "why_not", lambda device: "")
        monkeypatch.setattr(dispatch, "_cuda_decodes", {})
    model = pico.convert(pico.make_model(), window=16, dim=8).to(DEVICE, BF16)
    ids, mask = (x.to(DEVICE) for x in pico.pad([pico.make_tokens(1, n, seed=n)[0] for n in (21, 9, 14)]))
    given, logits = pico.make_tokens(3, FOLD + 20, seed=5).to(DEVICE), {}
    for kind, mode in (("float32", "eager"), ("eager", "eager"), ("static", "static")):
        decoder, steps = Decoder(model.to(FLOAT if kind == "float32" else BF16), batch=3, mode=mode), []
        decoder.prefill(ids, mask)
        for token in given.T:
            decoder.token.copy_(token)
            decoder.decode_one()
            steps.append(decoder.logits.float())
        logits[kind] = torch.stack(steps, 1)
    state = decoder.cache.layers[0].decode_state
    verdict = dispatch.can_decode_cuda(state, heads=4, decay=True)
    assert verdict, verdict.reason
    rounding = pico.relative_error(logits["eager"], logits["float32"])
    assert pico.relative_error(logits["static"], logits["float32"]) < 1.5 * rounding < 0.1


def test_state_survives_the_round_trip():
    """What it leaves behind continues as a `State` would, and as Triton's state would."""
    case = dict(decay=True, pad=9, groups=2, heads=2)
    state, last = check(**case)
    inputs, options, _ = make(prompt=0, tokens=5, seed=1, **{**case, "pad": 0})
    expected, _ = attention_quadratic(**inputs, **options, state=last.map(lambda x: x), return_state=True)
    got, _ = attention_quadratic(**inputs, **options, state=state, return_state=True)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


def test_rows_at_different_tokens():
    """Rows of a state may be at different tokens, and fold at different steps."""
    first, options, valid = make(prompt=12, batch=1, tokens=2 * FOLD)
    second, _, _ = make(prompt=30, batch=1, tokens=2 * FOLD, seed=1)
    ahead = 11  # tokens that the second row has had before the first comes
    states = [prefilled(x, options, valid, n, splits=2) for x, n in ((first, 12), (second, 30))]
    for t in range(30, 30 + ahead):
        step(part(second, t, t + 1), states[1], options)
    state = DecodeState(
        **{f.name: torch.cat([getattr(s, f.name) for s in states]) for f in fields(states[0]) if f.name != "window"},
        window=6,
    )  # fmt: skip
    outputs = []
    for t in range(2 * FOLD - ahead):
        tokens = [part(first, 12 + t, 13 + t), part(second, 30 + ahead + t, 31 + ahead + t)]
        outputs.append(step({n: torch.cat([x[n] for x in tokens]) for n in tokens[0]}, state, options))
    for row, (inputs, start) in enumerate(((first, 12), (second, 30 + ahead))):
        expected, _ = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, **options)
        got = torch.cat(outputs, 2)[row : row + 1]
        assert relative(got, expected[:, :, start : start + got.shape[2]]) < 1e-5


def test_refusals():
    def reason(heads=4, splits=1, **case):
        inputs, options, valid = make(prompt=0, tokens=1, **case)
        return cuda_decode.why_not(prefilled(inputs, options, valid, 0, splits=splits), heads=heads)

    assert reason() == ""
    assert reason(heads=16, head_dim=128, window=64, splits=8) == ""
    assert "map dim 5: a multiple of 4" in reason(map_dim=5)
    assert "head dim 36: whole pieces" in reason(head_dim=36, dtype=BF16)
    assert "value dim 66 in 1 splits: a multiple of 4" in reason(value_dim=66)
    assert "up to 1024 a split" in reason(value_dim=1028) and not reason(value_dim=1028, splits=2)
    assert "up to 16 a group" in reason(heads=17)
    assert "shared memory" in reason(heads=16, map_dim=32, head_dim=128)


@pytest.mark.skipif(ON_GPU, reason="the choice without a GPU")
def test_a_forced_choice_runs_or_raises(monkeypatch):
    inputs, options, valid = make(prompt=12, tokens=1)
    state = prefilled(inputs, options, valid, 12)
    with pytest.raises(RuntimeError, match="asked to run in CUDA, and cannot: the tensors are on cpu"):
        decode(**part(inputs, 12, 13), state=state, scaling=1.0, implementation="cuda")
    monkeypatch.setenv("LINEARIZE_KERNELS", "cuda")
    assert "on cpu" in dispatch.can_decode(state, heads=4).reason


@pytest.mark.parametrize("when_early", [False, True])
def test_auto_takes_cuda_where_its_self_test_passes(when_early, monkeypatch):
    """The self-test guards the kernel: a wrong one is refused, and its reason shown. So is one wrong after the maps
    alone, where it begins early."""
    inputs, options, valid = make(prompt=12, tokens=1, head_dim=64, window=8)
    state = prefilled(inputs, options, valid, 12)
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(dispatch, "_cuda_decodes", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this device")
    assert dispatch.decodes_in_cuda(state, heads=4, decay=False)
    assert not dispatch.decodes_in_cuda(state, heads=4, decay=False, implementation="triton")
    right = cuda_decode.launch_decode

    def wrong(*args, early=False):
        right(*args, early=early)
        args[9].mul_(1.01 if early == when_early else 1)

    monkeypatch.setattr(cuda_decode, "launch_decode", wrong)
    assert dispatch.decodes_in_cuda(state, heads=4, decay=False), "the verdict is kept"
    dispatch._cuda_decodes.clear()
    self_test_decode.cache_clear()
    verdict = dispatch.can_decode_cuda(state, heads=4)
    self_test_decode.cache_clear()
    assert not verdict and "is off by" in verdict.reason


def mapped_case(case):
    """(Tensors whose far ones are maps of the others, options, valid, steps as `decode_mapped` takes them)."""
    inputs, options, valid = make(**case)
    q, k = inputs["q"], inputs["k"]
    g, heads, size = torch.Generator().manual_seed(3), q.shape[1] + k.shape[1], inputs["k_far"].shape[-1] + 1
    maps = [(torch.randn(heads, n, size, generator=g) * q.shape[-1] ** -0.5).to(DEVICE) for n in (q.shape[-1], 1)]
    tokens = torch.cat([q, k], 1)
    far = tokens.double() @ maps[0].double() + maps[1].double()
    q_far, k_far = far.float().split([q.shape[1], k.shape[1]], 1)
    inputs |= dict(q_far=q_far[..., :-1], k_far=k_far[..., :-1], gate=q_far[..., -1])
    prompt, length = case.get("prompt", 12), tokens.shape[2]
    steps = [(tokens[:, :, t : t + 1], inputs["v"][:, :, t : t + 1], *maps) for t in range(prompt, length)]
    return inputs, options, valid, steps


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("case", [{}, dict(head_dim=128, map_dim=4, batch=5), dict(heads=6, head_dim=80)], ids=str)
def test_tokens_not_mapped_yet(case, dtype):
    case = dict(prompt=12, tokens=FOLD + 6, dtype=dtype) | case
    inputs, options, valid, steps = mapped_case(case)
    expected, _ = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, valid=valid, **options)
    state, how = prefilled(inputs, options, valid, 12), dict(scaling=options["scaling"], launch=Launch())
    got = torch.cat([decode_mapped(*step, state, **how) for step in steps], 2)
    assert relative(got, expected[:, :, 12:]) < (1e-5 if dtype == FLOAT else 5e-3)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("moved", ["q", "k", "v", "q_far", "k_far", "out"])
def test_what_lies_in_no_whole_pieces(moved, dtype):
    """Tensors one element further on, rows of an odd length: the same numbers, and nothing beside `out` is written."""
    inputs, options, valid = make(batch=2, groups=2, dtype=dtype)
    token, results = part(inputs, 12, 13), []
    for odd in (False, True):
        tensors = token | {"out": torch.full_like(token["q"], 7)}
        home = torch.nn.functional.pad(tensors[moved], [1, 0], value=7)
        if odd:
            tensors[moved] = home[..., 1:]
        state = prefilled(inputs, options, valid, 12)
        names = ("q", "k", "v", "q_far", "k_far", "gate")
        launch_decode(*(tensors[n] for n in names), state, options["scaling"], None, tensors["out"], Launch())
        assert (home[..., 0] == 7).all()
        results.append(tensors["out"].clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_strides_that_mean_nothing_or_repeat(dtype):
    """A single row may have any stride, and one head may stand for all: the same numbers as with dense tensors."""
    inputs, options, valid = make(batch=1, groups=2, dtype=dtype)
    token, results = part(inputs, 12, 13), []
    for n in ("k", "v", "k_far", "gate"):
        token[n] = token[n][:, :1].expand_as(token[n])
    odd = token | {n: token[n].as_strided(token[n].shape, (1, *token[n].stride()[1:])) for n in ("q", "k", "v")}
    odd["q_far"] = torch.stack([token["q_far"]] * 2, -1)[..., 0]
    dense = {n: x.clone(memory_format=torch.contiguous_format) for n, x in token.items()}
    for tensors in (dense, odd):
        results.append(step(tensors, prefilled(inputs, options, valid, 12), options, Launch()))
    assert torch.equal(*results)


GPU_CASES = {
    "common": {},
    "many folds": {"tokens": 300, "window": 16, "batch": 1},
    "large batch": {"batch": 300, "tokens": 40},
    **{f"head dim {x}": {"head_dim": x} for x in (16, 64, 80, 96, 112, 128)},
    **{f"map dim {x}": {"map_dim": x} for x in (4, 8, 24, 32)},
    "head and map dim 8": {"head_dim": 8, "map_dim": 8, "window": 16, "decay": True},
    **{f"{h} heads, {g} groups": {"heads": h, "groups": g} for h, g in ((3, 3), (9, 3), (16, 2), (16, 1), (10, 2))},
    **{f"window {w}": {"window": w, "prompt": w + 30} for w in (2, 16, 128, 256)},
    **{f"{n} splits": {"splits": n, "head_dim": 128} for n in (1, 2, 4, 8)},
    "head dim 112, 8 splits, one of none": {"splits": 8, "head_dim": 112},
    **{f"{n} sinks": {"sinks": n} for n in (0, 1, 16)},
    "decay": {"decay": True},
    "large scores": {"large": 4.0},
    "left padding": {"pad": 90, "batch": 3},
    "values 40": {"value_dim": 40},
}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("sum_dtype", [FLOAT, BF16], ids=lambda d: f"sum {d}")
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_table(name, dtype, sum_dtype):
    case = {"prompt": 100, "tokens": 100, "window": 64, "groups": 2, **GPU_CASES[name]}
    check(**case, dtype=dtype, sum_dtype=sum_dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("splits", [1, 8])
def test_graph_replay_equals_eager(splits):
    inputs, options, valid = make(prompt=70, tokens=200, head_dim=128, window=64, dtype=BF16)
    steps = [part(inputs, t, t + 1) for t in range(70, 270)]
    eager_state, state = (prefilled(inputs, options, valid, 70, splits=splits) for _ in range(2))
    eager = [
        decode(**x, state=eager_state, scaling=options["scaling"], implementation="cuda").clone() for x in steps
    ]
    static, out = {name: x.clone() for name, x in steps[0].items()}, torch.empty_like(eager[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing runs while it is captured
        decode(**static, state=state, scaling=options["scaling"], out=out, implementation="cuda")
    for x, expected in zip(steps, eager, strict=True):
        for name in static:
            static[name].copy_(x[name])
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("batch", [1, 40, 300])
def test_launches_that_overlap_are_as_one_after_the_other(batch, in_graph):
    """Nothing waits between steps: each begins on a state that the one before it is still changing."""
    case = dict(prompt=70, tokens=200, head_dim=128, window=64, batch=batch, heads=8, groups=2, dtype=BF16)
    inputs, options, valid, steps = mapped_case(case)
    one_by_one, state = (prefilled(inputs, options, valid, 70, splits=None) for _ in range(2))
    expected = []
    for tokens, v, *maps in steps:
        far, (q, k) = map_heads(tokens, *maps, in_cuda=True), tokens.split([8, 2], 1)
        torch.cuda.synchronize()
        q_far, k_far = far.split([8, 2], 1)
        far = q_far[..., :-1], k_far[..., :-1], q_far[..., -1]
        expected.append(decode(q, k, v, *far, one_by_one, scaling=options["scaling"], implementation="cuda"))
        torch.cuda.synchronize()
    outputs = [decode_mapped(*step, state, scaling=options["scaling"]) for step in steps[:3]]  # compiled, and tested
    if in_graph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs += [decode_mapped(*step, state, scaling=options["scaling"]) for step in steps[3:]]
        graph.replay()
    else:
        outputs += [decode_mapped(*step, state, scaling=options["scaling"]) for step in steps[3:]]
    assert torch.equal(torch.cat(outputs, 2), torch.cat(expected, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("shape", [(9, 3, 64), (32, 8, 128), (32, 32, 64)], ids=str)
def test_auto_is_cuda_here(shape, batch):
    """And the compiled kernel keeps its sums in registers."""
    heads, groups, head_dim = shape
    inputs, options, valid = make(
        prompt=70, tokens=1, batch=batch, heads=heads, groups=groups, head_dim=head_dim, window=64, dtype=BF16
    )
    state = prefilled(inputs, options, valid, 70, splits=None)
    verdict = dispatch.can_decode_cuda(state, heads=heads)
    assert verdict, verdict.reason
    out = inputs["q"][:, :, :1].clone()
    token = [part(inputs, 70, 71)[n] for n in ("q", "k", "v", "q_far", "k_far", "gate")]
    assert launch_decode(*token, state, 1.0, None, out).spills <= 16
