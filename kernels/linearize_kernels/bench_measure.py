"""How the benchmark measures: a row, ceilings, times, errors, and what becomes of a call that fails."""

import argparse
import signal
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from triton.errors import TritonError

# what a library's call may raise without the benchmark being at fault; a lost GPU shows in `require_gpu`
FAILURES = (RuntimeError, TritonError, ImportError, ArithmeticError, AssertionError, AttributeError, LookupError,
            TypeError, ValueError, OSError)  # fmt: skip
SLOW_MS = 100  # beyond this, three calls are timed


class Row(NamedTuple):
    """One measurement: shortest and median milliseconds, what its method costs, and the floor of the row's group."""

    operation: str
    shape: str
    B: int
    T: int
    implementation: str
    role: str  # ours, cudnn, fla (a whole operation of fla), or "" for what no ratio is taken to
    error: float | None  # against float64, relative RMS
    ms_min: float | None  # None where it could not be timed
    ms: float | None
    gflop: float
    gb: float
    floor_gb: float  # the bytes that our method has to move, for the roofline
    note: str  # why there is no time, or why it does not count

    @property
    def fine(self) -> bool:
        return self.ms is not None and not self.note


class Ceilings(NamedTuple):
    """Measured rates: GB/s of a device copy (read and written), TFLOP/s of a bfloat16 matrix product."""

    copy: float
    product: float


class TimedOut(Exception):
    """A time box ended."""


@contextmanager
def time_box(seconds: float):
    """Raises TimedOut in the block after so many seconds; in the main thread only."""

    def stop(*_):
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, should some code have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(work: Callable[[], None], seconds: float) -> str:
    """Runs work() in a time box; "", or why it failed."""
    try:
        with time_box(seconds):
            work()
    except TimedOut:
        note = f"timed out after {seconds:g} s"
    except ModuleNotFoundError as error:
        note = f"not installed ({error.name})"
    except torch.OutOfMemoryError:
        note = "out of memory"
    except FAILURES as error:
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    else:
        return ""
    require_gpu(note)
    return note


def require_gpu(note: str) -> None:
    """Raises SystemExit if a kernel's fault took this process' access to the GPU along."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the GPU is lost to this process after: {note}. Run again without that peer.") from error
    torch.cuda.empty_cache()


def measure(function: Callable, *, rep: float) -> tuple[float, float]:
    """(shortest, median) milliseconds by device events, the L2 cache cleared before each call."""
    import triton

    function()
    once = _time(function)
    if once > SLOW_MS:
        times = [once, _time(function), _time(function)]
        return min(times), statistics.median(times)
    return tuple(triton.testing.do_bench(function, warmup=10, rep=rep, quantiles=[0.0, 0.5]))


def measure_graph(call: Callable, calls: int, *, replays: int, samples: int = 5) -> tuple[float, float]:
    """(shortest, median) milliseconds of one of `calls` calls, captured together; a sample is `replays` replays.

    The calls must differ in their memory, so that together they do not fit the L2 cache. call(i) launches call i.
    """
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)

    def sample():
        for _ in range(replays):
            graph.replay()

    graph.replay()
    times = [_time(sample) / replays / calls for _ in range(samples)]
    return min(times), statistics.median(times)


def _time(function: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def count_of(text: str) -> int:
    """An argument that counts: 512, or 4k. Raises ArgumentTypeError."""
    digits, times = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1, as 512 or 4k")
    return int(digits) * times


def measure_ceilings(*, rep: float) -> Ceilings:
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 2 / measure(lambda: y.copy_(x), rep=rep)[1] / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return Ceilings(copy, 2 * 8192**3 / measure(lambda: a @ b, rep=rep)[1] / 1e9)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; NaN if anything is."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def poison(*likes: torch.Tensor) -> None:
    """Leaves NaN in the memory that PyTorch hands out next for tensors of these sizes: unwritten outputs show."""
    held = [torch.full((x.numel(),), torch.nan, dtype=x.dtype, device=x.device) for x in likes]
    del held


def require_finite(tensors) -> None:
    """Raises ArithmeticError if any element is NaN or infinite."""
    if not all(x.isfinite().all() for x in tensors):
        raise ArithmeticError("results that are not finite, or were never written")
