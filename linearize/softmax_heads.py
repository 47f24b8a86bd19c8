"""The softmax that stays: the base model's own attention function, for a whole layer or for some of its kv heads.

B batch, T time, S keys, H query heads, G kv heads, D head dim
"""

import sys

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def softmax_function(module):
    """The attention function the base model would call in this module."""
    implementation = module.config._softmax_implementation
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for cls in type(module).__mro__:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError(f"{type(module).__name__}: no eager_attention_forward beside it, so it is not supported")


def teacher_attention(module, query, key, value, attention_mask, scaling=None, observer=None, **kwargs):
    """The base model's own softmax; `observer`, if given, sees what went in and came out, layer by layer.

    observer(module, q, k, v, out [B, T, H, D], *, scaling, softcap, sink_logits, sliding_window, attend), where
    attend(values [B, G, T, D]) is the same attention to other values.
    """
    softmax = softmax_function(module)

    def attend(values):
        return softmax(module, query, key, values, attention_mask, scaling=scaling, **kwargs)

    out, weights = attend(value)
    if observer is not None:
        observer(
            module, query, key, value, out, scaling=scaling_of(query, scaling), softcap=kwargs.get("softcap"),
            sink_logits=kwargs.get("s_aux"), sliding_window=kwargs.get("sliding_window"),
            attend=lambda values: attend(values)[0],
        )  # fmt: skip
    return out, weights


def scaling_of(query, scaling):
    """The factor of q·k, where an attention function may leave it out."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


class HeadSplit:
    """Which kv heads of a layer, each with its query heads, are linear and which are kept in softmax.

    num_heads, num_kv_heads: of the whole layer. kept: kv heads, from 0. Raises ValueError for heads that are not there.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, kept=()):
        wrong = sorted(set(kept) - set(range(num_kv_heads)))
        if wrong or len(set(kept)) < len(kept):
            raise ValueError(f"kept kv heads {list(kept)}: each once, of 0 to {num_kv_heads - 1}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.kept = tuple(sorted(kept))
        self.linear = tuple(g for g in range(num_kv_heads) if g not in kept)
        self._indices = {}  # device -> index tensors, made once: no copy to a GPU in every call

    @property
    def num_linear(self) -> tuple[int, int]:
        """Query heads and kv heads that are linear."""
        return len(self.linear) * (self.num_heads // self.num_kv_heads), len(self.linear)

    def linear_part(self, *tensors, dim: int = 1) -> list:
        """The linear heads of tensors with H or G heads along `dim`; a None stays None."""
        return [self._take(x, self.linear, dim) for x in tensors]

    def kept_part(self, *tensors, dim: int = 1) -> list:
        """The kept heads of tensors with H or G heads along `dim`; a None stays None."""
        return [self._take(x, self.kept, dim) for x in tensors]

    def merge(self, linear, kept):
        """[B, T, linear query heads, D] and [B, T, kept query heads, D] -> [B, T, H, D] in the layer's order."""
        if not self.linear:
            return kept
        order = self._index("merge", self.linear + self.kept, linear.device)
        return torch.cat([linear, kept], 2).index_select(2, order)

    def _take(self, x, groups, dim):
        if x is None or len(groups) == self.num_kv_heads:
            return x
        assert x.shape[dim] in (self.num_heads, self.num_kv_heads), "neither query heads nor kv heads"
        kind = "query" if x.shape[dim] == self.num_heads else "kv"
        return x.index_select(dim, self._index(kind, groups, x.device))

    def _index(self, kind, groups, device):
        if (kind, groups, device) not in self._indices:
            ratio = self.num_heads // self.num_kv_heads
            heads = list(groups) if kind == "kv" else [g * ratio + r for g in groups for r in range(ratio)]
            index = torch.tensor(heads, dtype=torch.long, device=device)
            self._indices[kind, groups, device] = index.argsort() if kind == "merge" else index
        return self._indices[kind, groups, device]

    def __deepcopy__(self, memo):
        return self  # nothing in it changes


def kept_attention(module, heads: HeadSplit, query, key, value, attention_mask, cache_layer, **kwargs):
    """Softmax over the kept heads: query [B, H, T, D], key, value [B, G, T, D] of the whole layer -> [B, T, ., D].

    cache_layer: the layer's cache, which holds the kept heads' keys and values, or None. attention_mask and kwargs are
    what the base model would hand to its attention function.
    """
    query, key, value = heads.kept_part(query, key, value)
    if cache_layer is not None:
        key, value = cache_layer.update_kept(key, value)
    part, sink_logits = module, kwargs.get("s_aux")
    if sink_logits is not None:
        names = [name for name, p in module.named_parameters(recurse=False) if p is sink_logits]
        (kwargs["s_aux"],) = heads.kept_part(sink_logits, dim=0)
        part = _PartOf(module, dict.fromkeys(names, kwargs["s_aux"]))
    return softmax_function(module)(part, query, key, value, attention_mask, **kwargs)[0]


class _PartOf:
    """An attention module in which some parameters are those of the kept heads: eager functions read them there."""

    def __init__(self, module, own: dict):
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)
