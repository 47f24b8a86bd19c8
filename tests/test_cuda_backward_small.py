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

TEXTS = {"pieces": (1, 90, 1, 1, 40, 67), "long": (150, 50), "one": (200,), "edges": (64, 63, 65, 8)}


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
    for window in (16, 63, 64, 65, 128, 214):
        yield f"window {window}", dict(length=300, change=small(window))
    for window, lengths in ((64, (1, 63, 64, 65, 128, 129)), (20, (19, 20, 21, 84)), (130, (129, 130, 131, 256, 257))):
        for length in lengths:
            yield f"window {window}, length {length}", dict(length=length, change=small(window))
    for map_dim in (1, 2, 3):
        yield f"map dim {map_dim}", dict(length=150, change=small(30, map_dim))
    for sinks in (0, 1, 9, 16):
        yield f"{sinks} sinks", dict(length=200, sinks=sinks, change=small(40))
    yield "16 sinks, window 16", dict(length=150, sinks=16, change=small(16))
    yield "groups of 3", dict(length=200, heads=6, groups=2, change=small(50))
    yield "two rows", dict(length=130, heads=2, groups=1, batch=2, change=small(33))
    # See test_cuda_backward.py: over few heads the gate's gradient is ill-posed.
    yield "logits to 60", dict(length=200, large=4.0, heads=16, groups=16, change=small(64))
    yield "large gates", dict(length=260, gate=10.0, change=small(70))
    yield "no far term", dict(length=200, gate=-torch.inf, change=small(70))
    yield "views of padded rows", dict(length=140, extra=8, change=small(50))
    yield "float32 maps", dict(length=200, far_dtype=torch.float32, change=small(50))
    for name, texts in TEXTS.items():
        for window in (16, 64, 90):
            case = dict(length=200, batch=2, heads=3, groups=1, change=small(window, texts=texts))
            yield f"texts, {name}, window {window}", case
    yield "texts without sinks", dict(length=200, batch=2, sinks=0, change=small(20, texts=TEXTS["pieces"]))
    yield "texts with 16 sinks", dict(length=200, batch=2, sinks=16, change=small(20, texts=TEXTS["long"]))
    frozen = dict(length=200, heads=3, groups=1, batch=2, frozen=True)
    for window in (16, 64, 150):
        yield f"frozen, window {window}", dict(frozen, change=small(window))
        yield f"frozen, texts, window {window}", dict(frozen, change=small(window, texts=TEXTS["long"]))


CASES = dict(cases())


@pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, monkeypatch):
    reverse = list(CASES).index(name) % 2 == 1
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    passes(check("cpu", monkeypatch, **CASES[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, monkeypatch):
    assert cuda_backward.why_not_device(torch.device("cuda")) == ""
    passes(check("cuda", monkeypatch, **CASES[name]))
