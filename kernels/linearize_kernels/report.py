"""What each operation takes on a device, and why: what `linearize doctor` prints."""

import torch

from . import cuda
from .dispatch import (
    KERNELS,
    can_backward_cuda,
    can_decode_cuda,
    can_decode_triton,
    can_run_losses,
    requested,
    why_not_triton,
)
from .feature_maps import Taylor
from .state import State

DTYPES = (torch.bfloat16, torch.float32)
VOCABULARY = 49152
UNASKED = "on a CPU only where it is asked for"


def report(device: str | torch.device = "cuda", *, window=64, map_dim=16) -> list[tuple[str, str, str]]:
    """(operation, implementation, why) of every operation. Runs the kernels, at the shapes of a small model."""
    device, rows = torch.device(device), []
    for training in (True, False):
        for dtype in DTYPES:
            tensors = _small_inputs(1, window + 236, map_dim, device=device, dtype=dtype, requires_grad=training)
            options = dict(scaling=1.0, window=window, sinks=4, return_state=not training)
            rows.append((_name("training attention" if training else "prefill", dtype), *_attention(tensors, options)))
        if training:
            rows.append((_name("training backward", torch.bfloat16), *_backward(device, window, map_dim)))
    rows += [(_name("decode with its maps", dtype), *_decode(dtype, device, window, map_dim)) for dtype in DTYPES]
    return rows + [(_name("losses of logits", dtype), *_losses(dtype, device)) for dtype in DTYPES]


def _name(operation: str, dtype) -> str:
    return f"{operation}, {dtype}".replace("torch.", "")


def _taken(name: str, device: torch.device) -> tuple[str, str]:
    """The row of an implementation that runs."""
    return name, "the self-test passed" if device.type == "cuda" else "in Triton's interpreter, without a self-test"


def _refused(chosen: str, reason: str) -> tuple[str, str]:
    """The row of what no kernel takes, by what was asked for."""
    if chosen == "auto":
        return "reference", reason
    return chosen, "it is asked for" if chosen == "reference" else f"asked for, and cannot run: {reason}"


def _small_inputs(batch: int, length: int, map_dim: int, **options) -> list[torch.Tensor]:
    """q, k, v, q_far, k_far, gate of a small model."""
    sizes = [(9, 64), (3, 64), (3, 64), (9, map_dim), (3, map_dim), (9,)]
    return [torch.zeros(batch, heads, length, *size, **options) for heads, *size in sizes]


def _attention(tensors, options) -> tuple[str, str]:
    """What `attention` takes for a call, and why."""
    chosen, device, reasons = requested(), tensors[0].device, []
    for name in ("cuda", "triton") if chosen == "auto" else (chosen,):
        if name not in KERNELS:
            return _refused(name, "")
        verdict = KERNELS[name][0](*tensors, **options)
        if verdict and (chosen == name or device.type == "cuda"):
            implementation, why = _taken(name, device)
            return implementation, "; ".join([why, *reasons])
        if chosen == name:
            return _refused(chosen, verdict.reason)
        reasons.append(f"not {name}: {verdict.reason or UNASKED}")
    return _refused(chosen, "; ".join(reasons))


def _backward(device, window, map_dim) -> tuple[str, str]:
    """What finds the gradients of a batch that fills a GPU, and why."""
    tensors = _small_inputs(16, 64, map_dim, device=device, dtype=torch.bfloat16)
    verdict = can_backward_cuda(*tensors, scaling=1.0, window=window, sinks=4)
    return _taken("cuda", device) if verdict else ("as forward", f"not cuda: {verdict.reason}")


def _decode(dtype, device, window, map_dim) -> tuple[str, str]:
    """What `linearize.Decoder` takes for a step where it is one graph."""
    chosen = requested()
    reason = (cuda.why_not(device) if chosen == "cuda" else "") or why_not_triton(device)
    if chosen == "reference" or reason:
        return _refused(chosen, reason)
    from .decode import DecodeState

    k, k_far = (torch.zeros(1, 3, 1, size, device=device, dtype=dtype) for size in (64, map_dim))
    state = State.empty(k, k, k_far, num_features=Taylor.num_features(map_dim), sinks=4, ring=window - 1)
    state, refused = DecodeState.from_state(state, window=window), ""
    if chosen in ("auto", "cuda"):
        verdict = can_decode_cuda(state, heads=9, forced=chosen == "cuda")
        if verdict or chosen == "cuda":
            return _taken("cuda", device) if verdict else _refused(chosen, verdict.reason)
        refused = f"; not cuda: {verdict.reason}"
    verdict = can_decode_triton(state, heads=9, decay=False)
    implementation, why = _taken("triton", device) if verdict else _refused(chosen, verdict.reason)
    return implementation, why + refused


def _losses(dtype, device) -> tuple[str, str]:
    chosen, logits = requested(), torch.empty(1, VOCABULARY, dtype=dtype, device=device)
    if chosen == "cuda":
        return _refused(chosen, "there is no CUDA kernel, Triton has one")
    verdict = can_run_losses(logits, logits)
    if verdict and (chosen == "triton" or device.type == "cuda" and chosen == "auto"):
        return _taken("triton", device)
    return _refused(chosen, verdict.reason or UNASKED)
