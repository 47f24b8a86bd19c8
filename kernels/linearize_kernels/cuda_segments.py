"""How a text is cut to fill a GPU: into segments, each after a sum over what precedes it, and the spans of that sum.

Times are in steps of a block over a chunk; what they cost each other is by count, not measured.
"""

import functools

import torch

from .cuda_builds import Build

SHORTEST = 8  # chunks of a segment
MOST_SEGMENTS, MOST_PARTS = 64, 16  # tried
START = 2  # steps that a segment takes before its first chunk
SUM_TIME = 1 / 2000  # a chunk summed ahead, of all that a GPU does in a step
READ_TIME = 1  # reading a span's sum, in steps of the pass ahead
PARTS = 2  # spans of a segment, where that pass' blocks were not counted


def choose_segments(programs: int, key_heads: int, chunks: int, build: Build, device) -> int:
    """Into how many segments each of `programs` texts and heads goes, so that the last blocks to start do not leave the
    GPU empty for long. key_heads: rows times kv heads."""
    return _segments(programs, key_heads, chunks, _processors(device) * build.blocks)


@functools.cache  # every layer asks the same
def _segments(programs: int, key_heads: int, chunks: int, places: int) -> int:
    most = min(max(1, chunks // SHORTEST), MOST_SEGMENTS)

    def steps(segments: int) -> float:
        ahead = key_heads * SUM_TIME * chunks * (1 - 1 / segments)
        return -(-programs * segments // places) * (chunks / segments + START) + ahead

    return min(range(1, most + 1), key=steps)


def choose_parts(key_heads: int, segments: int, chunks: int, build: Build, device) -> int:
    """In how many spans a segment is summed: more fill the GPU in the pass ahead, and each has to be read later."""
    if segments == 1 or not build.sum_blocks:
        return PARTS
    return _parts(key_heads, segments, chunks, _processors(device) * build.sum_blocks)


@functools.cache
def _parts(key_heads: int, segments: int, chunks: int, places: int) -> int:
    def steps(parts: int) -> float:
        spans = (segments - 1) * parts
        return -(-key_heads * spans // places) * -(-chunks // (segments * parts)) + READ_TIME * spans

    return min(range(1, MOST_PARTS + 1), key=steps)


def _processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
