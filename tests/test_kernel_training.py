"""The Triton training kernels against the float64 reference: output and every gradient.

On a machine without a GPU they run in Triton's interpreter (see conftest.py), float32 and small shapes only:
it has no bfloat16 products. On a GPU the whole table runs. Fresh memory is filled with NaN beforehand.
"""

import functools
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()

from linearize_kernels import attention, attention_chunked, attention_quadratic, can_run  # noqa: E402
from linearize_kernels.configs import CONFIGS, Config, SumTiles, Tiles  # noqa: E402
from linearize_kernels.plan import plan_rows  # noqa: E402
from linearize_kernels.sums import key_sums  # noqa: E402
from linearize_kernels.training import attention_training, launch_forward  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
triton_training = functools.partial(attention_training, forward="triton", backward="triton")  # "auto" may take CUDA
DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
SMALL = Config(*[Tiles(16, 16, 16, 4, 1)] * 3, SumTiles(16, 16, 4, 1), 16)  # chunks and far tiles in short texts
MIXED = Config(
    Tiles(32, 16, 32, 4, 1), Tiles(16, 16, 16, 4, 1), Tiles(32, 16, 16, 4, 1), SumTiles(32, 16, 4, 1), 32
)


def make(length=75, batch=1, heads=2, groups=1, head_dim=16, map_dim=5, window=12, sinks=3, per="kv_head",
         decay=False, pad=None, cuts=(), large=1.0, far_gate=None, dtype=torch.float32, seed=0):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    far_heads = groups if per == "kv_head" else heads
    inputs = dict(
        q=draw(batch, length, heads, head_dim).transpose(1, 2) * large,
        k=draw(batch, groups, length, head_dim) * large,
        v=draw(batch, groups, length, head_dim), q_far=draw(batch, heads, length, map_dim) * 0.5,
        k_far=draw(batch, far_heads, length, map_dim) * 0.5, gate=draw(batch, heads, length),
        log_decay=-torch.linspace(0.01, 0.1, far_heads, device=DEVICE) if decay else None,
    )  # fmt: skip
    if far_gate is not None:
        inputs["gate"] = torch.full_like(inputs["gate"], far_gate)
    valid = segments = None
    if pad:
        valid = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
        valid[0, : length // 3] = False
        valid = valid.flip(1) if pad == "right" else valid
    if cuts:
        segments = torch.zeros(batch, length, dtype=torch.long, device=DEVICE)
        segments[:, list(cuts)] = 1
        segments = segments.cumsum(1)
    options = dict(scaling=head_dim**-0.5, window=window, sinks=sinks, valid=valid, segments=segments)
    return inputs, options, draw(batch, heads, length, head_dim)


def run(function, inputs, options, grad, dtype=None, frozen=()):
    """Output and gradients but those of `frozen`, by name."""
    given = {n: x.detach().to(dtype or x.dtype) for n, x in inputs.items() if x is not None}
    leaves = {n: x.requires_grad_() for n, x in given.items() if n not in frozen}
    out = function(**given, **options)
    out = out[0] if isinstance(out, tuple) else out
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return dict(zip(["out", *leaves], [out.detach(), *gradients], strict=True))


def check(case, config=None, frozen=()):
    inputs, options, grad = make(**case)
    dtype = inputs["q"].dtype
    right = run(attention_quadratic, inputs, options, grad, torch.float64, frozen)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        got = run(functools.partial(triton_training, config=config), inputs, options, grad, frozen=frozen)
    finally:
        torch.use_deterministic_algorithms(False)
    plain = run(attention_quadratic, inputs, options, grad, frozen=frozen) if dtype == torch.bfloat16 else None
    for name, expected in right.items():
        size, error = expected.norm(), (got[name].double() - expected).norm()
        allowed, floor = 1e-4, 1e-6
        if plain:  # the floor stands for gradients that cancel to nothing
            allowed, floor = 5e-3, 1e-5
            allowed = max(allowed, 2 * ((plain[name].double() - expected).norm() / size.clamp_min(1e-30)).item())
        assert error <= max(allowed * size, floor * expected.numel() ** 0.5), (
            f"{name}: {error / size:.1e} of {allowed:.1e}"
        )


CASES = {
    "plain": {},
    "one token": {"length": 1},
    "within the window": {"length": 9},
    **{f"{t} tokens, window 12, {n} sinks": {"length": t, "sinks": n}
       for n, lengths in ((0, (11, 12, 13)), (3, (13, 15, 16))) for t in lengths},  # 13 and 16: one pair is far
    "no sinks": {"sinks": 0},
    "window 1": {"window": 1, "sinks": 1, "length": 40},
    "window 15": {"window": 15},  # with tiles of 16 an error of one in the tiles' ranges shows at 15 or at 18
    "window 18": {"window": 18},
    "groups": {"heads": 4, "groups": 2},
    "per query head, decay": {"heads": 4, "groups": 2, "per": "query_head", "decay": True},
    "decay, groups": {"decay": True, "heads": 4, "groups": 2},
    "left padding": {"batch": 2, "pad": "left"},
    "right padding": {"batch": 2, "pad": "right", "sinks": 0},
    "segments": {"batch": 2, "cuts": (1, 2, 30, 45, 46)},
    "segments that begin with chunks": {"cuts": (16, 32), "batch": 2},
    "segments that begin with chunks, no sinks": {"cuts": (15, 48), "sinks": 0},
    **{f"a segment begins at {at}, within a span": {"cuts": (at,), "length": 112} for at in (40, 80)},  # of 32 slots
    "segments and padding, decay": {"batch": 2, "cuts": (20, 45, 46), "pad": "left", "decay": True},
    "large scores": {"large": 6.0},
    "large scores, gate as high": {"large": 6.0, "far_gate": 30.0},  # else the far term weighs nothing
    "gate off": {"far_gate": -float("inf")},
    "gate high": {"far_gate": 40.0},
    "gate above all, nothing far": {"far_gate": 300.0, "length": 15},
    "gate above all, short pieces": {"far_gate": 300.0, "cuts": (9, 20, 31, 40, 52)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_small_cases(name, dtype):
    check({**CASES[name], "dtype": dtype}, config=SMALL if dtype == torch.float32 else None)


def test_the_tables_are_of_triton(monkeypatch):
    """Where CUDA can run, "auto" takes it in most of them."""
    for name in ("can_forward_cuda", "can_backward_cuda"):
        monkeypatch.setattr(f"linearize_kernels.training.{name}", lambda *_, **__: pytest.fail("CUDA is asked for"))
    check({"length": 20}, config=SMALL if not ON_GPU else None)


FROZEN_CASES = (
    "plain", "within the window", "window 1", "groups", "per query head, decay", "right padding", "segments",
    "gate high",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FROZEN_CASES)
def test_q_k_and_v_frozen(name, dtype):
    case = {"length": 60, **CASES[name], "dtype": dtype}
    check(case, config=SMALL if dtype == torch.float32 else None, frozen=("q", "k", "v"))


@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["all", "q, k, v frozen"])
def test_what_the_output_lost_costs_the_gate_and_the_keys_nothing(frozen, monkeypatch):
    """Sums over exact pairs say what a rounded output hides; so they are needed with q, k and v frozen too."""
    inputs, options, grad = make(length=60, cuts=(9, 13), batch=2)
    inputs["v"], grad = inputs["v"] + 3, grad + 1
    right = run(attention_quadratic, inputs, options, grad, torch.float64, frozen)

    def coarse(*args, **kw):
        out, rest, lse = launch_forward(*args, **kw)
        return out.bfloat16().float(), rest, lse

    monkeypatch.setattr("linearize_kernels.training.launch_forward", coarse)
    got = run(functools.partial(triton_training, config=SMALL), inputs, options, grad, frozen=frozen)
    for name in ("gate", "k_far", *([] if frozen else ["k", "v"])):
        assert (got[name] - right[name]).norm() <= 1e-4 * right[name].norm(), name
    assert (got["q_far"] - right["q_far"]).norm() > 1e-3 * right["q_far"].norm(), "the output was not coarse"


def test_only_what_is_wanted_is_computed(monkeypatch):
    """Exact pairs are left out of the keys' gradient exactly where q, k and v are all frozen; sinks' with them."""
    seen = []

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                seen.append((self.name, constants.get("EXACT")))
                self.kernel[grid](*args, **constants)

            return launch

    for module, name in (("gradient", "query_gradient"), ("gradient", "key_gradient"), ("sink_gradient",) * 2):
        module = importlib.import_module(f"linearize_kernels.{module}_kernels")
        monkeypatch.setattr(module, f"{name}_kernel", Spy(name, getattr(module, f"{name}_kernel")))
    for wanted in ("q", "k", "v", ""):
        seen.clear()
        check({"length": 40}, config=SMALL, frozen=[name for name in "qkv" if name != wanted])
        exact = bool(wanted)
        sinks = [("sink_gradient", None)] if exact else []
        assert seen == [("query_gradient", exact), ("key_gradient", exact), *sinks]


@pytest.mark.skipif(ON_GPU, reason="these tiles are for the interpreter")
@pytest.mark.parametrize("name", ["plain", "segments", "left padding", "per query head, no decay"])
def test_tiles_of_different_sizes(name):
    cases = {**CASES, "per query head, no decay": {"heads": 4, "groups": 2, "per": "query_head"}}
    check({"length": 140, **cases[name]}, config=MIXED)


@pytest.mark.skipif(ON_GPU, reason="these tiles are for the interpreter")
def test_tiles_of_different_sizes_with_q_k_and_v_frozen():
    case = {"heads": 4, "groups": 2, "per": "query_head", "cuts": (1, 2, 30, 90), "length": 140}
    check(case, config=MIXED, frozen=("q", "k", "v"))


def test_a_plan_is_made_once_for_all_layers_and_anew_for_other_rows():
    _, options, _ = make(length=20, batch=2, pad="left", cuts=(9,))
    sizes = {"window": 12, "sinks": 3}
    first = plan_rows(20, options["valid"], options["segments"], **sizes)
    assert plan_rows(20, options["valid"], options["segments"], **sizes) is first
    options["valid"][1, :3] = False  # the same tensor with other contents
    second = plan_rows(20, options["valid"], options["segments"], **sizes)
    assert second is not first and not torch.equal(second.codes, first.codes)
    assert plan_rows(20, options["valid"].clone(), options["segments"], **sizes) is not second
    valid = options["valid"].clone()
    with torch.inference_mode():
        plan_rows(20, valid, None, **sizes)
    assert not plan_rows(20, valid, None, **sizes).codes.is_inference(), "training could not keep it"
    with torch.inference_mode():
        valid = options["valid"].clone()
        assert torch.equal(plan_rows(20, valid, None, **sizes).codes, plan_rows(20, valid, None, **sizes).codes)


def test_long_rows_take_far_tokens_through_sums(monkeypatch):
    """Not a pair further than window + chunk is taken by itself: without the sums the output is another."""
    inputs, options, _ = make(length=75)
    right = attention_training(**inputs, **options, config=SMALL)
    empty = lambda k_far, *args, **kw: (key_sums(k_far * 0 - 1e4, *args, **kw))  # noqa: E731
    monkeypatch.setattr("linearize_kernels.training.key_sums", empty)
    wrong = attention_training(**inputs, **options, config=SMALL)
    reach = options["window"] + SMALL.chunk
    torch.testing.assert_close(wrong[:, :, :reach], right[:, :, :reach])
    assert (wrong - right)[:, :, -1].norm() > 0.1 * right[:, :, -1].norm()


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation inside gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return result


@pytest.mark.skipif(ON_GPU, reason="these tiles are for the interpreter")
@pytest.mark.parametrize("case", [{}, {"decay": True}, {"cuts": (31, 32, 70)}], ids=["plain", "decay", "segments"])
def test_no_tensor_of_all_pairs(case):
    """Twice the tokens, twice the largest tensor, with gradients; that of the definition is four times as large."""

    def growth(function):
        largest = []
        for length in (80, 160):
            inputs, options, grad = make(**case, length=length, heads=1)
            with LargestTensor() as seen:
                run(function, inputs, options, grad)
            largest.append(seen.num_bytes)
        return largest[1] / largest[0]

    assert growth(attention_quadratic) > 3.5
    assert growth(functools.partial(triton_training, config=SMALL)) <= 2.1


GPU_CASES = {
    **{f"length {t}": {"length": t, "window": 64} for t in (1, 63, 64, 65, 127, 1000, 4096)},
    **{f"window {w}": {"window": w, "length": 700} for w in (16, 128, 256)},
    **{f"{w} + {more} tokens, window {w}, {n} sinks": {"window": w, "length": w + more, "sinks": n, "batch": 2}
       for w in (16, 64, 128, 256) for n in (0, 4) for more in (n - 1, n, n + 1)},  # n + 1: one pair is far
    **{f"head dim {x}": {"head_dim": x} for x in (80, 96, 128)},
    **{f"map dim {x}": {"map_dim": x} for x in (8, 24, 32)},
    **{f"{h} heads, {g} groups": {"heads": h, "groups": g} for h, g in ((3, 3), (9, 3), (8, 2), (16, 2))},
    "pieces": {"cuts": (1, 2, 3, 130, 131, 500, 501), "length": 1000, "batch": 2},
    "pieces that begin with chunks": {"cuts": (256, 511), "length": 1000},  # of 256 tokens, or 128
    "pieces that begin with chunks, no sinks": {"cuts": (255, 768), "length": 1000, "sinks": 0},
    "pieces, decay, no sinks": {"cuts": (64, 128, 500), "length": 1000, "decay": True, "sinks": 0},
    "left padding, per query head": {"pad": "left", "batch": 3, "per": "query_head"},
    "decay": {"decay": True, "length": 1000},
    "long, with spans": {"length": 3000, "batch": 1, "heads": 2, "groups": 1},
    "long pieces, with spans": {"length": 3000, "cuts": (700, 701, 1800), "heads": 2, "groups": 1},
    "long, per query head": {"length": 1500, "per": "query_head"},
    "scores to 60": {"large": 4.0},
    "scores to 60, gate as high": {"large": 4.0, "far_gate": 30.0},
    "window 214, map dim 4": {"window": 214, "map_dim": 4, "length": 1000, "heads": 9, "groups": 3},
    "window 214, map dim 4, pieces": {"window": 214, "map_dim": 4, "length": 1000, "cuts": (100, 300, 310, 650)},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["all", "q, k, v frozen"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_table(name, frozen, dtype):
    check({"length": 500, "heads": 4, "groups": 2, "head_dim": 64, "map_dim": 16, "window": 64, "sinks": 4,
           "dtype": dtype, **GPU_CASES[name]}, frozen=frozen)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("entry", CONFIGS, ids=str)
def test_every_config(entry, head_dim):
    shape = {
        "length": 700,
        "heads": 4,
        "groups": 2,
        "head_dim": head_dim,
        "map_dim": 16,
        "window": 64,
        "sinks": 4,
    }
    for extra in ({}, {"pad": "left", "cuts": (300,)}, {"decay": True}):
        for frozen in ((), ("q", "k", "v")):
            check({**shape, **extra, "dtype": entry[0]}, config=CONFIGS[entry], frozen=frozen)


def test_dispatch_forces_and_refuses(monkeypatch):
    inputs, options, _ = make(length=20)
    expected, _ = attention_quadratic(**inputs, **options)
    for choice in ("auto", "reference", "triton"):
        out, state = attention(**inputs, **options, implementation=choice)
        assert state is None
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    verdict = can_run(**inputs, **options, feature_map="hedgehog")
    assert not verdict and "hedgehog" in verdict.reason
    with pytest.raises(RuntimeError, match="softcap"):
        attention(**inputs, **options, softcap=3.0, implementation="triton")
    with pytest.raises(ValueError, match="choose one of"):
        attention(**inputs, **options, implementation="fast")
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="gradients through a state"):
        attention(**{**inputs, "q": inputs["q"].clone().requires_grad_()}, **options, return_state=True)


@pytest.mark.skipif(ON_GPU, reason="these tiles are for the interpreter")
@pytest.mark.parametrize("wanted", ["nothing", "no_grad", "gradients"])
def test_decay_is_bounded_where_gradients_are_wanted(wanted, monkeypatch):
    """Those alone take far pairs one by one; without them a decay goes through sums, at any length."""
    monkeypatch.setitem(CONFIGS, (torch.float32, 128), SMALL)
    monkeypatch.setattr("linearize_kernels.training.MAX_QUADRATIC", 60)
    lengths = []

    def watched(*args, **kw):
        lengths.append(args[0].shape[2])
        return key_sums(*args, **kw)

    monkeypatch.setattr("linearize_kernels.training.key_sums", watched)
    inputs, options, _ = make(length=75, decay=True)
    expected = attention_quadratic(**inputs, **options)[0]
    inputs["log_decay"].requires_grad_(wanted != "nothing")
    with torch.set_grad_enabled(wanted == "gradients"):
        if wanted == "gradients":
            with pytest.raises(RuntimeError, match="75 tokens: 1 to 60 with a decay and gradients"):
                attention(**inputs, **options, implementation="triton")
            return
        out, _ = attention(**inputs, **options, implementation="triton")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert lengths == [75] and not out.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decay_at_40k_tokens(dtype):
    inputs, options, _ = make(
        length=40000, heads=4, groups=2, head_dim=64, map_dim=16, window=64, decay=True, dtype=dtype
    )
    exact = {name: x.double() for name, x in inputs.items()}
    expected = attention_chunked(**exact, **options)[0]
    out, _ = attention(**inputs, **options, implementation="triton")
    assert (out - expected).norm() < (1e-4 if dtype == torch.float32 else 5e-3) * expected.norm()
    inputs["gate"].requires_grad_()
    assert "40000 tokens" in can_run(**inputs, **options).reason


def test_no_second_derivative():
    inputs, options, _ = make(length=20)
    q = inputs.pop("q").requires_grad_()
    out = attention_training(q=q, **inputs, **options, config=SMALL)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
