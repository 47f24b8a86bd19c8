"""The Triton program of `map_heads`: one token a row, each head through a small matrix of its own.

B batch, M heads, D head dim, E columns of a map

A program takes BB rows of one head. What it multiplies is of few bytes, so that one launch counts more than how the
product is made: by tensor cores in three TF32 products, which keeps float32.
"""

import triton
import triton.language as tl


@triton.jit
def map_kernel(
    x, weight, bias, out, x_b, x_h, batch,
    D: tl.constexpr, E: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """x [B, M, D] by strides, weight [M, D, E], bias [M, E], out [B, M, E] dense; float32 but for x."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    row, column = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, EP)
    is_row, is_column = (row < batch)[:, None], (column < E)[None, :]
    acc = tl.zeros([BB, EP], tl.float32) + tl.load(bias + head * E + column[None, :], mask=is_column, other=0.0)
    for start in tl.static_range(0, D, BD):
        i = start + tl.arange(0, BD)
        mine = tl.load(x + row[:, None] * x_b + head * x_h + i[None, :], mask=is_row & (i < D)[None, :], other=0.0)
        at = (head * D + i[:, None]) * E + column[None, :]
        w = tl.load(weight + at, mask=(i < D)[:, None] & is_column, other=0.0)
        acc += tl.dot(mine.to(tl.float32), w, input_precision="tf32x3")
    tl.store(out + (row[:, None] * heads + head) * E + column[None, :], acc, mask=is_row & is_column)
