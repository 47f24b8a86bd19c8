"""Which implementation an operation takes, and why: `auto`, `reference` or `triton`.

B batch, T new tokens, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim,
d map dim

The choice is made a call (`implementation=`) or by the environment variable LINEARIZE_KERNELS, which stands
in where a call says "auto". A forced implementation runs or raises; "auto" takes Triton where `can_run`
agrees. Triton is imported by the first call that could use it, so machines without it lose nothing.
"""

import importlib.util
import os
from typing import NamedTuple

import torch

from .reference import attention_reference

IMPLEMENTATIONS = ("auto", "reference", "triton")
SHORT = 64  # fewer new tokens after a state: launches are all the time there is, and the reference sums in float32


class Verdict(NamedTuple):
    """Whether an implementation can take a call, and why not. True or False in a condition."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def attention(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None,
              segments=None, log_decay=None, softcap=None, sink_logits=None, state=None, return_state=False,
              implementation="auto"):  # fmt: skip
    """Hybrid attention by the fastest implementation that can run: arguments, result as
    `attention_quadratic`.

    implementation: "auto", "reference" or "triton". Raises ValueError for another name, and RuntimeError with
    the reason where "triton" is forced and cannot run.
    """
    options = dict(
        scaling=scaling, window=window, sinks=sinks, feature_map=feature_map, valid=valid, segments=segments,
        log_decay=log_decay, softcap=softcap, sink_logits=sink_logits, state=state, return_state=return_state,
    )  # fmt: skip
    chosen = requested(implementation)
    short = q.shape[2] < SHORT and (state is not None or return_state)
    if chosen == "triton" or (chosen == "auto" and q.is_cuda and not short):
        verdict = can_run(q, k, v, q_far, k_far, gate, **options)
        if verdict:
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


def can_run(q, k, v, q_far, k_far, gate, **options) -> Verdict:
    """Whether the Triton kernels can take this call of `attention`, with the reason where not.

    The first call of each sort on a device compares kernels and reference there, which takes seconds.
    """
    if importlib.util.find_spec("triton") is None:
        return Verdict(False, "Triton is not installed")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return Verdict(False, f"the tensors are on {q.device.type}; Triton needs a CUDA GPU")
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return Verdict(False, f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0")
    from . import prefill, training
    from .self_test import self_test

    tensors = [q, k, v, q_far, k_far, gate, options.get("log_decay")]
    needs_grad, prefills = _needs_grad(tensors), _prefills(**options)
    if prefills and needs_grad:
        return Verdict(False, "no gradients through a state in Triton")
    reason = (prefill if prefills else training).why_not(q, k, v, q_far, k_far, gate, **options)
    if reason or not q.is_cuda:
        return Verdict(not reason, reason)
    error, allowed = self_test(
        q.device, q.dtype, prefill=prefills, heads=q.shape[1], groups=k.shape[1], far_heads=k_far.shape[1],
        head_dim=q.shape[-1], value_dim=v.shape[-1], map_dim=q_far.shape[-1],
        decay=options.get("log_decay") is not None, backward=needs_grad,
        masked=options.get("valid") is not None or options.get("segments") is not None,
    )  # fmt: skip
    if error <= allowed:
        return Verdict(True, "")
    name = torch.cuda.get_device_name(q.device)
    return Verdict(
        False, f"the self-test on {name} is off by {error:.1e}, relative; {allowed:.1e} is allowed"
    )


def _needs_grad(tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _prefills(*, state=None, return_state=False, **_) -> bool:
    """Whether the call is for prefill: a state goes in or out."""
    return state is not None or return_state


def _triton(*tensors, feature_map, softcap, sink_logits, state, return_state, segments, **options):
    from .prefill import attention_prefill
    from .training import attention_training

    with torch.cuda.device_of(tensors[0]):
        if not _prefills(state=state, return_state=return_state):
            return attention_training(*tensors, **options, segments=segments), None
        out, state = attention_prefill(*tensors, **options, state=state)
        return out, state if return_state else None


def report(device: str | torch.device = "cuda") -> list[tuple[str, str, str]]:
    """What each operation takes on a device, for `linearize doctor`: (operation, implementation, why).

    Runs the kernels there, at the shapes of a small model.
    """
    rows = []
    for name, training in (("training attention", True), ("prefill", False)):
        for dtype in (torch.bfloat16, torch.float32):
            sizes = [(9, 64), (3, 64), (3, 64), (9, 16), (3, 16), (9,)]
            tensors = [torch.zeros(1, h, 300, *size, device=device, dtype=dtype) for h, *size in sizes]
            tensors = [x.requires_grad_(training) for x in tensors]
            verdict = can_run(*tensors, scaling=1.0, window=64, sinks=4, return_state=not training)
            chosen = requested()
            if chosen == "auto":
                chosen = "triton" if verdict and tensors[0].is_cuda else "reference"
            reason = verdict.reason or "the self-test passed" if tensors[0].is_cuda else verdict.reason
            rows.append((f"{name}, {dtype}".replace("torch.", ""), chosen, reason))
    return rows
