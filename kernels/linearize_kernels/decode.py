"""One token of a layer in one launch, on a memory of static shape: made to be captured in a CUDA graph.

B batch, H query heads, G kv heads, D head dim, V value dim, d map dim, F Taylor features, n sinks, w window,
R = w + 63 ring slots, N splits of the value columns

The same function as `attention_quadratic` at T = 1 with a `State`, kept differently. Tokens lie in a ring
where they came, and are folded into the sum 64 at a time, so that the sum is read every token and written
once in 64 tokens. Until then they count by T(x) itself. Counters live on the device; nothing is allocated but
the output.
"""

import functools
import math
from dataclasses import dataclass, fields

import torch
import triton

from . import decode_kernels as kernels
from .state import State

FOLD = 64  # as in decode_kernels
DTYPES = (torch.float32, torch.bfloat16)
LAUNCH = dict(RB=32, FB=32, num_warps=4, num_stages=3)  # ring slots and features at once
TARGET_PROGRAMS = 264  # enough to fill a large GPU; fewer splits recompute fewer scores


@dataclass
class DecodeState:
    """What a layer remembers, of static shape; `decode` moves it on in place."""

    total: torch.Tensor  # [B, G, F, V] float32 or bfloat16, features(k_far) ⊗ v of folded tokens
    norm: torch.Tensor  # [B, G, N, F] float32, the same with 1 for v; one copy a split
    sink_k: torch.Tensor  # [B, G, n, D]
    sink_v: torch.Tensor  # [B, G, n, V]
    ring_k: torch.Tensor  # [B, G, R, D] token t in slot t % R
    ring_v: torch.Tensor  # [B, G, R, V]
    ring_far: torch.Tensor  # [B, G, R, d]
    ring_kind: torch.Tensor  # [B, G, R] int8: 0 nothing or padding, 1 an ordinary token, 2 a sink
    position: torch.Tensor  # [B, G, N] int32, tokens put in so far (w - 1 at the start); one copy a split
    offset: torch.Tensor  # [B] int32, tokens seen that are not padding, minus position
    pairs: torch.Tensor  # [2, F] int32, see feature_pairs
    window: int

    @classmethod
    def from_state(
        cls, state: State, *, window: int, dtype=torch.float32, splits: int | None = None
    ) -> "DecodeState":
        """The same memory in the static layout. state: with a ring of window - 1 and the far heads of k.

        dtype: of the sum, float32 or bfloat16 (half the traffic, about 1e-2 relative in the far term).
        splits: programs a kv head; a power of two. Raises ValueError for a state that does not fit.
        """
        batch, groups, ring, head_dim = state.ring_k.shape
        far_heads, value_dim = state.total.shape[1], state.ring_v.shape[-1]
        map_dim = state.ring_far.shape[-1]
        if ring != window - 1 or window < 2 or far_heads != groups:
            raise ValueError(
                f"a state with {ring} ring slots and {far_heads} far heads; one-launch decoding needs "
                f"window - 1 = {window - 1} slots, at least 1, and one far head for each of the {groups} kv heads"
            )
        splits = splits or choose_splits(batch * groups, value_dim)
        slots = window + FOLD - 1

        def widen(x):  # [B, G, P, size] -> [B, G, R, size]
            return torch.nn.functional.pad(x, [0, 0, 0, slots - ring]).contiguous()

        kind = state.ring_valid.to(torch.int8) * 2 - state.ring_usable.to(torch.int8)
        kind = torch.nn.functional.pad(kind, [0, slots - ring])[:, None].expand(-1, groups, -1)
        return cls(
            total=state.total[..., :-1].to(dtype).contiguous(),
            norm=state.total[..., -1].float()[:, :, None].expand(-1, -1, splits, -1).contiguous(),
            sink_k=state.sink_k.clone(memory_format=torch.contiguous_format),
            sink_v=state.sink_v.clone(memory_format=torch.contiguous_format),
            ring_k=widen(state.ring_k),
            ring_v=widen(state.ring_v),
            ring_far=widen(state.ring_far),
            ring_kind=kind.contiguous(),
            position=torch.full((batch, groups, splits), ring, dtype=torch.int32, device=state.total.device),
            offset=(state.length - ring).to(torch.int32),
            pairs=feature_pairs(map_dim, state.total.device),
            window=window,
        )

    def to_state(self, *, log_decay=None) -> State:
        """The memory as a `State` with a ring of R - 1 slots. log_decay [G]: as given to `decode`."""
        now = self.position[:, 0, 0].long()  # [B]
        slots, splits = self.ring_k.shape[2], self.norm.shape[2]
        tokens = now[:, None] - torch.arange(slots - 1, 0, -1, device=now.device)  # [B, R - 1], oldest first
        folded = (now - self.window + 1).clamp_min(0) // FOLD * FOLD
        kind = self.ring_kind[:, 0].gather(1, tokens % slots)
        valid = (kind > 0) & (tokens >= folded[:, None])

        def newest(x):
            index = (tokens % slots)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, index)

        assert splits == self.position.shape[2]
        total = torch.cat([self.total.float(), self.norm[:, :, 0, :, None]], -1)
        if log_decay is not None:
            age = (now - folded - self.window + 1)[:, None]  # [B, 1]
            total = total * torch.exp(log_decay.float() * age)[..., None, None]
        return State(
            total=total,
            sink_k=self.sink_k.clone(),
            sink_v=self.sink_v.clone(),
            ring_k=newest(self.ring_k),
            ring_v=newest(self.ring_v),
            ring_far=newest(self.ring_far),
            ring_valid=valid,
            length=now + self.offset,
        )

    def num_bytes(self) -> int:
        """Bytes of all tensors, the whole batch."""
        tensors = (getattr(self, f.name) for f in fields(self) if f.name != "window")
        return sum(t.numel() * t.element_size() for t in tensors)


def decode(q, k, v, q_far, k_far, gate, state: DecodeState, *, scaling, log_decay=None, out=None):
    """Hybrid attention of one new token a row, after what `state` holds; `state` is changed in place.

    q [B, H, 1, D], k [B, G, 1, D], v [B, G, 1, V] of one dtype (float32 or bfloat16), q_far [B, H, 1, d],
    k_far [B, G, 1, d], gate [B, H, 1], log_decay [G] float32: as in `attention_quadratic`. No token is
    padding. out: where the result [B, H, 1, V] goes, or None for a new tensor. Returns it. Not
    differentiable.
    """
    batch, heads, _, head_dim = q.shape
    groups, value_dim, map_dim = k.shape[1], v.shape[-1], q_far.shape[-1]
    reason = why_not(q, k, v, q_far, k_far)
    assert not reason, reason
    q, k, v, q_far, k_far = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, q_far, k_far))
    if out is None:
        out = q.new_empty(batch, heads, 1, value_dim)
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    splits, sinks = state.position.shape[2], state.sink_k.shape[2]
    kernels.decode_kernel[(splits, batch * groups)](
        q, k, v, q_far, k_far, gate, gate if log_decay is None else log_decay, out,
        state.total, state.norm, state.sink_k, state.sink_v, state.ring_k, state.ring_v, state.ring_far,
        state.ring_kind, state.position, state.offset, state.pairs,
        *[s for x in (q, k, v, q_far, k_far, gate, out) for s in x.stride()[:2]],
        state.window, state.ring_k.shape[2], sinks, heads // groups, heads, state.total.shape[2],
        scaling * math.log2(math.e),
        D=head_dim, V=value_dim, DIM=map_dim, DP=_pad(head_dim), FP=_pad(map_dim),
        VB=_pad(-(-value_dim // splits)),
        SINKS=_pad(sinks + 1), HP=16, DECAY=log_decay is not None,
        PRECISION=precision, SUM_PRECISION=precision, **LAUNCH,
    )  # fmt: skip
    return out


def why_not(q, k, v, q_far, k_far) -> str:
    """Why `decode` cannot take these arguments; empty where it can."""
    heads, groups = q.shape[1], k.shape[1]
    checks = {
        f"{q.shape[2]} tokens: one at a time": q.shape[2] == 1,
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of float32, bfloat16 for all": (
            q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
        ),
        f"head dims {q.shape[-1]} and {v.shape[-1]}: up to 256": max(q.shape[-1], v.shape[-1]) <= 256,
        f"map dim {q_far.shape[-1]}: up to 32": q_far.shape[-1] <= 32,
        f"{heads} query heads, {groups} kv heads: up to 16 a group": heads % groups == 0
        and heads // groups <= 16,
        f"{k_far.shape[1]} far heads, {groups} kv heads: as many": k_far.shape[1] == groups,
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


@functools.cache
def feature_pairs(map_dim: int, device) -> torch.Tensor:
    """[2, F] int32: the two entries of x whose product is a feature, as `Taylor.expand` orders; d means 1."""
    i, j = torch.triu_indices(map_dim, map_dim)
    one, x = torch.tensor([map_dim]), torch.arange(map_dim)
    left, right = torch.cat([one, x, i]), torch.cat([one, one.expand(map_dim), j])
    return torch.stack([left, right]).to(device, torch.int32)


def choose_splits(num_heads: int, value_dim: int) -> int:
    """Programs a kv head: doubled until the GPU is full or a program has 16 columns."""
    splits = 1
    while splits * num_heads < TARGET_PROGRAMS and _pad(value_dim) // (2 * splits) >= 16:
        splits *= 2
    return splits


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
