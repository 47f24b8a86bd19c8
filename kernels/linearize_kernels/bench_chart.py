"""The benchmark's results as a table on the screen, as CSV, and as a chart.

Ratios are within a row group (one operation, shape and size): how many times a row is faster than SDPA cuDNN (in
decoding: than softmax over 2048 tokens by cuDNN) and than the fastest whole operation of fla. The roofline is the time
to move our method's bytes at the measured copy rate. A row with a note counts for no ratio; its time is in brackets.
"""

import csv
import importlib.util
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from .bench_measure import Ceilings, Row
from .bench_shapes import SHAPES

HEADER = (
    f"{'implementation':37}{'error':>9}{'min ms':>10}{'ms':>10}{'TFLOP/s':>9}{'%':>5}{'GB/s':>7}{'%':>5}"
    f"{'roof %':>8}{'x cuDNN':>9}{'x fla':>8}"
)
DERIVED = ("tflops", "percent_of_product", "gb_per_s", "percent_of_copy", "percent_of_roofline", "times_cudnn",
           "times_fla")  # fmt: skip
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def group_of(row: Row) -> tuple:
    return row.operation, row.shape, row.B, row.T


def derive(rows: list[Row], ceilings: Ceilings) -> list[dict]:
    """Rates and ratios of the rows of one group, None where there is no time or nothing to compare with."""
    cudnn = min((r.ms for r in rows if r.role == "cudnn" and r.fine), default=None)
    fla = min((r.ms for r in rows if r.role == "fla" and r.fine), default=None)
    return [_derive(row, ceilings, cudnn, fla) for row in rows]


def _derive(row: Row, ceilings: Ceilings, cudnn, fla) -> dict:
    if row.ms is None:
        return dict.fromkeys(DERIVED)
    tflops, gb_per_s = row.gflop / row.ms, row.gb / row.ms * 1e3
    return dict(
        tflops=tflops,
        percent_of_product=100 * tflops / ceilings.product,
        gb_per_s=gb_per_s,
        percent_of_copy=100 * gb_per_s / ceilings.copy,
        percent_of_roofline=100 * roofline_ms(row, ceilings) / row.ms,
        times_cudnn=cudnn and cudnn / row.ms,
        times_fla=fla and fla / row.ms,
    )


def roofline_ms(row: Row, ceilings: Ceilings) -> float:
    return row.floor_gb / ceilings.copy * 1e3


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """The lines of one group, headed by what was called."""
    operation, shape, batch, length = group_of(rows[0])
    size = f"batch {batch}" if length == 1 else f"{batch} x {length}"
    floor = f"byte roofline {roofline_ms(rows[0], ceilings):.4f} ms"
    lines = [f"-- {operation}, {shape} ({SHAPES[shape].layer}), {size}: {floor}"]
    lines += [_line(row, derived) for row, derived in zip(rows, derive(rows, ceilings), strict=True)]
    return "\n".join(lines)


def _line(row: Row, derived: dict) -> str:
    if row.ms is None:
        return f"{row.implementation:37}  {row.note}"
    error = "" if row.error is None else f"{row.error:.1e}"
    time = f"{row.ms:.4f}" if row.fine else f"({row.ms:.4f})"
    line = (
        f"{row.implementation:37}{error:>9}{row.ms_min:10.4f}{time:>10}{derived['tflops']:9.1f}"
        f"{derived['percent_of_product']:5.0f}{derived['gb_per_s']:7.0f}{derived['percent_of_copy']:5.0f}"
        f"{derived['percent_of_roofline']:8.1f}{_ratio(derived['times_cudnn']):>9}{_ratio(derived['times_fla']):>8}"
    )
    return f"{line}  {row.note}".rstrip()


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_csv(path: Path, rows: list[Row], ceilings: Ceilings, about: dict) -> None:
    """Every row with its rates and layer; `about` (GPU, versions, settings) and the ceilings stand in each."""
    constant = {**about, "copy_gb_per_s": ceilings.copy, "product_tflops": ceilings.product}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*Row._fields, "layer", *DERIVED, *constant])
        writer.writeheader()
        for group in groups(rows):
            for row, derived in zip(group, derive(group, ceilings), strict=True):
                writer.writerow({**row._asdict(), "layer": SHAPES[row.shape].layer, **derived, **constant})


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, group_of)]


def draw_chart(path: Path, rows: list[Row], ceilings: Ceilings, title: str) -> str:
    """Time against length (decoding: batch) for each operation and shape, to a PNG. Returns what to tell the user."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no chart: matplotlib is not installed"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(rows)
    if not panels:
        return "no chart: no row has a time"
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 4.8 * lines), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    order = list(dict.fromkeys(row.implementation for row in rows))
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (name, members) in zip(places[: len(panels)], panels.items(), strict=True):
        _draw_panel(axes, name, members, ceilings, order)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path)
    return f"wrote {path}"


def panels_of(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Timed rows by (operation, shape)."""
    panels = {}
    for row in rows:
        if row.fine:
            panels.setdefault((row.operation, row.shape), []).append(row)
    return panels


def _draw_panel(axes, name, rows: list[Row], ceilings: Ceilings, order: list[str]) -> None:
    """order: of implementations over all panels, so that each keeps its colour."""
    decoding = all(row.T == 1 for row in rows)

    def position(row):
        return row.B if decoding else row.T

    curves = {}
    for row in rows:
        curves.setdefault(row.implementation, []).append(row)
    for label, points in curves.items():
        i = order.index(label)
        axes.plot(
            [position(r) for r in points], [r.ms for r in points], label=label.strip(), marker=".",
            color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            linewidth=2.5 if points[0].role == "ours" else 1.2,
        )  # fmt: skip
    floor = {position(r): roofline_ms(r, ceilings) for r in rows}
    axes.plot(list(floor), list(floor.values()), color="grey", linestyle="-.", linewidth=1, label="byte roofline")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axes.set(title=", ".join(name), xlabel="rows" if decoding else "tokens in a row", ylabel="ms (lower is better)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
