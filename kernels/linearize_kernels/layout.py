"""How tensors lie in memory, for the kernels that walk them: strides, and outputs as projections want them.

B batch, T time
"""


def strides(*tensors) -> list[int]:
    """Those of the first three dimensions of [B, heads, T, ...], tensor by tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def like(x, heads: int | None = None, dtype=None, size: int | None = None):
    """An empty [B, heads, T, size] tensor, as x [B, ., T, .] where nothing is said, in memory [B, T, heads, size]:
    joining heads copies nothing."""
    batch, given, length, columns = x.shape
    return x.new_empty(batch, length, heads or given, size or columns, dtype=dtype or x.dtype).transpose(1, 2)


def aligned(x, multiple: int = 8):
    """x with rows in one piece that begin on as many bytes as asynchronous copies need: 16, or 8 for a multiple of 4
    numbers."""
    multiple = min(multiple, 8)
    whole = x.data_ptr() % (2 * multiple) == 0 and all(stride % multiple == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and whole else x.contiguous()


def alike(out, rest):
    """Both with the same strides, in whole pieces of 16 bytes."""
    out, rest = aligned(out), aligned(rest)
    return (out, rest) if out.stride() == rest.stride() else (out.contiguous(), rest.contiguous())


def row_major(x):
    """x with its last dim contiguous, as the kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()
