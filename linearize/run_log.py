"""The log of a run: a JSON line a step in log.jsonl, and one progress line with an ETA on the terminal."""

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import TrainingError


class RunLog:
    """Writes records for the main process and nothing for the others.

    trackers: an accelerate Accelerator with trackers (TensorBoard, W&B, ...) started, or None.
    """

    def __init__(self, path: Path, *, enabled: bool = True, trackers=None):
        self.enabled, self.trackers = enabled, trackers
        self.steps_before = 0  # of earlier stages: trackers want steps that only grow
        self._file = None
        if enabled:
            _drop_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, **record) -> None:
        """One JSON line, with the time in seconds since the epoch. Raises TrainingError where the disk is full."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._file.name} could not be written: {error}. Make room, then give the same command again."
            ) from error

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


def _drop_unfinished_line(path: Path) -> None:
    """What a killed process had not finished writing would make the next line unreadable too."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
