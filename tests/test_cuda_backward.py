"""The CUDA backward against the float64 reference: every gradient, over lengths, heads, sinks and gates.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools
import math

import cuda_emulator
import pytest
import torch
from test_cuda_prefill import make, relative

from linearize_kernels import attention_quadratic, cuda, cuda_backward, cuda_backward_small
from linearize_kernels.dispatch import can_backward_cuda
from linearize_kernels.plan import plan_rows

CASES = {
    **{f"length {t}": {"length": t} for t in (1, 63, 64, 65, 127, 200)},
    **{f"length {t}, no sinks": {"length": t, "sinks": 0} for t in (1, 63, 64, 65, 200)},
    "four chunks": {"length": 330},
    "groups": {"length": 200, "heads": 4},
    **{f"{h} heads, one group": {"length": 130, "heads": h} for h in (3, 8)},
    "8 heads, 2 groups": {"length": 130, "heads": 8, "groups": 2, "batch": 2},
    "16 sinks": {"length": 200, "sinks": 16},
    # So large, few queries weigh far keys at all, and one alone may have a dgate that is a difference of near equals.
    "logits to 60": {"length": 200, "large": 4.0, "heads": 16, "groups": 16},
    "large gates": {"length": 260, "gate": 10.0},
    "small gates": {"length": 200, "gate": -10.0},
    "no far term": {"length": 200, "gate": -torch.inf},
    "gate above all, nothing far": {"length": 68, "gate": 300.0},
    "views of padded rows": {"length": 140, "extra": 8},
    "float32 maps": {"length": 200, "far_dtype": torch.float32},
    "nothing of what rounding lost": {"length": 200, "gate": 5.0, "keep_rest": False},
}


def forward(inputs, *, scaling, window, sinks, segments=None):
    """out, what its rounding lost, base-2 logs of the denominators, by the definition, in float64."""
    exact = {name: x.double() for name, x in inputs.items()}
    out, _ = attention_quadratic(**exact, scaling=scaling, window=window, sinks=sinks, segments=segments)
    heads, groups, length = inputs["q"].shape[1], inputs["k"].shape[1], inputs["q"].shape[2]
    k, k_far = (exact[name].repeat_interleave(heads // groups, 1) for name in ("k", "k_far"))
    scores = exact["q"] @ k.mT * scaling
    x = exact["q_far"] @ k_far.mT
    logs = exact["gate"][..., None] + (1 + x + x * x / 2).log()
    slots = torch.arange(length, device=out.device)
    distance = slots[:, None] - slots
    alike = distance == distance if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
    place = slots if segments is None else slots - (~alike).long().cumprod(-1).sum(-1)  # in its text; [B, 1, T]
    logs = torch.where((distance < window) | (place < sinks)[..., None, :], scores, logs)
    logs = logs.masked_fill((distance < 0) | ~alike, -torch.inf)
    rounded = out.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    rest = (out - rounded).bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    return rounded, rest, (logs.logsumexp(-1) / math.log(2)).float()


def check(device, monkeypatch, *, far_dtype=None, keep_rest=True, frozen=False, change=None, **case):
    """Errors of all gradients. change(inputs, options): what `make` does not know."""
    inputs, options = make(**case, device=device)
    if change:
        inputs, options = change(inputs, options)
    grad = torch.randn(inputs["q"].shape, device=device, generator=torch.Generator(device).manual_seed(1)).bfloat16()
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    expected = torch.autograd.grad(attention_quadratic(**leaves, **options)[0], list(leaves.values()), grad.double())
    canaries = []

    def like(x, heads, dtype=None, size=None):
        """As cuda_backward_small.like, one more token long: nothing may write there."""
        batch, _, length, given = x.shape
        longer = x.new_full((batch, length + 1, heads, size or given), torch.nan, dtype=dtype or x.dtype)
        canaries.append(longer[:, length])
        return longer[:, :length].transpose(1, 2)

    for module in (cuda_backward, cuda_backward_small):
        monkeypatch.setattr(module, "like", like)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out, rest, lse = forward(inputs, **options)
        rest = rest if keep_rest else torch.zeros_like(rest)
        segments = options.pop("segments", None)
        if segments is not None:
            plan = plan_rows(out.shape[2], None, segments, window=options["window"], sinks=options["sinks"])
            options |= dict(firsts=plan.first, lasts=plan.last)
        got = cuda_backward.attention_backward_cuda(
            **inputs, out=out, rest=rest, lse=lse, grad=grad, dtypes=far_dtype and (far_dtype, far_dtype),
            frozen=frozen, **options,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(canaries) == 5 - 3 * frozen and all(x.isnan().all() for x in canaries)
    errors = {}
    for name, x, right in zip(("dq", "dk", "dv", "dq_far", "dk_far", "dgate"), got, expected, strict=True):
        if x is None and frozen and name in ("dq", "dk", "dv"):
            continue
        assert x.isfinite().all() and x.shape == right.shape, name
        if name.endswith("far"):
            assert x.dtype == (far_dtype or torch.bfloat16)
        errors[name] = relative(x, right) if right.norm() > 0 else float(x.abs().max())
    return errors


def passes(errors):
    assert all(error < 5e-3 for error in errors.values()), {name: f"{error:.1e}" for name, error in errors.items()}


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, reverse, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    passes(check("cpu", monkeypatch, **CASES[name]))


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("map_dim", [4, 16])
def test_what_the_output_lost_costs_the_keys_and_the_gate_nothing(map_dim, monkeypatch):
    """Their gradients are found with a delta that the slopes' own sum has corrected."""

    def coarse(*args, exact=forward, **options):
        out, rest, lse = exact(*args, **options)
        return (out * 4).round() / 4, torch.zeros_like(rest), lse

    def far_from_zero(inputs, options):
        return {**inputs, "v": inputs["v"] + 3}, options

    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    monkeypatch.setitem(globals(), "forward", coarse)
    errors = check("cpu", monkeypatch, length=200, gate=3.0, map_dim=map_dim, change=far_from_zero)
    assert all(errors[name] < 1e-2 for name in ("dk", "dv", "dk_far", "dgate")), errors
    assert errors["dq"] > 5e-2, "the output was not coarse"


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
def test_training_takes_it(monkeypatch):
    """What the autograd function hands over, and in which order it gives gradients back."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from linearize_kernels import training

    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    monkeypatch.setattr(training, "launch_forward", lambda *x, scaling, window, sinks, **_: saved)
    inputs, options = make(length=140, heads=2)
    inputs["q_far"] = inputs["q_far"].float()  # its gradient is to be float32
    saved = forward(inputs, **options)
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.autograd.grad(attention_quadratic(**exact, **options)[0], list(exact.values()), grad.double())
    out = training.attention_training(**leaves, **options, backward="cuda")
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    for (name, leaf), x, right in zip(leaves.items(), got, expected, strict=True):
        assert x.dtype == leaf.dtype and relative(x, right) < 5e-3, name
    assert (got[3] != got[3].bfloat16()).any(), "rounded on the way"


REFUSED = {
    "head dim": ({"size": 128}, {}, "head dim 128"),
    "few programs": ({"heads": 131}, {}, "131 rows times heads"),
    "texts": ({"heads": 132}, {"segments": torch.zeros(1, 9)}, "segments"),
    "decay": ({"heads": 132}, {"log_decay": torch.zeros(1)}, "log_decay"),
    "window": ({"heads": 132}, {"window": 32}, "window 32 with map dim 16: 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    sizes, more, reason = REFUSED[name]
    inputs, options = make(length=9, **sizes)
    assert reason in cuda_backward.why_not(**inputs, **{**options, **more})


def test_takes_what_fills_a_gpu():
    inputs, options = make(length=9, heads=132)
    assert cuda_backward.why_not(**inputs, **options) == ""
    assert "CUDA needs an NVIDIA GPU" in can_backward_cuda(**inputs, **options).reason


def test_triton_asked_for(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    inputs, options = make(length=9, heads=132)
    assert can_backward_cuda(**inputs, **options).reason == "triton is asked for"


GPU_CASES = {
    **CASES,
    "all heads": {"length": 1000, "batch": 3, "heads": 32, "groups": 32},
    "all heads, long": {"length": 2048, "batch": 2, "heads": 32, "groups": 32},
    "length 4096": {"length": 4096, "heads": 2},
    "32 heads, 8 groups": {"length": 1500, "batch": 2, "heads": 32, "groups": 8},
    "9 heads, 3 groups, 9 sinks": {"length": 700, "batch": 4, "heads": 9, "groups": 3, "sinks": 9},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_gpu(name, monkeypatch):
    assert cuda_backward.why_not_device(torch.device("cuda"), small=False) == ""
    passes(check("cuda", monkeypatch, **GPU_CASES[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sinks", [0, 4, 16])
def test_as_triton_on_gpu(sinks, monkeypatch):
    """The whole of training attention: the same gradients by CUDA, which is taken, and by Triton."""
    from linearize_kernels import training

    inputs, options = make(length=900, batch=8, heads=32, groups=8, sinks=sinks, device="cuda")
    assert can_backward_cuda(**inputs, **options)
    grad, results, calls = torch.randn_like(inputs["q"]), {}, []
    real = training.attention_backward_cuda
    monkeypatch.setattr(training, "attention_backward_cuda", lambda *x, **kw: calls.append(1) or real(*x, **kw))
    for backward in ("triton", "auto"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = training.attention_training(*leaves, **options, backward=backward)
        results[backward] = torch.autograd.grad(out, leaves, grad)
    assert len(calls) == 1
    for name, x, right in zip(inputs, results["auto"], results["triton"], strict=True):
        assert relative(x, right.double()) < 7e-3, name
