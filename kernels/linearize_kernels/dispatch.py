"""Which implementation an operation takes, and why: `auto`, `reference` or `triton`.

B batch, T new tokens, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim, d map dim

The choice is made a call (`implementation=`) or by the environment variable LINEARIZE_KERNELS, which stands in where
a call says "auto". A forced implementation runs or raises; "auto" takes Triton where `can_run` agrees.
"""

import os
from typing import NamedTuple

import torch

from .reference import attention_chunked, attention_quadratic
from .state import State

IMPLEMENTATIONS = ("auto", "reference", "triton")
SHORT = 16  # up to so many new tokens the quadratic reference does less work than one chunk of the other


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
    function = attention_quadratic if q.shape[2] <= SHORT else attention_chunked
    return function(q, k, v, q_far, k_far, gate, **options)


def requested(implementation: str = "auto") -> str:
    """The implementation asked for: by the call, or for "auto" by LINEARIZE_KERNELS. Raises ValueError."""
    source = "implementation"
    if implementation == "auto":
        implementation, source = os.environ.get("LINEARIZE_KERNELS", "auto"), "LINEARIZE_KERNELS"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source}={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def can_run(q, k, v, q_far, k_far, gate, **options) -> Verdict:
    """Whether the Triton kernels can take this call of `attention`, with the reason where not."""
    return Verdict(False, "no Triton kernel is built yet")


def _triton(*args, **options) -> tuple[torch.Tensor, State | None]:
    raise NotImplementedError
