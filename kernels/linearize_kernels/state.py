"""The memory of one layer: everything that attention must remember of the past, of constant size.

B batch, G kv heads, M heads of the far term (G, or the H query heads), D head dim, V value dim, d map dim,
F expanded features, n sinks, P ring slots (window - 1, and some more where late folding is wanted)
"""

from dataclasses import dataclass, fields, replace

import torch
from torch.nn.functional import pad


@dataclass
class State:
    """Sinks, the newest P tokens exactly, and one sum over everything older.

    A token lives in the ring until P newer ones have come; then it is added to `total`, unless it is a sink.
    `total` is weighted by the far term's decay as seen from the next token.
    """

    total: torch.Tensor  # [B, M, F, V + 1] sum of features(k_far) ⊗ [v | 1], float32 (float64 for float64 inputs)
    sink_k: torch.Tensor  # [B, G, n, D]
    sink_v: torch.Tensor  # [B, G, n, V]
    ring_k: torch.Tensor  # [B, G, P, D] oldest first
    ring_v: torch.Tensor  # [B, G, P, V]
    ring_far: torch.Tensor  # [B, M, P, d] the mapped keys
    ring_valid: torch.Tensor  # [B, P] bool; False: padding, or nothing there yet
    length: torch.Tensor  # [B] int64, tokens seen that are not padding

    @classmethod
    def empty(cls, k, v, k_far, *, num_features: int, sinks: int, ring: int) -> "State":
        """A state that has seen nothing. k [B, G, T, D], v [B, G, T, V], k_far [B, M, T, d] give the shapes."""
        batch, groups, _, head_dim = k.shape
        value_dim, (_, far_heads, _, map_dim) = v.shape[-1], k_far.shape
        dtype = accumulation_dtype(k.dtype)
        return cls(
            total=k.new_zeros(batch, far_heads, num_features, value_dim + 1, dtype=dtype),
            sink_k=k.new_zeros(batch, groups, sinks, head_dim),
            sink_v=v.new_zeros(batch, groups, sinks, value_dim),
            ring_k=k.new_zeros(batch, groups, ring, head_dim),
            ring_v=v.new_zeros(batch, groups, ring, value_dim),
            ring_far=k_far.new_zeros(batch, far_heads, ring, map_dim),
            ring_valid=torch.zeros(batch, ring, dtype=torch.bool, device=k.device),
            length=torch.zeros(batch, dtype=torch.long, device=k.device),
        )

    @classmethod
    def after_text(cls, total, k, v, k_far, *, sinks: int, ring: int) -> "State":
        """The state after a whole text without padding, copied out of k, v, k_far; its sum is given."""
        batch, length = k.shape[0], k.shape[2]

        def oldest(x):  # a copy: a view would keep all of the text alive
            x = x[:, :, :sinks].clone(memory_format=torch.contiguous_format)
            return pad(x, [0, 0, 0, sinks - x.shape[2]]) if x.shape[2] < sinks else x

        def newest(x):
            x = x[:, :, max(0, length - ring) :].clone(memory_format=torch.contiguous_format)
            return pad(x, [0, 0, ring - x.shape[2], 0]) if x.shape[2] < ring else x

        slots = torch.arange(ring, device=k.device).expand(batch, ring)
        return cls(
            total=total, sink_k=oldest(k), sink_v=oldest(v),
            ring_k=newest(k), ring_v=newest(v), ring_far=newest(k_far),
            ring_valid=slots >= ring - length, length=torch.full((batch,), length, device=k.device),
        )  # fmt: skip

    @property
    def num_sinks(self) -> int:
        return self.sink_k.shape[2]

    @property
    def sink_valid(self) -> torch.Tensor:
        """[B, n] bool: the first tokens of a row that is not padding are its sinks."""
        return torch.arange(self.num_sinks, device=self.length.device) < self.length[:, None]

    @property
    def ring_usable(self) -> torch.Tensor:
        """[B, P] bool: tokens in the ring that are neither padding nor sinks (those stand apart)."""
        newer_or_same = self.ring_valid.long().flip(-1).cumsum(-1).flip(-1)
        rank = self.length[:, None] - newer_or_same
        return self.ring_valid & (rank >= self.num_sinks)

    @property
    def has_folded(self) -> torch.Tensor:
        """[B] bool: whether `total` holds any token."""
        return self.length - self.num_sinks > self.ring_usable.sum(-1)

    def map(self, function) -> "State":
        """A state with every tensor (batch first) replaced by function(tensor): reordering, repeating, moving."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def crop(self, num_slots: int) -> "State":
        """Forgets the newest `num_slots` slots; the caller sees to it that none of the window was folded."""
        if num_slots == 0:
            return self
        gone = self.ring_valid[:, -num_slots:].sum(-1)

        def shift(x, dim):
            kept = x.narrow(dim, 0, x.shape[dim] - num_slots)
            return torch.cat([torch.zeros_like(x.narrow(dim, 0, num_slots)), kept], dim)

        return replace(
            self,
            ring_k=shift(self.ring_k, 2),
            ring_v=shift(self.ring_v, 2),
            ring_far=shift(self.ring_far, 2),
            ring_valid=shift(self.ring_valid, 1),
            length=self.length - gone,
        )

    def with_more_ring(self, num_slots: int) -> "State":
        """The same past with `num_slots` more ring slots, empty ones before the oldest."""

        def grow(x, dim):
            shape = [*x.shape[:dim], num_slots, *x.shape[dim + 1 :]]
            return torch.cat([x.new_zeros(shape), x], dim)

        return replace(
            self,
            ring_k=grow(self.ring_k, 2),
            ring_v=grow(self.ring_v, 2),
            ring_far=grow(self.ring_far, 2),
            ring_valid=grow(self.ring_valid, 1),
        )

    def num_bytes(self) -> int:
        """Bytes of all tensors, the whole batch."""
        return sum(t.numel() * t.element_size() for t in (getattr(self, f.name) for f in fields(self)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32, or in float64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32
