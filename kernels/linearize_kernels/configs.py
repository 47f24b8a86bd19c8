"""Tile sizes and launch options of the attention kernels, by dtype and head dim."""

from typing import NamedTuple

import torch
import triton


class Tiles(NamedTuple):
    """Of a kernel that walks pairs of queries and keys; features of a sum are taken `features` at a time."""

    queries: int
    keys: int
    features: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; fewer let more programs share a multiprocessor


class SumTiles(NamedTuple):
    """Of the kernel that sums tokens into features ⊗ values."""

    features: int
    slots: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """Every kernel's tiles, and the slots of a chunk: a multiple of all of them."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles
    sums: SumTiles
    chunk: int


# (dtype, largest head dim) -> tiles. Found on an H100 (kernels/README.md); the tests run every entry.
CONFIGS = {
    (torch.float32, 128): Config(*[Tiles(32, 32, 32, 4, 1)] * 3, SumTiles(32, 32, 4, 1), 256),
    (torch.bfloat16, 64): Config(
        Tiles(64, 32, 32, 4, 3), Tiles(64, 32, 32, 4, 3, 168), Tiles(32, 64, 32, 4, 3), SumTiles(64, 128, 4, 3), 128
    ),
    (torch.bfloat16, 128): Config(
        Tiles(64, 32, 32, 4, 3, 168), Tiles(64, 32, 32, 4, 3), Tiles(32, 64, 32, 4, 3), SumTiles(64, 64, 4, 2), 128
    ),
}


def config_for(dtype, head_dim: int) -> Config:
    """The tiles for a dtype and the larger of head and value dim."""
    small = (dtype, 64) in CONFIGS and head_dim <= 64
    return CONFIGS[dtype, 64 if small else 128]


def padded(size: int) -> int:
    """The smallest size a tile can have that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype) -> str:
    """float32 products in full; the choice means nothing for bfloat16."""
    return "ieee" if dtype == torch.float32 else "tf32"
