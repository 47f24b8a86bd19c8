"""The CUDA prefill as the forward of training: what it leaves for the backward, and gradients after it.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools
import itertools
import math

import cuda_emulator
import pytest
import torch
from test_cuda_backward import forward
from test_cuda_prefill import make, relative

from linearize_kernels import attention, attention_quadratic, cuda, cuda_backward, cuda_prefill
from linearize_kernels.dispatch import can_forward_cuda, can_run_cuda
from linearize_kernels.plan import plan_rows

CASES = {
    **{f"length {t}": {"length": t} for t in (1, 63, 64, 65, 127, 200)},
    **{f"{h} heads, one group": {"length": 130, "heads": h} for h in (3, 8)},
    "8 heads, 2 groups": {"length": 130, "heads": 8, "groups": 2, "batch": 2},
    **{f"length {t}, no sinks": {"length": t, "sinks": 0} for t in (63, 64, 65, 200)},
    "16 sinks": {"length": 150, "sinks": 16},
    "logits to 60": {"length": 200, "large": 4.0},
    "large gates": {"length": 200, "gate": 200.0},
    "no far term": {"length": 200, "gate": -torch.inf},
    "segments": {"length": 400, "batch": 2, "segments": 3},
    "head dim 128": {"length": 200, "size": 128, "heads": 2},
    "head dim 128, segments": {"length": 330, "size": 128, "segments": 3},
    "views of padded rows": {"length": 100, "extra": 8},
}
IN_EMULATOR = pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(device, *, segments=None, parts=1, **case):
    inputs, options = make(**case, device=device)
    exact, _ = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, **options)
    _, _, expected_lse = forward(inputs, **options)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out, rest, lse = cuda_prefill.attention_forward_cuda(**inputs, **options, segments=segments, parts=parts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.stride() == rest.stride() and lse.is_contiguous() and lse.shape == out.shape[:3]
    assert out.isfinite().all() and rest.isfinite().all() and lse.isfinite().all()
    assert relative(out, exact) < 5e-3
    # Scores are products of bfloat16 numbers, added up in float32: their logs are nearly exact.
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=2e-5)
    again, _ = cuda_prefill.attention_prefill_cuda(**inputs, **options, segments=segments, parts=parts)
    assert torch.equal(out, again)
    step = torch.finfo(torch.bfloat16).eps * out.float().abs()  # rest is at most half a step of out
    assert (rest.float().abs() <= step / 2 * 1.01 + 1e-30).all()
    return out, rest, exact


@IN_EMULATOR
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, reverse, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    check("cpu", **CASES[name])


def exact_values(length, size, device="cpu"):
    """Inputs whose attention is free of rounding before the output's: all weights of a row equal, values whole."""
    inputs, options = make(length=length, size=size, sinks=0, device=device)
    for name in ("q", "q_far"):
        inputs[name] = torch.zeros_like(inputs[name])
    inputs["v"] = (inputs["v"] * 3).round()
    inputs["gate"] = torch.zeros_like(inputs["gate"])
    return inputs, options


def check_rest(device, size):
    inputs, options = exact_values(200, size, device)
    exact, _ = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, **options)
    out, rest, lse = cuda_prefill.attention_forward_cuda(**inputs, **options)
    assert relative(out, exact) > 1e-3 and relative(out.double() + rest.double(), exact) < 2e-5
    counts = torch.arange(1, 201, device=device).float()
    torch.testing.assert_close(lse[0, 0], counts.log() / math.log(2), rtol=1e-6, atol=1e-6)


DOCUMENTS = {
    "one": {"length": 150, "cuts": ()},
    "three": {"length": 300, "cuts": (70, 200)},
    "short ones": {"length": 140, "cuts": (1, 2, 5, 64, 128)},
    "shared by programs": {"length": 400, "cuts": (64, 65, 133, 199, 330), "segments": 3},  # a part begins at 133
    "one beyond its part": {"length": 260, "cuts": (10, 250), "segments": 4},
    "heads and rows": {"length": 150, "cuts": (61,), "heads": 4, "groups": 2, "batch": 2, "segments": 2},
    "no sinks": {"length": 200, "cuts": (90,), "sinks": 0},
    "head dim 128": {"length": 210, "cuts": (75, 141), "size": 128, "segments": 2},
}


def check_documents(device, *, cuts, segments=None, **case):
    """Each document as if it stood alone."""
    inputs, options = make(**case, device=device)
    length = inputs["q"].shape[2]
    numbers = torch.zeros(len(inputs["q"]), length, dtype=torch.long, device=device)
    for cut in cuts:
        numbers[:1, cut:] += 1  # other rows: one document
    ends = plan_rows(length, None, numbers, window=options["window"], sinks=options["sinks"]).last
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = cuda_prefill.attention_forward_cuda(**inputs, **options, ends=ends, segments=segments)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = {n: x.double() for n, x in inputs.items()}
    expected, _ = attention_quadratic(**exact, **options, segments=numbers)
    assert relative(got[0], expected) < 5e-3
    for row in range(len(numbers)):
        bounds = [0, *cuts, length] if row == 0 else [0, length]
        for start, end in itertools.pairwise(bounds):
            alone = {n: x[row : row + 1, :, start:end] for n, x in inputs.items()}
            for x, right in zip(got, cuda_prefill.attention_forward_cuda(**alone, **options, segments=1), strict=True):
                assert torch.equal(x[row : row + 1, :, start:end], right)


@IN_EMULATOR
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_emulated(name, reverse, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    check_documents("cpu", **DOCUMENTS[name])


@IN_EMULATOR
@pytest.mark.parametrize("size", [64, 128])
def test_out_and_rest_are_exact_together(size, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    check_rest("cpu", size)


@IN_EMULATOR
def test_training_takes_it(monkeypatch):
    """Gradients through the autograd function, both of its parts from the sources for CUDA."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from linearize_kernels.training import attention_training

    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    inputs, options = make(length=200, heads=2)
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.autograd.grad(attention_quadratic(**exact, **options)[0], list(exact.values()), grad.double())
    out = attention_training(**leaves, **options, forward="cuda", backward="cuda")
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    for (name, leaf), x, right in zip(leaves.items(), got, expected, strict=True):
        assert x.dtype == leaf.dtype and relative(x, right) < 5e-3, name


@IN_EMULATOR
@pytest.mark.parametrize("shape", [{}, {"window": 214, "map_dim": 4}], ids=["one window", "the recipe's"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_forced_forward_runs_or_raises(documents, shape, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    tested = []

    def self_test(*_, **sort):
        tested.append((sort["cuda"], sort.get("masked", False), sort.get("backward")))
        return 0.0, 1.0

    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(cuda_prefill, "why_not_device", lambda *_, **options: "")
    monkeypatch.setattr(cuda_prefill, "FEWEST", 1)
    monkeypatch.setattr(cuda_backward, "why_not", lambda *_, **options: "gradients have tests of their own")
    monkeypatch.setattr("linearize_kernels.self_test.self_test", self_test)
    length = 36 + shape.get("window", 64)
    inputs, options = make(length=length, **shape)
    options["segments"] = (torch.arange(length)[None] > 40).long() if documents else None
    expected, _ = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, **options)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, _ = attention(**leaves, **options, implementation="cuda")
    assert out.requires_grad and relative(out.detach(), expected) < 5e-3
    without, _ = attention(**inputs, **options, implementation="cuda")
    assert torch.equal(without, out)
    assert tested == [("forward", documents, True), ("forward", True, False) if documents else ("prefill", False, None)]
    with pytest.raises(RuntimeError, match="cannot: valid is not built"):
        attention(**leaves, **options, valid=torch.ones(1, length, dtype=torch.bool), implementation="cuda")
    with pytest.raises(RuntimeError, match="cannot: no gradients through a state in CUDA"):
        attention(**leaves, **options, return_state=True, implementation="cuda")


def test_few_programs_with_documents_go_to_triton():
    inputs, options = make(length=9, heads=132)
    numbers = torch.zeros(1, 9, dtype=torch.long)
    assert cuda_prefill.why_not_forward(*inputs.values(), **options) == ""
    assert "132 rows times heads" in cuda_prefill.why_not_forward(*inputs.values(), **options, segments=numbers)
    inputs, options = make(length=9, heads=132, batch=2)
    numbers = numbers.expand(2, -1)
    assert cuda_prefill.why_not_forward(*inputs.values(), **options, segments=numbers) == ""
    valid = numbers == 0
    assert "valid" in cuda_prefill.why_not_forward(*inputs.values(), **options, segments=numbers, valid=valid)


def test_refusals():
    inputs, options = make()
    assert "CUDA needs an NVIDIA GPU" in can_forward_cuda(**inputs, **options).reason
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with pytest.raises(RuntimeError, match="asked to run in cuda.* CUDA needs an NVIDIA GPU"):
        attention(**leaves, **options, implementation="cuda")


def test_triton_asked_for(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    inputs, options = make()
    assert can_forward_cuda(**inputs, **options).reason == "triton is asked for"


GPU_CASES = {
    **CASES,
    "segments found": {"length": 4096, "batch": 2},
    "many segments": {"length": 3000, "segments": 11, "parts": 3},
    "all heads": {"length": 1000, "batch": 3, "heads": 32, "groups": 32},
    "all heads of 128": {"length": 1000, "batch": 2, "heads": 32, "groups": 8, "size": 128},
}


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_gpu(name):
    check("cuda", **GPU_CASES[name])


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_on_gpu(name):
    check_documents("cuda", **DOCUMENTS[name])


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("size", [64, 128])
def test_out_and_rest_on_gpu(size):
    check_rest("cuda", size)


GRADIENTS = {
    "one window": {"length": 50},
    "no chunk out of the windows": {"length": 150, "heads": 4, "groups": 2},
    "long": {"length": 1500, "heads": 8, "groups": 2, "batch": 2},
    "head dim 128": {"length": 1000, "heads": 8, "groups": 2, "size": 128, "batch": 2},
    "no sinks": {"length": 700, "heads": 4, "groups": 4, "sinks": 0},
    "no far term": {"length": 500, "gate": -torch.inf},
    "documents": {"length": 1200, "heads": 8, "groups": 2, "cuts": (1, 300, 420, 1000)},
    "cut into segments": {"length": 8192, "heads": 2, "groups": 1},
}


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_by_triton_after_it(name):
    from linearize_kernels.training import attention_training

    cuts, case = GRADIENTS[name].get("cuts"), {n: x for n, x in GRADIENTS[name].items() if n != "cuts"}
    inputs, options = make(**case, device="cuda")
    if cuts:
        slots = torch.arange(case["length"], device="cuda")[None]
        options["segments"] = sum((slots >= cut).long() for cut in cuts)
    grad = torch.randn(inputs["q"].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    exact = {n: x.double().requires_grad_() for n, x in inputs.items()}
    expected = torch.autograd.grad(attention_quadratic(**exact, **options)[0], list(exact.values()), grad.double())
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = attention_training(**leaves, **options, forward="cuda", backward="triton")
        got = torch.autograd.grad(out, list(leaves.values()), grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for (n, leaf), x, right in zip(leaves.items(), got, expected, strict=True):
        assert x.dtype == leaf.dtype and x.isfinite().all(), n
        assert (relative(x, right) if right.norm() > 0 else float(x.abs().max())) < 5e-3, n


@pytest.mark.gpu
@ON_GPU
def test_dispatch_takes_it(monkeypatch):
    from linearize_kernels import training

    calls = []
    real = training.attention_forward_cuda
    monkeypatch.setattr(training, "attention_forward_cuda", lambda *x, **kw: calls.append(1) or real(*x, **kw))
    inputs, options = make(length=300, device="cuda")
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    assert can_run_cuda(**leaves, **options)
    calls.clear()  # the self-test's
    outs = [attention(**leaves, **options, implementation=name)[0] for name in ("auto", "cuda", "triton")]
    assert len(calls) == 2 and torch.equal(outs[0], outs[1])
    attention(**leaves, **options, valid=torch.ones(1, 300, dtype=torch.bool, device="cuda"))
    assert len(calls) == 2
