"""What a decode step maps, queries and keys of one token a row, in one launch."""

import torch
import triton

from . import cuda
from . import map_kernels as kernels
from .cuda_decode import NAMES, in_pieces

ROWS, WARPS = 4, 4  # of maps.cu: rows of a warp, warps of a block


def map_heads(x, weight, bias, *, in_cuda: bool = False):
    """x weight + bias a head: x [B, M, 1, D], weight [M, D, E], bias [M, 1, E] -> [B, M, 1, E] float32, dense.

    x is float32 or bfloat16, weight and bias dense float32; they are multiplied in float32. Not differentiable.
    in_cuda: by maps.cu, which takes D in whole pieces of 4, up to 128, and reads weight before the launch just before
    it has ended; else by Triton.
    """
    (batch, heads, length, head_dim), columns = x.shape, weight.shape[2]
    assert length == 1 and weight.shape == (heads, head_dim, columns) and bias.shape == (heads, 1, columns)
    assert weight.dtype == bias.dtype == torch.float32 and weight.is_contiguous() and bias.is_contiguous()
    out = torch.empty(batch, heads, 1, columns, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        (_in_cuda if in_cuda else _in_triton)(x, weight, bias, out)
    return out


def _in_cuda(x, weight, bias, out) -> None:
    (batch, heads, _, head_dim), columns = x.shape, out.shape[3]
    assert head_dim % 4 == 0 and head_dim <= 128, "a lane takes 4 of at most 128 entries"
    x = x if in_pieces(x, 4) else x.clone(memory_format=torch.contiguous_format)
    defines = dict(ELEMENT=NAMES[x.dtype], HEAD_DIM=head_dim, COLUMNS=columns, WARPS=WARPS)
    kernel = cuda.kernel("maps.cu", "map_kernel", defines, device=x.device.index)
    grid = heads, triton.cdiv(batch, ROWS * WARPS), 1
    kernel(grid, (32 * WARPS, 1, 1), x, weight, bias, out, *x.stride()[:2], batch, early=True)


def _in_triton(x, weight, bias, out) -> None:
    (batch, heads, _, head_dim), columns = x.shape, out.shape[3]
    x = x if x.stride(3) == 1 else x.contiguous()
    rows = 16 if batch <= 16 else 32
    kernels.map_kernel[(heads, triton.cdiv(batch, rows))](
        x, weight, bias, out, *x.stride()[:2], batch,
        D=head_dim, E=columns, BB=rows, BD=min(128, _pad(head_dim)), EP=_pad(columns),
    )  # fmt: skip


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
