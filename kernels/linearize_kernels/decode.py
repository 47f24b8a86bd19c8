"""One token of a layer in one launch, on a memory of static shape: made to be captured in a CUDA graph.

B batch, H query heads, G kv heads, D head dim, V value dim, d map dim, F Taylor features, n sinks, w window,
R = w + 31 ring slots, N splits of the value columns

The same function as `attention_quadratic` at T = 1 with a `State`, kept differently. Tokens lie in a ring
where they came, and are folded into the sum 32 at a time, so that the sum is read every token and written
once in 32 tokens (64 would write it less and read more ring). Until then they count by T(x) itself. Counters
live on the device; nothing is allocated but the output.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import triton

from . import decode_kernels as kernels
from .state import State

FOLD = 32  # as in decode_kernels
DTYPES = (torch.float32, torch.bfloat16)
TARGET_PROGRAMS = 264  # enough to fill a large GPU; fewer splits recompute fewer scores


@dataclass
class DecodeState:
    """What a layer remembers, of static shape; `decode` moves it on in place."""

    total: torch.Tensor  # [B, G, F, V] float32 or bfloat16, features(k_far) ⊗ v of folded tokens; see feature_order
    norm: torch.Tensor  # [B, G, N, F] float32, the same with 1 for v; one copy a split
    keys: torch.Tensor  # [B, G, n + R, D] the sinks, then the ring: token t in slot t % R
    values: torch.Tensor  # [B, G, n + R, V]
    ring_far: torch.Tensor  # [B, G, R, d]
    ring_kind: torch.Tensor  # [B, G, R] int8: 0 nothing or padding, 1 an ordinary token, 2 a sink
    position: torch.Tensor  # [B, G, N] int32, tokens put in so far (w - 1 at the start); one copy a split
    offset: torch.Tensor  # [B] int32, tokens seen that are not padding, minus position
    window: int

    @classmethod
    def from_state(
        cls, state: State, *, window: int, dtype=torch.float32, splits: int | None = None
    ) -> "DecodeState":
        """The same memory in the static layout. state: with a ring of window - 1 and the far heads of k.

        dtype: of the sum, float32 or bfloat16: half the traffic, and for texts to 8k tokens about 1e-2 relative in the
        far term; beyond, unless a decay keeps the sum short, it stops growing (kernels/README.md).
        splits: programs a kv head; a power of two. Raises ValueError for a state that does not fit.
        """
        batch, groups, ring, head_dim = state.ring_k.shape
        far_heads, value_dim = state.total.shape[1], state.ring_v.shape[-1]
        if ring != window - 1 or window < 2 or far_heads != groups:
            raise ValueError(
                f"a state with {ring} ring slots and {far_heads} far heads; one-launch decoding needs "
                f"window - 1 = {window - 1} slots, at least 1, and one far head for each of the {groups} kv heads"
            )
        splits = splits or choose_splits(batch * groups, value_dim)
        slots = window + FOLD - 1

        def widen(x):  # [B, G, P, size] -> [B, G, R, size]
            return torch.nn.functional.pad(x, [0, 0, 0, slots - ring]).contiguous()

        def join(sinks, ring):
            return torch.cat([sinks, widen(ring)], 2)

        order, weight = feature_order(state.ring_far.shape[-1], state.total.device)
        total = state.total[:, :, order] * weight[:, None]
        kind = state.ring_valid.to(torch.int8) * 2 - state.ring_usable.to(torch.int8)
        kind = torch.nn.functional.pad(kind, [0, slots - ring])[:, None].expand(-1, groups, -1)
        return cls(
            total=total[..., :-1].to(dtype).contiguous(),
            norm=total[..., -1].float()[:, :, None].expand(-1, -1, splits, -1).contiguous(),
            keys=join(state.sink_k, state.ring_k),
            values=join(state.sink_v, state.ring_v),
            ring_far=widen(state.ring_far),
            ring_kind=kind.contiguous(),
            position=torch.full((batch, groups, splits), ring, dtype=torch.int32, device=state.total.device),
            offset=(state.length - ring).to(torch.int32),
            window=window,
        )

    def to_state(self, *, log_decay=None) -> State:
        """The memory as a `State` with a ring of R - 1 slots. log_decay [G]: as given to `decode`."""
        now = self.position[:, 0, 0].long()  # [B]
        slots, sinks = self.ring_far.shape[2], self.num_sinks
        tokens = now[:, None] - torch.arange(slots - 1, 0, -1, device=now.device)  # [B, R - 1], oldest first
        folded = (now - self.window + 1).clamp_min(0) // FOLD * FOLD
        kind = self.ring_kind[:, 0].gather(1, tokens % slots)
        valid = (kind > 0) & (tokens >= folded[:, None])

        def newest(x):
            index = (tokens % slots)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, index)

        order, weight = feature_order(self.ring_far.shape[-1], self.total.device)
        total = torch.cat([self.total.float(), self.norm[:, :, 0, :, None]], -1) / weight[:, None]
        total = total[:, :, order.argsort()]
        if log_decay is not None:
            age = (now - folded - self.window + 1)[:, None]  # [B, 1]
            total = total * torch.exp(log_decay.float() * age)[..., None, None]
        return State(
            total=total,
            sink_k=self.keys[:, :, :sinks].clone(),
            sink_v=self.values[:, :, :sinks].clone(),
            ring_k=newest(self.keys[:, :, sinks:]),
            ring_v=newest(self.values[:, :, sinks:]),
            ring_far=newest(self.ring_far),
            ring_valid=valid,
            length=now + self.offset,
        )

    @property
    def num_sinks(self) -> int:
        return self.keys.shape[2] - self.ring_far.shape[2]

    def num_bytes(self) -> int:
        """Bytes of all tensors, the whole batch."""
        tensors = (getattr(self, f.name) for f in fields(self) if f.name != "window")
        return sum(t.numel() * t.element_size() for t in tensors)


def decode(
    q, k, v, q_far, k_far, gate, state: DecodeState, *, scaling, log_decay=None, out=None, launch=None,
    implementation="auto",
):  # fmt: skip
    """Hybrid attention of one new token a row, after what `state` holds; `state` is changed in place.

    q [B, H, 1, D], k [B, G, 1, D], v [B, G, 1, V] of one dtype (float32 or bfloat16), q_far [B, H, 1, d],
    k_far [B, G, 1, d], gate [B, H, 1], log_decay [G]: as in `attention_quadratic`; a log_decay that is not dense
    float32 costs a conversion a token. No token is padding. out: where the result [B, H, 1, V] goes, or None for a
    new tensor. launch: a `Launch` (of this file or of cuda_decode.py) instead of the chosen one, to measure.
    implementation: "auto", "triton" or "cuda"; "auto" takes CUDA where `can_decode_cuda` agrees. Returns out. Not
    differentiable. Raises RuntimeError where CUDA is forced and cannot run, and where a graph is captured before it
    is known whether CUDA can.
    """
    if out is None:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    in_cuda = _takes_cuda(q.shape[1], state, log_decay, launch, implementation)
    return _launch(q, k, v, q_far, k_far, gate, state, scaling, log_decay, out, launch, in_cuda=in_cuda)


def decode_mapped(tokens, v, weight, bias, state: DecodeState, *, scaling, log_decay=None, launch=None):
    """`decode` of tokens that are not mapped yet, in two launches; in CUDA the second begins while the first runs.

    tokens [B, H + G, 1, D]: queries, then keys; v [B, G, 1, V]; weight [H + G, D, d + 1], bias [H + G, 1, d + 1], dense
    float32: their maps, the last column the gate of a query (and nothing of a key); in CUDA weight is read before the
    launch just before this call has ended, so that one must not write it. Else as `decode`.
    """
    from .map_heads import map_heads

    groups, out = v.shape[1], v.new_empty(tokens.shape[0], tokens.shape[1] - v.shape[1], 1, v.shape[-1])
    in_cuda = _takes_cuda(out.shape[1], state, log_decay, launch, "auto")
    far = map_heads(tokens, weight, bias, in_cuda=in_cuda)
    (q, k), (q_far, k_far) = (x.split([x.shape[1] - groups, groups], 1) for x in (tokens, far))
    far = q_far[..., :-1], k_far[..., :-1], q_far[..., -1]
    return _launch(q, k, v, *far, state, scaling, log_decay, out, launch, in_cuda=in_cuda, early=in_cuda)


def _launch(q, k, v, q_far, k_far, gate, state, scaling, log_decay, out, launch, *, in_cuda: bool, early=False):
    """`launch_decode` of the one kernel or the other; early: of cuda_decode's. Returns out."""
    log_decay = None if log_decay is None else log_decay.detach().float().contiguous()
    arguments = q, k, v, q_far, k_far, gate, state, scaling, log_decay, out, launch
    if in_cuda:
        from .cuda_decode import launch_decode as launch_in_cuda

        launch_in_cuda(*arguments, early=early)
    else:
        launch_decode(*arguments)
    return out


def _takes_cuda(heads: int, state: DecodeState, log_decay, launch, implementation: str) -> bool:
    from . import dispatch

    if launch is not None:
        return not isinstance(launch, Launch)
    return dispatch.decodes_in_cuda(state, heads=heads, decay=log_decay is not None, implementation=implementation)


def launch_decode(q, k, v, q_far, k_far, gate, state, scaling, log_decay, out, launch=None):
    """`decode` in Triton into `out`; returns what Triton's launch does: the compiled kernel, with its registers."""
    batch, heads, _, head_dim = q.shape
    groups, value_dim, map_dim = k.shape[1], v.shape[-1], q_far.shape[-1]
    reason = why_not(q, k, v, q_far, k_far)
    assert not reason, reason
    q, k, v, q_far, k_far = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, q_far, k_far))
    splits, group, columns = state.position.shape[2], heads // groups, columns_of(state)
    launch = launch or launch_of(state, heads=heads)
    with torch.cuda.device_of(q):
        return kernels.decode_kernel[(splits, groups, batch)](
            q, k, v, q_far, k_far, gate, gate if log_decay is None else log_decay, out,
            state.total, state.norm, state.keys, state.values, state.ring_far, state.ring_kind,
            state.position, state.offset,
            *[s for x in (q, k, v, q_far, k_far, gate, out) for s in x.stride()[:2]],
            scaling * math.log2(math.e),
            GROUP=group, WINDOW=state.window, SINKS=state.num_sinks, D=head_dim, V=value_dim, DIM=map_dim,
            DP=_pad(head_dim), FP=_pad(map_dim), HP=triton.next_power_of_2(group),
            NP=_pad(state.total.shape[2]), VB=columns, DECAY=log_decay is not None,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            **launch._asdict(),
        )  # fmt: skip


class Launch(NamedTuple):
    """How a program does its work; RB, FB, UNROLL and EAGER as in decode_kernels."""

    RB: int  # slots of sinks and ring at once
    FB: int  # features at once
    UNROLL: int  # blocks of features without a loop
    EAGER: bool  # read unwanted slots too, and so without waiting for the counter
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None  # registers of a thread at most


def launch_of(state: DecodeState, *, heads: int) -> Launch:
    """The launch that a state of layers of `heads` query heads takes."""
    sizes = state.keys.shape[2], state.keys.shape[-1], columns_of(state), heads // state.keys.shape[1]
    return choose_launch(state.position.numel(), *sizes, state.keys.dtype)


def columns_of(state: DecodeState) -> int:
    """Value columns of a program, padded."""
    return _pad(-(-state.values.shape[-1] // state.position.shape[2]))


def choose_launch(programs: int, rows: int, head_dim: int, columns: int, group: int, dtype) -> Launch:
    """The launch for `programs` programs of `columns` value columns, `rows` sinks and ring slots.

    Few programs: latency counts, everything is read at once by 8 warps. Many: 4 warps, and unwanted slots are not
    read. Found on an H100 (kernels/README.md).
    """
    few = programs <= TARGET_PROGRAMS
    warps = 8 if few else 4
    threads, heads = 32 * warps, triton.next_power_of_2(group)
    widest = 2**15 // (_pad(max(head_dim, columns)) * dtype.itemsize)  # a tile of 32 KB
    slots = max(16, min(_pad(rows), widest))
    # 16 bytes a thread; a thread has 32 sums at most; factors are fewer than threads, so that each is loaded
    # where it is used.
    features = max(1, min(4 * threads // columns, 32 * threads // (heads * columns), threads // (2 * heads)))
    unroll = min(16, -(-153 // features)) if few else 4
    return Launch(slots, features, unroll, few, warps, num_stages=2 if slots >= rows else 1)


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
def feature_order(map_dim: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each feature of decode_kernels' order stands in `Taylor.expand`'s, [F], and a weight [F].

    Rows of a `State`'s sum, times the weight, are rows of `DecodeState.total`: there a square's 1/2 stands
    with the keys alone.
    """
    i, j = torch.triu_indices(map_dim, map_dim)
    place = torch.empty(map_dim, map_dim, dtype=torch.long)
    place[i, j] = place[j, i] = 1 + map_dim + torch.arange(len(i))
    pair = torch.arange(len(i))
    left = pair % map_dim
    order = [place[left, (left + pair // map_dim) % map_dim], 1 + torch.arange(map_dim), torch.tensor([0])]
    weight = torch.ones(1 + map_dim + len(i))
    weight[:map_dim] = 0.5**0.5  # the squares
    return torch.cat(order).to(device), weight.to(device)


@functools.cache
def feature_pairs(map_dim: int, device) -> torch.Tensor:
    """[2, F] int32: the two entries of x whose product is a feature, as `Taylor.expand` orders; d means 1."""
    i, j = torch.triu_indices(map_dim, map_dim)
    one, x = torch.tensor([map_dim]), torch.arange(map_dim)
    left, right = torch.cat([one, x, i]), torch.cat([one, one.expand(map_dim), j])
    return torch.stack([left, right]).to(device, torch.int32)


def choose_splits(num_heads: int, value_dim: int) -> int:
    """Programs a kv head: doubled until the GPU is full or a program has 16 columns."""
    splits = max(1, _pad(value_dim) // 128)
    while splits * num_heads < TARGET_PROGRAMS and _pad(value_dim) // (2 * splits) >= 16:
        splits *= 2
    return splits


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
