"""A ranking of layers or kv heads (see `ranking.rank`) as tables for the terminal and as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from linearize.kept_softmax import Unit, written_down
from linearize.recipe import KeepSoftmaxSettings
from linearize_eval.chart import STYLES
from linearize_eval.perplexity import position_label
from linearize_eval.ranking import HALVES
from linearize_eval.report_text import NOT_FINITE, write_bytes, write_number

SHOWN_SINGLES = 12
CHART_FILE = "ranking.png"


def print_ranking(ranking: dict, console: Console | None = None) -> None:
    """The best singles, and the curve from none kept on, beside evenly spaced units."""
    console = console or Console()
    unit = unit_name(ranking)
    singles = ranking["singles"]
    shown = singles[:SHOWN_SINGLES]
    title = f"one {unit} kept in softmax, the best {len(shown)} of {len(singles)} by {HALVES[ranking['by']][1]}"
    console.print(_table(ranking, title, [(_names(f), f) for f in shown]))
    rows = [(f"{len(f['kept'])}: {_last_names(f, ranking)}", f) for f in ranking["curve"]]
    title = f"{unit}s kept: greedily by {ranking['by']} up to {len(ranking['chain'])}, then in the order of the singles"
    console.print(_table(ranking, title, rows))
    rows = [(f"{len(f['kept'])} evenly spaced", f) for f in ranking["even"][: max(1, len(ranking["chain"]))]]
    console.print(_table(ranking, "for comparison", rows))


def unit_name(ranking: dict) -> str:
    return ranking["unit"].replace("_", " ")


def recipe_lines(ranking: dict, count: int, keep: KeepSoftmaxSettings) -> str:
    """What to write into a recipe to keep the first `count` units of the chain beside what it keeps by name, `keep`."""
    chain = ranking["chain"][:count]
    chosen = sorted(pair[0] for pair in chain) if ranking["unit"] == "layer" else sorted(chain)
    named = written_down(keep, [Unit(layer, head, ()) for layer, head in chain])
    choose = {**_names_in(keep), "count": count, "by": ranking["by"], "unit": ranking["unit"]}
    return (
        f"attention:\n  keep_softmax: {_flow(choose)}   # chooses {chosen}\n"
        f"  # or, by name: keep_softmax: {_flow(_names_in(named))}"
    )


def _names_in(keep: KeepSoftmaxSettings) -> dict:
    return {name: value for name in ("layers", "heads") if (value := getattr(keep, name))}


def _flow(settings: dict) -> str:
    """A YAML mapping on one line."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in settings.items()) + "}"


def _table(ranking: dict, title: str, rows) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("kept", overflow="fold")
    copies = [f"copy@{position_label(distance)}" for distance in ranking["distances"]]
    for heading in (*copies, "KL", "ppl", "state at 4k"):
        table.add_column(heading, justify="right")
    for name, figures in (("teacher", ranking["teacher"]), ("none", ranking["none"]), *rows):
        table.add_row(name, *_cells(figures))
    return table


def _cells(figures: dict) -> list[str]:
    state = figures["state_bytes"]
    return [
        *(_number(c["perplexity"]) for c in figures["copy"]),
        NOT_FINITE if figures["kl"] is None else f"{figures['kl']:.4f}",
        _number(figures["perplexity"]),
        "" if state is None else write_bytes(state),
    ]


def _number(value: float | None) -> str:
    return NOT_FINITE if value is None else write_number(value)


def _names(figures: dict) -> str:
    return ", ".join(str(layer) if head is None else f"{layer}.{head}" for layer, head in figures["kept"])


def _last_names(figures: dict, ranking: dict) -> str:
    """The whole set while the choice was greedy; beyond it the newest alone, in the order of the singles."""
    if len(figures["kept"]) <= len(ranking["chain"]):
        return _names(figures)
    if len(figures["kept"]) == len(ranking["singles"]):
        return "all"
    return "... " + _names({"kept": figures["kept"][-1:]})


def draw_ranking(ranking: dict, path: str | Path) -> None:
    """Draws copy perplexity and KL by number of units kept, the choice against even spacing, to a PNG file."""
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    measures = [("KL to the teacher (nats)", lambda f: f["kl"], False)]
    if ranking["distances"]:
        furthest = ranking["distances"][-1]
        measures.insert(0, (f"copy perplexity at {furthest} tokens", lambda f: f["copy"][-1]["perplexity"], True))
    for axes, (label, figure_of, has_teacher) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
    ):
        _draw_curve(axes, ranking, label, figure_of, has_teacher)
    figure.savefig(path)


def _draw_curve(axes, ranking, label, figure_of, has_teacher) -> None:
    unit = unit_name(ranking)
    for (colour, style), name, key in ((STYLES[1], "chosen greedily", "curve"), (STYLES[2], "evenly spaced", "even")):
        sets = [ranking["none"], *ranking[key]]
        values = [float("nan") if figure_of(f) is None else figure_of(f) for f in sets]
        axes.plot(
            [len(f["kept"]) for f in sets], values, color=colour, linestyle=style, marker="o", markersize=3, label=name
        )
    if has_teacher:
        axes.axhline(figure_of(ranking["teacher"]), color=STYLES[0][0], linewidth=1, label="teacher")
    if has_teacher:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{label} (lower is better)", xlabel=f"{unit}s kept in softmax", ylabel=label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
