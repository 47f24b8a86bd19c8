"""The CUDA prefill and training forward at any window and map dim (prefill_windows.cu) against the float64 reference.

Without a GPU the same source runs in an emulator (cuda_on_cpu.h), in both orders of threads.
"""

import functools

import cuda_emulator
import pytest
import test_cuda_forward
import test_cuda_prefill
import torch
from test_cuda_prefill import make

from linearize_kernels import cuda, cuda_prefill, cuda_segments
from linearize_kernels.cuda_builds import LARGEST_BLOCK, choose_build, lag_of, longest_alike

RECIPE = {"window": 214, "map_dim": 4}
CASES = {
    **{f"length {t}": {"length": t, **RECIPE} for t in (1, 64, 213, 214, 215, 280, 450)},
    "groups": {"length": 330, "heads": 4, "groups": 2, "batch": 2, **RECIPE},
    **{f"{h} heads, one group": {"length": 330, "heads": h, **RECIPE} for h in (3, 8)},
    "logits to 60": {"length": 450, "large": 4.0, **RECIPE},
    **{f"gates by {gate}": {"length": 450, "gate": gate, **RECIPE} for gate in (200.0, -200.0, -torch.inf)},
    "views of padded rows": {"length": 300, "extra": 4, **RECIPE},
    "segments": {"length": 700, "segments": 3, "parts": 2, **RECIPE},
    "no sinks": {"length": 450, "sinks": 0, **RECIPE},
    "dim 1": {"length": 450, "window": 214, "map_dim": 1},
    **{f"window {w}, length {t}": {"length": t, "window": w, "map_dim": 4}
       for w in (2, 16, 63, 64, 65) for t in (w, w + 1, 200)},
    **{f"window {w}, length {t}, no sinks": {"length": t, "window": w, "map_dim": 4, "sinks": 0}
       for w in (2, 16, 63, 64, 65, 128, 214, 256) for t in (w - 1, w, w + 1)},
    **{f"window {w}, length {t}": {"length": t, "window": w, "map_dim": 4}
       for w in (16, 64, 128, 256) for t in (w + 4, w + 5)},  # w + 5: one pair is far
    "length 127, window 64": {"length": 127, "window": 64, "map_dim": 4},
    "dim 8": {"length": 330, "window": 128, "map_dim": 8},
    "dim 6, heads of two groups": {"length": 200, "window": 128, "map_dim": 6, "heads": 4, "groups": 2},
    "dim 16": {"length": 450, "window": 214, "map_dim": 16},
    "keys read again": {"length": 500, "window": 320, "map_dim": 4},
    "head dim 128": {"length": 450, "size": 128, "heads": 4, "groups": 2, **RECIPE},
}  # fmt: skip
TRAINED = {
    **{f"length {t}": {"length": t, **RECIPE} for t in (1, 214, 450)},
    **{f"length {t}, no sinks": {"length": t, "sinks": 0, **RECIPE} for t in (213, 214, 215)},
    "8 heads, 2 groups": {"length": 300, "heads": 8, "groups": 2, **RECIPE},
    "no far term": {"length": 450, "gate": -torch.inf, **RECIPE},
    "large gates": {"length": 450, "gate": 200.0, **RECIPE},
}
DOCUMENTS = {
    "short ones": {"length": 140, "cuts": (1, 2, 5, 64, 128), **RECIPE},
    "shared by programs": {"length": 600, "cuts": (64, 65, 299, 400), "segments": 3, **RECIPE},  # a part begins at 400
    "heads and rows": {"length": 350, "cuts": (61,), "heads": 4, "groups": 2, "batch": 2, "segments": 2, **RECIPE},
}
IN_EMULATOR = pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture
def canaries(monkeypatch):
    """Outputs are one token longer than they seem; nothing may be written there."""
    found = []

    def like(q):
        batch, heads, length, size = q.shape
        longer = q.new_full((batch, length + 1, heads, size), torch.nan)
        found.append(longer[:, length])
        return longer[:, :length].transpose(1, 2)

    monkeypatch.setattr(cuda_prefill, "like", like)
    yield
    assert found and all(x.isnan().all() for x in found)


@IN_EMULATOR
@ORDERS
@pytest.mark.parametrize("name", CASES)
def test_prefill_emulated(name, reverse, monkeypatch, canaries):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    test_cuda_prefill.check("cpu", **CASES[name])


@IN_EMULATOR
@ORDERS
@pytest.mark.parametrize("name", TRAINED)
def test_forward_emulated(name, reverse, monkeypatch, canaries):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    test_cuda_forward.check("cpu", **TRAINED[name])


@IN_EMULATOR
@ORDERS
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_emulated(name, reverse, monkeypatch, canaries):
    monkeypatch.setattr(cuda, "kernel", functools.partial(cuda_emulator.kernel, reverse=reverse))
    test_cuda_forward.check_documents("cpu", **DOCUMENTS[name])


@IN_EMULATOR
@pytest.mark.parametrize("gate", [0.0, 200.0])
def test_weights_sum_to_one(gate, monkeypatch):
    """Numerator and denominator are found in different ways; an error of one key in 100 shows in every row."""
    monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    inputs, options = make(length=450, gate=gate, **RECIPE)
    inputs["v"] = torch.ones_like(inputs["v"])
    out, _ = cuda_prefill.attention_prefill_cuda(**inputs, **options)
    torch.testing.assert_close(out.float(), torch.ones(out.shape), rtol=0, atol=4e-3)  # a step of bfloat16 below 1


def test_chunks_seen_pair_by_pair():
    """A chunk's first query must be out of the window of none of the keys that are left to the sum."""
    for window in range(2, 513):
        newest = 64 * 100 - 64 * lag_of(window) + 63  # key in the sum that chunk 100 reads
        assert 64 * 100 - newest >= window > 64 * 100 - newest - 64


def test_windows_of_one_program():
    for map_dim in (4, 16):
        for window in {*range(2, 513)} - {64}:
            longest = longest_alike(window, map_dim)
            assert longest >= window and choose_build(64, map_dim, longest, 4, 1).defines == (
                choose_build(64, map_dim, window, 4, 1).defines
            )
            assert lag_of(longest + 1) == lag_of(longest) + 1
    assert longest_alike(64, 16) == longest_alike(64, 13) == 64 and longest_alike(64, 4) == 65


def test_every_shape_has_a_build():
    for head_dim in (64, 128):
        for map_dim in (4, 8, 16):
            for window in (2, 64, 65, 214, 320, 512):
                for group in (1, 2, 3, 4):
                    build = choose_build(head_dim, map_dim, window, 4, group)
                    assert build.shared_bytes <= LARGEST_BLOCK and group % build.heads == 0 and build.blocks >= 1
    assert choose_build(64, 16, 64, 4, 1).source == "prefill.cu"
    assert choose_build(64, 4, 214, 4, 3).defines["SLOTS"] == 5 and choose_build(64, 4, 214, 4, 3).blocks == 2


def test_segments_fill_the_last_wave():
    build = choose_build(64, 4, 214, 4, 3)
    cuts = functools.partial(cuda_segments.choose_segments, build=build, device=torch.device("cpu"))  # 2 blocks at once
    assert cuts(4, 4, 32) == 1  # two full waves
    assert cuts(5, 1, 32) == 2  # 5 half waves for 3 whole ones
    assert cuts(1, 1, 512) == 2 and cuts(1, 1, 15) == 1
    assert cuts(5, 2000, 32) == 1  # summing ahead costs more


def test_refuses():
    inputs, options = make()
    for window, reason in ((1, "window 1: 2 to 512"), (2, ""), (512, ""), (513, "window 513")):
        found = cuda_prefill.why_not_text(**inputs, **{**options, "window": window})
        assert reason in found and bool(reason) == bool(found)
    inputs, options = make(map_dim=17)
    assert "map dim 17" in cuda_prefill.why_not_text(**inputs, **options)


GPU_CASES = {
    **CASES,
    "windows": {"length": 900, "window": 512, "map_dim": 4, "batch": 2, "segments": 2},
    "segments found": {"length": 4096, "batch": 2, **RECIPE},
    "many segments": {"length": 3000, "segments": 11, "parts": 3, **RECIPE},
    "9 heads on 3": {"length": 1500, "batch": 4, "heads": 9, "groups": 3, **RECIPE},
    "all heads": {"length": 1000, "batch": 2, "heads": 32, "groups": 32, **RECIPE},
    "all heads of 128": {"length": 1000, "batch": 2, "heads": 32, "groups": 8, "size": 128, **RECIPE},
    "128, keys read again": {"length": 1000, "heads": 4, "groups": 2, "size": 128, "window": 512, "map_dim": 16},
    "128, heads alone": {"length": 1000, "heads": 3, "groups": 3, "size": 128, **RECIPE},
    "16 sinks": {"length": 700, "sinks": 16, **RECIPE},
    **{f"as it could be built: {defines}": {"length": 700, "heads": 6, "groups": 1, "defines": defines, **RECIPE}
       for defines in ({"HEADS": 2}, {"HEADS": 3, "BLOCKS": 1}, {"SLOTS": 2, "BLOCKS": 3}, {"HEADS": 2, "SLOTS": 2})},
}  # fmt: skip


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", GPU_CASES)
def test_prefill_on_gpu(name):
    test_cuda_prefill.check("cuda", **GPU_CASES[name])


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", TRAINED)
def test_forward_on_gpu(name):
    test_cuda_forward.check("cuda", **TRAINED[name])


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_on_gpu(name):
    test_cuda_forward.check_documents("cuda", **DOCUMENTS[name])
