"""The log of a run: a JSON line a step in log.jsonl, and one progress line with an ETA on the terminal."""

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm


class RunLog:
    """Writes records for the main process and nothing for the others.

    trackers: an accelerate Accelerator with trackers (TensorBoard, W&B, ...) started, or None.
    """

    def __init__(self, path: Path, *, enabled: bool = True, trackers=None):
        self.enabled, self.trackers = enabled, trackers
        self.steps_before = 0  # of earlier stages: trackers want steps that only grow
        self._file = path.open("a", encoding="utf-8") if enabled else None

    def write(self, **record) -> None:
        """One JSON line, with the time in seconds since the epoch."""
        if self._file is not None:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """A line for the person in front of the terminal."""
        if self.enabled:
            tqdm.write(text)

    def step(self, bar: tqdm, stage: str, step: int, *, tokens_per_second: float, **figures) -> None:
        """A finished training step: logged, tracked, and shown in the progress line."""
        memory_gib = peak_memory_bytes() / 2**30
        record = {**figures, "tokens_per_second": round(tokens_per_second, 1), "memory_gib": round(memory_gib, 3)}
        self.write(stage=stage, step=step, **record)
        if self.trackers is not None:
            numbers = {f"{stage}/{k}": v for k, v in record.items() if isinstance(v, (int, float))}
            self.trackers.log(numbers, step=self.steps_before + step)
        shown = {k: v for k, v in figures.items() if isinstance(v, float)}
        text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
        bar.set_postfix_str(f"{text}  {tokens_per_second:,.0f} tok/s  {memory_gib:.1f} GiB", refresh=False)
        bar.update()

    def progress(self, stage: str, *, start: int, total: int) -> tqdm:
        return tqdm(desc=stage, initial=start, total=total, disable=not self.enabled, dynamic_ncols=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
