"""The cache of a decode step of static shape, moved on in place: a `DecodeState` a converted layer, keys and
values of a fixed number of slots a softmax layer.

Nothing here depends on the data, so a step can be captured in a CUDA graph (see decoding.py).

B batch, H query heads, G kv heads, D head dim, d map dim
"""

from dataclasses import fields

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .errors import LinearizeError
from .linearized_cache import LinearizedCacheLayer
from .modeling_linearized import attention_modules, linear_attentions


class StaticError(LinearizeError):
    """This model cannot decode in static shapes; the message says why."""


class StaticLinearLayer(LinearizedCacheLayer):
    """One converted layer's memory of B rows in the layout of the one-launch decode kernel."""

    def __init__(self, linear_attn, *, batch: int, dtype: torch.dtype, device):
        super().__init__()
        from linearize_kernels import can_decode
        from linearize_kernels.decode import DecodeState

        self.linear_attn, self.window = linear_attn, linear_attn.window
        rows = torch.zeros(batch, linear_attn.num_kv_heads, 1, linear_attn.head_dim, dtype=dtype, device=device)
        self.decode_state = DecodeState.from_state(linear_attn.empty_state(rows, rows), window=self.window)
        self.splits = self.decode_state.position.shape[2]
        verdict = can_decode(self.decode_state, heads=linear_attn.num_heads, decay=linear_attn.log_decay is not None)
        if not verdict:
            raise StaticError(f"the decode kernel: {verdict.reason}")
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

    @torch.compiler.disable
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


class StaticSoftmaxLayer(DynamicLayer):
    """Keys and values of L slots of a softmax layer; which slot is next stands on the device."""

    def __init__(self, module, *, batch: int, slots: int, next_slot, dtype: torch.dtype, device):
        super().__init__()
        config = module.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, heads, slots, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.next_slot, self.is_initialized = next_slot, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.next_slot, key_states)
        self.values.index_copy_(2, self.next_slot, value_states)
        return self.keys, self.values

    def load(self, layer, rows: slice) -> None:
        """Copies keys and values of a growing layer."""
        self.keys[rows, :, : layer.keys.shape[2]].copy_(layer.keys)
        self.values[rows, :, : layer.keys.shape[2]].copy_(layer.values)

    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


class StaticCache(Cache):
    """All layers' memory of B rows. slots: how many tokens, padding included, softmax layers can hold.

    Raises StaticError where the model cannot have one.
    """

    static_shapes = True  # the model's forward then takes the mask as it is

    def __init__(self, model, *, batch: int, slots: int | None):
        modules, linear = attention_modules(model), linear_attentions(model)
        reason = why_not_static(model, modules, linear, slots)
        if reason:
            raise StaticError(reason)
        options = dict(batch=batch, dtype=model.dtype, device=model.device)
        self.slot, self.mask, self.free = torch.zeros(1, dtype=torch.long, device=model.device), None, None
        if set(linear) != set(modules):
            self.mask = torch.zeros(batch, 1, 1, slots, dtype=torch.bool, device=model.device)
        super().__init__(
            layers=[
                StaticLinearLayer(linear[i], **options)
                if i in linear
                else StaticSoftmaxLayer(modules[i], slots=slots, next_slot=self.slot, **options)
                for i in sorted(modules)
            ]
        )

    def load(self, state, rows: slice = slice(None)) -> None:
        """Copies a `linearize.State` into these rows. Softmax layers: into all rows."""
        for mine, layer in zip(self.layers, state.cache.layers, strict=True):
            mine.load(layer.state if isinstance(mine, StaticLinearLayer) else layer, rows)
        seen = state.tokens.shape[1]
        self.slot.fill_(seen)
        if self.mask is not None:
            if seen >= self.mask.shape[3]:
                raise StaticError(f"{seen} tokens read, and the decoder's softmax layers hold {self.mask.shape[3]}")
            self.free = self.mask.shape[3] - seen
            self.mask.zero_()
            self.mask[:, 0, 0, :seen] = state.tokens >= 0

    def take_slot(self) -> None:
        """The host's count of the slots left, before a step. Raises StaticError where none is."""
        if self.free is not None:
            if self.free == 0:
                raise StaticError(f"the decoder's softmax layers hold {self.mask.shape[3]} tokens, and are full")
            self.free -= 1

    def open_slot(self):
        """The mask [B, 1, 1, L] of the next token, which sees itself; None where no layer needs one."""
        return None if self.mask is None else self.mask.index_fill_(3, self.slot, True)

    def close_slot(self) -> None:
        self.slot += 1

    def num_bytes(self) -> int:
        """Bytes of all layers, the whole batch."""
        return sum(layer.num_bytes() for layer in self.layers)


def why_not_static(model, modules, linear, slots) -> str:
    """Why this model cannot decode in static shapes, as far as its parts tell; empty where it can."""
    config = model.config.get_text_config()
    kept = sorted(set(modules) - set(linear))
    implementation = getattr(config, "_softmax_implementation", config._attn_implementation)
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    checks = {
        "it has layers that are no attention": len(modules) == config.num_hidden_layers,
        f"its layers {kept} keep softmax attention, and no max_length is given": not kept or slots is not None,
        f"softmax layers in {implementation}: sdpa only": not kept or implementation == "sdpa",
        f"softmax layers of type {sorted(sliding)}": not kept or not (sliding or getattr(config, "sliding_window", 0)),
        f"dtype {model.dtype}: float32 or bfloat16": model.dtype in (torch.float32, torch.bfloat16),
    }
    for x in linear.values():
        checks |= {
            f"the {x.feature_map} map: taylor only": x.series == "taylor",
            f"kv heads {x.heads.kept} of a layer keep softmax attention": not x.heads.kept,
            "a map per query head": x.k_map.shape[0] == x.num_kv_heads,
            f"window {x.window}: 2 or more": x.window >= 2,
            f"map dim {x.q_map.shape[-1]}: up to 32": x.q_map.shape[-1] <= 32,
            f"head dim {x.head_dim}: up to 256": x.head_dim <= 256,
            f"{x.num_heads} query heads, {x.num_kv_heads} kv heads: up to 16 a group": (
                x.num_heads <= 16 * x.num_kv_heads
            ),
        }
    return next((reason for reason, fine in checks.items() if not fine), "")
