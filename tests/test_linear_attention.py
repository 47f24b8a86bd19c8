"""What a converted layer learns: the maps' gradients."""

import pytest
import torch

from linearize.linear_attention import _map_heads, _product


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_gradients_of_a_map_are_those_of_the_product(length, dtype):
    """Whether the tokens divide into pieces or not; heads lie inside tokens, as projections leave them."""
    torch.manual_seed(length)
    x = torch.randn(2, length, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    weight = torch.randn(3, 8, 5, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    out, expected = _map_heads(x, weight), _product(x, weight)
    assert type(out.grad_fn).__name__.startswith("_TrainedMap")
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), slope) for y in (out, expected)), strict=True)
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype and wanted.norm() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
