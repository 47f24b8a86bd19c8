"""Plain `model.generate` over the static decode step: a cache that runs the step itself, as one CUDA graph.

    cache = GraphCache(model, batch=1)              # the graph is made once, and serves one text after another
    model.generate(ids, past_key_values=cache)      # transformers' own loop, processors, criteria and streamers
    cache.reset()                                   # else the next call goes on with the same text

Since transformers 5.24 the argument is called `cache`. `model.generate(ids, cache_implementation="static")` makes one
and keeps it with the model.

B batch, T time, V vocabulary
"""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .decoding import Decoder
from .linearized_cache import CacheError
from .modeling_linearized import CACHE
from .sampling import Sampling
from .state import read


class GraphCache(Cache):
    """The memory of B rows for `generate`, greedy or sampled. mode, max_length, disable_compile: of `Decoder`.

    Raises StaticError where the model or the machine cannot have the mode. Beams and assisted decoding, which change
    or take back rows, are refused.
    """

    is_linear = (False,)  # so that generate leaves what has been read already out of a prompt

    def __init__(self, model, *, batch: int = 1, max_length: int | None = None, mode: str = "graph",
                 disable_compile: bool | None = None):  # fmt: skip
        super().__init__(layers=[])
        unused = Sampling(seed=0)  # generate chooses tokens itself; no draw of its random numbers is taken
        self.decoder = Decoder(model, batch=batch, sampling=unused, eos=[], mode=mode, max_length=max_length,
                               disable_compile=disable_compile)  # fmt: skip
        self.max_length = max_length
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        self.seen, self.state = 0, None  # state: of what has been read, until a step goes beyond it

    def __reduce__(self):
        """A copy of a model begins without one: graphs cannot be copied."""
        return type(None), ()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @torch.no_grad()
    def run_model(self, model, *, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **_):
        """The model's forward over this cache: logits [B, 1, V] after the last of new tokens [B, T].

        Several tokens are read in chunks as long as no step has been made, afterwards one by one.
        """
        batch = len(self.decoder.token)
        if model is not self.decoder.model:
            raise CacheError("this GraphCache was made for another model")
        if input_ids is None or input_ids.shape[0] != batch:
            given = "inputs_embeds" if input_ids is None else f"{input_ids.shape[0]} rows"
            raise CacheError(f"a GraphCache of {batch} rows takes input_ids of as many, not {given}; see its `batch`")
        length = input_ids.shape[1]
        if length > 1 and logits_to_keep != 1:
            raise CacheError("a GraphCache gives the logits of the last token alone: it is for model.generate")
        new = None if attention_mask is None else attention_mask[:, -length:]
        if self.seen == 0 or (self.state is not None and length > 1):
            self._check_positions(new, position_ids)
            self.state = read(model, input_ids, new, state=self.state)
            self.decoder.start(self.state)
            logits = self.state.logits
        else:
            if length > 1 and new is not None and not new.all():
                raise CacheError("padding between what a GraphCache has read and what follows")
            self.state = None
            for token in input_ids.unbind(1):
                self.decoder.token.copy_(token)
                self.decoder.decode_one()
            logits = self.decoder.logits.clone()
        self.seen += length
        return CausalLMOutputWithPast(logits=logits[:, None], **{CACHE: self})

    def _check_positions(self, mask, position_ids) -> None:
        """Raises CacheError for other positions than each row's count of tokens."""
        if position_ids is None or self.seen:
            return
        mask = torch.ones_like(position_ids) if mask is None else mask
        wrong = (position_ids != mask.cumsum(-1) - 1) & mask.bool()
        if wrong.any():
            raise CacheError("a GraphCache counts positions itself; leave position_ids out")

    def _refuse(self, *_):
        raise CacheError("a GraphCache cannot reorder, repeat or take back rows: beams and assisted decoding need "
                         f"the model's own cache; leave {CACHE} and cache_implementation out")  # fmt: skip

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop = activate_past_recording = _refuse


def graph_cache_of(model, *, batch: int, max_length: int, disable_compile: bool | None) -> GraphCache:
    """An empty GraphCache for rows of so many tokens: that of the last call where it fits."""
    kept, cache = getattr(model, "_graph_cache", None) or (None, None)
    if cache is None or kept != (batch, _places(model), disable_compile) or cache.max_length < max_length:
        model._graph_cache = cache = None  # the old one's memory first
        cache = GraphCache(model, batch=batch, max_length=max_length, disable_compile=disable_compile)
        model._graph_cache = (batch, _places(model), disable_compile), cache  # a decoder may move weights
    cache.reset()
    return cache


def _places(model) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]
