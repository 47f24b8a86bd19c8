"""`linearize bench generation`: tokens a second and bytes, a converted model beside its teacher.

The teacher once with a static KV cache (in a CUDA graph, the fastest softmax kernel of softmax_choice.py) and once
with transformers' growing cache; the better of the two is what it is compared by. generation_measure.py times a cell.
On a CPU every cell runs in a process of its own, so that its memory is its own.
"""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from linearize.errors import LinearizeError
from linearize.whole_folder import check_folder_of

from .generation_measure import Cell, Result, copy_rate, free_memory, largest_batch, measure, rounded_down
from .generation_models import SHAPES, load_side

SIDES = ("converted", "teacher-static", "teacher-dynamic")


def bench_generation(folder=None, *, against=None, shape=None, prompts=(128, 1024, 8192, 32768), new=1024,
                     batches=(1, "max"), cells=None, sides=None, steps=None, made_up=False, dtype="bfloat16",
                     device="auto", disable_compile=None, profile=False, output=None,
                     window=None, map_dim=None, own_process=None) -> list[Result]:  # fmt: skip
    """Measures every side at every prompt and batch, prints as it goes and returns the results.

    batches: numbers, and "max" for the largest that fits. cells: pairs (prompt, batch) instead of all. steps: how many
    of the new tokens' steps are timed, from their middle; None: all. made_up: decode from random memory, nothing is
    read. disable_compile: of `linearize.Decoder`. profile: print the kernels of a step, too. output: path without
    suffix for a CSV file, written line by line, one of the ratios, and a PNG. window, map_dim: of a shape; None: the
    recipes' default. own_process: a process a cell; None: on a CPU.
    """
    from linearize.loading import pick_device

    sides = _checked(folder, against, shape, new, sides)
    if output:
        check_folder_of(output)
    device = pick_device(device)
    pairs = list(cells or itertools.product(prompts, batches))
    own_process = device.type == "cpu" if own_process is None else own_process
    if own_process and any(batch == "max" for _, batch in pairs):
        raise LinearizeError("the largest batch is found on a GPU; give --batches, or --cells, of numbers here")
    rate = copy_rate(device)
    free_memory()
    print(describe(device, rate))
    if steps is not None and steps < new - 1:
        print(f"Timed: {steps} decode steps from the middle of {new - 1}; figures for all are extrapolated from them")
    options = dict(folder=folder, against=against, shape=shape, dtype=dtype, device=device, window=window,
                   map_dim=map_dim)  # fmt: skip
    results = []

    def done(result):
        results.append(result)
        _report(result, output, first=len(results) == 1)

    more = (steps, made_up, disable_compile, profile)
    cells = [Cell(side, prompt, new, batch, *more) for side in sides for prompt, batch in pairs]
    if own_process:
        for cell in cells:
            done(in_own_process(cell, options, rate))
    else:
        for kind in ("converted", "teacher"):
            _measure_side([cell for cell in cells if cell.side.startswith(kind)], kind, options, rate, done)
    if ratios := compare(results):
        _print_ratios(ratios)
        if output:
            _write_ratios(ratios, f"{output}.ratios.csv")
    if output:
        from .generation_chart import draw_generation

        draw_generation(results, f"{output}.png", title=describe(device, rate))
    return results


def _checked(folder, against, shape, new, sides) -> tuple[str, ...]:
    """The sides to measure. Raises LinearizeError for what does not go together."""
    if (folder is None) == (shape is None):
        raise LinearizeError("give a converted model's folder, or --shape NAME for random weights; not both")
    if shape is not None and shape not in SHAPES:
        raise LinearizeError(f"--shape {shape}: choose from {', '.join(SHAPES)}")
    sides = tuple(sides or (SIDES if against or shape else SIDES[:1]))
    if new < 2:
        raise LinearizeError("--new must be at least 2: the first new token belongs to prefill")
    if wrong := [side for side in sides if side not in SIDES]:
        raise LinearizeError(f"sides {wrong}: choose from {', '.join(SIDES)}")
    if not (against or shape) and set(sides) != {"converted"}:
        raise LinearizeError("--against says which teacher to measure")
    return sides


def _measure_side(cells, kind: str, options: dict, rate: float, done) -> None:
    """All cells of one model, loaded once."""
    if not cells:
        return
    model = load_side(kind, **options)
    for cell in cells:
        if cell.batch == "max":
            done(_largest(model, cell, rate))
        else:
            done(try_cell(model, cell, rate))
    del model
    free_memory()


def try_cell(model, cell: Cell, rate: float) -> Result:
    """`measure`, or a Result without figures where memory runs out."""
    try:
        result = measure(model, cell, rate)
    except torch.OutOfMemoryError:
        result = _does_not_fit(cell)
    free_memory()
    return result


def _does_not_fit(cell: Cell) -> Result:
    return Result(cell.side, cell.prompt, cell.new, cell.batch, how="does not fit")


def _largest(model, cell: Cell, rate: float) -> Result:
    """The largest batch: what should fit by its bytes, an eighth less each time that it does not."""
    free_memory()
    batch = largest_batch(model, cell)
    while True:
        result = try_cell(model, Cell(**{**asdict(cell), "batch": batch}), rate)
        if result.decode_ms is not None or batch == 1:
            return result
        batch = rounded_down(batch * 7 // 8)


def in_own_process(cell: Cell, options: dict, rate: float) -> Result:
    """`measure` in a new process, which loads the model. Raises LinearizeError where it fails."""
    job = json.dumps({"cell": asdict(cell), "options": {**options, "device": str(options["device"])}, "rate": rate},
                     default=str)  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-m", __name__, job], capture_output=True, text=True, env=environment)
    if run.returncode == -signal.SIGKILL:  # by the system, for its memory
        return _does_not_fit(cell)
    if run.returncode:
        lines = ["", *run.stderr.strip().splitlines()]
        told = "\n".join(lines).partition("\nerror: ")[2] or lines[-1] or f"exit status {run.returncode}"
        raise LinearizeError(f"{cell.side}, prompt {cell.prompt}: {told}")
    if cell.profile:
        print(run.stdout.rpartition("\n{")[0])
    return Result(**json.loads(run.stdout.splitlines()[-1]))


def _child(job: str) -> None:
    """What `in_own_process` starts: one cell, its Result as the last line of the output."""
    job = json.loads(job)
    job["options"]["device"] = torch.device(job["options"]["device"])
    kind = job["cell"]["side"].partition("-")[0]
    try:
        model = load_side(kind, **job["options"])
        print(json.dumps(asdict(measure(model, Cell(**job["cell"]), job["rate"]))))
    except LinearizeError as error:
        sys.exit(f"error: {error}")


def compare(results) -> list[tuple]:
    """(prompt, what, converted, teacher, ratio of decode tokens a second), where both sides were measured.

    At each batch that both have, and at each side's best: of the teacher's two caches the better one.
    """
    rows, measured = [], [r for r in results if r.decode_ms is not None]
    for prompt in dict.fromkeys(r.prompt for r in measured):
        here = [r for r in measured if r.prompt == prompt]
        ours, theirs = ([r for r in here if (r.side == "converted") == mine] for mine in (True, False))
        if not (ours and theirs):
            continue
        for batch in sorted({r.batch for r in ours} & {r.batch for r in theirs}):
            pair = [_fastest(r for r in rs if r.batch == batch) for rs in (ours, theirs)]
            rows.append((prompt, f"batch {batch}", *pair, pair[0].decode_tokens_s / pair[1].decode_tokens_s))
        pair = [_fastest(ours), _fastest(theirs)]
        rows.append((prompt, "each at its best", *pair, pair[0].decode_tokens_s / pair[1].decode_tokens_s))
    return rows


def _fastest(results) -> Result:
    return max(results, key=lambda r: r.decode_tokens_s)


def _write_ratios(rows, path) -> None:
    names = ("decode_tokens_s", "total_tokens_s", "bytes_a_row")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "at", "batch", "teacher_batch", "teacher", *(f"{name}_ratio" for name in names)])
        for prompt, what, ours, theirs, _ in rows:
            pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
            ratios = [mine / other if mine and other else "" for mine, other in pairs]
            writer.writerow([prompt, what, ours.batch, theirs.batch, theirs.side, *ratios])


def _print_ratios(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Converted over teacher")
    for column in ("prompt", "at", "converted tok/s", "teacher tok/s", "decoding", "with prefill", "MiB a row",
                   "KV cache MiB a row"):  # fmt: skip
        table.add_column(column, justify="right")
    for prompt, what, ours, theirs, ratio in rows:
        whole = ours.total_tokens_s and theirs.total_tokens_s
        table.add_row(
            f"{prompt:,}", what, f"{ours.decode_tokens_s:,.0f} (batch {ours.batch})",
            f"{theirs.decode_tokens_s:,.0f} ({theirs.side.removeprefix('teacher-')}, batch {theirs.batch})",
            f"{ratio:.2f}", f"{ours.total_tokens_s / theirs.total_tokens_s:.2f}" if whole else "-",
            f"{ours.bytes_a_row / 2**20:,.2f}", f"{theirs.bytes_a_row / 2**20:,.2f}",
        )  # fmt: skip
    Console(width=130).print(table)


def describe(device, rate: float) -> str:
    """Device, versions and copy rate."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {versions}, copy {rate / 1e9:,.0f} GB/s (read and written)"


def _report(result: Result, output, *, first: bool) -> None:
    """A line on the screen, and in the CSV file at once, so that an interrupted run keeps what it has."""
    if first:
        print(f"{'side':<16}{'prompt':>7}{'batch':>7}{'steps':>6}{'prefill tok/s':>15}{'ms a step':>11}{'tok/s':>10}"
              f"{'with prefill':>14}{'roofline':>10}{'MiB a row':>11}{'peak GB':>9}{'resident':>9}{'setup s':>9}"
              "  how")  # fmt: skip
    r = result
    cells = [
        (r.prefill_tokens_s, 15, ",.0f"), (r.decode_ms, 11, ",.3f"), (r.decode_tokens_s, 10, ",.5g"),
        (r.total_tokens_s, 14, ",.5g"), (r.roofline_percent and r.roofline_percent / 100, 10, ".0%"),
        (r.bytes_a_row and r.bytes_a_row / 2**20, 11, ",.2f"), (r.peak_gb, 9, ",.2f"), (r.resident_gb, 9, ",.2f"),
        (r.setup_s, 9, ",.1f"),
    ]  # fmt: skip
    line = f"{r.side:<16}{r.prompt:>7}{r.batch:>7}{r.steps:>6}" + "".join(
        f"{'-' if value is None else format(value, spec):>{width}}" for value, width, spec in cells
    )
    print(f"{line}  {r.how}")
    sys.stdout.flush()
    if output:
        path = Path(f"{output}.csv")
        with path.open("w" if first else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(r)))
            if first:
                writer.writeheader()
            writer.writerow(asdict(r))


if __name__ == "__main__":
    _child(sys.argv[1])
