"""Taylor features as products of picked entries: the matrices that pick them, for the kernels.

d map dim, F Taylor features, FP: d padded, FN: F padded

A feature is a product of two entries of a vector, one of which may be 1. One-hot matrices pick entries on the tensor
cores, exactly. A square counts half (T(x) = 1 + x + x²/2): the side that is summed carries the half, the other none,
so that both are exact in bfloat16. `Taylor.expand` gives each side sqrt(1/2); `weights` leads from one to the other.
"""

import functools
from typing import NamedTuple

import torch

from .configs import padded
from .decode import feature_pairs


class Picks(NamedTuple):
    """Of each: left entry, right entry, right entry with the half."""

    columns: torch.Tensor  # [3, FP, FN] one-hot, in the dtype of the vectors
    rows: torch.Tensor  # [3, FN, FP] the same, transposed
    ones: torch.Tensor  # [2, FN] float32, 1 where the entry (left, right) is the constant 1
    weights: torch.Tensor  # [F] float32, sqrt(1/2) for squares, else 1
    num_features: int

    def arguments(self) -> tuple:
        return self.columns, self.rows, self.ones


@functools.cache
def make_picks(map_dim: int, dtype, device) -> Picks:
    """The matrices for vectors of `map_dim` entries."""
    pairs = feature_pairs(map_dim, device).long()  # [2, F], map_dim stands for 1
    num_features = pairs.shape[1]
    square = (pairs[0] == pairs[1]) & (pairs[0] < map_dim)
    entries = torch.arange(padded(map_dim), device=device)
    one_hot = ((pairs[:, None] == entries[:, None]) & (pairs[:, None] < map_dim)).float()  # [2, FP, F]
    one_hot = torch.cat([one_hot, one_hot[1:] * torch.where(square, 0.5, 1.0)])
    fill = [0, -num_features % 64]
    columns = torch.nn.functional.pad(one_hot, fill).to(dtype).contiguous()
    ones = torch.nn.functional.pad((pairs == map_dim).float(), fill).contiguous()
    weights = torch.where(square, 0.5**0.5, 1.0).float()
    return Picks(columns, columns.transpose(1, 2).contiguous(), ones, weights, num_features)
