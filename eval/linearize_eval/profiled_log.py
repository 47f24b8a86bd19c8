"""A run's log that profiles its last steps: which kernels take the GPU's time, and what the host asks of it."""

import time

import torch
from torch.profiler import ProfilerActivity, profile

from linearize.run_log import RunLog

PROFILED = 2  # steps
KERNELS, CALLS = 25, 8  # lines of each
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


class ProfiledLog(RunLog):
    """Profiles the PROFILED steps that follow step `after`, the last of a run, and prints the result."""

    def __init__(self, path, *, after: int):
        super().__init__(path)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.after, self.profiler, self.started = after, profile(activities=activities), 0.0

    def step(self, bar, stage, step, *, tokens_per_second, **figures):
        super().step(bar, stage, step, tokens_per_second=tokens_per_second, **figures)
        if step == self.after:
            self.profiler.start()
            self.started = time.perf_counter()
        elif step == self.after + PROFILED:
            seconds = time.perf_counter() - self.started
            self.profiler.stop()
            self.say("\n".join(profile_lines(self.profiler.key_averages(), seconds)))


def profile_lines(averages, seconds: float) -> list[str]:
    """The kernels that take most time, and how often the host called into CUDA: milliseconds and counts a step.

    seconds: of all steps, the profiler's own work included. Without a GPU, operators of the CPU by their own time.
    """
    events = [event for event in averages if not event.is_user_annotation]
    kernels = [(event.self_device_time_total, event) for event in events if event.device_type == CUDA]
    kind = "kernels" if kernels else "operators"
    timed = sorted(kernels or [(e.self_cpu_time_total, e) for e in events], key=lambda pair: -pair[0])
    total, count = sum(each for each, _ in timed), sum(event.count for _, event in timed)
    a_step = 1e3 * PROFILED  # microseconds of all steps to milliseconds of one
    lines = [f"a step: {total / a_step:.1f} of {seconds * 1e6 / a_step:.1f} ms in {count / PROFILED:,.0f} {kind}"]
    lines += [_line(each, event, event.key[:100]) for each, event in timed[:KERNELS]]
    if kernels:
        calls = [(e.cpu_time_total, e) for e in events if e.device_type == CPU and e.key.startswith("cu")]
        calls.sort(key=lambda pair: -pair[0])
        lines += [_line(each, event, f"{event.key} (host)") for each, event in calls[:CALLS]]
    return lines


def _line(microseconds, event, name: str) -> str:
    return f"{microseconds / 1e3 / PROFILED:9.2f} ms {event.count / PROFILED:7.0f} x  {name}"
