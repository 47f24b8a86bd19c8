"""The cache of a decode step of static shape, moved on in place: a `DecodeState` for the linear heads of a layer, keys
and values of a fixed number of slots for what is softmax, be it a layer or single kv heads.

Rows need not be equally long: token t of a row lies in slot t, without padding, so that a row's position says which
slot is next and which are seen. Nothing here depends on the data, so a step can be captured in a CUDA graph (see
decoding.py).

B batch, H query heads, G kv heads, D head dim, d map dim, L slots
"""

from dataclasses import fields

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .errors import LinearizeError
from .kept_softmax import has_softmax
from .linearized_cache import LinearizedCacheLayer
from .modeling_linearized import attention_modules, linear_attentions
from .rows import put

NO_END = 2**62  # steps: a row that ends by itself, or that nothing bounds


class StaticError(LinearizeError):
    """This model cannot decode in static shapes; the message says why."""


class StaticSoftmaxLayer(DynamicLayer):
    """Keys and values of L slots of a softmax layer, or of the kept kv heads of one."""

    def __init__(self, *, batch: int, heads: int, head_dim: int, slots: int, next_slot, dtype: torch.dtype, device):
        super().__init__()
        shape = (batch, heads, slots, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.next_slot, self.is_initialized = next_slot, True  # [B] int64, on the device
        self.rows = torch.arange(batch, device=device)

    def update(self, key_states, value_states, *args, **kwargs):
        """Puts one new token a row, [B, G, 1, D] each, into its slot; returns all slots."""
        self.keys[self.rows, :, self.next_slot] = key_states[:, :, 0]  # no scatter_: compiled, it would copy all slots
        self.values[self.rows, :, self.next_slot] = value_states[:, :, 0]
        return self.keys, self.values

    def load(self, layer, rows, order) -> None:
        """Copies keys and values of a growing layer; order [B, S]: its columns, those of tokens first."""
        order = order[:, None, : self.keys.shape[2], None]
        for mine, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            index = order.expand(-1, theirs.shape[1], -1, theirs.shape[3])
            put(mine[:, :, : index.shape[2]], rows, theirs.gather(2, index))

    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


class StaticLinearLayer(LinearizedCacheLayer):
    """One converted layer's memory of B rows: in the layout of the one-launch decode kernel, and `kept` beside it."""

    def __init__(self, linear_attn, *, slots: int, next_slot, **options):
        super().__init__()
        self.linear_attn, self.window, self.is_initialized = linear_attn, linear_attn.window, True
        self.decode_state, self.maps, kept = None, None, len(linear_attn.heads.kept)
        if kept:
            self.kept = StaticSoftmaxLayer(
                heads=kept, head_dim=linear_attn.head_dim, slots=slots, next_slot=next_slot, **options
            )
        if linear_attn.num_heads:
            self._make_decode_state(**options)
            self._fuse_maps()

    def _make_decode_state(self, *, batch: int, dtype: torch.dtype, device) -> None:
        from linearize_kernels import can_decode
        from linearize_kernels.decode import DecodeState

        linear = self.linear_attn
        rows = torch.zeros(batch, linear.num_kv_heads, 1, linear.head_dim, dtype=dtype, device=device)
        self.decode_state = DecodeState.from_state(linear.empty_state(rows, rows), window=self.window)
        self.splits = self.decode_state.position.shape[2]
        verdict = can_decode(self.decode_state, heads=linear.num_heads, decay=linear.log_decay is not None)
        if not verdict:
            raise StaticError(f"the decode kernel: {verdict.reason}")

    @torch.no_grad()
    def _fuse_maps(self) -> None:
        """Maps and gate as one product: q [W_q | u] + [0 | b], k [W_k | 0] - c [W_k | 0]; in place if they are."""
        linear = self.linear_attn
        q_weight = torch.cat([linear.q_map, linear.gate_weight[..., None]], -1).float()  # [H, D, d + 1]
        q_bias = torch.zeros_like(q_weight[:, :1])
        q_bias[..., -1] = linear.gate_bias[:, None] if linear.far_enabled else -torch.inf
        k_weight = torch.nn.functional.pad(linear.k_map.float(), [0, 1])  # [G, D, d + 1]
        k_bias = -(linear.key_center.float()[:, None] @ k_weight)
        log_decay = None if linear.log_decay is None else linear.log_decay.float()  # a whole model may be in bfloat16
        new = torch.cat([q_weight, k_weight]), torch.cat([q_bias, k_bias]), log_decay
        if self.maps is None:
            self.maps = new
        for mine, x in zip(self.maps, new, strict=True):
            if x is not None:
                mine.copy_(x)

    def load(self, layer, rows, order) -> None:
        """Puts what a growing layer remembers of some rows in its place; the buffers stay where they are."""
        from linearize_kernels.decode import DecodeState

        if self.linear_attn.heads.kept:
            self.kept.load(layer.kept, rows, order)
        if self.decode_state is None:
            return
        if rows is None:
            self._fuse_maps()  # the weights may have changed since
        new = DecodeState.from_state(layer.state, window=self.window, splits=self.splits)
        for name in (f.name for f in fields(new) if f.name != "window"):
            put(getattr(self.decode_state, name), rows, getattr(new, name))

    def attend(self, linear_attn, q, k, v, *, scaling, softcap=None, sink_logits=None, **_):
        """Output [B, H, 1, D] for one new token a row, none of them padding."""
        from linearize_kernels.decode_op import decode_op

        if self.decode_state is None:
            return torch.empty_like(q)
        if softcap is not None or sink_logits is not None:
            raise StaticError("its attention has a softcap or sink logits, which the decode kernel lacks")
        weight, bias, log_decay = self.maps
        tokens = torch.cat([q, k], 1)  # [B, H + G, 1, D]
        return decode_op(tokens, v, weight, bias, self.decode_state, scaling=scaling, log_decay=log_decay)

    def num_bytes(self) -> int:
        parts = [self.decode_state] * (self.decode_state is not None) + [self.kept] * bool(self.linear_attn.heads.kept)
        return sum(part.num_bytes() for part in parts)


class StaticCache(Cache):
    """All layers' memory of B rows. slots: how many tokens of a row softmax layers and heads can hold.

    Raises StaticError where the model cannot have one.
    """

    static_shapes = True  # the model's forward then takes the mask as it is

    def __init__(self, model, *, batch: int, slots: int | None):
        modules, linear = attention_modules(model), linear_attentions(model)
        reason = why_not_static(model, modules, linear, slots)
        if reason:
            raise StaticError(reason)
        self.slots = slots if has_softmax(model) else None
        self.next_slot = torch.zeros(batch, dtype=torch.long, device=model.device)
        width = -(-(slots or 0) // 8) * 8  # SDPA wants masks of such a size
        self.numbers = torch.arange(width, device=model.device)
        self.free = torch.full((batch,), NO_END)  # steps that a row's slots last for, counted by the host
        options = dict(
            batch=batch, slots=width, next_slot=self.next_slot, dtype=model.dtype, device=model.device
        )
        super().__init__(
            layers=[
                StaticLinearLayer(linear[i], **options)
                if i in linear
                else StaticSoftmaxLayer(**kv_shape(modules[i].config), **options)
                for i in sorted(modules)
            ]
        )

    def load(self, state, rows=None, *, max_new_tokens: int | None = None) -> None:
        """Copies a `linearize.State` into these rows, indices (None: all).

        max_new_tokens: after which the rows end; None: nobody knows. Raises StaticError where softmax has too few
        slots for it.
        """
        if rows is None and state.is_one_row:
            state = state.select([0])  # which the buffers repeat, without a copy of a whole layer
        valid = state.tokens >= 0
        if self.slots is not None:
            longest = valid.sum(-1).max().item()
            if longest + (max_new_tokens or 1) > self.slots:
                new = f" and {max_new_tokens} to come" if max_new_tokens else ""
                raise StaticError(f"{longest} tokens read{new}, and the decoder's softmax slots hold {self.slots}")
            chosen = slice(None) if rows is None else rows.tolist()
            self.free[chosen] = NO_END if max_new_tokens else self.slots - longest
        order = (~valid).int().argsort(dim=1, stable=True)
        for mine, layer in zip(self.layers, state.cache.layers, strict=True):
            mine.load(layer, rows, order)

    def take_slot(self) -> None:
        """The host's count of the slots left, before a step. Raises StaticError where a row has none."""
        if self.slots is not None:
            if self.free.min() == 0:
                raise StaticError(f"the decoder's softmax slots hold {self.slots} tokens, and are full")
            self.free -= 1

    def open_slot(self, position):
        """Makes room for the next token of each row, at position [B]; returns what it sees, a mask [B, 1, 1, L].

        None where nothing is softmax.
        """
        if self.slots is None:
            return None
        self.next_slot.copy_(position)
        return (self.numbers <= position[:, None])[:, None, None]

    def num_bytes(self) -> int:
        """Bytes of all layers, the whole batch."""
        return sum(layer.num_bytes() for layer in self.layers)


def kv_shape(config) -> dict:
    """The kv heads of a softmax layer and their size."""
    heads = config.num_attention_heads
    return {
        "heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def why_not_static(model, modules, linear, slots) -> str:
    """Why this model cannot decode in static shapes, as far as its parts tell; empty where it can."""
    config = model.config.get_text_config()
    kept = sorted(set(modules) - set(linear))
    softmax = has_softmax(model)
    implementation = getattr(config, "_softmax_implementation", config._attn_implementation)
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    checks = {
        "it has layers that are no attention": len(modules) == config.num_hidden_layers,
        "layers or kv heads keep softmax attention, and no max_length is given": not softmax or slots is not None,
        f"softmax attention in {implementation}: sdpa only": not softmax or implementation == "sdpa",
        f"softmax layers of type {sorted(sliding)}": not kept or not (sliding or getattr(config, "sliding_window", 0)),
        f"dtype {model.dtype}: float32 or bfloat16": model.dtype in (torch.float32, torch.bfloat16),
    }
    for x in (x for x in linear.values() if x.num_heads):
        checks |= {
            f"the {x.feature_map} map: taylor only": x.series == "taylor",
            "a map per query head": x.k_map.shape[0] == x.num_kv_heads,
            f"window {x.window}: 2 or more": x.window >= 2,
            f"map dim {x.q_map.shape[-1]}: up to 32": x.q_map.shape[-1] <= 32,
            f"head dim {x.head_dim}: up to 256": x.head_dim <= 256,
            f"{x.num_heads} query heads, {x.num_kv_heads} kv heads: up to 16 a group": (
                x.num_heads <= 16 * x.num_kv_heads
            ),
        }
    return next((reason for reason, fine in checks.items() if not fine), "")
