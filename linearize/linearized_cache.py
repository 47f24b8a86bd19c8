"""The cache of a converted layer in transformers' terms: one `State`, of constant size, for its linear heads.

Where a layer keeps some kv heads in softmax, those heads' keys and values are held beside it, and grow.
"""

import importlib
from dataclasses import replace

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation import GenerationMode

DRAFT_SLOTS = 128  # newest tokens that can be taken back again while assisted decoding is on


class CacheError(ValueError):
    """A cache or mask that converted layers cannot work with was handed to the model."""


class LinearizedCacheLayer(CacheLayerMixin):
    """Holds a layer's `State` between calls, and in `kept` the keys and values of heads kept in softmax, if any.

    Its own `keys` and `values` stay None: of the linear heads nothing grows with the text.
    """

    is_sliding = False  # masks for the full-attention layers a model has kept may be sized by this layer
    supports_early_init = False
    is_compileable = False

    def __init__(self):
        super().__init__()
        self.state = None
        self.num_seen = 0  # slots, padding included
        self.num_extra = 0  # ring slots beyond the window, kept so that tokens can be cropped
        self.num_in_ring = 0  # slots of the ring that hold something
        self.kept = DynamicLayer()  # keys and values [B, kept kv heads, S, D]
        self.log_decay = None  # [M] of the layer that fills this cache, where it has one

    def attend(self, linear_attn, q, k, v, **options):
        """Output [B, H, T, V] of `linear_attn` for new tokens after what this cache holds; remembers them."""
        self.is_initialized = True
        if self.state is None and (self.num_extra or not linear_attn.num_heads):  # else from nothing, which is faster
            self.state = linear_attn.empty_state(k, v, extra=self.num_extra)
        self.log_decay = linear_attn.log_decay
        out, self.state = linear_attn(q, k, v, state=self.state, return_state=True, **options)
        self.num_seen += q.shape[2]
        self.num_in_ring = min(self.num_in_ring + q.shape[2], self.state.ring_valid.shape[1])
        return out

    def update_kept(self, k, v):
        """Adds the kept heads' new k, v [B, ., T, D]; returns all of them [B, ., S, D]."""
        return self.kept.update(k, v)

    def activate_past_recording(self) -> None:
        """Makes room for taking back up to DRAFT_SLOTS tokens (assisted decoding, prompt lookup)."""
        if self.num_extra:
            return
        self.num_extra = DRAFT_SLOTS
        if self.state is not None:
            self.state = self.state.with_more_ring(DRAFT_SLOTS)

    @property
    def is_croppable(self) -> bool:
        return self.num_extra > 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest -tokens_to_remove slots (zero or negative, as in transformers)."""
        count = -tokens_to_remove
        if count < 0:
            raise CacheError("crop takes the number of tokens to remove as a negative number")
        if count == 0 or self.state is None:
            return
        needed = self.state.ring_valid.shape[1] - self.num_extra  # slots that the next token's window sees
        if self.num_seen > self.num_in_ring and self.num_in_ring - count < needed:
            raise CacheError(
                f"cannot take back {count} tokens: only {self.num_in_ring - needed} newest ones are kept "
                "apart. Call activate_past_recording() on the cache before running the tokens, and draft at "
                f"most {DRAFT_SLOTS} at a time (num_assistant_tokens, prompt_lookup_num_tokens)."
            )
        self.state = self.state.crop(count)
        if self.kept.is_initialized:  # transformers before 5.18 crops what is not there
            self.kept.crop(-count)
        if self.log_decay is not None:  # the sum is weighted as seen from the next token, now an earlier one
            undo = torch.exp((-count * self.log_decay.detach().float()).clamp_max(80))[:, None, None]
            self.state = replace(self.state, total=self.state.total * undo)
        self.num_seen -= count
        self.num_in_ring -= count

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise CacheError("a converted layer's cache is filled by its own attention, see LinearizedCacheLayer.attend")

    def update(self, key_states, value_states, *args, **kwargs):
        raise CacheError(
            "this cache belongs to converted layers, but a softmax layer wrote to it: the cache was made for "
            "another model. Let the model make its own: model.make_cache()."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.num_seen, 0

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def _map(self, function) -> None:
        if self.state is not None:
            self.state = self.state.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))
        self.kept.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))
        self.kept.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])
        self.kept.batch_select_indices(indices)

    def offload(self) -> None:
        if self.state is not None:
            self.device = self.state.total.device
            self._map(lambda t: t.to("cpu", non_blocking=True))
            self.kept.offload()

    def prefetch(self) -> None:
        if self.state is not None and self.state.total.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))
            self.kept.prefetch()

    def reset(self) -> None:
        self.state, self.num_seen, self.num_in_ring, self.is_initialized = None, 0, 0, False
        self.kept = DynamicLayer()

    def num_bytes(self) -> int:
        """Bytes held, the whole batch."""
        if self.state is None:
            return 0
        kept = (self.kept.keys, self.kept.values) if self.kept.is_initialized else ()
        return self.state.num_bytes() + sum(t.nbytes for t in kept)


def chosen_cache(model, generation_config, mode, batch_size: int, max_length: int):
    """The empty cache that `model.generate` has been asked for; the arguments are transformers'."""
    kind = generation_config.cache_implementation
    if kind in (None, "dynamic"):
        return model.make_cache()
    if kind != "static":
        raise CacheError(
            f"cache_implementation={kind!r}: a converted model has its own cache, of constant size. Leave it out, or "
            "choose 'static' for the whole step in one CUDA graph."
        )
    if not __name__.startswith("linearize."):
        raise CacheError(
            "cache_implementation='static' needs linearize: import linearize before from_pretrained, and leave "
            "trust_remote_code out"
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation_config.is_assistant:
        raise CacheError("cache_implementation='static' is for greedy search and sampling; leave it out for others")
    make = importlib.import_module("linearize.graph_cache").graph_cache_of
    batch = batch_size * generation_config.num_return_sequences
    return make(model, batch=batch, max_length=max_length, disable_compile=generation_config.disable_compile)
