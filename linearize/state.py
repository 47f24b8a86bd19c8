"""What a model remembers of a text, as a value: read a document once, ask about it many times, on any day.

    state = read(model, input_ids)                     # in chunks, so that any length fits
    state.save("book.safetensors", model, tokenizer)   # a few MB, whatever the length
    state = State.load("book.safetensors", model, tokenizer)
    decoder.start(state.select([0] * 8))               # eight copies of one row

B batch, T time, V vocabulary
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from linearize_kernels.state import State as LayerState

from .errors import LinearizeError
from .kept_softmax import has_softmax
from .linearized_cache import LinearizedCacheLayer
from .modeling_linearized import CACHE

CHUNK = 4096  # tokens of a row that go through the model at once
TOKENS_AT_ONCE = 32768  # tokens of all rows that do
FORMAT = "linearize state 2"
_SAMPLES = 4096  # numbers of each weight that go into the fingerprint
MASK_AT_ONCE = 2**27  # query-key pairs, of all rows (and heads, where scores are written out), that do in softmax
_LAYER_FIELDS = tuple(f.name for f in fields(LayerState))
_KEPT = {"kept_keys": "keys", "kept_values": "values"}  # of a converted layer's kept heads
_GROWING = ("keys", "values", *_KEPT)


class StateError(LinearizeError):
    """A saved state is damaged, belongs to another model or tokenizer, or cannot be written."""


@dataclass
class State:
    """A batch of texts as the model remembers them, and what it expects next. Never changed in place."""

    cache: Cache
    logits: torch.Tensor  # [B, V] for the next token
    tokens: torch.Tensor  # [B, T] int64, -1 where there is none (padding)

    @property
    def lengths(self) -> torch.Tensor:
        """[B] tokens read, padding left out: the position of the next one."""
        return (self.tokens >= 0).sum(-1)

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self) -> "State":
        """Another State whose cache the model may go on with: it replaces tensors and changes none."""
        cache = copy.copy(self.cache)
        cache.layers = [_with_tensors(x, _tensors(x)) if _is_known(x) else copy.deepcopy(x) for x in cache.layers]
        return State(cache, self.logits, self.tokens)

    def select(self, rows: Sequence[int]) -> "State":
        """These rows, as often as they are named: [0, 0, 0] makes three of the first, and takes no memory."""
        rows = list(rows)
        index = torch.tensor(rows, device=self.tokens.device)

        def pick(x):
            if set(rows) == {rows[0]}:
                return x[rows[0]].expand(len(rows), *x.shape[1:])
            return x.index_select(0, index)

        return State(_copy_cache(self.cache, pick), pick(self.logits), pick(self.tokens))

    @property
    def is_one_row(self) -> bool:
        """Whether it is a single text, be it many times over, as `select` makes it."""
        return len(self) == 1 or self.tokens.stride(0) == 0

    def with_width(self, width: int) -> "State":
        """The same with `width` columns, T: padding on the left comes or goes. What is cut off is forgotten."""
        cache = copy.copy(self.cache)
        cache.layers = [_with_width(layer, width) for layer in cache.layers]
        return State(cache, self.logits, _pad_or_cut(self.tokens, width, dim=1, value=-1))

    def put_into(self, cache: Cache, mask, rows, going) -> tuple:
        """Another (cache, mask) of the same model, with this state's rows in the place of its `rows`, indices.

        mask [B, S] bool: which columns of softmax layers are tokens of a row; None where nothing is softmax. They
        become as many as the longest row needs, of these and those that are `going` [B] bool.
        """
        mine, new = self, copy.copy(cache)
        if mask is not None:
            others = going.index_fill(0, rows, False)
            width = int(max(_columns(self.tokens >= 0).max(), (_columns(mask) * others).max()))
            mine, new.layers = self.with_width(width), [_with_width(layer, width) for layer in cache.layers]
            mask = _pad_or_cut(mask, width, dim=1).index_copy(0, rows, mine.tokens >= 0)
        pairs = zip(new.layers, mine.cache.layers, strict=True)
        new.layers = [
            _with_tensors(x, {n: t.index_copy(0, rows, _tensors(own)[n]) for n, t in _tensors(x).items()})
            for x, own in pairs
        ]
        return new, mask

    @staticmethod
    def join(states: Sequence["State"]) -> "State":
        """The rows of several states in one."""
        if len(states) == 1:
            return states[0]
        width = max(s.tokens.shape[1] for s in states)
        states = [s if s.tokens.shape[1] == width else s.with_width(width) for s in states]
        cache = copy.copy(states[0].cache)
        cache.layers = [_join_layers(layers) for layers in zip(*(s.cache.layers for s in states), strict=True)]
        return State(cache, torch.cat([s.logits for s in states]), torch.cat([s.tokens for s in states]))

    @property
    def is_constant(self) -> bool:
        """Whether its size is independent of the text's length: every head of every layer is linear."""
        return all(isinstance(x, LinearizedCacheLayer) and not x.kept.is_initialized for x in self.cache.layers)

    def num_bytes(self, width: int | None = None) -> int:
        """Bytes of the layers' memory, the whole batch; width: as if so many tokens had been read."""
        layers = self.cache.layers
        if width is not None:
            layers = [_with_width(layer, width) for layer in _copy_cache(self.cache, lambda x: x.to("meta")).layers]
        return sum(x.numel() * x.element_size() for layer in layers for x in _tensors(layer).values())

    def save(self, path, model, tokenizer=None) -> None:
        """Writes a safetensors file that knows which model (and tokenizer) it belongs to.

        Raises StateError where it cannot be written.
        """
        tensors = {"logits": self.logits, "tokens": self.tokens}
        for index, layer in enumerate(self.cache.layers):
            tensors |= {f"layers.{index}.{name}": x for name, x in _tensors(layer).items()}
        seen = [layer.get_seq_length() for layer in self.cache.layers]
        metadata = {"format": FORMAT, "model": fingerprint(model), "seen": json.dumps([int(x) for x in seen])}
        if tokenizer is not None:
            metadata["tokenizer"] = tokenizer_fingerprint(tokenizer)
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        try:
            save_file(tensors, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} cannot be written: {error}. Give another file.") from error

    @classmethod
    def load(cls, path, model, tokenizer=None) -> "State":
        """Reads a saved state to the model's device. Raises StateError where it is not this model's."""
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} is not a saved state: {error}") from error
        _check(path, metadata, model, tokenizer)
        cache = make_cache(model)
        for index, (layer, seen) in enumerate(zip(cache.layers, json.loads(metadata["seen"]), strict=True)):
            start = f"layers.{index}."
            mine = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            _fill(layer, mine, seen, model.dtype)
        return cls(cache, tensors["logits"], tensors["tokens"])


@torch.no_grad()
def read(model, input_ids, attention_mask=None, *, state: State | None = None, chunk: int = CHUNK) -> State:
    """Reads texts after what `state` has read (None: nothing). The given state stays as it is.

    input_ids, attention_mask [B, T], padded on the left. A state of one row stands for any number of rows.
    Raises LinearizeError for an empty or right-padded row, and for a padded one after a state.
    """
    input_ids = input_ids.to(model.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(model.device)
    if input_ids.shape[1] == 0 or not bool(mask[:, -1].all()):
        raise LinearizeError("every row must end in a token: pad on the left, and give no empty row")
    if state is not None and not bool(mask.all()):
        raise LinearizeError(
            "padding between a state and what follows would narrow the window: read texts of one length together, or "
            "one by one, and join them with State.join"
        )
    if state is not None and len(state) != len(input_ids):
        if len(state) != 1:
            raise LinearizeError(f"{len(input_ids)} texts after a state of {len(state)} rows")
        state = state.select([0] * len(input_ids))
    past = 0 if state is None else state.tokens.shape[1]
    rows, chunk = _tokens_at_once(model, len(input_ids), input_ids.shape[1], past, chunk)
    parts = []
    for start in range(0, len(input_ids), rows):
        some = range(start, min(start + rows, len(input_ids)))
        before = None if state is None else state.select(some)
        parts.append(_read_rows(model, input_ids[start : start + rows], mask[start : start + rows], before, chunk))
    return State.join(parts)


def _tokens_at_once(model, batch: int, length: int, past: int, chunk: int) -> tuple[int, int]:
    """(rows, tokens of each) that go through the model at once, so that no tensor grows with batch or length alone.

    Where anything is softmax, every token meets all before it: the longer the text, the fewer tokens.
    """
    chunk = max(1, min(chunk, length))
    rows = min(batch, max(1, TOKENS_AT_ONCE // chunk))
    if not all(_is_known(layer) for layer in make_cache(model).layers):
        rows = batch  # not every other kind of cache can be joined again
    config = model.config.get_text_config()
    if has_softmax(model):
        implementation = getattr(config, "_softmax_implementation", config._attn_implementation)
        heads = config.num_attention_heads if implementation == "eager" else 1
        chunk = max(1, min(chunk, MASK_AT_ONCE // (rows * heads * (past + length))))
    return rows, chunk


def _read_rows(model, input_ids, mask, before, chunk) -> State:
    cache = make_cache(model) if before is None else before.cache  # select() made it ours
    old = mask[:, :0] if before is None else (before.tokens >= 0).to(mask.dtype)
    mask, num_old = torch.cat([old, mask], 1), old.shape[1]
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    for start in range(0, input_ids.shape[1], chunk):
        stop = min(start + chunk, input_ids.shape[1])
        out = model(
            input_ids=input_ids[:, start:stop], attention_mask=mask[:, : num_old + stop],
            position_ids=position_ids[:, num_old + start : num_old + stop], use_cache=True, **{CACHE: cache},
            logits_to_keep=1,
        )  # fmt: skip
    tokens = input_ids.masked_fill(mask[:, num_old:] == 0, -1)
    if before is not None:
        tokens = torch.cat([before.tokens, tokens], 1)
    return State(cache, out.logits[:, -1].clone(), tokens)


def make_cache(model) -> Cache:
    """An empty cache of the model's own kind, converted or not."""
    return model.make_cache() if hasattr(model, "make_cache") else DynamicCache(config=model.config)


def fingerprint(model) -> str:
    """Of the config and a sample of every weight, in bfloat16, so that a model loaded in another dtype is the same."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map", "architectures")
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """Of the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _check(path, metadata, model, tokenizer) -> None:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise StateError(f"{path} is not a saved state of this version ({FORMAT}), but {found!r}; read the text again")
    if metadata["model"] != fingerprint(model):
        raise StateError(
            f"{path} was saved by another model (other weights or config). Load the model that read the text, "
            "or read the text again."
        )
    expected = metadata.get("tokenizer")
    if tokenizer is not None and expected is not None and expected != tokenizer_fingerprint(tokenizer):
        raise StateError(f"{path} was saved with another tokenizer, whose token ids mean other text")


def _is_known(layer) -> bool:
    return isinstance(layer, LinearizedCacheLayer | DynamicLayer)


def _tensors(layer) -> dict[str, torch.Tensor]:
    """What a cache layer holds, by name."""
    if isinstance(layer, LinearizedCacheLayer):
        kept = {name: getattr(layer.kept, theirs) for name, theirs in _KEPT.items() if layer.kept.is_initialized}
        return {name: getattr(layer.state, name) for name in _LAYER_FIELDS} | kept
    if isinstance(layer, DynamicLayer):
        return {"keys": layer.keys, "values": layer.values}
    raise StateError(f"a {type(layer).__name__} cannot be copied or saved; softmax and converted layers can")


def _fill(layer, tensors, seen: int, dtype) -> None:
    """The reverse of `_tensors`, for an empty layer."""
    exact = ("sink_k", "sink_v", "ring_k", "ring_v", "ring_far", *_GROWING)
    tensors = {name: x.to(dtype) if name in exact else x for name, x in tensors.items()}
    if isinstance(layer, LinearizedCacheLayer):
        kept = {theirs: tensors.pop(name) for name, theirs in _KEPT.items() if name in tensors}
        if kept:
            _fill(layer.kept, kept, seen, dtype)
        layer.state, layer.is_initialized, layer.num_seen = LayerState(**tensors), True, seen
        layer.num_in_ring = min(seen, layer.state.ring_valid.shape[1])
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if layer.is_sliding:
        layer.cumulative_length = seen


def _with_tensors(layer, tensors):
    """The same layer with other tensors; neither's changes reach the other."""
    new, tensors = copy.copy(layer), dict(tensors)
    if isinstance(layer, LinearizedCacheLayer):
        kept = {theirs: tensors.pop(name) for name, theirs in _KEPT.items() if name in tensors}
        new.kept = _with_tensors(layer.kept, kept) if kept else copy.copy(layer.kept)
        new.state = LayerState(**tensors)
    else:
        new.keys, new.values = tensors["keys"], tensors["values"]
    return new


def _with_width(layer, width: int):
    """The layer with so many columns of keys and values, the oldest cut off or zeros put before them."""
    columns = min(width, layer.sliding_window - 1) if layer.is_sliding else width
    tensors = _tensors(layer)
    new = _with_tensors(
        layer, {n: _pad_or_cut(x, columns, dim=2) if n in _GROWING else x for n, x in tensors.items()}
    )
    if isinstance(layer, LinearizedCacheLayer):
        new.num_seen = width
    elif layer.is_sliding:
        new.cumulative_length = width
    return new


def _pad_or_cut(x, size: int, *, dim: int, value=0):
    """x with `size` along `dim`, made so at the left end."""
    ends = [0, 0] * (x.ndim - dim - 1) + [size - x.shape[dim], 0]
    return torch.nn.functional.pad(x, ends, value=value)


def _columns(mask):
    """[B, S] bool -> [B] columns from a row's first token on."""
    return mask.shape[1] - mask.int().argmax(-1)


def _copy_cache(cache: Cache, function) -> Cache:
    new = copy.copy(cache)
    new.layers = [_with_tensors(x, {n: function(t) for n, t in _tensors(x).items()}) for x in cache.layers]
    return new


def _join_layers(layers):
    parts = [_tensors(layer) for layer in layers]
    joined = _with_tensors(layers[0], {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    if isinstance(joined, LinearizedCacheLayer):
        joined.num_in_ring = min(layer.num_in_ring for layer in layers)
    return joined
