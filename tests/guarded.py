"""Tensors whose last byte is the last that may be touched: the emulator says who reads or writes behind them."""

import ctypes
import mmap

import torch

PROT_NONE = 0  # of mprotect: neither read nor write


def empty(size: int, dtype) -> torch.Tensor:
    """[size] on the CPU, not set."""
    num_bytes = size * dtype.itemsize
    end = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    home = mmap.mmap(-1, end + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(home))
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mprotect(ctypes.c_void_p(address + end), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE)
    assert not failed, f"mprotect: error {ctypes.get_errno()}"
    return torch.frombuffer(home, dtype=dtype, count=size, offset=end - num_bytes)


def copy(x: torch.Tensor) -> torch.Tensor:
    """x with the same strides."""
    flat = x.as_strided([x.untyped_storage().nbytes() // x.itemsize], [1], 0)
    return empty(flat.numel(), x.dtype).copy_(flat).as_strided(x.shape, x.stride(), x.storage_offset())
