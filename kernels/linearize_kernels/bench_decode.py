"""The decoding section: a token of one layer, by replay of a CUDA graph, ours and softmax over 2k and 8k tokens.

B rows, H query heads, G kv heads, D head and value dim, d map dim, F Taylor features, n sinks, w window

A graph holds one call for each of several layers, so that their memories together exceed the L2 cache. Our kernel
folds FOLD tokens into its sums at once, so a sample is FOLD replays: a figure holds its share of folding.
Counts: the sum is read each token and read and written once in FOLD; of ring slots, w - 1 + FOLD / 2 are held.
"""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import attention_chunked, attention_quadratic
from .bench_measure import Row, attempt, measure, measure_graph, poison, relative, require_finite
from .bench_shapes import Cost, Shape, draw
from .decode import FOLD

OPERATION = "decode a token"
CHECKED = 70  # tokens compared: more than one fold
LIMITS = {torch.float32: 1e-2, torch.bfloat16: 2e-2}
WORKING_SET = 2**27  # bytes of several layers: beyond the 50 to 60 MB of L2 cache of an H100 or H200
CACHES = (2048, 8192)
REFERENCE_ROWS = 16  # the eager reference is timed at this batch only


def bench_decode(s: Shape, names, *, limit: float, rep: float):
    """Rows of one batch size: our kernels with both kinds of sums, then the peers named."""
    floor = decode_cost(s, torch.float32).gb
    for dtype in (torch.float32, torch.bfloat16):
        role = "ours" if dtype == torch.float32 else ""
        for name, words in (("triton", ""), ("cuda", "CUDA, ")):
            label = f"linearize decode, {words}{str(dtype)[6:]} sum"
            work = partial(time_ours, s, dtype, name)
            yield _row(s, label, role, decode_cost(s, dtype), floor, limit, work)
    if "reference" in names and s.B == REFERENCE_ROWS:
        cost = decode_cost(s, torch.float32)
        yield _row(s, "reference", "", cost, floor, limit, lambda out: _reference(s, out, rep))
    for past in CACHES:
        gb = s.B * s.G * past * 2 * s.D * 2 / 1e9
        cost = Cost(s.B * s.H * 4 * s.D * past / 1e9, gb)
        for name, words in (("sdpa_cudnn", "cuDNN"), ("sdpa_flash", "flash")):
            if name in names:
                role = "cudnn" if name == "sdpa_cudnn" and past == CACHES[0] else ""
                label = f"softmax over {past}, SDPA {words}"
                yield _row(
                    s, label, role, cost, floor, limit, lambda out, name=name, past=past: _softmax(s, past, name, out)
                )


def decode_cost(s: Shape, dtype: torch.dtype) -> Cost:
    """What a token of a layer has to move and do. dtype: of the sums; normalisers are float32."""
    held = s.window + FOLD // 2 - 1
    sums = s.features * (s.D * dtype.itemsize + 4) * (1 + 2 / FOLD)
    slots = held * (2 * s.D + s.d) * 2 + s.sinks * 2 * s.D * 2
    flop = s.B * s.H * (2 * s.features * (s.D + 1) + 4 * s.D * (held + s.sinks))
    return Cost(flop / 1e9, s.B * s.G * (sums + slots) / 1e9)


def _row(s, label, role, cost, floor, limit, work) -> Row:
    """work(result): puts error and times into result as it gets them."""
    result = dict(error=None, times=(None, None), note="")
    note = attempt(lambda: work(result), limit) or result["note"]
    return Row(OPERATION, s.name, s.B, 1, label, role, result["error"], *result["times"], *cost, floor, note)


def time_ours(s: Shape, dtype, implementation: str, result, launch=None) -> None:
    """launch: instead of the chosen one."""
    from .decode import DecodeState, decode

    options, how = dict(scaling=s.D**-0.5), dict(implementation=implementation, launch=launch)
    past, state = past_of(s)
    layers = max(4, -(-WORKING_SET // int(decode_cost(s, dtype).gb * 1e9)))
    states = [DecodeState.from_state(state, window=s.window, dtype=dtype) for _ in range(layers)]
    more, _ = draw(s._replace(B=1, T=CHECKED))
    whole = {n: torch.cat([past[n], x], 2).double() for n, x in more.items()}
    expected, _ = attention_quadratic(**whole, **options, window=s.window, sinks=s.sinks)
    outputs = []
    for t in range(CHECKED):
        token = token_at(s, more, t)
        out = torch.full_like(token["q"], torch.nan)
        decode(**token, state=states[0], **options, **how, out=out)
        outputs.append(out[[0, -1]])  # the first and the last of rows that are all alike
    result["error"] = max(relative(x, expected[0, :, -CHECKED:]) for x in torch.cat(outputs, 2))
    if not result["error"] < LIMITS[dtype]:
        result["note"] = "WRONG"
    result["times"] = measure_graph(
        lambda i: decode(**token, state=states[i], **options, **how, out=out), layers, replays=FOLD, samples=3
    )
    require_finite([out])


def past_of(s: Shape, length: int = 500):
    """(Inputs of one row, the state after them in B rows)."""
    inputs, _ = draw(s._replace(B=1, T=length))
    options = dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    _, state = attention_chunked(**inputs, **options, return_state=True)
    return inputs, state.map(lambda x: x.expand(s.B, *x.shape[1:]).contiguous())


def token_at(s: Shape, inputs, t: int):
    return {n: x[:, :, t : t + 1].expand(s.B, *[-1] * (x.ndim - 1)).contiguous() for n, x in inputs.items()}


def _reference(s: Shape, result, rep: float) -> None:
    """Launched from the host: it allocates."""
    past, state = past_of(s)
    token, options = token_at(s, past, -2), dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    function = lambda: attention_quadratic(**token, **options, state=state, return_state=True)  # noqa: E731
    exact, _ = attention_quadratic(
        **{n: x[:1].double() for n, x in token.items()},
        **options,
        state=state.map(lambda x: x[:1].double() if x.is_floating_point() else x[:1]),
    )
    result["error"] = relative(function()[0][-1:], exact)
    result["times"] = measure(function, rep=rep)


def _softmax(s: Shape, past: int, name: str, result) -> None:
    backend = SDPBackend.CUDNN_ATTENTION if name == "sdpa_cudnn" else SDPBackend.FLASH_ATTENTION
    size = 2 * s.B * s.G * past * s.D * 2
    caches = [
        torch.randn(2, s.B, s.G, past, s.D, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(1, -(-WORKING_SET // size)))
    ]
    q = torch.randn(s.B, s.H, 1, s.D, device="cuda", dtype=torch.bfloat16)
    outputs = [None]  # held by the graph's memory

    def call(i):
        with sdpa_kernel(backend):
            outputs[0] = scaled_dot_product_attention(q, *caches[i], enable_gqa=True)

    poison(q)
    call(0)
    k, v = (x[-1:].double().repeat_interleave(s.H // s.G, 1) for x in caches[0])
    result["error"] = relative(outputs[0][-1:], scaled_dot_product_attention(q[-1:].double(), k, v))
    if not result["error"] < 1e-2:
        result["note"] = "WRONG"
    result["times"] = measure_graph(call, len(caches), replays=8)
