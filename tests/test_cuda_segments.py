"""How the CUDA prefill cuts texts on a GPU of 132 multiprocessors; what its benchmark tries."""

import pytest
import torch

from linearize_kernels import cuda_segments
from linearize_kernels.cuda_builds import choose_build
from linearize_kernels.cuda_segments import choose_parts, choose_segments


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_segments, "_processors", lambda device: 132)


def cut(rows, length, heads=32, groups=32, size=64):
    """(segments, parts) of rows of `length` tokens."""
    build, chunks, device = choose_build(size, 16, 64, 4, heads // groups), -(-length // 64), torch.device("cpu")
    segments = choose_segments(rows * heads, rows * groups, chunks, build, device)
    return segments, choose_parts(rows * groups, segments, chunks, build, device)


def test_texts_are_cut_only_where_a_gpu_is_not_full():
    assert [cut(65536 // t, t)[0] for t in (1024, 2048, 4096, 8192, 16384, 32768, 65536)] == [1, 1, 1, 1, 2, 4, 8]
    assert cut(1, 131072)[0] == 8
    assert cut(3, 8192)[0] == 8  # 96 texts and heads: 768 blocks in three waves, where two each would leave a quarter
    assert cut(1, 200) == (1, cuda_segments.PARTS)


def test_the_pass_ahead_fills_a_gpu_too():
    assert cut(2, 32768) == (4, 2)  # 384 blocks of 396 at once
    assert cut(4, 16384) == (2, 3)
    assert cut(1, 8192) == (8, 1)  # more parts are shorter, but each has to be read
    assert cut(2, 32768, groups=8, size=128) == (2, 8)  # 128 of 132, where two parts were 32 blocks
    build = choose_build(64, 4, 214, 4, 1)  # its blocks are not counted
    assert choose_parts(64, 4, 512, build, torch.device("cpu")) == cuda_segments.PARTS
