"""What limits the CUDA kernels of a call, by Nsight Compute: `python -m linearize_kernels.bench_profile prefill`.

One call is profiled after another has warmed up, kernel by kernel, at the clocks that the GPU is at. What is printed of
each: its time, how near DRAM, shared memory, issue slots and tensor cores are to their most, how many warps there are,
registers, and for what warps wait, in cycles for each instruction issued.
"""

import argparse
import csv
import shutil
import subprocess
import sys

import torch

from .bench_backward import cuda_call
from .bench_measure import count_of
from .bench_shapes import SHAPES, Shape, draw
from .cuda_prefill import attention_forward_cuda, attention_prefill_cuda

SECTIONS = ["SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "SchedulerStats", "ComputeWorkloadAnalysis",
            "MemoryWorkloadAnalysis"]  # fmt: skip
OURS = "regex:^(prefill|window|key|query|sink)_"  # names of kernels
METRICS = {  # a part of metrics' names: what the largest of them is called here
    "gpu__time_duration.sum": "time",
    "gpu__dram_throughput.avg.pct": "DRAM %",
    "l1tex__throughput.avg.pct": "L1 and shared memory %",
    "sm__throughput.avg.pct": "multiprocessors %",
    "pipe_tensor": "tensor cores %",
    "sm__inst_issued.avg.pct": "issue slots %",
    "sm__warps_active.avg.pct": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "local_load": "local loads",
}
STALL, STALLS = "issue_stalled_", 5  # so many reasons are printed


def call_of(what: str, s: Shape, frozen=()):
    """One call of the kernels of prefill, of the forward of training, or of its backward, as a function of nothing."""
    if what == "backward":
        return cuda_call(s, {}, frozen)[0]
    inputs, options = draw(s)[0], dict(scaling=s.D**-0.5, window=s.window, sinks=s.sinks)
    if what == "forward":
        return lambda: attention_forward_cuda(**inputs, **options)
    return lambda: attention_prefill_cuda(**inputs, **options, return_state=False)


def run_once(call) -> None:
    """Two calls; only the second is in the profiler's range."""
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile_command(arguments: list[str]) -> list[str]:
    """How Nsight Compute runs this module; the clocks stay as they are."""
    sections = [part for section in SECTIONS for part in ("--section", section)]
    profiler = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", OURS]
    script = [sys.executable, "-m", "linearize_kernels.bench_profile", *arguments, "--once"]
    return [*profiler, *sections, "--csv", "--page", "raw", *script]


def summaries(text: str) -> list[str]:
    """Two lines for each kernel in Nsight Compute's raw page; text: what it wrote. Raises ValueError without one."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"Nsight Compute reported no kernel:\n{text[-2000:]}")
    units, *kernels = csv.DictReader(lines[start:])
    return [_summary(kernel, units) for kernel in kernels if kernel.get("Kernel Name")]


def _summary(kernel: dict, units: dict) -> str:
    found = {}
    for name, value in kernel.items():
        label = next((label for part, label in METRICS.items() if name and part in name), None)
        if label and value and (label[-1] != "%" or "pct" in name):
            found[label] = max(found.get(label, ("", "")), (value, units[name]), key=lambda x: _number(x[0]))
    stalls = {
        name.split(STALL)[1].split("_per_")[0]: _number(value)
        for name, value in kernel.items()
        if name and STALL in name and "ratio" in name and value
    }
    longest = sorted(stalls.items(), key=lambda x: -x[1])[:STALLS]
    waits = ", ".join(f"{reason} {cycles:.2f}" for reason, cycles in longest)
    facts = ", ".join(f"{label} {value}" + f" {unit}" * (label == "time") for label, (value, unit) in found.items())
    return f"{kernel['Kernel Name']}: {facts}\n    waits: {waits}"


def _number(text: str) -> float:
    return float(text.replace(",", "") or "-inf")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["prefill", "forward", "backward"])
    parser.add_argument("--shape", choices=list(SHAPES), default="based")
    parser.add_argument("--tokens", type=count_of, default=65536, help="a call (at least one row)")
    parser.add_argument("--length", type=count_of, default=2048, help="of a row, as 4096 or 4k")
    parser.add_argument("--window", type=count_of, default=64)
    parser.add_argument("--map-dim", type=count_of, default=16)
    parser.add_argument("--frozen", action="store_true", help="a backward that needs no gradients of q, k, v")
    parser.add_argument("--once", action="store_true", help="only the call, for a profiler around this process")
    arguments = sys.argv[1:] if argv is None else list(argv)
    choice = parser.parse_args(arguments)
    if choice.once:
        sizes = dict(T=choice.length, B=max(1, choice.tokens // choice.length), window=choice.window, d=choice.map_dim)
        run_once(call_of(choice.what, SHAPES[choice.shape]._replace(**sizes), ("q", "k", "v") if choice.frozen else ()))
        return 0
    if not shutil.which("ncu"):
        print("Nsight Compute (ncu) is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    done = subprocess.run(profile_command(arguments), capture_output=True, text=True)
    print("\n".join(summaries(done.stdout + done.stderr)))
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
