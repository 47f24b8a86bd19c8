"""Maps of a decode step in one launch against float64; without a GPU in Triton's interpreter, in float32, and in the
emulator."""

import cuda_emulator
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import cuda, self_test  # noqa: E402
from linearize_kernels.map_heads import map_heads  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 16, 35])
@pytest.mark.parametrize("sizes", [(6, 16, 5), (4, 24, 17), (2, 160, 33)], ids=str)
def test_each_head_goes_through_its_own_map(sizes, batch, dtype):
    heads, head_dim, columns = sizes
    g = torch.Generator().manual_seed(0)
    # as projections leave them, beside what belongs to values
    x = torch.randn(batch, 1, heads + 3, head_dim, generator=g).to(DEVICE, dtype).transpose(1, 2)[:, :heads]
    weight, bias = (torch.randn(heads, n, columns, generator=g).to(DEVICE) for n in (head_dim, 1))
    out = map_heads(x, weight, bias)
    expected = torch.einsum("bhtd,hde->bhte", x.double(), weight.double()) + bias.double()
    assert out.shape == expected.shape and out.dtype == torch.float32 and out.is_contiguous()
    assert (out - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture
def cuda_here(monkeypatch):
    reason = cuda.why_not("cuda") if ON_GPU else cuda_emulator.WHY_NOT
    if reason:
        pytest.skip(reason)
    if not ON_GPU:
        monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 35])
@pytest.mark.parametrize("sizes", [(6, 16, 5), (4, 24, 17), (2, 128, 33), (3, 64, 8)], ids=str)
def test_in_cuda(sizes, batch, dtype, cuda_here):
    heads, head_dim, columns = sizes
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, heads + 3, head_dim, generator=g).to(DEVICE, dtype).transpose(1, 2)[:, :heads]
    weight, bias = (torch.randn(heads, n, columns, generator=g).to(DEVICE) for n in (head_dim, 1))
    out = map_heads(x, weight, bias, in_cuda=True)
    expected = torch.einsum("bhtd,hde->bhte", x.double(), weight.double()) + bias.double()
    assert out.shape == expected.shape and out.dtype == torch.float32 and out.is_contiguous()
    assert (out - expected).norm() < 1e-6 * expected.norm()
    shifted = torch.zeros(x.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(x.shape).copy_(x)  # not on 8 bytes
    assert torch.equal(map_heads(shifted, weight, bias, in_cuda=True), out)


def test_a_gate_of_minus_infinity_stays_one():
    x, weight, bias = torch.ones(2, 2, 1, 16), torch.ones(2, 16, 3), torch.zeros(2, 1, 3)
    bias[0, 0, -1] = -torch.inf
    out = map_heads(*(t.to(DEVICE) for t in (x, weight, bias)))
    assert out[:, 0, 0].tolist() == [[16, 16, -torch.inf]] * 2 and out[:, 1, 0].tolist() == [[16, 16, 16]] * 2


def test_the_self_test_sees_a_wrong_product(monkeypatch):
    sizes, maps_agree = dict(heads=3, head_dim=16, columns=5), self_test.maps_agree.__wrapped__
    assert maps_agree(torch.device(DEVICE), torch.float32, **sizes)
    wrong = lambda x, *maps: map_heads(x, *maps) * 1.001  # noqa: E731
    monkeypatch.setattr("linearize_kernels.map_heads.map_heads", wrong)
    assert not maps_agree(torch.device(DEVICE), torch.float32, **sizes)
