"""Who sees whom, for the kernels: what they need to know of padding, segments and sinks.

B batch, L slots, n sinks
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .state import State


class Plan(NamedTuple):
    """One-element dummies in a plain batch, where slots say it all.

    Slots of one segment number; a slot's code is 2 · segment + is_sink, or -1 for padding.
    """

    plain: bool
    segments: torch.Tensor  # [B, L] int32
    codes: torch.Tensor  # [B, L] int32
    has_far: torch.Tensor  # [B, L] int32, whether the query at this slot has any far key
    first: torch.Tensor  # [B, L] int32, first slot of this slot's segment
    last: torch.Tensor  # [B, L] int32, last one
    sink_list: torch.Tensor  # [B, L] int32, slots of sinks in order, then the others
    sinks_before: torch.Tensor  # [B, L + 1] int32, sinks in the slots before


def plain_plan(device) -> Plan:
    """No padding, one text a row."""
    return Plan(True, *[torch.zeros(1, dtype=torch.int32, device=device)] * 7)


def segments_of(cu_seqlens, length: int) -> torch.Tensor:
    """[1, length] int64, what `attention` takes as `segments`, of texts one after the other in a single row.

    cu_seqlens [N + 1] int, as of flash attention: where each text begins, from 0, and the last one ends. A text may be
    empty; what follows the last is a text of its own. Does not wait for the device.
    """
    places = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)[None]


_newest: tuple = (None, None, None)  # what the newest plan was made from and for, and the plan


def plan_rows(length: int, valid, segments, *, window: int, sinks: int) -> Plan:
    """Rows with padding (valid [B, L] bool or None) and packed texts (segments [B, L] or None), without a past.

    All layers of a model ask for the same plan one after the other, so the newest one is kept.
    """
    global _newest
    given = [x for x in (valid, segments) if x is not None]
    # Tensors of inference mode do not tell whether they were changed, and a plan made there serves no backward.
    if torch.is_inference_mode_enabled() or any(x.is_inference() for x in given):
        return _plan_rows(length, valid, segments, window=window, sinks=sinks)
    key = length, window, sinks, *((id(x), None if x is None else x._version) for x in (valid, segments))
    if _newest[0] != key:
        _newest = key, (valid, segments), _plan_rows(length, valid, segments, window=window, sinks=sinks)
    return _newest[2]


def _plan_rows(length, valid, segments, *, window, sinks) -> Plan:
    given = segments if valid is None else valid
    batch, device = given.shape[0], given.device
    slots = torch.arange(length, device=device).expand(batch, length)
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts = slots == 0
    if segments is not None:
        starts = starts | pad(segments[:, 1:] != segments[:, :-1], [1, 0])
    ends = pad(starts[:, 1:], [0, 1], value=True)
    first = torch.where(starts, slots, 0).cummax(1).values
    last = torch.where(ends, slots, length).flip(1).cummin(1).values.flip(1)
    number = starts.long().cumsum(1) - 1
    count = pad(valid.long().cumsum(1), [1, 0])  # [B, L + 1] valid slots before
    rank = count[:, :-1] - count.gather(1, first)
    is_sink = valid & (rank < sinks)
    eligible = pad((valid & ~is_sink).long().cumsum(1), [1, 0])
    oldest_exact = torch.maximum(slots - window + 1, first)
    has_far = eligible.gather(1, oldest_exact) > eligible.gather(1, first)
    codes = torch.where(valid, 2 * number + is_sink.long(), -1)
    return _plan(number, codes, has_far, first, last, is_sink)


def plan_line(state: State, valid, window: int) -> Plan:
    """One text a row, on a line of sinks, ring and new tokens (valid [B, T] bool)."""
    rank = state.length[:, None] + valid.long().cumsum(1) - 1
    is_sink = valid & (rank < state.num_sinks)
    ordinary = torch.cat([torch.zeros_like(state.sink_valid), state.ring_usable, valid & ~is_sink], 1)
    as_sink = torch.cat([state.sink_valid, torch.zeros_like(state.ring_valid), is_sink], 1)
    codes = torch.where(ordinary, 0, torch.where(as_sink, 1, -1))
    count = pad(ordinary.long().cumsum(1), [1, 0])  # [B, L + 1] ordinary slots before
    slots = torch.arange(codes.shape[1], device=codes.device)
    has_far = (count[:, (slots - window + 1).clamp_min(0)] > 0) | state.has_folded[:, None]
    zeros = torch.zeros_like(codes)
    return _plan(zeros, codes, has_far, zeros, zeros + codes.shape[1] - 1, as_sink)


def _plan(number, codes, has_far, first, last, is_sink) -> Plan:
    sink_list = torch.argsort(~is_sink, dim=1, stable=True)
    sinks_before = pad(is_sink.long().cumsum(1), [1, 0])
    tensors = (number, codes, has_far, first, last, sink_list, sinks_before)
    return Plan(False, *(x.to(torch.int32).contiguous() for x in tensors))
