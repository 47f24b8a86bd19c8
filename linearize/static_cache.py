"""The cache of a decode step of static shape: each converted layer's `DecodeState`, moved on in place.

Nothing here depends on the data, so a step can be captured in a CUDA graph (see decoding.py).

B batch, H query heads, G kv heads, D head dim, d map dim
"""

from dataclasses import fields

import torch
from transformers.cache_utils import Cache

from .errors import LinearizeError
from .linearized_cache import LinearizedCacheLayer
from .modeling_linearized import attention_modules, linear_attentions


class StaticError(LinearizeError):
    """This model cannot decode in static shapes; the message says why."""


class StaticLinearLayer(LinearizedCacheLayer):
    """One converted layer's memory of B rows in the layout of the one-launch decode kernel."""

    def __init__(self, linear_attn, *, batch: int, dtype: torch.dtype, device):
        super().__init__()
        from linearize_kernels.decode import DecodeState

        self.linear_attn, self.window = linear_attn, linear_attn.window
        rows = torch.zeros(batch, linear_attn.num_kv_heads, 1, linear_attn.head_dim, dtype=dtype, device=device)
        self.decode_state = DecodeState.from_state(linear_attn.empty_state(rows, rows), window=self.window)
        self.splits = self.decode_state.position.shape[2]
        self.is_initialized = True
        self._fuse_maps()

    def _fuse_maps(self) -> None:
        """Map and gate in one product a side: q [W_q | u] + [0 | b],  k W_k - c W_k."""
        linear = self.linear_attn
        gate = linear.gate_weight[..., None]
        self.q_weight = torch.cat([linear.q_map, gate], -1).detach()  # [H, D, d + 1]
        self.q_bias = torch.zeros_like(self.q_weight[:, :1])
        self.q_bias[..., -1] = linear.gate_bias.detach()[:, None]
        if not linear.far_enabled:
            self.q_bias[..., -1] = -torch.inf
        self.k_weight = linear.k_map.detach()  # [G, D, d]
        self.k_bias = -(linear.key_center.detach()[:, None] @ self.k_weight)
        self.decay = None if linear.log_decay is None else linear.log_decay.detach().contiguous()

    def load(self, state, rows: slice) -> None:
        """Puts a `State` of some rows in its place; the buffers stay where they are."""
        from linearize_kernels.decode import DecodeState

        new = DecodeState.from_state(state, window=self.window, splits=self.splits)
        for name in (f.name for f in fields(new) if f.name not in ("pairs", "window")):
            getattr(self.decode_state, name)[rows].copy_(getattr(new, name))

    def attend(self, linear_attn, q, k, v, *, scaling, softcap=None, sink_logits=None, **_):
        """Output [B, H, 1, D] for one new token a row, none of them padding."""
        from linearize_kernels.decode import decode

        if softcap is not None or sink_logits is not None:
            raise StaticError("its attention has a softcap or sink logits, which the decode kernel lacks")
        q_far = torch.baddbmm(self.q_bias, q[:, :, 0].transpose(0, 1).float(), self.q_weight).transpose(0, 1)
        k_far = torch.baddbmm(self.k_bias, k[:, :, 0].transpose(0, 1).float(), self.k_weight).transpose(0, 1)
        q_far, gate, k_far = q_far[:, :, None, :-1], q_far[:, :, None, -1], k_far[:, :, None]
        return decode(q, k, v, q_far, k_far, gate, self.decode_state, scaling=scaling, log_decay=self.decay)

    def num_bytes(self) -> int:
        return self.decode_state.num_bytes()


def why_not_static(model) -> str:
    """Why this model cannot decode in static shapes, as far as its parts tell; empty where it can."""
    layers = linear_attentions(model)
    kept = sorted(set(attention_modules(model)) - set(layers))
    first = next(iter(layers.values()))
    size = first.num_heads // first.num_kv_heads
    checks = {
        f"layers {kept} keep softmax attention, whose cache grows": not kept,
        "it has layers that are no attention": len(layers) == model.config.get_text_config().num_hidden_layers,
        f"the {first.feature_map} map: taylor only": first.feature_map == "taylor",
        "a map per query head": first.k_map.shape[0] == first.num_kv_heads,
        f"window {first.window}: 2 or more": first.window >= 2,
        f"map dim {first.q_map.shape[-1]}: up to 32": first.q_map.shape[-1] <= 32,
        f"head dim {first.head_dim}: up to 256": all(x.head_dim <= 256 for x in layers.values()),
        f"{size} query heads a kv head: up to 16": all(x.num_heads <= 16 * x.num_kv_heads for x in layers.values()),
        f"dtype {model.dtype}: float32 or bfloat16": model.dtype in (torch.float32, torch.bfloat16),
    }
    return next((reason for reason, fine in checks.items() if not fine), "")


def make_static_cache(model, *, batch: int) -> Cache:
    """An empty static cache of B rows. Raises StaticError where the model cannot have one."""
    reason = why_not_static(model)
    if reason:
        raise StaticError(reason)
    layers = [
        StaticLinearLayer(linear_attn, batch=batch, dtype=model.dtype, device=linear_attn.q_map.device)
        for linear_attn in linear_attentions(model).values()
    ]
    return Cache(layers=layers)


def load_static(cache: Cache, source: Cache, rows: slice) -> None:
    """Copies the states of another cache into these rows."""
    for static, layer in zip(cache.layers, source.layers, strict=True):
        static.load(layer.state, rows)
