"""What a decode step maps, queries and keys of one token a row, in one launch and one operator of torch."""

import torch
import triton

from . import map_kernels as kernels


@torch.library.custom_op("linearize::map_heads", mutates_args=())
def map_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x weight + bias a head: x [B, M, 1, D], weight [M, D, E], bias [M, 1, E] -> [B, M, 1, E] float32, dense.

    x is float32 or bfloat16, weight and bias dense float32; they are multiplied in float32. Not differentiable.
    """
    (batch, heads, length, head_dim), columns = x.shape, weight.shape[2]
    assert length == 1 and weight.shape == (heads, head_dim, columns) and bias.shape == (heads, 1, columns)
    assert weight.dtype == bias.dtype == torch.float32 and weight.is_contiguous() and bias.is_contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(batch, heads, 1, columns, dtype=torch.float32, device=x.device)
    rows = 16 if batch <= 16 else 32
    with torch.cuda.device_of(x):
        kernels.map_kernel[(heads, triton.cdiv(batch, rows))](
            x, weight, bias, out, *x.stride()[:2], batch,
            D=head_dim, E=columns, BB=rows, BD=min(128, _pad(head_dim)), EP=_pad(columns),
        )  # fmt: skip
    return out


@map_heads.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], *bias.shape, dtype=torch.float32)


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
