"""`linearize bench generation`: tokens a second and bytes, a converted model beside its teacher.

Both sides decode by the same code (`linearize.Decoder`): the whole step in one CUDA graph, greedy, no end of rows.
The teacher once with a static KV cache (graph, SDPA) and once with transformers' growing cache; the better of
the two is what it is compared by. A prompt is read for as many rows as make 32k tokens, and the state copied to
the rest of the batch: what the tokens are does not change a step's time, and prefill is reported apart.

B batch, T prompt tokens
"""

import csv
import gc
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from linearize.decoding import Decoder
from linearize.errors import LinearizeError
from linearize.linearized_cache import LinearizedCacheLayer
from linearize.state import TOKENS_AT_ONCE, read

SIDES = ("converted", "teacher-static", "teacher-dynamic")
SHAPES = {  # Llama configs of random weights; based-1.3b: the size of BASED's largest model, 32 heads of 64
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
    ),
    "based-1.3b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=50280,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip
MAX_BATCH = 8192
_WARMUP = 4


@dataclass
class Result:
    """One line of the table; None where the batch did not fit."""

    side: str
    prompt: int
    new: int
    batch: int
    prefill_tokens_s: float | None = None
    decode_ms: float | None = None  # a step
    decode_tokens_s: float | None = None
    total_tokens_s: float | None = None  # new tokens over the time of prefill (at its measured rate) and decode
    roofline_percent: float | None = None  # bytes a step must move at the measured copy rate, over its time
    bytes_a_row: int | None = None  # state or KV cache
    peak_gb: float | None = None
    step: str = ""  # graph or eager, with the reason


def bench_generation(folder=None, *, against=None, shape=None, prompts=(128, 1024, 8192, 32768), new=1024,
                     batches=(1, "max"), sides=None, dtype="bfloat16", device="auto", compile_layers=False,
                     output=None, window=None) -> list[Result]:  # fmt: skip
    """Measures every side at every prompt and batch, prints as it goes and returns the results.

    batches: numbers, and "max" for the largest power of two that fits. output: path without suffix for a CSV
    file, written line by line, and a PNG.
    """
    if (folder is None) == (shape is None):
        raise LinearizeError("give a converted model's folder, or --shape NAME for random weights; not both")
    sides = sides or (SIDES if against or shape else SIDES[:1])
    if new < 2:
        raise LinearizeError("--new must be at least 2: the first new token belongs to prefill")
    if wrong := [side for side in sides if side not in SIDES]:
        raise LinearizeError(f"sides {wrong}: choose from {', '.join(SIDES)}")
    if not (against or shape) and set(sides) != {"converted"}:
        raise LinearizeError("--against says which teacher to measure")
    from linearize.loading import pick_device

    device = pick_device(device)
    rate = copy_rate(device)
    print(describe(device, rate))
    results = []
    for kind in ("converted", "teacher"):
        wanted = [side for side in sides if side.startswith(kind)]
        if not wanted:
            continue
        model = _load(kind, folder, against, shape, dtype, device, window)
        if compile_layers:
            _compile(model)
        for prompt in prompts:
            for side in wanted:
                for batch in batches:
                    if batch == "max":
                        found = _largest(model, side, prompt, new, rate)
                    else:
                        found = [_try(model, side, prompt, new, batch, rate)]
                    for result in found:
                        results.append(result)
                        _report(result, output, first=len(results) == 1)
        del model
        _free()
    if ratios := compare(results):
        _print_ratios(ratios)
    if output:
        from .generation_chart import draw_generation

        draw_generation(results, f"{output}.png", title=describe(device, rate))
    return results


@torch.no_grad()
def measure(model, side: str, prompt: int, new: int, batch: int, rate: float) -> Result:
    """Prefill and decode of one cell. Raises torch.OutOfMemoryError where it does not fit."""
    result = Result(side, prompt, new, batch)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = max(1, min(batch, TOKENS_AT_ONCE // prompt))
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (rows, prompt), device=model.device)
    with torch.compiler.set_stance("force_eager"):
        read(model, ids)  # kernels are built, self-tests run
    _wait(model)
    with torch.compiler.set_stance("force_eager"):  # compiled layers are for decoding
        state, seconds = _timed(model, lambda: read(model, ids))
    result.prefill_tokens_s = rows * prompt / seconds
    steps = new - 1
    mode = "eager" if side == "teacher-dynamic" else "auto"
    decoder = Decoder(model, batch=batch, eos=[], mode=mode, max_length=prompt + steps + _WARMUP + 1)
    decoder.start(state if rows == batch else state.select([0] * batch))
    del state
    decoder.decode_n(_WARMUP)
    _wait(model)
    _, seconds = _timed(model, lambda: decoder.decode_n(steps))
    result.step = "graph" if decoder.graph else f"eager {decoder.why_eager}".strip()
    held = cache_bytes(decoder.cache)
    result.bytes_a_row = held // batch
    result.decode_ms, result.decode_tokens_s = 1e3 * seconds / steps, batch * steps / seconds
    result.total_tokens_s = batch * new / (seconds * new / steps + batch * prompt / result.prefill_tokens_s)
    moved = weight_bytes(model) + bytes_read(decoder.cache, prompt + new / 2)
    result.roofline_percent = 100 * moved / rate / (seconds / steps)
    if model.device.type == "cuda":
        result.peak_gb = torch.cuda.max_memory_allocated() / 1e9
    return result


def _try(model, side, prompt, new, batch, rate) -> Result:
    """`measure`, or a Result without figures where memory runs out."""
    try:
        return measure(model, side, prompt, new, batch, rate)
    except torch.OutOfMemoryError:
        return Result(side, prompt, new, batch, step="does not fit")
    finally:
        _free()


def _largest(model, side, prompt, new, rate) -> list[Result]:
    """The largest power of two that fits, found from the bytes of one row and then by trying."""
    if model.device.type != "cuda":
        raise LinearizeError("the largest batch is found on a GPU; give --batches numbers here")
    one = _try(model, side, prompt, 16, 1, rate)
    if one.bytes_a_row is None:
        return [one]
    free, _ = torch.cuda.mem_get_info()
    row = one.bytes_a_row + _bytes_a_token(model) * (new - 16)
    batch = 1
    # at most nine tenths of what is free, with room for logits in float32 a few times over
    row += 4 * 4 * model.config.get_text_config().vocab_size
    while 2 * batch * row <= 0.9 * free and batch < MAX_BATCH:
        batch *= 2
    while batch > 1:
        result = _try(model, side, prompt, new, batch, rate)
        if result.decode_ms is not None:
            return [result]
        batch //= 2
    return [_try(model, side, prompt, new, 1, rate)]


def compare(results) -> list[tuple]:
    """(prompt, what, converted, teacher, ratio of decode tokens a second), where both sides were measured.

    At each batch that both have, and at each side's best: of the teacher's two caches the better one.
    """
    rows, measured = [], [r for r in results if r.decode_ms is not None]
    for prompt in dict.fromkeys(r.prompt for r in measured):
        here = [r for r in measured if r.prompt == prompt]
        ours, theirs = ([r for r in here if (r.side == "converted") == mine] for mine in (True, False))
        if not (ours and theirs):
            continue
        for batch in sorted({r.batch for r in ours} & {r.batch for r in theirs}):
            pair = [_fastest(r for r in rs if r.batch == batch) for rs in (ours, theirs)]
            rows.append((prompt, f"batch {batch}", *pair, pair[0].decode_tokens_s / pair[1].decode_tokens_s))
        pair = [_fastest(ours), _fastest(theirs)]
        rows.append((prompt, "each at its best", *pair, pair[0].decode_tokens_s / pair[1].decode_tokens_s))
    return rows


def _fastest(results) -> Result:
    return max(results, key=lambda r: r.decode_tokens_s)


def _print_ratios(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Decoding: converted over teacher")
    for column in ("prompt", "at", "converted tok/s", "teacher tok/s", "ratio", "MiB a row", "KV cache MiB a row"):
        table.add_column(column, justify="right")
    for prompt, what, ours, theirs, ratio in rows:
        table.add_row(
            f"{prompt:,}", what, f"{ours.decode_tokens_s:,.0f} (batch {ours.batch})",
            f"{theirs.decode_tokens_s:,.0f} ({theirs.side.removeprefix('teacher-')}, batch {theirs.batch})",
            f"{ratio:.2f}", f"{ours.bytes_a_row / 2**20:,.2f}", f"{theirs.bytes_a_row / 2**20:,.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def copy_rate(device) -> float:
    """Bytes a second, read and written, of a large copy on this device."""
    size = 2**28 if device.type == "cuda" else 2**24
    a = torch.zeros(size, dtype=torch.float32, device=device)
    b, best = torch.empty_like(a), float("inf")
    for _ in range(10):
        _sync(device)
        start = time.perf_counter()
        b.copy_(a)
        _sync(device)
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * a.element_size() / best


def describe(device, rate: float) -> str:
    """Device, versions and copy rate."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {versions}, copy {rate / 1e9:,.0f} GB/s (read and written)"


def random_model(shape: str, *, dtype, device):
    """A Llama of random weights, made on the device."""
    if shape not in SHAPES:
        raise LinearizeError(f"--shape {shape}: choose from {', '.join(SHAPES)}")
    config = transformers.LlamaConfig(max_position_embeddings=131072, attn_implementation="sdpa", **SHAPES[shape])
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weight_bytes(model) -> int:
    """Bytes of weights that a step reads: all but an embedding table that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embedding is head else embedding.numel() * embedding.element_size()
    return sum(p.numel() * p.element_size() for p in model.parameters()) - unread


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


def _bytes_a_token(model) -> int:
    """What a row's memory grows by; 0 where all is linear."""
    state = read(model, torch.zeros(1, 1, dtype=torch.long))
    return state.num_bytes(2) - state.num_bytes(1)


def _load(kind, folder, against, shape, dtype, device, window):
    from linearize.loading import DTYPES, load, load_any

    if kind == "teacher" and not shape:
        return load_any(against, dtype=dtype, device=str(device))[0]
    if not shape:
        return load(folder, dtype=dtype, device=str(device))[0]
    torch.manual_seed(0)
    model = random_model(shape, dtype=DTYPES[dtype], device=device)
    if kind == "converted":
        from linearize.architecture import linearize_
        from linearize.recipe import AttentionSettings

        linearize_(model, AttentionSettings(**({} if window is None else {"window": window})))
    return model


def _compile(model) -> None:
    """Each decoder layer by torch.compile (instances, in place): fewer and larger kernels in the graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=False)


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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(result: Result, output, *, first: bool) -> None:
    """A line on the screen, and in the CSV file at once, so that an interrupted run keeps what it has."""
    if first:
        print(f"{'side':<16}{'prompt':>7}{'batch':>7}{'prefill tok/s':>15}{'ms a step':>11}{'tok/s':>11}"
              f"{'with prefill':>14}{'roofline':>10}{'MiB a row':>11}{'peak GB':>9}  step")  # fmt: skip
    r = result
    cells = [
        (r.prefill_tokens_s, 15, ",.0f"), (r.decode_ms, 11, ",.3f"), (r.decode_tokens_s, 11, ",.0f"),
        (r.total_tokens_s, 14, ",.0f"), (r.roofline_percent, 9, ".0f"),
    ]  # fmt: skip
    line = f"{r.side:<16}{r.prompt:>7}{r.batch:>7}" + "".join(
        f"{'-' if value is None else format(value, spec):>{width}}" for value, width, spec in cells
    )
    row = "-" if r.bytes_a_row is None else f"{r.bytes_a_row / 2**20:,.2f}"
    peak = "-" if r.peak_gb is None else f"{r.peak_gb:,.1f}"
    print(f"{line}%{row:>11}{peak:>9}  {r.step}")
    sys.stdout.flush()
    if output:
        path = Path(f"{output}.csv")
        with path.open("w" if first else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(r)))
            if first:
                writer.writeheader()
            writer.writerow(asdict(r))
