"""What the kernels of one decode step take: `linearize bench generation --profile`.

On a GPU by torch's profiler over replays of the graph, so as they run there; on a CPU operators instead of kernels.
"""

from collections import defaultdict

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PROFILED = 4  # steps
SHOWN = 20  # kernels


def print_profile(decoder) -> None:
    """Runs PROFILED more steps and prints kernels by their time: times a step, microseconds a step, and share."""
    rows, what = profile_step(decoder), "kernels" if decoder.device.type == "cuda" else "operators"
    total = sum(time for _, _, time in rows)
    count = sum(times for _, times, _ in rows)
    print(f"{count:,.0f} {what} a step, {total / 1e3:,.3f} ms in them")
    print(f"{'a step':>8}{'us a step':>11}{'share':>7}")
    for name, times, time in rows[:SHOWN]:
        print(f"{times:>8,.0f}{time:>11,.1f}{time / total:>7.1%}  {name[:90]}")
    if rest := rows[SHOWN:]:
        times, time = (sum(row[i] for row in rest) for i in (1, 2))
        print(f"{times:>8,.0f}{time:>11,.1f}{time / total:>7.1%}  {len(rest)} others")


def profile_step(decoder) -> list[tuple[str, float, float]]:
    """(kernel, times a step, microseconds a step), the longest first."""
    cuda = decoder.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        decoder.decode_n(PROFILED)
        if cuda:
            torch.cuda.synchronize(decoder.device)
    found = defaultdict(lambda: [0, 0.0])
    for event in recorded.events():
        if (event.device_type == DeviceType.CUDA) == cuda:
            found[event.name][0] += 1
            found[event.name][1] += event.self_device_time_total if cuda else event.self_cpu_time_total
    rows = [(name, times / PROFILED, time / PROFILED) for name, (times, time) in found.items()]
    return sorted(rows, key=lambda row: -row[2])
