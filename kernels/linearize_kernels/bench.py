"""Checks, then times, the kernels beside their reference and their peers on this GPU.

    python -m linearize_kernels.bench [--only SECTION] [--shapes …] [--lengths …] [--peers …] [--quick]

Sections: prefill; training (forward, and forward + backward together); decode. Prefill and training take the same
number of tokens a call at every length. Every call is compared with its definition in float64 before it is timed: all
of it must be finite, and its last row right in the heads of the last kv group; gradients in a row of 1,024 tokens.
Operations and bytes are algorithmic counts (bench_shapes.py). The ceilings, a large copy and a large matrix product,
are measured in the same run. Peers (bench_peers.py) run in time boxes; one that is absent, wrong, too slow or broken is
reported. The exit status is 1 if a kernel of ours failed or was wrong.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from .bench_chart import HEADER, draw_chart, table, write_csv
from .bench_decode import bench_decode
from .bench_measure import Row, attempt, count_of, measure, measure_ceilings, poison, relative, require_finite
from .bench_peers import PEERS, Candidate, candidates
from .bench_shapes import SHAPES, Shape, draw, hybrid_cost

SECTIONS = {"prefill": ("prefill",), "training": ("forward", "forward + backward"), "decode": ()}
LENGTHS = {"prefill": [2**i for i in range(10, 18)], "training": [2**i for i in range(10, 16)]}
BATCHES = {"8b": (1, 4, 16, 64, 128, 256, 512, 1024), "135m": (1, 16, 128, 1024), "based": (1, 16, 128)}
QUICK_LENGTHS, QUICK_BATCHES = (4096, 16384), (1, 128)
PATIENCE = 2  # times a candidate may run out of its time
GRADIENT_LENGTH = 1024  # gradients are compared at one row of so many tokens


def bench_call(c: Candidate, operation: str, s: Shape, inputs, grad, checked: dict, options) -> Row:
    """Checks and times one candidate. checked: errors of gradients by candidate and shape, found once."""
    backward = operation == "forward + backward"
    error, times, note = None, (None, None), ""

    def work():
        nonlocal error, times, note
        function, tensors = c.make(inputs)
        error = check_forward(c, s, function, tensors)
        call = functools.partial(function, *tensors)
        if backward:
            if (c.label, s.name) not in checked:
                checked[c.label, s.name] = check_gradients(c, s)
            error = max(error, checked[c.label, s.name])
            call = functools.partial(outputs_and_gradients, c, function, tensors, grad)
            poison(*tensors)
            require_finite(call())
        if error is not None and not error < c.tolerance:
            note = "WRONG"
        if options.compile_only:
            return
        with torch.set_grad_enabled(backward):
            times = measure(call, rep=options.rep)

    failure = attempt(work, options.seconds)
    return _row(c, operation, s, error, times, failure or note)


def _row(c: Candidate, operation: str, s: Shape, error=None, times=(None, None), note="") -> Row:
    floor = hybrid_cost(s, backward=operation == "forward + backward").gb
    return Row(operation, s.name, s.B, s.T, c.label, c.role, error, *times, *c.cost, floor, note)


@torch.no_grad()
def check_forward(c: Candidate, s: Shape, function, tensors) -> float | None:
    """Runs the call that will be timed in poisoned memory; error of its last row's last kv group."""
    poison(tensors[0], tensors[-1], tensors[min(2, len(tensors) - 1)])
    out = function(*tensors)
    require_finite([out])
    if c.exact is None:
        return None

    def last(x):  # a group's heads, of tensors with H heads as with G
        return x[-1:, -(x.shape[1] // s.G) :, : c.prefix or s.T]

    return relative(last(out), c.exact(*(last(x) for x in tensors)))


def check_gradients(c: Candidate, s: Shape) -> float:
    """Largest error of output and gradients of one short row."""
    short = s._replace(B=1, T=min(s.T, GRADIENT_LENGTH))
    inputs, grad = draw(short)
    function, tensors = c.make(inputs)
    expected = outputs_and_gradients(c, c.exact, [x.double() for x in tensors], grad.double())
    got = outputs_and_gradients(c, function, tensors, grad)
    return max(relative(a, b) for a, b in zip(got, expected, strict=True))


def outputs_and_gradients(c: Candidate, function, tensors, grad) -> list[torch.Tensor]:
    """Out and the gradients of all tensors, by one forward and one backward."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    if c.checkpoints:
        out.backward(grad)
        return [out.detach(), *(x.grad for x in leaves)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def sizes(section: str, choice) -> list[Shape]:
    """The calls of a section, shape by shape."""
    names = choice.shapes or (["8b", "135m"] if section == "decode" else ["based", "8b"])
    shapes = [SHAPES[n]._replace(window=choice.window, d=choice.map_dim) for n in names]
    if section == "decode":
        batches = choice.batches or (QUICK_BATCHES if choice.quick else None)
        return [s._replace(B=b) for s in shapes for b in batches or BATCHES[s.name]]
    lengths = choice.lengths or (QUICK_LENGTHS if choice.quick else LENGTHS[section])
    calls = [s._replace(T=t, B=max(1, choice.tokens // t)) for s in shapes for t in lengths]
    # fla's kernels are compiled for a number of rows, not for a length
    return [s._replace(T=128) for s in calls] if choice.compile_only and choice.no_ours else calls


def run_section(section: str, choice):
    """Groups of rows, each of one operation and size."""
    checked, timed_out = {}, Counter()
    for s in sizes(section, choice):
        if section == "decode":
            yield list(bench_decode(s, choice.peers, limit=choice.seconds, rep=choice.rep))
        for operation in SECTIONS[section]:
            inputs, grad = draw(s)
            rows = []
            for c in candidates(operation, s, choice.peers):
                if choice.no_ours and c.role == "ours":
                    continue
                key = c.label, operation, s.name
                if timed_out[key] == PATIENCE:
                    rows.append(_row(c, operation, s, note=f"not run: timed out at {PATIENCE} shorter lengths"))
                    continue
                rows.append(bench_call(c, operation, s, inputs, grad, checked, choice))
                timed_out[key] += rows[-1].note.startswith("timed out")
            del inputs, grad
            yield rows


def compile_ahead(choice, sections) -> str:
    """Compiles what the run needs in parallel processes, one for a section, shape and implementation each.

    They leave kernels in Triton's cache on disk; nothing is timed meanwhile. Only worth it with fla, whose chunked
    kernels try over a hundred variants. What is not done after `--compile-seconds` is left to the time boxes.
    """
    slow = [name for name in choice.peers if name.startswith("fla_")]
    if not slow or choice.compile_seconds <= 0:
        return ""
    jobs = []
    for section in set(sections) - {"decode"}:
        calls = sizes(section, choice)
        lengths = ",".join(str(t) for t in sorted({s.T for s in calls}))
        for name in {s.name for s in calls}:
            common = ["--compile-only", "--only", section, "--shapes", name, "--lengths", lengths]
            common += ["--tokens", str(choice.tokens), "--seconds", str(choice.compile_seconds)]
            common += ["--window", str(choice.window), "--map-dim", str(choice.map_dim)]
            jobs += [[*common, "--peers", peer, "--no-ours"] for peer in slow] + [[*common, "--peers", "none"]]
    started = time.monotonic()
    late = _run_all([[sys.executable, "-m", "linearize_kernels.bench", *job] for job in jobs], choice.compile_seconds)
    unfinished = f", {late} of them cut off" if late else ""
    return f"compiled ahead in {time.monotonic() - started:.0f} s by {len(jobs)} processes{unfinished}"


def _run_all(commands, seconds: float) -> int:
    """Runs all at once; returns how many had to be killed after so many seconds. What they find is seen again later."""
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}  # what tuning finds on a shared GPU is worth nothing
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    end, late = time.monotonic() + seconds, 0
    workers = [subprocess.Popen(command, **quiet) for command in commands]
    for worker in workers:
        try:
            worker.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            late += 1
    return late


def about() -> dict:
    """The GPU and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import triton

    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        versions["fla"] = version("fla-core")
    except PackageNotFoundError:
        versions["fla"] = "not installed"
    return versions


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="linearize_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_names(SECTIONS), help=f"sections, by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--shapes", type=_names(SHAPES), help=f"by commas: {', '.join(SHAPES)}")
    parser.add_argument("--lengths", type=_numbers, help="tokens of a row, by commas, as 4096 or 4k")
    parser.add_argument("--window", type=count_of, default=64, help="tokens that are attended to exactly")
    parser.add_argument("--map-dim", type=count_of, default=16, help="of the far term's map")
    parser.add_argument("--batches", type=_numbers, help="rows of a decoding step, by commas")
    parser.add_argument("--peers", type=_names(PEERS), default=list(PEERS), help=f"{', '.join(PEERS)}, or none")
    parser.add_argument("--quick", action="store_true", help="two lengths, two batch sizes, shorter timing")
    parser.add_argument("--tokens", type=count_of, default=65536, help="a prefill or training call, one row at least")
    parser.add_argument("--seconds", type=float, default=40, help="a peer's compilation, check and timing of one row")
    parser.add_argument("--compile-seconds", type=float, default=120, help="for compiling fla's kernels ahead; 0: not")
    parser.add_argument("--output", type=Path, default=Path("bench-kernels"), help="writes OUTPUT.csv and OUTPUT.png")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-ours", action="store_true", help=argparse.SUPPRESS)
    choice = parser.parse_args(arguments)
    choice.rep = 20 if choice.quick else 50
    return choice


def _names(allowed):
    def read(text: str) -> list[str]:
        names = [] if text == "none" else text.lower().split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
        return names

    return read


def _numbers(text: str) -> list[int]:
    return [count_of(part) for part in text.split(",")]


def main(arguments=None) -> None:
    choice = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("the benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    sections = choice.only or list(SECTIONS)
    if choice.compile_only:
        for section in sections:
            for _ in run_section(section, choice):
                pass
        return
    facts = about()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if facts["fla"] == "not installed":
        choice.peers = [name for name in choice.peers if not name.startswith("fla_")]
        print("fla's kernels: not installed (pip install flash-linear-attention)")
    compiled = compile_ahead(choice, sections)
    if compiled:
        print(compiled)
    ceilings = measure_ceilings(rep=choice.rep)
    settings = {"window": choice.window, "sinks": sizes(sections[0], choice)[0].sinks, "map_dim": choice.map_dim}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    print(
        f"measured ceilings: copy {ceilings.copy:.0f} GB/s, bfloat16 matrix product {ceilings.product:.0f} TFLOP/s\n"
        "error: relative RMS against float64; %: of these ceilings, by algorithmic counts; roof: the bytes our method "
        "must move, at the copy rate\nsoftmax and fla get k and v repeated to all query heads before the clock starts; "
        f"fla has neither window, sinks nor gate\n{said}\n{HEADER}",
        flush=True,
    )
    rows = []
    for section in sections:
        for group in run_section(section, choice):
            rows += group
            print(table(group, ceilings), flush=True)
            write_csv(choice.output.with_suffix(".csv"), rows, ceilings, {**facts, **settings})
    title = f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, bfloat16; {said}"
    print(f"wrote {choice.output.with_suffix('.csv')}")
    print(draw_chart(choice.output.with_suffix(".png"), rows, ceilings, title))
    failed = [row for row in rows if row.implementation.startswith("linearize") and not row.fine]
    if failed:
        sys.exit(f"{len(failed)} rows of our kernels failed or were wrong, see above")


if __name__ == "__main__":
    main()
