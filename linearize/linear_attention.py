"""What a converted layer learns, and how it turns queries, keys and values into an output.

B batch, T time, H query heads, G kv heads, M heads of the far term (G, or H with a map per query head),
D head dim, V value dim, d map dim
"""

import torch
from torch import nn

try:
    from linearize_kernels import FEATURE_MAPS, State
    from linearize_kernels import attention as hybrid_attention
except ModuleNotFoundError as error:  # an exported folder carries the reference beside this file
    if error.name != "linearize_kernels":
        raise
    from .feature_maps import FEATURE_MAPS
    from .reference import attention_reference as hybrid_attention
    from .state import State

from .softmax_heads import HeadSplit


class LinearAttention(nn.Module):
    """The learned part of a layer: maps, key centre and far gate; all parameters are float32.

    kv heads in `kept` (numbers in the layer) stay softmax and own nothing here: everything below is of the others,
    `heads` tells which is which.

    far weight of key j for query i:  exp(gate_bias + gate_weight·q_i) f(q_map q_i, k_map (k_j - key_center))

    The gate carries exp(scaling · q·k̄), which costs no state; the series only has to carry what is left.
    """

    def __init__(self, *, num_heads, num_kv_heads, head_dim, window, sinks, feature_map, map_dim, per, decay,
                 kept=()):  # fmt: skip
        super().__init__()
        self.heads = HeadSplit(num_heads, num_kv_heads, kept)
        num_heads, num_kv_heads = self.heads.num_linear
        far_heads = num_kv_heads if per == "kv_head" else num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.sinks, self.feature_map = window, sinks, feature_map
        self.far_enabled = feature_map != "none"  # False: window and sinks alone; also an ablation, then never saved
        map_dim = map_dim if self.far_enabled else 1
        float32 = {"dtype": torch.float32}
        self.q_map = nn.Parameter(torch.empty(num_heads, head_dim, map_dim, **float32))
        self.k_map = nn.Parameter(torch.empty(far_heads, head_dim, map_dim, **float32))
        self.key_center = nn.Parameter(torch.empty(far_heads, head_dim, **float32))
        self.gate_weight = nn.Parameter(torch.empty(num_heads, head_dim, **float32))
        self.gate_bias = nn.Parameter(torch.empty(num_heads, **float32))
        self.decay_logit = nn.Parameter(torch.empty(far_heads, **float32)) if decay else None
        self.reset_parameters()

    @classmethod
    def by_spec(cls, spec: dict, shape, kept) -> "LinearAttention":
        """A layer by the config's `linear_attention`: shape (query heads, kv heads, head dim), kv heads `kept`."""
        heads, kv_heads, head_dim = shape
        return cls(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, window=spec["window"], sinks=spec["sinks"],
            feature_map=spec["feature_map"], map_dim=spec["map_dim"], per=spec["per"], decay=spec["decay"], kept=kept,
        )  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random maps, no centre, a small constant gate; calibration replaces all of it."""
        std = self.head_dim**-0.5
        self.q_map.normal_(std=std)
        self.k_map.normal_(std=std)
        self.key_center.zero_()
        self.gate_weight.zero_()
        self.gate_bias.fill_(-4.0)
        if self.decay_logit is not None:
            self.decay_logit.fill_(-8.0)  # a decay of 0.0003 a token

    @torch.no_grad()
    def keeping(self, kept) -> "LinearAttention":
        """A copy in which the kv heads `kept` (numbers in the layer) are softmax too; other parameters are equal."""
        gone = [self.heads.linear.index(g) for g in kept]
        rest = HeadSplit(self.num_heads, self.num_kv_heads, gone)
        with torch.device("meta"):
            other = LinearAttention(
                num_heads=self.heads.num_heads, num_kv_heads=self.heads.num_kv_heads, head_dim=self.head_dim,
                window=self.window, sinks=self.sinks, feature_map=self.feature_map, map_dim=self.q_map.shape[-1],
                per="kv_head" if self.k_map.shape[0] == self.num_kv_heads else "query_head",
                decay=self.decay_logit is not None, kept=(*self.heads.kept, *kept),
            )  # fmt: skip
        other.far_enabled = self.far_enabled
        state = {name: rest.linear_part(p.detach().clone(), dim=0)[0] for name, p in self.named_parameters()}
        other.load_state_dict(state, assign=True)
        return other

    @property
    def series(self) -> str:
        """What the kernels compute: without a far term they get a gate of -inf, and the smallest Taylor map."""
        return "taylor" if self.feature_map == "none" else self.feature_map

    @property
    def log_decay(self) -> torch.Tensor | None:
        """[M] log of the far term's decay a token, below 0; None without decay."""
        return None if self.decay_logit is None else -nn.functional.softplus(self.decay_logit)

    def project(self, q, k):
        """q [B, H, T, D], k [B, G, T, D] -> mapped q [B, H, T, d], mapped k [B, M, T, d], gate [B, H, T].

        The maps multiply in float32. Their results have q's dtype, in which kernels multiply them and states keep them.
        """
        given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
        if self.k_map.shape[0] != k.shape[1]:
            k = k.repeat_interleave(self.k_map.shape[0] // k.shape[1], 1)
        to_far = torch.cat([self.q_map, self.gate_weight[..., None]], -1).to(dtype)  # the gate is one column more
        q_far, gate = _map_heads(q, to_far).split([to_far.shape[-1] - 1, 1], -1)  # one gradient, not two to add
        gate = gate[..., 0] + self.gate_bias.to(dtype)[:, None]
        k_map = self.k_map.to(dtype)
        k_far = _map_heads(k, k_map) - self.key_center.to(dtype)[:, None] @ k_map
        return q_far.to(given), k_far.to(given), gate

    def forward(self, q, k, v, *, scaling, valid=None, segments=None, softcap=None, sink_logits=None,
                state=None, return_state=False):  # fmt: skip
        """q [B, H, T, D], k [B, G, T, D], v [B, G, T, V] after norms and rotary -> (out [B, H, T, V], State).

        valid [B, T] bool marks tokens that are not padding; segments [B, T] int numbers packed documents;
        softcap and sink_logits [H] are the base model's own, where it has them; the State is None unless
        return_state. H and G are the linear heads alone.
        """
        if not self.num_heads:
            return torch.empty_like(q), state
        with torch.autocast(q.device.type, enabled=False):
            q_far, k_far, gate = self.project(q, k)
            if not self.far_enabled:
                gate = torch.full_like(gate, -torch.inf)
            return hybrid_attention(
                q, k, v, q_far, k_far, gate, scaling=scaling, window=self.window, sinks=self.sinks,
                feature_map=self.series, valid=valid, segments=segments, log_decay=self.log_decay,
                softcap=softcap, sink_logits=sink_logits, state=state, return_state=return_state,
            )  # fmt: skip

    def empty_state(self, k, v, *, extra=0) -> State:
        """A State that has seen nothing, for k [B, G, T, D] and v [B, G, T, V]; `extra` more ring slots."""
        far_heads, _, map_dim = self.k_map.shape
        k_far = k.new_zeros(k.shape[0], far_heads, 1, map_dim)
        num_features = FEATURE_MAPS[self.series].num_features(map_dim)
        ring = max(self.window - 1, 0) + extra
        return State.empty(k, v, k_far, num_features=num_features, sinks=self.sinks, ring=ring)

    def token_bytes(self, *, dtype_bytes: int) -> int:
        """Bytes of one token's keys and values in this layer: what a KV cache would grow by."""
        return 2 * self.num_kv_heads * self.head_dim * dtype_bytes

    def state_bytes(self, *, dtype_bytes: int) -> int:
        """Bytes that one sequence needs in this layer, with keys and values of `dtype_bytes` each."""
        far_heads, _, map_dim = self.k_map.shape
        features = FEATURE_MAPS[self.series].num_features(map_dim)
        ring = max(self.window - 1, 0)
        sums = 4 * far_heads * features * (self.head_dim + 1)  # float32
        mapped = dtype_bytes * far_heads * map_dim * ring
        return self.token_bytes(dtype_bytes=dtype_bytes) * (ring + self.sinks) + mapped + sums


def _map_heads(x, weight):
    """[B, H, T, D], [H, D, d] -> [B, H, T, d], in the dtype of weight."""
    if torch.is_grad_enabled() and weight.requires_grad:
        return _TrainedMap.apply(x, weight)
    return _product(x, weight)


def _product(x, weight):
    """`_map_heads` itself: no copy but of the dtype where heads lie inside tokens, as projections leave them."""
    batch, heads, length, _ = x.shape
    rows = x.to(weight.dtype).transpose(0, 1).reshape(heads, batch * length, -1)
    return torch.bmm(rows, weight).view(heads, batch, length, -1).transpose(0, 1)


class _TrainedMap(torch.autograd.Function):
    """`_product`; x is kept as it came, and weight's gradient is summed in pieces.

    As one product over all tokens, few heads and columns leave a GPU idle: 43 % of a matching step went there.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        of_x = _product(slope, weight.mT).to(x.dtype) if ctx.needs_input_grad[0] else None
        pieces = 8 if x.shape[2] % 8 == 0 else 1
        rows, slopes = (
            t.to(weight.dtype, memory_format=torch.contiguous_format).unflatten(2, [pieces, -1]) for t in (x, slope)
        )
        return of_x, (rows.mT @ slopes).sum([0, 2])
