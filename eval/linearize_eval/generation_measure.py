"""One cell of `linearize bench generation`: a side at a prompt length and a batch, timed.

Both sides decode by the same code (`linearize.Decoder`): on a GPU the step compiled and in one CUDA graph, greedy, no
end of rows. Kernels are built, tested and captured before the clock starts; `setup_s` says how long that took. One row
is read and its memory copied to the batch: what the tokens are does not change a step's time.

B batch, T prompt tokens, D head dim
"""

import gc
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from linearize.decoding import Decoder
from linearize.errors import LinearizeError
from linearize.linearized_cache import LinearizedCacheLayer
from linearize.modeling_linearized import linear_attentions
from linearize.state import CHUNK, TOKENS_AT_ONCE, State, read

from .generation_models import is_converted, weight_bytes
from .generation_profile import PROFILED, print_profile
from .memory import kv_cache_bytes

MAX_BATCH = 8192
FOLD = 32  # as in linearize_kernels.decode, which needs Triton
WARMUP = 4  # steps before the clock starts
SLOTS = 64  # the teacher's slots are a multiple, so that no mask has to be padded; skipped tokens too
_SPARE = 2.5e9  # bytes of a GPU left alone when the largest batch is sought: activations, kernels, the graph


@dataclass(frozen=True)
class Cell:
    """What to measure."""

    side: str  # converted, teacher-static or teacher-dynamic
    prompt: int  # tokens; 0: one, with which every text begins
    new: int
    batch: int
    steps: int | None = None  # steps timed, in the middle of the new tokens; None: all
    made_up: bool = False  # decode from random memory of the right size, with nothing read
    disable_compile: bool | None = None  # of Decoder
    profile: bool = False  # also print what the kernels of a step take


@dataclass
class Result:
    """One line of the table; None where the batch did not fit, or nothing was read."""

    side: str
    prompt: int
    new: int
    batch: int
    steps: int = 0  # timed
    prefill_tokens_s: float | None = None
    decode_ms: float | None = None  # a step
    decode_tokens_s: float | None = None
    total_tokens_s: float | None = None  # new tokens over prefill (at its measured rate) and decode (at its own)
    roofline_percent: float | None = None  # time of a step's bytes at the measured copy rate, over its time
    bytes_a_row: int | None = None  # state or KV cache
    peak_gb: float | None = None  # GPU: allocated while decoding; CPU: resident, of the process since loading
    resident_gb: float | None = None  # CPU: resident after decoding
    setup_s: float | None = None  # before the clock of decoding starts: reading, kernels, capture
    how: str = ""  # graph, static or eager, with the reason; the teacher's softmax


@torch.no_grad()
def measure(model, cell: Cell, rate: float) -> Result:
    """Prefill and decode of one cell. Raises torch.OutOfMemoryError where it does not fit."""
    cuda, steps = model.device.type == "cuda", min(cell.steps or cell.new - 1, cell.new - 1)
    skipped = (cell.new - 1 - steps) // 2 // SLOTS * SLOTS  # the timed steps stand in the middle of all, nearly
    result = Result(cell.side, cell.prompt, cell.new, cell.batch, steps)
    reset_peak(model.device)
    start, length = time.perf_counter(), max(1, cell.prompt + skipped)
    if cell.made_up:
        state = made_up_state(model, length)
    else:
        ids = _tokens(model, 1, length)
        state, seconds = _timed(model, lambda: _read(model, ids))
        if cell.prompt:
            result.prefill_tokens_s = _prefill_rate(model, cell) if cuda else ids.numel() / seconds
    if cuda:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
    profiled = PROFILED * cell.profile
    length = -(-(length + steps + WARMUP + profiled + 1) // SLOTS) * SLOTS
    words, context = "", nullcontext()
    if cuda and not is_converted(model):
        from .softmax_choice import use_fastest

        growing = cell.side == "teacher-dynamic"
        words, context = use_fastest(model, batch=cell.batch, slots=length, growing=growing)
        free_memory()
    with context:
        decoder = Decoder(model, batch=cell.batch, eos=[], mode=_mode(cell.side, cuda), max_length=length,
                          disable_compile=cell.disable_compile)  # fmt: skip
        decoder.start(state.select([0] * cell.batch) if cell.batch > 1 else state)
        del state
        decoder.decode_n(WARMUP)
        _wait(model)
        result.setup_s = time.perf_counter() - start
        _, seconds = _timed(model, lambda: decoder.decode_n(steps))
        if cell.profile:
            print_profile(decoder)
    result.how = "; ".join(filter(None, [_how(decoder), words, "memory made up" * cell.made_up]))
    _fill_in(result, model, decoder.cache, seconds / steps, skipped, rate)
    return result


def _fill_in(result: Result, model, cache, step_seconds: float, skipped: int, rate: float) -> None:
    """The figures that follow from the time of a step and the bytes of the cache."""
    batch, new = result.batch, result.new
    result.bytes_a_row = cache_bytes(cache) // batch
    result.decode_ms, result.decode_tokens_s = 1e3 * step_seconds, batch / step_seconds
    if result.prefill_tokens_s or not result.prompt:
        prefill = batch * result.prompt / result.prefill_tokens_s if result.prompt else 0.0
        result.total_tokens_s = batch * new / (step_seconds * new + prefill)
    moved = bytes_read(cache, result.prompt + skipped + WARMUP + result.steps / 2)  # at the mean length of these steps
    result.roofline_percent = 100 * (weight_bytes(model) + moved) / rate / step_seconds
    if model.device.type == "cuda":
        result.peak_gb = torch.cuda.max_memory_allocated() / 1e9
    else:
        resident = psutil.Process().memory_info().rss
        result.peak_gb, result.resident_gb = max(peak_resident(), resident) / 1e9, resident / 1e9


def _how(decoder: Decoder) -> str:
    """How the steps ran, and why not better."""
    how = "graph" if decoder.graph else "static" if decoder.is_static else f"eager {decoder.why_eager}"
    if decoder.compile_seconds is not None:
        how += f", compiled in {decoder.compile_seconds:.0f} s"
    elif decoder.why_not_compiled:
        how += f", not compiled: {decoder.why_not_compiled}"
    return how.strip()


def _mode(side: str, cuda: bool) -> str:
    """The Decoder's mode: a CPU has no graphs, but fixed buffers save the teacher a copy of its cache a step."""
    if side == "teacher-dynamic" or (not cuda and side == "converted"):
        return "eager"
    return "auto" if cuda else "static"


def _tokens(model, rows: int, length: int):
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, length), device=model.device)


def _read(model, ids) -> State:
    """On a GPU a prompt in one piece, which is fastest; on a CPU in the pieces that bound its memory."""
    return read(model, ids, chunk=ids.shape[1] if model.device.type == "cuda" else CHUNK // 4)


def _prefill_rate(model, cell: Cell) -> float:
    """Tokens a second on a GPU, at as many rows as make 32k tokens, the second time."""
    ids = _tokens(model, max(1, min(cell.batch, TOKENS_AT_ONCE // cell.prompt)), cell.prompt)
    if len(ids) > 1:  # the kernels for one row have been built
        _read(model, ids)
    _wait(model)
    _, seconds = _timed(model, lambda: _read(model, ids))
    return ids.numel() / seconds


def made_up_state(model, length: int) -> State:
    """Memory of one row as after `length` tokens, of random values."""
    state = read(model, _tokens(model, 1, 1)).copy()
    for layer in state.cache.layers:
        if isinstance(layer, LinearizedCacheLayer):
            layer.num_seen, layer.num_in_ring = length, min(length, layer.state.ring_valid.shape[1])
            random = layer.state.map(lambda x: torch.rand_like(x) if x.is_floating_point() else x)
            random.total.mul_(1e-3)[:, :, 0] += length  # of the constant feature: no weight is below 0
            full = torch.ones_like(random.ring_valid)
            layer.state = replace(random, ring_valid=full, length=torch.full_like(random.length, length))
            layer = layer.kept
        if layer.is_initialized:
            held = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            layer.keys, layer.values = (
                torch.randn(*x.shape[:2], held, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (layer.keys, layer.values)
            )
            layer.cumulative_length = length  # of sliding layers
    return State(state.cache, state.logits, _tokens(model, 1, length))


def largest_batch(model, cell: Cell) -> int:
    """How many rows should fit on this GPU, by the bytes of one, beside the one that was read."""
    if model.device.type != "cuda":
        raise LinearizeError("the largest batch is found on a GPU; give --batches numbers here")
    free, _ = torch.cuda.mem_get_info()
    row = row_bytes(model, cell)
    return rounded_down(min(MAX_BATCH, int((free - _SPARE) / row) - (not cell.made_up)))


def row_bytes(model, cell: Cell) -> float:
    """Bytes of a row of the batch: its memory, and logits of two steps and in the graph."""
    config, size = model.config.get_text_config(), model.dtype.itemsize
    token, row = kv_cache_bytes(config, 1, size), 0
    for x in linear_attentions(model).values() if is_converted(model) else ():
        mine = x.token_bytes(dtype_bytes=size)
        groups, _, map_dim = x.k_map.shape
        late = FOLD * (mine + size * groups * map_dim)  # slots that are folded together
        row += x.state_bytes(dtype_bytes=size) + late + groups * (x.window + FOLD + 3) + 4  # kinds of slots, counters
        token -= mine
    row += (cell.prompt + cell.new + SLOTS) * token
    return row + 3 * size * config.vocab_size


def rounded_down(batch: int) -> int:
    """To a multiple of 16, from 128 on; of 4, from 32 on."""
    step = 16 if batch >= 128 else 4 if batch >= 32 else 1
    return max(1, batch // step * step)


def cache_bytes(cache) -> int:
    """Bytes of a cache, whatever its layers."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "num_bytes", None)
        total += own() if own else layer.keys.nbytes + layer.values.nbytes
    return total


def bytes_read(cache, length: float) -> float:
    """Bytes of a cache that a step reads when rows are `length` long: softmax keys and values not beyond that."""
    total = cache_bytes(cache)
    for layer in cache.layers:
        softmax = layer.kept if isinstance(layer, LinearizedCacheLayer) else layer
        if softmax.is_initialized:
            total -= (softmax.keys.nbytes + softmax.values.nbytes) * max(0, 1 - length / softmax.keys.shape[2])
    return total


def copy_rate(device) -> float:
    """Bytes a second, read and written, of a large copy on this device; the fastest of half a second and ten or more.

    A GPU that has rested needs that long to be as fast as it is in a step.
    """
    size = 2**28 if device.type == "cuda" else 2**24
    a = torch.zeros(size, dtype=torch.float32, device=device)
    b, times, begin = torch.empty_like(a), [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() < begin + 0.5:
        _sync(device)
        start = time.perf_counter()
        b.copy_(a)
        _sync(device)
        times.append(time.perf_counter() - start)
    return 2 * a.numel() * a.element_size() / min(times)


def reset_peak(device) -> None:
    """Forgets the largest memory so far; of a process, where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most bytes this process has had in memory, since `reset_peak` on Linux, since its start elsewhere."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _timed(model, function):
    start = time.perf_counter()
    value = function()
    _wait(model)
    return value, time.perf_counter() - start


def _wait(model) -> None:
    _sync(model.device)


def _sync(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
