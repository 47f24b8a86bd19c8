"""Which implementation an operation takes, and why: `auto`, `reference`, `triton` or `cuda`.

B batch, T new tokens, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim,
d map dim

The choice is made a call (`implementation=`) or by the environment variable LINEARIZE_KERNELS, which stands
in where a call says "auto". A forced implementation runs or raises; "auto" takes CUDA where `can_run_cuda` agrees,
else Triton where `can_run` does. Both are imported by the first call that could use them, so machines without them
lose nothing.
"""

import importlib.util
import os
from typing import NamedTuple

import torch

from .reference import attention_reference

IMPLEMENTATIONS = ("auto", "reference", "triton", "cuda")
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
    """Hybrid attention, in CUDA where that can run, else in Triton, else by the reference: arguments, result as
    `attention_quadratic`.

    implementation: one of IMPLEMENTATIONS. Raises ValueError for another name, or where `valid` or `segments` is not
    [B, T], and RuntimeError with the reason where "triton" or "cuda" is forced and cannot run.
    """
    for name, x in (("valid", valid), ("segments", segments)):
        if x is not None and x.shape != (q.shape[0], q.shape[2]):
            raise ValueError(f"{name} is {list(x.shape)}: [rows, tokens] of q, {[q.shape[0], q.shape[2]]}; expand it")
    options = dict(
        scaling=scaling, window=window, sinks=sinks, feature_map=feature_map, valid=valid, segments=segments,
        log_decay=log_decay, softcap=softcap, sink_logits=sink_logits, state=state, return_state=return_state,
    )  # fmt: skip
    chosen = requested(implementation)
    short = q.shape[2] < SHORT and (state is not None or return_state)
    names = ("cuda", "triton") if chosen == "auto" and q.is_cuda and not short else (chosen,)
    for name in names:
        if name in KERNELS:
            can, run = KERNELS[name]
            verdict = can(q, k, v, q_far, k_far, gate, **options)
            if verdict:
                return run(q, k, v, q_far, k_far, gate, **options, forced=name == chosen)
            if name == chosen:
                raise RuntimeError(f"attention was asked to run in {name}, and cannot: {verdict.reason}")
    return attention_reference(q, k, v, q_far, k_far, gate, **options)


def requested(implementation: str = "auto") -> str:
    """The implementation asked for: by the call, or for "auto" by LINEARIZE_KERNELS. Raises ValueError."""
    source = "implementation"
    if implementation == "auto":
        implementation, source = os.environ.get("LINEARIZE_KERNELS", "auto"), "LINEARIZE_KERNELS"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source}={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def why_not_triton(device: torch.device) -> str:
    """Why no Triton kernel runs on a device; empty where they do, also in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else f"on {device.type}; Triton needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return ""


def can_run(q, k, v, q_far, k_far, gate, **options) -> Verdict:
    """Whether the Triton kernels can take this call of `attention`, with the reason where not.

    The first call of each sort on a device compares kernels and reference there, which takes seconds.
    """
    reason = why_not_triton(q.device)
    if reason:
        return Verdict(False, reason)
    from . import prefill, training
    from .self_test import self_test

    tensors = [q, k, v, q_far, k_far, gate, options.get("log_decay")]
    needs_grad, prefills = wants_gradients(tensors), _prefills(**options)
    if prefills and needs_grad:
        return Verdict(False, "no gradients through a state in Triton")
    reason = (prefill if prefills else training).why_not(q, k, v, q_far, k_far, gate, **options)
    if reason or not q.is_cuda:
        return Verdict(not reason, reason)
    error, allowed = self_test(
        q.device, q.dtype, prefill=prefills, heads=q.shape[1], groups=k.shape[1], far_heads=k_far.shape[1],
        head_dim=q.shape[-1], value_dim=v.shape[-1], map_dim=q_far.shape[-1],
        decay=options.get("log_decay") is not None, backward=needs_grad,
        masked=any(options.get(name) is not None for name in ("valid", "segments", "state")),
    )  # fmt: skip
    return _compared(error, allowed, q.device)


def can_run_cuda(q, k, v, q_far, k_far, gate, **options) -> Verdict:
    """Whether the CUDA kernel can take this call of `attention` (a whole text; without a state also rows of several),
    with the reason where not.

    The first call of each sort on a device compiles it and compares it with the reference there, which takes seconds.
    """
    from . import cuda

    reason = cuda.why_not(q.device)
    if reason:
        return Verdict(False, reason)
    from . import cuda_prefill
    from .cuda_builds import longest_alike
    from .self_test import self_test

    tensors = q, k, v, q_far, k_far, gate
    needs_grad, prefills = wants_gradients([*tensors, options.get("log_decay")]), _prefills(**options)
    if needs_grad and prefills:
        return Verdict(False, "no gradients through a state in CUDA")
    if not prefills and (needs_grad or options.get("segments") is not None):
        return can_forward_cuda(*tensors, **options, backward=needs_grad, chosen="cuda")
    reason = cuda_prefill.why_not_text(*tensors, **options) or cuda_prefill.why_not_device(*tensors, **options)
    if reason:
        return Verdict(False, reason)
    error, allowed = self_test(
        q.device, q.dtype, prefill=True, cuda="prefill", heads=q.shape[1], groups=k.shape[1], far_heads=k.shape[1],
        head_dim=q.shape[-1], value_dim=v.shape[-1], map_dim=q_far.shape[-1],
        window=longest_alike(options["window"], q_far.shape[-1]), sinks=options["sinks"],
    )  # fmt: skip
    return _compared(error, allowed, q.device)


def can_forward_cuda(q, k, v, q_far, k_far, gate, *, backward=True, chosen=None, **options) -> Verdict:
    """Whether the CUDA kernel can be the forward of `attention_training`, with the reason where not.

    backward: whether gradients are to follow; those by Triton are in the self-test then. chosen: the implementation
    asked for; None: by the environment. The first call of each sort on a device takes seconds.
    """
    from . import cuda_prefill

    tensors = q, k, v, q_far, k_far, gate

    def why_not_device(_):
        return cuda_prefill.why_not_device(*tensors, **options)

    return _can_train_cuda("forward", tensors, options, cuda_prefill.why_not_forward, why_not_device, backward, chosen)


def can_backward_cuda(q, k, v, q_far, k_far, gate, **options) -> Verdict:
    """Whether CUDA kernels can find the gradients of `attention_training`, with the reason where not.

    The first call of each sort on a device compiles them and compares them with the reference there, which takes
    seconds.
    """
    from . import cuda_backward

    tensors = q, k, v, q_far, k_far, gate

    def why_not_device(device):
        return cuda_backward.why_not_device(device, small=q_far.shape[-1] <= cuda_backward.MOST_DIMS)

    return _can_train_cuda("backward", tensors, options, cuda_backward.why_not, why_not_device)


def _can_train_cuda(part: str, tensors, options, why_not, why_not_device, backward=True, chosen=None) -> Verdict:
    from . import cuda
    from .cuda_builds import longest_alike
    from .self_test import self_test

    (q, k, v, q_far, *_), chosen = tensors, chosen or requested()
    reason = cuda.why_not(q.device) if chosen in ("auto", "cuda") else f"{chosen} is asked for"
    reason = reason or why_not(*tensors, **options) or why_not_device(q.device)
    if reason:
        return Verdict(False, reason)
    error, allowed = self_test(
        q.device, q.dtype, prefill=False, cuda=part, heads=q.shape[1], groups=k.shape[1], far_heads=k.shape[1],
        head_dim=q.shape[-1], value_dim=v.shape[-1], map_dim=q_far.shape[-1], backward=backward,
        masked=options.get("segments") is not None, window=longest_alike(options["window"], q_far.shape[-1]),
        sinks=options["sinks"],
    )  # fmt: skip
    return _compared(error, allowed, q.device)


def can_decode(state, *, heads: int, decay: bool = False) -> Verdict:
    """Whether `decode` can be trusted with a `DecodeState` of layers of `heads` query heads, with the reason where not.

    The first call of each sort on a device compares the kernel that `decode` would take and the reference there, which
    takes seconds.
    """
    chosen = requested()
    if chosen in ("auto", "cuda"):
        verdict = can_decode_cuda(state, heads=heads, decay=decay, forced=chosen == "cuda")
        if verdict or chosen == "cuda":
            return verdict
    if chosen == "reference":
        return Verdict(False, "reference is asked for")
    return can_decode_triton(state, heads=heads, decay=decay)


def can_decode_triton(state, *, heads: int, decay: bool) -> Verdict:
    """As `can_decode`, of the Triton kernel."""
    reason = why_not_triton(state.total.device)
    if reason or not state.total.is_cuda:
        return Verdict(not reason, reason)
    from .decode import launch_of

    return _test_decode(state, launch_of(state, heads=heads), heads, decay)


_cuda_decodes: dict[tuple, Verdict] = {}  # by everything that a verdict depends on


def can_decode_cuda(state, *, heads: int, decay: bool = False, forced: bool = False) -> Verdict:
    """As `can_decode`, of the CUDA kernel. forced: also where Triton is the faster one."""
    tensors = state.total, state.keys, state.values, state.ring_far
    key = (state.total.device, *((x.dtype, x.shape) for x in tensors), state.position.shape, state.window, heads, decay)
    if (key, forced) not in _cuda_decodes:
        if state.total.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a graph is captured, and decode is not tested yet: call can_decode or decode before")
        _cuda_decodes[key, forced] = _try_decode_cuda(state, heads, decay, forced)
    return _cuda_decodes[key, forced]


def _try_decode_cuda(state, heads: int, decay: bool, forced: bool) -> Verdict:
    from . import cuda

    reason = cuda.why_not(state.total.device)
    if reason:
        return Verdict(False, reason)
    from . import cuda_decode

    reason = cuda_decode.why_not(state, heads=heads)
    if not reason and not forced and state.position.numel() < cuda_decode.FEWEST_BLOCKS:
        reason = f"Triton is faster below {cuda_decode.FEWEST_BLOCKS} blocks"
    if reason:
        return Verdict(False, reason)
    return _test_decode(state, cuda_decode.choose_launch(state, heads=heads), heads, decay)


def decodes_in_cuda(state, *, heads: int, decay: bool, implementation: str = "auto") -> bool:
    """Whether `decode` takes CUDA (else Triton). Raises RuntimeError where CUDA is forced and cannot run, where no
    Triton kernel runs and it would be taken, and where the reference is asked for, which is `attention` with a
    `State`."""
    chosen = requested(implementation)
    if chosen == "reference":
        raise RuntimeError("decode was asked to run as the reference: that is attention with a State")
    if chosen in ("auto", "cuda"):
        verdict = can_decode_cuda(state, heads=heads, decay=decay, forced=chosen == "cuda")
        if chosen == "cuda" and not verdict:
            raise RuntimeError(f"decode was asked to run in CUDA, and cannot: {verdict.reason}")
        if verdict:
            return True
    reason = why_not_triton(state.total.device)
    if reason:
        raise RuntimeError(f"decode cannot run in Triton: {reason}")
    return False


def can_run_losses(logits, teacher=None) -> Verdict:
    """Whether the Triton kernels can take `logit_losses` of these, with the reason where not.

    The first call of each sort on a device compares kernels and reference there, which takes seconds.
    """
    dtypes = [x.dtype for x in (logits, teacher) if x is not None]
    reason = "logits in float64; Triton has float32" if torch.float64 in dtypes else why_not_triton(logits.device)
    if reason or not logits.is_cuda:
        return Verdict(not reason, reason)
    from .self_test import self_test_losses

    error, allowed = self_test_losses(logits.device, *dtypes, vocabulary=logits.shape[1])
    return _compared(error, allowed, logits.device)


def _test_decode(state, launch, heads: int, decay: bool) -> Verdict:
    from .self_test import self_test_decode

    device = state.total.device
    error, allowed = self_test_decode(
        device, state.keys.dtype, launch=launch, splits=state.position.shape[2], heads=heads,
        groups=state.keys.shape[1], head_dim=state.keys.shape[-1], value_dim=state.values.shape[-1],
        map_dim=state.ring_far.shape[-1], window=state.window, sinks=state.num_sinks, decay=decay,
        far_dtype=state.ring_far.dtype, sum_dtype=state.total.dtype,
    )  # fmt: skip
    return _compared(error, allowed, device)


def _compared(error: float, allowed: float, device) -> Verdict:
    if error <= allowed:
        return Verdict(True, "")
    name = torch.cuda.get_device_name(device)
    return Verdict(False, f"the self-test on {name} is off by {error:.1e}, relative; {allowed:.1e} is allowed")


def wants_gradients(tensors) -> bool:
    """Whether a call with these tensors, some perhaps None, is to be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _prefills(*, state=None, return_state=False, **_) -> bool:
    """Whether the call is for prefill: a state goes in or out."""
    return state is not None or return_state


def _triton(*tensors, feature_map, softcap, sink_logits, state, return_state, segments, forced, **options):
    from .prefill import attention_prefill
    from .training import attention_training

    with torch.cuda.device_of(tensors[0]):
        if not _prefills(state=state, return_state=return_state):
            backward = "triton" if forced else "auto"
            out = attention_training(*tensors, **options, segments=segments, forward="triton", backward=backward)
            return out, None
        out, state = attention_prefill(*tensors, **options, state=state)
        return out, state if return_state else None


def _cuda(*tensors, scaling, window, sinks, return_state, segments, **_):
    from .cuda_prefill import attention_prefill_cuda
    from .training import attention_training

    with torch.cuda.device_of(tensors[0]):
        if wants_gradients(tensors) or segments is not None:
            options = dict(scaling=scaling, window=window, sinks=sinks, segments=segments)
            return attention_training(*tensors, **options, forward="cuda"), None
        return attention_prefill_cuda(
            *tensors, scaling=scaling, window=window, sinks=sinks, return_state=return_state
        )


KERNELS = {"triton": (can_run, _triton), "cuda": (can_run_cuda, _cuda)}
