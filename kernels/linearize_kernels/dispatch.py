"""Which implementation an operation takes, and why: `auto`, `reference` or `triton`.

B batch, T new tokens, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim, d map dim

The choice is made a call (`implementation=`) or by the environment variable LINEARIZE_KERNELS, which stands in where
a call says "auto". A forced implementation runs or raises; "auto" takes Triton where `can_run` agrees.
"""

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch

from .reference import attention_quadratic, attention_reference

IMPLEMENTATIONS = ("auto", "reference", "triton")


class Verdict(NamedTuple):
    """Whether an implementation can take a call, and why not. True or False in a condition."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def attention(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None,
              segments=None, log_decay=None, softcap=None, sink_logits=None, state=None, return_state=False,
              implementation="auto"):  # fmt: skip
    """Hybrid attention by the fastest implementation that can run: arguments and result as `attention_quadratic`.

    implementation: "auto", "reference" or "triton". Raises ValueError for another name, and RuntimeError with the
    reason where "triton" is forced and cannot run.
    """
    options = dict(
        scaling=scaling, window=window, sinks=sinks, feature_map=feature_map, valid=valid, segments=segments,
        log_decay=log_decay, softcap=softcap, sink_logits=sink_logits, state=state, return_state=return_state,
    )  # fmt: skip
    chosen = requested(implementation)
    if chosen != "reference":
        verdict = can_run(q, k, v, q_far, k_far, gate, **options)
        if verdict and (chosen == "triton" or q.is_cuda):
            return _triton(q, k, v, q_far, k_far, gate, **options)
        if chosen == "triton":
            raise RuntimeError(f"attention was asked to run in Triton, and cannot: {verdict.reason}")
    return attention_reference(q, k, v, q_far, k_far, gate, **options)


def requested(implementation: str = "auto") -> str:
    """The implementation asked for: by the call, or for "auto" by LINEARIZE_KERNELS. Raises ValueError."""
    source = "implementation"
    if implementation == "auto":
        implementation, source = os.environ.get("LINEARIZE_KERNELS", "auto"), "LINEARIZE_KERNELS"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source}={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def can_run(q, k, v, q_far, k_far, gate, *, state=None, return_state=False, **options) -> Verdict:
    """Whether the Triton kernels can take this call of `attention`, with the reason where not.

    The first call of each sort on a device compares the kernels with the reference there, which takes seconds.
    """
    if importlib.util.find_spec("triton") is None:
        return Verdict(False, "Triton is not installed")
    if state is not None or return_state:
        return Verdict(False, "the kernels neither take nor give a state")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not interpreted:
        return Verdict(False, f"the tensors are on {q.device.type}; Triton needs a CUDA GPU")
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return Verdict(False, f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0")
    from .training import why_not

    reason = why_not(q, k, v, q_far, k_far, gate, **options)
    if reason:
        return Verdict(False, reason)
    if not q.is_cuda:
        return Verdict(True, "")
    tensors = [x for x in (q, k, v, q_far, k_far, gate, options.get("log_decay")) if x is not None]
    error, allowed = self_test(
        q.device, q.dtype, heads=q.shape[1], groups=k.shape[1], far_heads=k_far.shape[1], head_dim=q.shape[-1],
        value_dim=v.shape[-1], map_dim=q_far.shape[-1], decay=options.get("log_decay") is not None,
        masked=options.get("valid") is not None or options.get("segments") is not None,
        backward=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    )  # fmt: skip
    if error <= allowed:
        return Verdict(True, "")
    return Verdict(False, f"the self-test on {torch.cuda.get_device_name(q.device)} is wrong by {error:.1e}, "
                          f"relative; up to {allowed:.1e} is rounding")  # fmt: skip


@functools.cache
def self_test(device, dtype, *, heads, groups, far_heads, head_dim, value_dim, map_dim, decay=False, masked=False,
              backward=True):  # fmt: skip
    """Largest relative RMS error of the Triton kernels' output and gradients against the float64 reference.

    Random inputs of 300 tokens, window 64, 4 sinks. Returns (error, allowed error). NaN counts as infinite.
    """
    from .training import attention_training

    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads, *size):
        return torch.randn(1, num_heads, 300, *size, generator=generator, device=device).to(dtype)

    inputs = [draw(heads, head_dim), draw(groups, head_dim), draw(groups, value_dim), draw(heads, map_dim) * 0.5,
              draw(far_heads, map_dim) * 0.5, draw(heads), -torch.linspace(0.01, 0.1, far_heads, device=device)]  # fmt: skip
    grad, valid, segments = draw(heads, value_dim), None, None
    if masked:
        slots = torch.arange(300, device=device)[None]
        valid, segments = slots >= 9, (slots >= 150).long() + (slots >= 151)
    options = dict(scaling=head_dim**-0.5, window=64, sinks=4, valid=valid, segments=segments)
    results = []
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        for function, kind in ((attention_quadratic, torch.float64), (attention_training, dtype)):
            leaves = [x.to(kind).requires_grad_(backward) for x in inputs]
            out = function(*leaves[:6], **options, log_decay=leaves[6] if decay else None)
            out = out[0] if isinstance(out, tuple) else out
            wanted = leaves if decay else leaves[:6]
            gradients = torch.autograd.grad(out, wanted, grad.to(kind)) if backward else []
            results.append([out, *gradients])
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]
    error = max(math.inf if math.isnan(e) else e for e in errors)
    return error, 1e-4 if dtype == torch.float32 else 1e-2


def _triton(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, valid, segments, log_decay, **_):
    from .training import attention_training

    out = attention_training(q, k, v, q_far, k_far, gate, scaling=scaling, window=window, sinks=sinks, valid=valid,
                             segments=segments, log_decay=log_decay)  # fmt: skip
    return out, None


def report(device: str | torch.device = "cuda") -> list[tuple[str, str, str]]:
    """What each operation takes on a device, for `linearize doctor`: (operation, implementation, why).

    Runs the kernels there for the shapes of a common small model, forward and backward.
    """
    shapes = dict(heads=9, groups=3, far_heads=3, head_dim=64, map_dim=16)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        def empty(num_heads, *size):
            return torch.zeros(1, num_heads, 300, *size, device=device, dtype=dtype, requires_grad=True)  # noqa: B023

        verdict = can_run(
            empty(shapes["heads"], shapes["head_dim"]), *[empty(shapes["groups"], shapes["head_dim"])] * 2,
            empty(shapes["heads"], shapes["map_dim"]), empty(shapes["far_heads"], shapes["map_dim"]), empty(shapes["heads"]),
        )  # fmt: skip
        chosen = requested()
        if chosen == "auto":
            chosen = "triton" if verdict and torch.device(device).type == "cuda" else "reference"
        rows.append((f"training attention, {dtype}".replace("torch.", ""), chosen, verdict.reason or "self-test passed"))
    return rows
