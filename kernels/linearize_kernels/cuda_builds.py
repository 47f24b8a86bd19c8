"""Which of the two sources of the CUDA prefill a call takes, and how it is compiled: sizes are as in the sources.

D head dim, d map dim (padded to 4, 8 or 16)
"""

import functools
from dataclasses import dataclass

from . import cuda

CHUNK, HEAD_DIMS, MAP_DIMS, WINDOWS = 64, (64, 128), (4, 8, 16), range(2, 513)
PROCESSOR_BYTES, LARGEST_BLOCK = 233472, 232448  # shared memory of a Hopper multiprocessor, and of a block of one
ENOUGH_WARPS = 8  # on a multiprocessor
ONE_WINDOW_BYTES = {64: 110336, 128: 221952}  # of prefill.cu, by D
# of its kernel that sums ahead of segments: bytes of a stage and beside them; as in prefill_tiles.cuh
STAGE_BYTES, MORE_SUMS_BYTES = {64: 11264, 128: 19456}, 10688
SUM_STAGES, SUM_BLOCKS, SUM_SPLIT = 4, {64: 3, 128: 1}, {64: 1, 128: 2}
ONE_WINDOW_CHOICES = {"SUM_STAGES", "SUM_BLOCKS", "SUM_SPLIT"}


@dataclass(frozen=True)
class Build:
    """One way to compile. heads: of a block; blocks: of a multiprocessor; sum_floats: of a span in memory.

    sum_threads, sum_blocks: likewise of the kernel that sums spans; 0 blocks: not counted.
    """

    source: str
    names: tuple[str, str]
    defines: dict
    shared_bytes: int
    sums_bytes: int
    sum_floats: int
    threads: int
    sum_threads: int
    sum_blocks: int
    heads: int = 1
    blocks: int = 1
    more_arguments: tuple = ()

    def kernel(self, **more):
        defines = {name: value for name, value in self.defines.items() if not name.startswith("SUM_")}
        return cuda.kernel(self.source, self.names[0], {**defines, **more}, self.shared_bytes)

    def sums_kernel(self):
        about_queries = ("SINKS", "HEADS", "BLOCKS", "SLOTS", "PREFILL_SHARED")  # nothing to it
        defines = {name: value for name, value in self.defines.items() if name not in about_queries}
        return cuda.kernel(self.source, self.names[1], defines, self.sums_bytes)


def padded_map_dim(map_dim: int) -> int:
    return next(size for size in MAP_DIMS if size >= map_dim)


def lag_of(window: int) -> int:
    """How many chunks of keys a chunk of queries sees pair by pair."""
    return -(-(window + CHUNK - 1) // CHUNK)


def longest_alike(window: int, map_dim: int) -> int:
    """The longest window that runs by the same program: what a self-test at that window says of this one too."""
    one = (window, padded_map_dim(map_dim)) == (CHUNK, 16)
    return window if one else CHUNK * lag_of(window) - CHUNK + 1


@functools.cache
def choose_build(head_dim: int, map_dim: int, window: int, sinks: int, group: int, **forced) -> Build:
    """The build for a shape; group: query heads of a kv head. None is refused in favour of Triton: where that may be
    faster (map dim 16 at another window than 64, above all at head dim 128, where registers spill) is not measured.

    forced, for measurements: ONE_WINDOW_CHOICES of prefill.cu; HEADS, SLOTS, BLOCKS of prefill_windows.cu, or
    ANY_WINDOW=1 for that in place of prefill.cu.
    """
    places = -(-sinks // 8) * 8
    if (window, map_dim) == (CHUNK, 16) and forced.keys() <= ONE_WINDOW_CHOICES:
        return _one_window(head_dim, places, forced)
    lag = lag_of(window)
    shape = {"MAP_DIM": map_dim, "HEAD_DIM": head_dim, "SINKS": places, "LAG": lag}
    ways = [(heads, slots) for slots in (lag, 2) for heads in (1, 2) if group % heads == 0]
    ways = [(heads, slots) for heads, slots in ways if _bytes(heads, slots, **shape) <= LARGEST_BLOCK]
    heads, slots = max(ways, key=lambda way: min(_warps(*way, **shape), ENOUGH_WARPS))  # the first of equal ones
    heads, slots = forced.get("HEADS", heads), forced.get("SLOTS", slots)
    blocks = forced.get("BLOCKS", max(1, _warps(heads, slots, **shape) // (4 * heads)))
    features, shared = map_dim * (map_dim // 2 + 2), _bytes(heads, slots, **shape)
    far_row, feature_row = _rows(map_dim)
    spans = 2 * CHUNK * head_dim * 2 + 2 * CHUNK * far_row + CHUNK * feature_row
    return Build(
        "prefill_windows.cu", ("window_kernel", "window_sums_kernel"),
        {**shape, "SLOTS": slots, "HEADS": heads, "BLOCKS": blocks, "PREFILL_SHARED": shared, "SPAN_SHARED": spans},
        shared, spans, features * head_dim + (4 if map_dim == 16 else 1) * 128,
        threads=128 * heads, sum_threads=2 * head_dim, sum_blocks=0, heads=heads, blocks=blocks,
        more_arguments=(window,),
    )  # fmt: skip


def _one_window(head_dim: int, places: int, forced: dict) -> Build:
    """prefill.cu's build; places: for sinks."""
    chosen = {"SUM_STAGES": SUM_STAGES, "SUM_BLOCKS": SUM_BLOCKS[head_dim], "SUM_SPLIT": SUM_SPLIT[head_dim]} | forced
    return Build(
        "prefill.cu", ("prefill_kernel", "prefill_sums_kernel"),
        {"HEAD_DIM": head_dim, "SINKS": places, **chosen}, ONE_WINDOW_BYTES[head_dim],
        STAGE_BYTES[head_dim] * chosen["SUM_STAGES"] + MORE_SUMS_BYTES, 160 * head_dim + 272, threads=4 * head_dim,
        sum_threads=2 * head_dim * chosen["SUM_SPLIT"], sum_blocks=chosen["SUM_BLOCKS"], blocks=128 // head_dim,
    )  # fmt: skip


def _rows(map_dim: int) -> tuple[int, int]:
    """Bytes of a row of mapped vectors, and of features."""
    return 48 if map_dim == 16 else 2 * map_dim, 2 * map_dim * (map_dim // 2 + 2) + 16


def _bytes(heads: int, slots: int, *, HEAD_DIM, MAP_DIM, SINKS, LAG) -> int:
    """Shared memory of a block, as windows_tiles.cuh lays it out."""
    far_row, feature_row = _rows(MAP_DIM)
    tile, sinks = CHUNK * HEAD_DIM * 2, 2 * 16 * HEAD_DIM * 2 if SINKS else 0
    features = MAP_DIM * (MAP_DIM // 2 + 2)
    return (
        (2 * slots + heads) * tile + sinks + features * HEAD_DIM * 2 + CHUNK * feature_row
        + (MAP_DIM + 1) * MAP_DIM * 4 + (LAG + heads) * CHUNK * far_row
    )  # fmt: skip


def _warps(heads: int, slots: int, **sizes) -> int:
    """Warps of a multiprocessor, by shared memory and by registers (255 of a thread)."""
    blocks = PROCESSOR_BYTES // (_bytes(heads, slots, **sizes) + 1024)
    return 4 * heads * min(blocks, 2 // heads)
