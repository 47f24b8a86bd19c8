"""The report card as a picture: perplexity by position, and memory by length."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from linearize_eval.perplexity import position_label
from linearize_eval.report_text import NOT_FINITE, write_number

# Okabe and Ito's palette, distinct for colour-blind eyes; the line styles tell the same without colour.
STYLES = (
    ("#000000", "-"),
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#CC79A7", ":"),
    ("#009E73", "-."),
    ("#E69F00", (0, (6, 2))),
    ("#56B4E9", (0, (1, 3))),
)
BINS_AN_OCTAVE = 2
COMPARED_LENGTH = 32768
OUTLIER = 10  # a variant so many times worse than the best does not set the scale


def draw_report(report: dict, path: str | Path) -> None:
    """Draws the report (see `report.measure_report`) to the PNG file `path`."""
    figure = Figure(figsize=(12, 5.5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_perplexity(left, report)
    _draw_memory(right, report)
    lines, labels = left.get_legend_handles_labels()  # under the axes: no free corner can be relied on
    figure.legend(lines, labels, loc="outside lower left", ncols=3, frameon=False, handlelength=3)
    figure.savefig(path)


def smooth_by_position(nll: np.ndarray, *, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """NLL by position (entry 0 is position 1) -> (bin centres, perplexities) over bins of equal ratio.

    Positions before `first` are left out. A bin's figure is exp of its mean NLL, NaN if one of it is.
    """
    stop = len(nll) + 1
    num_bins = max(1, round(np.log2(stop / first) * BINS_AN_OCTAVE))
    edges = np.unique(np.rint(np.geomspace(first, stop, num_bins + 1)).astype(int))
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    centres = np.array([np.sqrt(start * (end - 1)) for start, end in spans])
    means = np.array([nll[start - 1 : end - 1].mean() for start, end in spans])
    return centres, np.exp(means)


def _draw_perplexity(axes: Axes, report: dict) -> None:
    # Well inside the window all variants agree but for "window off", and few tokens have little to say.
    first = max(1, min(report["window"], report["meta"]["row_tokens"]) // 4)
    curves = []
    for variant in report["variants"]:
        nll = np.array(variant["nll_by_position"], dtype=float)  # None becomes NaN
        curves.append(smooth_by_position(nll, first=first))
    top = top_of_axis([values for _, values in curves])
    drawn = zip(report["variants"], curves, strict=True)
    for (colour, style), (variant, (centres, values)) in zip(itertools.cycle(STYLES), drawn):
        overall = variant["perplexity"]
        label = f"{variant['name']}: {NOT_FINITE if overall is None else write_number(overall)} overall"
        if top is not None and np.nanmax(values, initial=0) > top:
            label += ", partly above the axis" if np.nanmin(values) <= top else ", above the axis"
        axes.plot(centres, values, color=colour, linestyle=style, linewidth=2, label=label)
    axes.axvline(report["window"], color="grey", linewidth=1, linestyle=":")
    axes.annotate(
        f"window {report['window']}",
        (report["window"], 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 6),
        textcoords="offset points",
        color="dimgrey",
    )
    log_axes(axes)
    axes.set_ylim(top=top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.set(
        title="Perplexity by position (lower is better)",
        xlabel="position of the predicted token (tokens)",
        ylabel="perplexity",
    )


def top_of_axis(curves: list[np.ndarray]) -> float | None:
    """Upper end of the perplexity axis if a broken variant would squeeze the others flat; else None."""
    finite = [values for values in curves if np.isfinite(values[-1])]
    best = min((values[-1] for values in finite), default=0)
    near = [values for values in finite if values[-1] <= OUTLIER * best]
    if not near or len(near) == len(curves):
        return None
    return 1.25 * max(np.nanmax(values) for values in near)


def _draw_memory(axes: Axes, report: dict) -> None:
    curve = report["memory"]["curve"]
    lengths = [row["length"] for row in curve]
    for (colour, style), key, label in (
        (STYLES[0], "kv_bytes", "teacher: KV cache"),
        (STYLES[1], "state_bytes", "converted: state"),
    ):
        mebibytes = [row[key] / 2**20 for row in curve]
        axes.plot(lengths, mebibytes, color=colour, linestyle=style, linewidth=2, label=label)
    for row in curve:
        if row["length"] == COMPARED_LENGTH:
            _draw_ratio(axes, row)
    log_axes(axes)
    axes.set(
        title="Memory of one sequence (lower is better)",
        xlabel="length of the sequence (tokens)",
        ylabel="memory (MiB)",
    )
    axes.legend(frameon=False, loc="upper left", alignment="left")


def _draw_ratio(axes: Axes, row: dict) -> None:
    """An arrow from the KV cache to the state at one length, with how many times less or more it is."""
    cache, state = row["kv_bytes"] / 2**20, row["state_bytes"] / 2**20
    words = f"{cache / state:.1f}x less" if cache >= state else f"{state / cache:.1f}x more"
    arrow = {"arrowstyle": "->", "color": "dimgrey", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (row["length"], state), (row["length"], cache), arrowprops=arrow)
    axes.annotate(
        f"{words}\nat {position_label(row['length'])}",
        (row["length"], np.sqrt(cache * state)),
        xytext=(-6, -12),
        textcoords="offset points",
        horizontalalignment="right",
        color="dimgrey",
    )


def log_axes(axes: Axes) -> None:
    """Lengths in tokens along a base-2 x axis, plain numbers along a logarithmic y axis, a faint grid."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: position_label(round(x))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
