"""Launches decode.cu: which calls it takes, how a block does its work, and its arguments.

B batch, H query heads, G kv heads, D head dim, V value dim, d map dim, F Taylor features, R ring slots, n sinks
"""

import functools
import math
from typing import NamedTuple

import torch

from . import cuda
from .decode import FOLD, TARGET_PROGRAMS, DecodeState
from .feature_maps import Taylor

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
THREADS = 256  # of a block, where nobody asks for another launch
MAX_STATIC = 48 << 10  # bytes of shared memory that a kernel may declare
THREE_EACH = 396  # blocks that all run at once as three a multiprocessor of a large GPU, with more registers than four
FEWEST_BLOCKS = 1  # below so many "auto" takes Triton
EAGER_VALUES = 8  # rows of values that a thread may hold before it knows which it needs


class Launch(NamedTuple):
    """How a block does its work, as decode.cu says; found on an H100 and an H200 (kernels/README.md)."""

    threads: int = THREADS
    blocks: int = 4  # a multiprocessor, at least: what registers of a thread are limited to
    staged: int = 8  # pieces of the sum that a thread asks for at once
    unroll: int = 3  # and then so many
    eager: bool = False


def why_not(state: DecodeState, *, heads: int) -> str:
    """Why the kernel cannot take a state of layers of `heads` query heads; empty where it can."""
    groups, head_dim, value_dim = state.keys.shape[1], state.keys.shape[-1], state.values.shape[-1]
    map_dim, size = state.ring_far.shape[-1], state.keys.element_size()
    splits, widest = state.position.shape[2], 4 * THREADS
    kinds = {state.keys.dtype, state.values.dtype, state.total.dtype, state.ring_far.dtype}
    static = _static_bytes(state, heads // groups)
    checks = {
        f"dtypes {sorted(map(str, kinds))}: float32 and bfloat16": kinds <= set(NAMES)
        and state.keys.dtype == state.values.dtype,
        f"head dim {head_dim}: whole pieces of 16 bytes, up to 128": head_dim * size % 16 == 0
        and head_dim <= 128,
        f"value dim {value_dim} in {splits} splits: a multiple of 4, up to {widest} a split": value_dim % 4 == 0
        and value_dim <= widest * splits,
        f"map dim {map_dim}: a multiple of 4, up to 32": map_dim % 4 == 0 and map_dim <= 32,
        f"{heads} query heads, {groups} kv heads: up to 16 a group": heads % groups == 0 and heads // groups <= 16,
        f"window, sinks and heads need {static} bytes of shared memory: up to {MAX_STATIC}": static <= MAX_STATIC,
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def choose_launch(state: DecodeState, *, heads: int) -> Launch:
    """Few blocks: latency counts, so everything is asked for at once. Many: several share a multiprocessor.

    heads: of the queries; a thread has 4 sums for each one of a group.
    """
    few = state.position.numel() <= TARGET_PROGRAMS
    columns, threads = _columns(state.values.shape[-1], state.position.shape[2]), THREADS
    pieces, rows = (-(-size // (threads // (columns // 4))) for size in (state.total.shape[2], state.keys.shape[2]))
    if few:
        return Launch(threads, 1, min(pieces, 16), 4, rows <= EAGER_VALUES)
    group = heads // state.keys.shape[1]
    if group <= 4 and state.position.numel() > THREE_EACH:
        return Launch(threads, 4, min(pieces, 8))
    return Launch(threads, 3 if group <= 8 else 2, min(pieces, 10), 4)


def launch_decode(q, k, v, q_far, k_far, gate, state, scaling, log_decay, out, launch=None, *, early=False):
    """As `decode.launch_decode`, with this kernel; returns the compiled kernel.

    early: it may begin before the launch before it has ended, which must not change the state, nor follow early on one
    that does.
    """
    heads, groups, splits = q.shape[1], k.shape[1], state.position.shape[2]
    q_far, k_far = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_far, k_far))
    q, k, v = (x if in_pieces(x, n) else x.clone(memory_format=torch.contiguous_format)
               for x, n in ((q, 16 // q.itemsize), (k, 16 // k.itemsize), (v, 4)))  # fmt: skip
    if not in_pieces(out, 4):
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        kernel = launch_decode(q, k, v, q_far, k_far, gate, state, scaling, log_decay, dense, launch, early=early)
        out.copy_(dense)
        return kernel
    assert q.shape[2] == 1 and q.dtype == k.dtype == v.dtype == state.keys.dtype, "one token, of the state's dtype"
    assert k.shape[-1] == state.keys.shape[-1] and v.shape[-1] == state.values.shape[-1], "as wide as the state's"
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and out.stride(-1) == 1, "out: [B, H, 1, V], dense at the end"
    decay = log_decay is not None
    assert not decay or (log_decay.dtype == torch.float32 and log_decay.is_contiguous()), "log_decay: dense, float32"
    launch = launch or choose_launch(state, heads=heads)
    defines, shared = _compile_options(
        launch, tuple(x.dtype for x in (q, state.total, state.ring_far, q_far, k_far, gate, out)),
        (heads // groups, q.shape[-1], v.shape[-1], q_far.shape[-1], state.window, state.num_sinks),
        splits, decay, early,
    )  # fmt: skip
    kernel = cuda.kernel("decode.cu", "decode_kernel", defines, shared, device=q.device.index)
    strides = [s for x in (q, k, v, q_far, k_far, gate, out) for s in x.stride()[:2]]
    kernel(
        (splits, groups, q.shape[0]), (launch.threads, 1, 1),
        q, k, v, q_far, k_far, gate, log_decay, out, state.total, state.norm, state.keys, state.values,
        state.ring_far, state.ring_kind, state.position, state.offset, *strides,
        scaling * math.log2(math.e), early=early,
    )  # fmt: skip
    return kernel


def in_pieces(x, size: int) -> bool:
    """Whether rows of x, [B, heads, 1, N], begin on whole pieces of `size` elements, read or written at once.

    The stride of a dim of length 1 means nothing.
    """
    strides = (stride for length, stride in zip(x.shape[:2], x.stride()[:2], strict=True) if length > 1)
    return x.stride(-1) == 1 and x.data_ptr() % (size * x.itemsize) == 0 and all(s % size == 0 for s in strides)


def _columns(value_dim: int, splits: int) -> int:
    """Value columns of a block: a multiple of 4; the last blocks may have fewer, or none."""
    return -(-value_dim // (4 * splits)) * 4


@functools.cache
def _compile_options(launch: Launch, dtypes, sizes, splits: int, decay: bool, early: bool) -> tuple[dict, int]:
    """(What decode.cu has to be told, its dynamic shared memory in bytes: the largest of its three uses)."""
    names = ("ELEMENT", "SUM", "RING_FAR", "Q_FAR", "K_FAR", "GATE", "OUT")
    numbers = ("HEADS", "HEAD_DIM", "VALUE_DIM", "MAP_DIM", "WINDOW", "SINKS")
    columns = _columns(sizes[2], splits)
    parts = launch.threads // (columns // 4)
    features = Taylor.num_features(sizes[3])
    defines = {
        **{name: NAMES[dtype] for name, dtype in zip(names, dtypes, strict=True)},
        **dict(zip(numbers, sizes, strict=True)), "ELEMENT_BYTES": dtypes[0].itemsize,
        **dict(FOLD=FOLD, DECAY=int(decay), SPLITS=splits, COLUMNS=columns),
        **dict(THREADS=launch.threads, BLOCKS=launch.blocks, EARLY=int(early)),
        **dict(STAGED=min(launch.staged, -(-features // parts)), UNROLL=launch.unroll, EAGER=int(launch.eager)),
    }
    staged = defines["STAGED"] * launch.threads * 4 * dtypes[1].itemsize
    added = parts * sizes[0] * columns * 4
    each = 8 if parts <= 16 else 4
    at_once = min(parts * each, -(-features // each) * each)
    folding = FOLD * (at_once + columns + sizes[3]) * 4
    return defines, max(staged, added, folding)


def _static_bytes(state: DecodeState, group: int) -> int:
    """Of decode.cu's static shared memory, at most; by its structs and constants, for blocks of THREADS."""
    rows, head_dim, size = *state.keys.shape[2:], state.keys.element_size()
    map_dim, features, value_dim = state.ring_far.shape[-1], state.total.shape[2], state.values.shape[-1]
    columns = _columns(value_dim, state.position.shape[2])
    parts = max(1, THREADS // (columns // 4))
    values = -(-rows // parts)
    rounds = -(-values * size // 16)
    padded = max(-(-values // rounds) * rounds * parts, rows + 1)  # PADDED
    sorts = -(-padded // THREADS) * THREADS
    query = 32 * -(-head_dim // 32) if size == 2 else _power(head_dim)  # DIM
    inputs = (group * query + head_dim + columns) * size + (group * (map_dim + 5) + FOLD * map_dim) * 4
    heads = _power(group)  # PAD
    return inputs + (features + padded) * heads * 4 + (features + heads) * 4 + sorts + 5 * 16  # to begin on 16 bytes


def _power(size: int) -> int:
    """The least power of two that is not below size."""
    return 1 << (size - 1).bit_length()
