"""The picture of `linearize bench generation`: tokens a second by prompt length and batch, a line a side."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .chart import STYLES, log_axes


def draw_generation(results, path, *, title: str) -> None:
    """results: of generation_bench, those without figures are left out. Writes the PNG file `path`."""
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measured = [r for r in results if r.decode_ms is not None]
    sides = list(dict.fromkeys(r.side for r in measured))
    for axes, choose, words in (
        (left, max, "at the largest batch measured"),
        (right, min, "at the smallest batch measured"),
    ):
        for side, (colour, line) in zip(sides, itertools.cycle(STYLES)):
            points = []
            for prompt in sorted({r.prompt for r in measured if r.side == side}):
                cell = choose((r for r in measured if r.side == side and r.prompt == prompt), key=lambda r: r.batch)
                points.append((max(1, prompt), cell.decode_tokens_s, cell.batch))
            xs, ys, _ = zip(*points, strict=True)
            axes.plot(xs, ys, color=colour, linestyle=line, marker="o", label=side)
            for x, y, batch in points:
                axes.annotate(f"{batch}", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=8)
        log_axes(axes)
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axes.set(title=f"Decoding, {words} (written beside)", xlabel="prompt (tokens)", ylabel="new tokens a second")
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)
