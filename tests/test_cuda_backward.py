"""The CUDA backward against the float64 reference: every gradient, over lengths, heads, sinks and gates.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools
import math

import cuda_emulator
import pytest
import torch
from test_cuda_prefill import make, relative

from linearize_kernels import attention_quadratic, cuda, cuda_backward

CASES = {
    **{f"length {t}": {"length": t} for t in (1, 63, 64, 65, 127, 200)},
    **{f"length {t}, no sinks": {"length": t, "sinks": 0} for t in (1, 64, 200)},
    "four chunks": {"length": 330},
    "groups": {"length": 200, "heads": 4},
    "8 heads, 2 groups": {"length": 130, "heads": 8, "groups": 2, "batch": 2},
    "16 sinks": {"length": 200, "sinks": 16},
    "logits to 60": {"length": 200, "large": 4.0},
    "large gates": {"length": 260, "gate": 10.0},
    "small gates": {"length": 200, "gate": -10.0},
    "no far term": {"length": 200, "gate": -torch.inf},
    "views of padded rows": {"length": 140, "extra": 8},
    "float32 maps": {"length": 200, "far_dtype": torch.float32},
}


def forward(inputs, *, scaling, window, sinks):
    """out, what its rounding lost, base-2 logs of the denominators, by the definition, in float64."""
    exact = {name: x.double() for name, x in inputs.items()}
    out, _ = attention_quadratic(**exact, scaling=scaling, window=window, sinks=sinks)
    heads, groups, length = inputs["q"].shape[1], inputs["k"].shape[1], inputs["q"].shape[2]
    k, k_far = (exact[name].repeat_interleave(heads // groups, 1) for name in ("k", "k_far"))
    scores = exact["q"] @ k.mT * scaling
    x = exact["q_far"] @ k_far.mT
    logs = exact["gate"][..., None] + (1 + x + x * x / 2).log()
    slots = torch.arange(length, device=out.device)
    distance = slots[:, None] - slots
    logs = torch.where((distance < window) | (slots < sinks), scores, logs).masked_fill(distance < 0, -torch.inf)
    rounded = out.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    rest = (out - rounded).bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    return rounded, rest, (logs.logsumexp(-1) / math.log(2)).float()


def check(device, *, far_dtype=None, **case):
    inputs, options = make(**case, device=device)
    grad = torch.randn(inputs["q"].shape, device=device, generator=torch.Generator(device).manual_seed(1)).bfloat16()
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    expected = torch.autograd.grad(attention_quadratic(**leaves, **options)[0], list(leaves.values()), grad.double())
    saved = forward(inputs, **options)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        dtypes = far_dtype and (far_dtype, far_dtype)
        got = cuda_backward.attention_backward_cuda(**inputs, **dict(zip(("out", "rest", "lse"), saved)), grad=grad,
                                                    dtypes=dtypes, **options)  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    errors = {}
    for name, x, right in zip(("dq", "dk", "dv", "dq_far", "dk_far", "dgate"), got, expected, strict=True):
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
    passes(check("cpu", **CASES[name]))
