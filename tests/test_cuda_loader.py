"""The CUDA loader, and that the emulator which stands in for a GPU sees the faults it shall see."""

import sys
import types

import cuda_emulator
import pytest
import torch

from linearize_kernels import cuda

SOURCE = """
#include "primitives.cuh"

// y = the sum of each block's 64 x, times s, in bfloat16; written by every thread.
extern "C" __global__ void sums(const float* x, bf16* y, int n, float s, const float* unused) {
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    __shared__ float part[2];
    const int i = blockIdx.x * 64 + threadIdx.x;
    shared[threadIdx.x] = i < n ? x[i] * s : 0.f;
    BARRIER
    float sum = shared[63 - threadIdx.x];
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (unused == nullptr) y[i] = from_float<bf16>(part[0] + part[1]);
}
"""
GOOD = {"BARRIER": "__syncthreads();"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sums.cu").write_text(SOURCE)
    (tmp_path / "primitives.cuh").write_text((cuda.HERE / "primitives.cuh").read_text())
    monkeypatch.setattr(cuda, "HERE", tmp_path)


def run(make, defines, shared_bytes=256, device="cpu", **options):
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.full((128,), torch.nan, dtype=torch.bfloat16, device=device)
    make("sums.cu", "sums", defines, shared_bytes, **options)((2, 1, 1), (64, 1, 1), x, y, 100, 2.0, None)
    expected = torch.stack([2 * x[:64].sum(), 2 * x[64:100].sum()]).repeat_interleave(64)
    return y.float(), expected.bfloat16().float()


needs_compiler = pytest.mark.skipif(bool(cuda_emulator.WHY_NOT), reason=cuda_emulator.WHY_NOT)


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
def test_the_emulator_runs_a_kernel(folder, reverse):
    got, expected = run(cuda_emulator.kernel, GOOD, reverse=reverse)
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0)


@needs_compiler
def test_the_emulator_sees_a_missing_barrier(folder):
    got, _ = run(cuda_emulator.kernel, {"BARRIER": ""})
    assert got.isnan().all()


@needs_compiler
def test_the_emulator_sees_threads_that_part_at_a_barrier(folder):
    with pytest.raises(RuntimeError, match=r"thread \d+ waits at .*, others at"):
        run(cuda_emulator.kernel, {"BARRIER": "if (threadIdx.x < 32) __syncthreads();"})
    with pytest.raises(RuntimeError, match="63 of 64 threads wait at"):
        run(cuda_emulator.kernel, {"BARRIER": "if (threadIdx.x == 40) return; __syncthreads();"})


@needs_compiler
def test_the_emulator_sees_a_write_past_shared_memory(folder):
    with pytest.raises(RuntimeError, match="past 252 bytes"):
        run(cuda_emulator.kernel, GOOD, 252)


def test_arguments_are_packed_by_type():
    x = torch.zeros(3)
    values, pointers = cuda.pack([x, None, 7, True, 0.5])
    assert [type(v).__name__ for v in values] == ["c_void_p", "c_void_p", "c_int", "c_int", "c_float"]
    assert [v.value for v in values] == [x.data_ptr(), None, 7, 1, 0.5] and len(pointers) == 5
    for wrong in (2**31, "text", 1j):
        with pytest.raises(AssertionError):
            cuda.pack([wrong])


def test_no_gpu_is_a_reason():
    assert "NVIDIA GPU" in cuda.why_not("cpu")


@pytest.mark.parametrize("known", [([80, 90, 100],), (3, [80, 90, 100])], ids=["a list", "a count and a list"])
@pytest.mark.parametrize(("capability", "reason"), [((10, 0), ""), ((12, 0), "up to sm_100, and the GPU is sm_120")])
def test_a_gpu_newer_than_nvrtc_is_a_reason(known, capability, reason, monkeypatch):
    """cuda.bindings tell the architectures with their count (13.0) or without it (13.3)."""
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = types.SimpleNamespace()
    bindings.nvrtc = types.SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, *known))
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = cuda.why_not.__wrapped__("cuda")
    assert found.endswith(reason) and bool(found) == bool(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvrtc_compiles_and_runs_a_kernel(folder):
    assert cuda.why_not("cuda") == ""
    got, expected = run(cuda.kernel, GOOD, device="cuda")
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0)
    kernel = cuda.kernel("sums.cu", "sums", GOOD, 256)
    assert kernel.registers > 0 and kernel.spills == 0
    with pytest.raises(cuda.CudaError, match="does not compile"):
        cuda.kernel("sums.cu", "sums", {"BARRIER": "?"}, 256)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(cuda.CudaError, match="not compiled yet"), torch.cuda.graph(graph):
        cuda.kernel("sums.cu", "sums", {**GOOD, "ANOTHER": 1}, 256)
