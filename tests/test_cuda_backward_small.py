"""The CUDA backward of small maps against the float64 reference: windows, map dims, lengths, heads, sinks, texts.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools

import cuda_emulator
import pytest
import torch
from test_cuda_backward import check, forward, passes
from test_cuda_prefill import make, relative

from linearize_kernels import attention_quadratic, cuda, cuda_backward
from linearize_kernels.dispatch import can_backward_cuda

TEXTS = {"pieces": (1, 90, 1, 1, 40, 67), "long": (150, 50), "one": (200,), "edges": (64, 63, 65, 8),
         "from a slot before a boundary": (127, 73)}  # fmt: skip


def small(window, map_dim=4, texts=None):
    """A change of `make`'s inputs: maps of fewer dims, another window, several texts in a row."""

    def change(inputs, options):
        length = inputs["q"].shape[2]
        inputs |= {name: inputs[name][..., :map_dim] for name in ("q_far", "k_far")}
        options |= dict(window=window)
        if texts:
            numbers = torch.arange(len(texts)).repeat_interleave(torch.tensor(texts))
            rows = [numbers.roll(shift) for shift in (0, 37)][: len(inputs["q"])]
            # rolled, the last text goes on at the row's beginning; there it is another one
            rows = [torch.where(torch.arange(length) < 37, row + 100, row) if i else row for i, row in enumerate(rows)]
            options["segments"] = torch.stack(rows).to(inputs["q"].device)
        return inputs, options

    return change


def cases():
    for window in (2, 16, 63, 64, 65, 128, 214, 256):
        yield f"window {window}", dict(length=window + 110, change=small(window))
    for window, lengths in ((64, (1, 63, 64, 65, 127, 129)), (20, (19, 20, 21)), (130, (129, 130, 131, 256, 257))):
        for length in lengths:
            yield f"window {window}, length {length}", dict(length=length, change=small(window))
    for window in (16, 64, 128, 214, 256):
        for length in (window - 1, window, window + 1):
            yield f"window {window}, length {length}, no sinks", dict(length=length, sinks=0, change=small(window))
    for map_dim in (1, 2, 3):
        yield f"map dim {map_dim}", dict(length=150, change=small(30, map_dim))
    for sinks in (0, 1, 9):
        yield f"{sinks} sinks", dict(length=200, sinks=sinks, change=small(40))
    yield "16 sinks, window 16", dict(length=150, sinks=16, change=small(16))
    yield "groups of 3", dict(length=200, heads=6, groups=2, change=small(50))
    for heads in (4, 8):
        yield f"{heads} heads, one group", dict(length=150, heads=heads, change=small(50))
    yield "two rows", dict(length=130, heads=2, groups=1, batch=2, change=small(33))
    # See test_cuda_backward.py: over few heads the gate's gradient is ill-posed.
    yield "logits to 60", dict(length=200, large=4.0, heads=16, groups=16, change=small(64))
    yield "large gates", dict(length=260, gate=10.0, change=small(70))
    yield "no far term", dict(length=200, gate=-torch.inf, change=small(70))
    yield "gate above all, nothing far", dict(length=74, gate=300.0, change=small(70))
    yield "views of padded rows", dict(length=140, extra=8, change=small(50))
    yield "float32 maps", dict(length=200, far_dtype=torch.float32, change=small(50))
    for name, texts in TEXTS.items():
        for window in (16, 64, 90):
            case = dict(length=200, batch=2, heads=2, groups=1, change=small(window, texts=texts))
            yield f"texts, {name}, window {window}", case
    yield "texts, from slot 191", dict(length=240, heads=2, groups=1, change=small(16, texts=(191, 49)))
    # A sum's boundary, slot 64, between the sinks of a text.
    yield "texts with 7 sinks", dict(length=200, batch=2, sinks=7, change=small(20, texts=(60, 140)))
    frozen = dict(length=180, heads=2, groups=1, batch=2, frozen=True)
    for window in (16, 64, 90):
        yield f"frozen, window {window}", dict(frozen, change=small(window))
    for window in (16, 64):
        yield f"frozen, texts, window {window}", dict(frozen, change=small(window, texts=(130, 50)))


CASES = dict(cases())


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, monkeypatch):
    reverse = list(CASES).index(name) % 2 == 1
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    passes(check("cpu", monkeypatch, **CASES[name]))


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["all", "frozen"])
def test_training_takes_it(frozen, monkeypatch):
    """What the autograd function hands over of texts, and what it gives back where q, k and v are frozen."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from linearize_kernels import training

    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    monkeypatch.setattr(training, "key_sums", lambda *_, **__: (training.no_sums(torch.device("cpu")), None))
    monkeypatch.setattr(training, "launch_forward", lambda *x, scaling, window, sinks, **_: saved)
    inputs, options = small(20, texts=TEXTS["long"])(*make(length=200, heads=2, batch=2))
    saved = forward(inputs, **options)
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    given = {name: x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()}
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = attention_quadratic(**exact, **options)[0]
    expected = torch.autograd.grad(out, [exact[name] for name in leaves], grad.double())
    out = training.attention_training(**given, **options, backward="cuda")
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    for (name, leaf), x, right in zip(leaves.items(), got, expected, strict=True):
        assert x.dtype == leaf.dtype and relative(x, right) < 5e-3, name


REFUSED = {
    "map dim 8": ({}, 64, 8, {}, "map dim 8: up to 4, or 16"),
    "short window": ({}, 1, 4, {}, "window 1: 2 to 512"),
    "long window": ({}, 513, 4, {}, "window 513: 2 to 512"),
    "head dim": ({"size": 128}, 100, 4, {}, "head dim 128"),
    "padding": ({}, 100, 4, {"valid": torch.ones(1, 9, dtype=torch.bool)}, "valid"),
    "decay": ({}, 100, 4, {"log_decay": torch.zeros(1)}, "log_decay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    sizes, window, map_dim, more, reason = REFUSED[name]
    inputs, options = small(window, map_dim)(*make(length=9, **sizes))
    assert reason in cuda_backward.why_not(**inputs, **{**options, **more})


def test_takes_few_rows_of_several_texts():
    inputs, options = small(214, texts=(4, 5))(*make(length=9, heads=9, groups=3))
    assert cuda_backward.why_not(**inputs, **options) == ""
    assert "CUDA needs an NVIDIA GPU" in can_backward_cuda(**inputs, **options).reason


GPU_CASES = {
    **CASES,
    **{f"length {t}": dict(length=t, heads=2, change=small(214)) for t in (1000, 4096)},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_gpu(name, monkeypatch):
    assert cuda_backward.why_not_device(torch.device("cuda"), small=True) == ""
    passes(check("cuda", monkeypatch, **GPU_CASES[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("texts", [(900,), (1, 300, 99, 500)], ids=["plain", "texts"])
@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["all", "frozen"])
def test_as_triton_on_gpu(frozen, texts, monkeypatch):
    """The whole of training attention: the same gradients by CUDA, which is taken, and by Triton."""
    from linearize_kernels import training

    change = small(214, texts=texts if len(texts) > 1 else None)
    inputs, options = change(*make(length=900, batch=2, heads=9, groups=3, device="cuda"))
    assert can_backward_cuda(**inputs, **options)
    grad, results, calls = torch.randn_like(inputs["q"]), {}, []
    real = training.attention_backward_cuda
    monkeypatch.setattr(training, "attention_backward_cuda", lambda *x, **kw: calls.append(1) or real(*x, **kw))
    for backward in ("triton", "auto"):
        given = [x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()]
        out = training.attention_training(*given, **options, backward=backward)
        results[backward] = torch.autograd.grad(out, [x for x in given if x.requires_grad], grad)
    assert len(calls) == 1
    for x, right in zip(results["auto"], results["triton"], strict=True):
        assert relative(x, right.double()) < 7e-3
