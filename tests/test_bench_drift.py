"""The drift of sums in bfloat16: the model of the benchmark is the decode kernels' own fold."""

from itertools import pairwise

import cuda_emulator
import pytest
import torch
from decode_inputs import DEVICE, make, part, prefilled

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import bench_drift, cuda  # noqa: E402
from linearize_kernels.decode import FOLD, decode  # noqa: E402

ON_GPU = torch.cuda.is_available()
WHY_NOT = cuda.why_not("cuda") if ON_GPU else cuda_emulator.WHY_NOT


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_sum_is_the_kernels(dtype, monkeypatch):
    from linearize_kernels import cuda_decode

    if not ON_GPU:
        monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
    window, folds = 2, 5
    shape = dict(prompt=0, tokens=folds * FOLD + window - 1, batch=1, map_dim=4, window=window, sinks=0)
    inputs, options, valid = make(**shape, dtype=torch.bfloat16)
    inputs["v"] += 1
    state = prefilled(inputs, options, valid, 0, dtype=dtype, splits=1)
    launch = cuda_decode.choose_launch(state, heads=2)
    for t in range(shape["tokens"]):
        decode(**part(inputs, t, t + 1), state=state, scaling=options["scaling"], launch=launch)
    total = torch.zeros_like(state.total[0])
    edges = [0, *(i * FOLD - (window - 1) for i in range(1, folds + 1))]  # first come the empty slots of a short past
    for start, end in pairwise(edges):
        features = bench_drift.key_features(inputs["k_far"][0, :, start:end])
        total = bench_drift.fold(total, features, inputs["v"][0, :, start:end])
    same = (state.total[0] == total).float().mean()
    assert total.dtype == state.total.dtype == dtype and (dtype == torch.float32 or same > 0.98), f"{same:.3f} alike"
    step = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(state.total[0].float(), total.float(), rtol=step, atol=1e-5)
    assert total.device.type == DEVICE


def test_what_a_fold_adds_to_a_long_sum_is_lost_in_bfloat16():
    """The figures of kernels/README.md: 512 folds of one size, and rounding stops the sum; a decay keeps it short."""
    lengths = [1024, 32768]
    for dtype, log_decay, least, most in (
        (torch.float32, 0.0, (0, 0), (1e-6, 1e-6)),
        (torch.bfloat16, 0.0, (1e-3, 0.2), (1e-2, 0.6)),
        (torch.bfloat16, -1e-3, (1e-3, 1e-3), (1e-2, 1e-2)),
    ):
        errors = bench_drift.drift(dtype, map_dim=4, mean=1.0, log_decay=log_decay, lengths=lengths)
        assert all(a <= error <= b for a, error, b in zip(least, errors, most, strict=True)), (dtype, errors)


def test_features_give_the_series():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in "qk")
    x = q @ k.T
    torch.testing.assert_close(bench_drift.query_features(q) @ bench_drift.key_features(k).T, 1 + x + x * x / 2)


def test_the_table(capsys):
    bench_drift.main(["--map-dims", "4", "--means", "0", "--decays", "0", "--lengths", "64", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[-2:] == ["64", "128"] and "bfloat16" in lines[1]
