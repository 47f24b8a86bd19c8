"""The fastest softmax attention for one new token on this machine, so that no teacher is measured at a slower one.

Which kernel is fastest for one query over a long, masked cache depends on batch and length, and transformers'
`sdpa` takes what torch prefers; older releases also repeat keys and values for every query head wherever there is a
mask. Here the query heads of a kv head are rows of one product, and the kernels are timed at the very shape.

B batch, H query heads, G kv heads, S slots, D head dim
"""

import copy
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.modeling_linearized import attention_modules

# of torch's SDPA, and transformers' `eager` (two matrix products); cuDNN makes a plan a length, so not where it grows
MASKED = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "eager": None}
GROWING = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "eager": None}
ALLOWED_ERROR = 2e-2  # relative to float32


def one_token(q, k, v, mask, scaling, *, eager: bool):
    """q [B, H, 1, D], k, v [B, G, S, D], mask [B, 1, 1, S] bool or None -> [B, H, 1, D]."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    if eager:
        scores = rows @ k.transpose(-1, -2) * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    else:
        out = torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(*q.shape[:3], v.shape[-1])


def _register(name: str, *, eager: bool) -> None:
    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if query.shape[2] > 1 or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = one_token(query, key, value, attention_mask, scaling, eager=eager)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(name, attention)


for _eager in (True, False):
    _register(f"linearize_bench_{'eager' if _eager else 'sdpa'}", eager=_eager)


def use_fastest(model, *, batch: int, slots: int, growing: bool):
    """Gives an unconverted model on a GPU its fastest softmax for one token after `slots` tokens.

    growing: a cache without unused slots, so without a mask. Returns (words for the table, the context in which to
    decode). Prefill stays with transformers' `sdpa`.
    """
    modules = attention_modules(model).values()
    times = measure_kernels(next(iter(modules)).config, model, batch=batch, slots=slots, growing=growing)
    name = min(times, key=times.get)
    for module in modules:
        module.config = copy.copy(module.config)  # the model's own still says sdpa: that makes the masks
        module.config._attn_implementation = f"linearize_bench_{'eager' if name == 'eager' else 'sdpa'}"
    others = ", ".join(f"{other} {times[other]:.0f}" for other in times if other != name)
    backend = (GROWING if growing else MASKED)[name]
    words = f"{name} {times[name]:.0f} us a layer" + f" ({others})" * bool(others)
    return words, sdpa_kernel(backend) if backend else nullcontext()


@torch.no_grad()
def measure_kernels(config, model, *, batch: int, slots: int, growing: bool) -> dict[str, float]:
    """Microseconds of one layer by kernel, of those that run and are right."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    options = dict(device=model.device, dtype=model.dtype)
    q = torch.randn(batch, heads, 1, head_dim, **options)
    k, v = (torch.randn(batch, groups, slots, head_dim, **options) for _ in range(2))
    mask = None if growing else (torch.arange(slots, device=model.device) < slots - slots // 8).expand(batch, 1, 1, -1)
    first = [None if x is None else x[:1] for x in (q, k, v, mask)]
    exact = [x.float() if x is not None and x.is_floating_point() else x for x in first]
    expected, times = one_token(*exact, head_dim**-0.5, eager=True), {}
    for name, backend in (GROWING if growing else MASKED).items():
        try:
            with sdpa_kernel(backend) if backend else nullcontext():
                out = one_token(q, k, v, mask, head_dim**-0.5, eager=backend is None)[:1]
                if ((out - expected).norm() / expected.norm()).item() <= ALLOWED_ERROR:
                    times[name] = _microseconds(q, k, v, mask, head_dim**-0.5, eager=backend is None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # this kernel does not take these shapes
            if "kernel" not in str(error).lower() and "cudnn" not in str(error).lower():
                raise
    return times


def _microseconds(*args, times: int = 10, **options) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        one_token(*args, **options)
    start.record()
    for _ in range(times):
        one_token(*args, **options)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / times
