"""Generation at full speed: the whole decode step (layers, head, sampling, end of rows) as one CUDA graph.

    decoder = Decoder(model, batch=4, sampling=Sampling(temperature=0.7))
    first = decoder.prefill(input_ids, attention_mask)    # [B] first new tokens
    token = decoder.decode_one()                          # [B] the next
    tokens = decoder.decode_n(100)                        # [B, 100] and no wait for the device

or `generate(model, input_ids, ...)`, which stops at the end of rows. The same code runs without a graph where
a model or machine cannot have one (mode="auto" decides; `decoder.why_eager` says why). Before it is recorded the model
goes through torch.compile, which makes a third of the kernels of it.

B batch, T time, V vocabulary
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from .errors import LinearizeError
from .merged_products import MergedProducts
from .modeling_linearized import CACHE
from .rows import put, take
from .sampling import Sampler, Sampling
from .state import State, read
from .static_cache import NO_END, StaticCache, StaticError

MODES = ("auto", "graph", "static", "eager")
CHECK_EVERY = 16  # tokens between looks at which rows have ended
COMPILE = {"realize_reads_threshold": 0}  # what many kernels read is made once: cos and sin, else anew in every layer
log = logging.getLogger(__name__)


def settle(picked, token, position, finished, last, ends, pad) -> None:
    """Enters the tokens picked, [B], into a Decoder's token, position and finished [B], in place.

    last [B], ends [E], pad: what ends a row, and fills it then. A row that has ended stands still.
    """
    new, at = torch.where(finished, pad, picked), position + ~finished
    at_end = (new[:, None] == ends).any(-1) | (at >= last)
    token.copy_(new)
    position.copy_(at)
    finished.logical_or_(at_end)


class Decoder:
    """Decodes B rows at once, a token of each at a time; can be used again for other prompts.

    mode: "graph" (a CUDA graph over static state), "static" (the same without a graph), "eager" (the model's
    own cache), "auto" (graph on a GPU where the model can, else eager). Raises StaticError where a forced mode
    cannot run. eos, pad: token ids, by default the model's. max_length: the most tokens of a row, prompt
    included; needed for static decoding where layers or kv heads have kept softmax, whose keys then get that much
    room. An unconverted model decodes here too, as one that has kept all layers.

    disable_compile: named as in transformers' GenerationConfig. None: the step of a graph is compiled where it can be
    (else `why_not_compiled` and the log say why not), which takes tens of seconds, `compile_seconds`; False: compiled
    without a graph too, or an error; True: never.
    """

    def __init__(self, model, *, batch: int, sampling: Sampling | None = None, eos=None, pad=None, mode: str = "auto",
                 max_length: int | None = None, disable_compile: bool | None = None):  # fmt: skip
        if mode not in MODES:
            raise LinearizeError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
        if mode == "eager" and disable_compile is False:
            raise LinearizeError("mode='eager' is never compiled; leave disable_compile out")
        self.model, self.device, self.why_eager, self.graph, self.cache = model, model.device, "", None, None
        ends, pad = end_tokens(model, eos, pad)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.sampler = Sampler(sampling or Sampling(), batch=batch, vocabulary=vocabulary, device=self.device)
        self.ends = torch.tensor(ends, dtype=torch.long, device=self.device)
        self.pad = torch.tensor(pad, device=self.device)
        self.token = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.position = torch.zeros(batch, dtype=torch.long, device=self.device)  # of self.token in its row
        self.last = torch.full((batch,), NO_END, device=self.device)  # position at which a row ends in any case
        self.finished = torch.ones(batch, dtype=torch.bool, device=self.device)  # rows that have ended, or never began
        self.logits = None  # [B, V] of the newest step; a graph writes them in place
        self.mask = None  # [B, seen] bool where the model's own cache holds softmax keys
        self.run_model, self.settle, self.compile_seconds, self.why_not_compiled = run_model, settle, None, ""
        self.merged = None  # MergedProducts, where the step is static
        with torch.cuda.device_of(self.token):
            self._choose_mode(mode, batch, max_length, disable_compile)

    def prefill(self, input_ids, attention_mask=None, *, state: State | None = None):
        """Reads prompts [B, T], padded on the left, after `state`; returns the first new tokens [B]."""
        return self.start(read(self.model, input_ids, attention_mask, state=state))

    @torch.no_grad()
    def start(self, state: State):
        """Goes on from a state of B rows, which stays as it is; returns the first new tokens [B]."""
        if len(state) != len(self.token):
            raise LinearizeError(f"a state of {len(state)} rows for a decoder of {len(self.token)}; see State.select")
        if self.is_static:
            self.cache.load(state)
            self.merged.refresh()
        else:
            self.cache, self.mask = state.copy().cache, None if state.is_constant else state.tokens >= 0
        self.position.copy_(state.lengths - 1)
        self.last.fill_(NO_END)
        self.finished.zero_()
        self.sampler.start(state.tokens)
        self._choose(state.logits)
        return self.token.clone()

    def replace(self, slot: int, state: State, *, seed: int = 0, max_new_tokens: int | None = None) -> int:
        """`replace_rows` of a single row."""
        return self.replace_rows([slot], state, seeds=[seed], max_new_tokens=max_new_tokens)[0]

    @torch.no_grad()
    def replace_rows(self, slots: Sequence[int], state: State, *, seeds: Sequence[int],
                     max_new_tokens: int | None = None) -> list[int]:  # fmt: skip
        """Puts other texts, a state of as many rows, into slots, whatever was there; returns their first new tokens.

        seeds: one a row, added to the sampling's. max_new_tokens: after which the rows end by themselves. Raises
        StaticError where static softmax has no room for them.
        """
        if len(state) != len(slots):
            raise LinearizeError(f"a state of {len(state)} rows for {len(slots)} slots; see State.select")
        rows = torch.tensor(list(slots), device=self.device)
        if self.is_static:
            self.cache.load(state, rows, max_new_tokens=max_new_tokens)
            self.merged.refresh()
        else:
            if self.cache is None:
                each = state.select([0] * len(self.token))
                self.cache, self.mask = each.cache, None if state.is_constant else each.tokens >= 0
            self.cache, self.mask = state.put_into(self.cache, self.mask, rows, ~self.finished)
        self.position[rows] = state.lengths - 1
        self.last[rows] = NO_END if max_new_tokens is None else state.lengths + (max_new_tokens - 1)
        self.finished[rows] = False
        self.sampler.start(state.tokens, rows, numbers=seeds)
        self._choose(state.logits, rows)
        return self.token[rows].tolist()

    def decode_one(self):
        """The next token of each row, [B]; pad after a row's end. Does not wait for the device."""
        self._advance()
        return self.token.clone()

    def decode_n(self, n: int):
        """The next n tokens of each row, [B, n]. Does not wait for the device."""
        tokens = self.token.new_empty(len(self.token), n)
        for i in range(n):
            self._advance()
            tokens[:, i] = self.token
        return tokens

    def _advance(self) -> None:
        if self.is_static:
            self.cache.take_slot()
        self.graph.replay() if self.graph else self._step()

    @torch.no_grad()
    def _step(self) -> None:
        """One token of every row through the model, and the choice of the next: what the graph holds."""
        if self.is_static:
            mask = self.cache.open_slot(self.position)
        elif self.mask is None:
            mask = None
        else:
            mask = self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        with self.merged.on() if self.merged else nullcontext():
            self.logits = self.run_model(self.model, self.cache, self.token, self.position, mask)
        self._choose(self.logits, settle=self.settle)

    def _choose(self, logits, rows=None, *, settle=settle) -> None:
        """Takes the next token of these rows, indices (None: all), from logits [rows, V], in place."""
        buffers = self.token, self.position, self.finished
        mine = [take(x, rows) for x in buffers]
        settle(self.sampler.pick(logits, rows), *mine, take(self.last, rows), self.ends, self.pad)
        if rows is not None:  # then they are copies
            for buffer, x in zip(buffers, mine, strict=True):
                put(buffer, rows, x)

    @property
    def is_static(self) -> bool:
        return isinstance(self.cache, StaticCache)

    def _choose_mode(self, mode, batch, max_length, disable_compile) -> None:
        """Sets up static state and graph where wanted; in mode auto says in `why_eager` what was in the way."""
        if mode == "eager":
            return
        try:
            if mode != "static" and self.device.type != "cuda":
                raise StaticError(f"the model is on {self.device.type}; a graph needs a CUDA GPU")
            self.cache = StaticCache(self.model, batch=batch, slots=max_length)
            self.merged = MergedProducts(self.model, self._step)
            if disable_compile is False or (disable_compile is None and mode != "static"):
                self._compile(must=disable_compile is False)
            if mode != "static":
                self._capture()
        except StaticError as error:
            if mode != "auto" or disable_compile is False:
                raise
            self.why_eager, self.graph, self.cache = str(error), None, None
            self.run_model, self.settle, self.compile_seconds, self.merged = run_model, settle, None, None

    def _compile(self, *, must: bool) -> None:
        """Replaces `run_model` and `settle`, each as one graph of torch.compile, and runs them once."""
        from torch._dynamo.exc import TorchDynamoException  # takes seconds

        start = time.perf_counter()
        self.run_model, self.settle = (
            torch.compile(function, fullgraph=True, dynamic=False, options=COMPILE) for function in (run_model, settle)
        )
        try:
            with torch._dynamo.config.patch(recompile_limit=256):  # one for each sort of Decoder in this process
                self._step()
        except TorchDynamoException as error:
            if must:
                raise
            self.run_model, self.settle = run_model, settle
            self.why_not_compiled = str(error).strip().partition("\n")[0]
            log.warning("the decode step is not compiled: %s", self.why_not_compiled)
        else:
            self.compile_seconds = time.perf_counter() - start
            log.info("the decode step was compiled in %.0f s", self.compile_seconds)

    def _capture(self) -> None:
        """Runs the step until its kernels are built, then once without any wait for the host, then records it."""
        stream, before = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
            self._step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                raise StaticError(f"a step of {type(self.model).__name__} waits for the device: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self.graph = graph


def run_model(model, cache, token, position, mask):
    """token, position [B] -> logits [B, V]; the cache moves on. Bound to no Decoder, which would then hold itself."""
    inputs = dict(input_ids=token[:, None], position_ids=position[:, None], attention_mask=mask)
    return model(**inputs, use_cache=True, **{CACHE: cache}).logits[:, -1]


def end_tokens(model, eos=None, pad=None) -> tuple[list[int], int]:
    """(ids that end a row, id that fills it afterwards): as given, else by the model's generation config."""
    settings = model.generation_config
    eos = settings.eos_token_id if eos is None else eos
    ends = [] if eos is None else [eos] if isinstance(eos, int) else [int(x) for x in eos]
    pad = settings.pad_token_id if pad is None else pad
    if pad is None:
        pad = ends[0] if ends else 0
    return ends, pad


def generate(model, input_ids=None, attention_mask=None, *, max_new_tokens: int, sampling: Sampling | None = None,
             eos=None, pad=None, stop_strings=(), tokenizer=None, state: State | None = None, on_tokens=None,
             mode: str = "auto", disable_compile: bool | None = None, decoder: Decoder | None = None):  # fmt: skip
    """New tokens [B, N] after prompts [B, T] (padded on the left) and `state`; pad follows a row's end.

    Greedily the same tokens as `model.generate`. Without input_ids the state alone is continued. stop_strings:
    a row ends with the token that completes one (needs the tokenizer), as in transformers. on_tokens(tokens
    [B, k], on the CPU) is called as they come. disable_compile: of `Decoder`, but that None is True: compiling takes
    longer than it saves in one call. decoder: one made before, whose graph is used again.
    """
    if max_new_tokens < 1:
        raise LinearizeError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if decoder is not None and (sampling, eos, pad, mode, disable_compile) != (None, None, None, "auto", None):
        raise LinearizeError("a decoder brings its own sampling, eos, pad, mode and compilation; give either")
    if stop_strings and tokenizer is None:
        raise LinearizeError("stop_strings need the tokenizer")
    if input_ids is None and state is None:
        raise LinearizeError("nothing to continue: give input_ids, a state or both")
    if input_ids is not None:
        state = read(model, input_ids, attention_mask, state=state)
    if decoder is None:
        length = state.tokens.shape[1] + max_new_tokens + CHECK_EVERY
        decoder = Decoder(
            model, batch=len(state), sampling=sampling, eos=eos, pad=pad, mode=mode, max_length=length,
            disable_compile=True if disable_compile is None else disable_compile,
        )  # fmt: skip
    rows = _Rows(decoder, stop_strings, tokenizer)
    every = 1 if decoder.graph is None else CHECK_EVERY
    for tokens in stream(decoder, decoder.start(state), max_new_tokens, every=every):
        new = rows.add(tokens)
        if on_tokens is not None and new.shape[1]:
            on_tokens(new)
        if rows.all_ended:
            break
    return torch.cat(rows.tokens, 1).to(decoder.device)


def stream(decoder: Decoder, first, max_new_tokens: int, *, every: int = CHECK_EVERY):
    """Yields all new tokens as [B, k] on the CPU. On a GPU one more piece is always under way while one is read."""
    waiting, left = _to_cpu(first[:, None]), max_new_tokens - 1
    while left > 0:
        n = min(every, left)
        if decoder.graph is None:  # nothing to overlap: look first, so that no step is run in vain
            yield waiting()
            waiting = _to_cpu(decoder.decode_n(n))
        else:
            ahead = _to_cpu(decoder.decode_n(n))
            yield waiting()
            waiting = ahead
        left -= n
    yield waiting()


def _to_cpu(tokens):
    """Starts a copy and returns a function that waits for it."""
    if not tokens.is_cuda:
        return lambda: tokens
    copied = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    event = torch.cuda.current_stream(tokens.device).record_event()

    def wait():
        event.synchronize()
        return copied

    return wait


def has_stop(answer: list[int], stop_strings: Sequence[str], tokenizer, *, new: int = 1) -> bool:
    """Whether the newest of an answer's token ids, `new` of them, complete one of the texts."""
    if not stop_strings:
        return False
    longest = max(len(s.encode()) for s in stop_strings)
    tail = tokenizer.decode(answer[-longest - 7 - new :])  # a token is at least a byte; 8 for what goes before
    return any(s in tail for s in stop_strings)


class _Rows:
    """The host's account of what has come and which rows have ended."""

    def __init__(self, decoder: Decoder, stop_strings, tokenizer):
        self.stop_strings, self.tokenizer, self.tokens = list(stop_strings), tokenizer, []
        self.ends, self.pad = set(decoder.ends.tolist()), decoder.pad.item()
        self.answers = [[] for _ in range(len(decoder.token))]  # without padding
        self.ended = [False] * len(decoder.token)

    def add(self, tokens):
        """Takes tokens [B, k]; returns them with what lies beyond a row's end filled, and cut where all have ended."""
        tokens, used = tokens.clone(), 0
        for r, row in enumerate(tokens.tolist()):
            for i, token in enumerate(row):
                if self.ended[r]:
                    tokens[r, i:] = self.pad
                    break
                self.answers[r].append(token)
                self.ended[r] = token in self.ends or has_stop(self.answers[r], self.stop_strings, self.tokenizer)
                used = max(used, i + 1)
        tokens = tokens[:, :used]
        self.tokens.append(tokens)
        return tokens

    @property
    def all_ended(self) -> bool:
        return all(self.ended)
