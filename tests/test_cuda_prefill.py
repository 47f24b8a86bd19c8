"""The CUDA prefill against the float64 reference: output and state, over lengths, heads, sinks, segments, gates.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools

import cuda_emulator
import pytest
import torch

from linearize_kernels import attention, attention_quadratic, cuda, cuda_prefill
from linearize_kernels.dispatch import can_run_cuda

CASES = {
    **{f"length {t}": {"length": t} for t in (1, 5, 63, 64, 65, 127, 128, 200)},
    "groups": {"length": 130, "heads": 4, "groups": 2},
    **{f"{h} heads, one group": {"length": 130, "heads": h} for h in (3, 8)},
    **{f"length {t}, no sinks": {"length": t, "sinks": 0} for t in (63, 64, 65, 192)},
    **{f"length {t}": {"length": t} for t in (68, 69)},  # 69: one pair is far
    "16 sinks": {"length": 150, "sinks": 16},
    "logits to 60": {"length": 150, "large": 4.0},
    "large gates": {"length": 200, "gate": 200.0},
    "small gates": {"length": 200, "gate": -200.0},
    "no far term": {"length": 200, "gate": -torch.inf},
    "segments": {"length": 500, "batch": 2, "segments": 3, "parts": 1},
    "as it could be built": {"length": 500, "segments": 2, "parts": 3,
                             "defines": {"SUM_STAGES": 3, "SUM_BLOCKS": 2, "SUM_SPLIT": 2}},
    "sums of parts": {"length": 400, "segments": 2, "parts": 2, "sinks": 3},
    **{f"head dim 128, length {t}": {"length": t, "size": 128} for t in (65, 192, 200)},
    "head dim 128, groups": {"length": 140, "size": 128, "heads": 3, "groups": 1},
    "head dim 128, segments": {"length": 330, "size": 128, "segments": 3, "parts": 1},
    "views of padded rows": {"length": 100, "extra": 8},
}  # fmt: skip


def make(length=90, batch=1, heads=1, groups=1, size=64, sinks=4, large=1.0, gate=None, extra=0, device="cpu", seed=0,
         window=64, map_dim=16):  # fmt: skip
    """Random inputs in a model's layout: heads side by side in memory, `extra` more numbers between them.

    The same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count, size):
        x = torch.randn(batch, length, count, size + extra, generator=generator).to(device, torch.bfloat16)
        return x[..., :size].transpose(1, 2)

    inputs = dict(
        q=draw(heads, size) * large, k=draw(groups, size) * large, v=draw(groups, size),
        q_far=draw(heads, map_dim) * 0.5, k_far=draw(groups, map_dim) * 0.5, gate=draw(heads, 1)[..., 0].float(),
    )  # fmt: skip
    if extra:
        inputs["q"], inputs["k"] = draw(heads, size), draw(groups, size)
    if gate is not None:
        inputs["gate"] = inputs["gate"] + gate
    return inputs, dict(scaling=size**-0.5, window=window, sinks=sinks)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def check(device, *, segments=None, parts=1, defines=None, **case):
    inputs, options = make(**case, device=device)
    assert cuda_prefill.why_not_text(**inputs, **options) == ""
    expected, last = attention_quadratic(**{n: x.double() for n, x in inputs.items()}, **options, return_state=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out, state = cuda_prefill.attention_prefill_cuda(
            **inputs, **options, segments=segments, parts=parts, defines=defines
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()
    assert relative(out, expected) < 5e-3
    assert state.total.shape == last.total.shape
    if last.total.norm() > 0:
        assert relative(state.total, last.total) < 5e-3
        assert relative(state.total[..., -1], last.total[..., -1]) < 1e-5  # the normaliser is not rounded
    else:
        assert not state.total.any()
    for name in ("sink_k", "sink_v", "ring_k", "ring_v", "ring_far", "ring_valid", "length"):
        torch.testing.assert_close(getattr(state, name), getattr(last, name).to(getattr(state, name).dtype), msg=name)


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, reverse, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    check("cpu", **CASES[name])


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("gate", [0.0, 200.0])
def test_weights_sum_to_one(gate, monkeypatch):
    """Numerator and denominator are found in different ways; an error of one key in 100 shows in every row."""
    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    inputs, options = make(length=200, gate=gate)
    inputs["v"] = torch.ones_like(inputs["v"])
    out, _ = cuda_prefill.attention_prefill_cuda(**inputs, **options)
    torch.testing.assert_close(out.float(), torch.ones(out.shape), rtol=0, atol=4e-3)  # a step of bfloat16 below 1


REFUSED = {
    "float32": (dict(q=lambda x: x.float()), {}, "bfloat16"),
    "window": ({}, {"window": 1}, "window 1"),
    "sinks": ({}, {"sinks": 17}, "17 sinks"),
    "padding": ({}, {"valid": torch.ones(1, 90, dtype=torch.bool)}, "valid"),
    "decay": ({}, {"log_decay": torch.zeros(1)}, "log_decay"),
    "head dim": (dict(v=lambda x: x[..., :32]), {}, "head dims"),
    "far heads": (dict(k_far=lambda x: x.expand(-1, 2, -1, -1)), {}, "far heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    inputs, options = make(heads=2)
    changes, more, reason = REFUSED[name]
    inputs.update({key: change(inputs[key]) for key, change in changes.items()})
    assert reason in cuda_prefill.why_not_text(**inputs, **{**options, **more})


def test_forced_where_it_cannot_run():
    inputs, options = make()
    with pytest.raises(RuntimeError, match="asked to run in cuda.* CUDA needs an NVIDIA GPU"):
        attention(**inputs, **options, return_state=True, implementation="cuda")


GPU_CASES = {
    **CASES,
    "segments found": {"length": 4096, "batch": 2},
    "many segments": {"length": 3000, "segments": 11, "parts": 3},
    "all heads": {"length": 1000, "batch": 3, "heads": 32, "groups": 32},
    "8 heads, 2 groups": {"length": 1500, "batch": 2, "heads": 8, "groups": 2},
    "8 heads, 2 groups of 128": {"length": 1500, "batch": 2, "heads": 8, "groups": 2, "size": 128},
    "no sinks of 128": {"length": 700, "size": 128, "sinks": 0},
    "9 sinks of 128": {"length": 700, "size": 128, "sinks": 9},
    "all heads of 128": {"length": 1000, "batch": 2, "heads": 32, "groups": 8, "size": 128},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_gpu(name):
    inputs, options = make(size=128, device="cuda")
    assert cuda_prefill.why_not_device(**inputs, **options) == ""
    check("cuda", **GPU_CASES[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dispatch_takes_it():
    inputs, options = make(length=300, device="cuda")
    expected, last = attention(**inputs, **options, return_state=True, implementation="cuda")
    out, state = attention(**inputs, **options, return_state=True)
    assert torch.equal(out, expected) and torch.equal(state.total, last.total)
    assert torch.equal(attention(**inputs, **options)[0], expected)  # without a state too
    leaves = {**inputs, "q": inputs["q"].requires_grad_()}
    assert "no gradients through a state" in can_run_cuda(**leaves, **options, return_state=True).reason
