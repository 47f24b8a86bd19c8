"""What came of a sweep: a row a variant in results.csv, the same as a table, and recall against state in a picture."""

import csv
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.text import Text

from linearize.recipe import Recipe
from linearize_eval.chart import STYLES
from linearize_eval.comparison import NOT_MEASURED, print_rows
from linearize_eval.report_text import CONVERTED, FAR_OFF, TEACHER, find_variant, write_bytes, write_number

RESULTS_FILE, CHART_FILE = "results.csv", "results.png"
STATE_LENGTH = 4096


def figures_of(report: dict) -> dict:
    """The figures of a report that variants are compared by; None where one is not finite or was not measured.

    far_off_cost_percent: how much perplexity rises, where the far term matters, when it is switched off. "teacher"
    holds the teacher's perplexity and copy recall.
    """
    teacher, converted, far_off = (find_variant(report, name) for name in (TEACHER, CONVERTED, FAR_OFF))
    far_off = far_off or {"far_nll_by_row": None}  # a model without a far term
    before, after = converted["far_nll_by_row"] or [None], far_off["far_nll_by_row"] or [None]
    known = None not in (*before, *after)
    cost = 100 * math.expm1(sum(after) / len(after) - sum(before) / len(before)) if known else None
    state = {row["length"]: row["state_bytes"] for row in report["memory"]["curve"]}
    text = {"text_perplexity": converted["text"]["perplexity"]} if "text" in converted else {}
    return {
        "perplexity": converted["perplexity"],
        **text,
        "far_off_cost_percent": cost,
        **_copies(converted),
        "kl": converted.get("kl"),
        "state_bytes_4k": state[STATE_LENGTH],
        "teacher": {"perplexity": teacher["perplexity"], **_copies(teacher)},
    }


def _copies(variant: dict) -> dict:
    return {f"copy@{copy['distance']}": copy["perplexity"] for copy in variant["copy"]}


def write_results(folder: Path, base: Recipe, records: Sequence[dict]) -> None:
    """Writes results.csv, whole: the settings of the grid, the figures, minutes and the error of every variant.

    A setting that was not in a variant's grid has the value of the recipe, `base`.
    """
    rows = result_rows(base, records)
    path = folder / RESULTS_FILE
    with path.with_suffix(".tmp").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)


def result_rows(base: Recipe, records: Sequence[dict]) -> list[dict]:
    """One flat dict a variant: settings, figures ("" where none), minutes, error."""
    paths = list(dict.fromkeys(path for record in records for path in record["grid"]))
    names = [n for record in records for n in record["figures"] or {} if n != "teacher"]
    rows = []
    for record in records:
        grid = {path: record["grid"][path] if path in record["grid"] else value_of(base, path) for path in paths}
        grid = {path: value if isinstance(value, str) else json.dumps(value) for path, value in grid.items()}
        figures = record["figures"] or {}
        found = {name: "" if figures.get(name) is None else figures[name] for name in names}
        rows.append({**grid, **found, "minutes": round(record["minutes"], 2), "error": record["error"] or ""})
    return rows


def value_of(recipe: Recipe, path: str):
    """The value of a setting by its dotted name."""
    value = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def show_results(folder: Path, base: Recipe, records: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints the results as a table and draws them."""
    console = console or Console()
    rows = result_rows(base, records)
    names = [name for name in rows[0] if name != "error"]
    cells = [[_cell(name, row[name]) for name in names] for row in rows]
    heading = [name.removesuffix("_percent").replace("state_bytes_4k", "state@4k") for name in names]
    print_rows(heading, cells, title="Sweep", console=console)
    done = [record for record in records if record["figures"]]
    if done:
        teacher = _teacher_of(done)
        words = ", ".join(f"{k} {_cell(k, v)}" for k, v in teacher.items())
        console.print(Text(f"the teacher: {words}. Written: {folder / RESULTS_FILE}", style="dim"))
    if draw_results(records, folder / CHART_FILE):
        console.print(Text(f"drawn: {folder / CHART_FILE}", style="dim"))
    else:
        console.print(Text("not drawn: no variant has a finite copy recall", style="yellow"))


def _cell(name: str, value) -> str:
    if value is None or value == "":
        return NOT_MEASURED
    if not isinstance(value, (int, float)):
        return str(value)
    if name.startswith("state_bytes"):
        return write_bytes(value)
    if name == "far_off_cost_percent":
        return f"{value:+.1f} %"
    return f"{value:.3g}" if name == "kl" else write_number(value)


def draw_results(records: Sequence[dict], path: Path) -> bool:
    """Copy recall against the state of one sequence, a style a distance, with a line along the best, to the PNG file
    `path`; False if no point."""
    done = [record for record in records if record["figures"]]
    distances = dict.fromkeys(name for record in done for name in record["figures"] if name.startswith("copy@"))
    figure = Figure(figsize=(10, 6.5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes, states = figure.subplots(), set()
    for name, (colour, _), marker in zip(distances, itertools.cycle(STYLES), itertools.cycle("osD^vPX")):
        points = [(r["figures"]["state_bytes_4k"], r["figures"].get(name), label_of(r)) for r in done]
        for state, value, label in points:
            if value is not None:
                states.add(state)
                axes.plot(state, value, color=colour, marker=marker, linestyle="")
                place = {"xytext": (6, 3), "textcoords": "offset points"}
                axes.annotate(label, (state, value), fontsize=7, color=colour, **place)
        best = frontier((state, value) for state, value, _ in points if value is not None)
        axes.plot(*zip(*best, strict=True), color=colour, linewidth=1, drawstyle="steps-post")
        axes.plot([], [], color=colour, marker=marker, label=name.replace("@", " at distance "))
        teacher = _teacher_of(done).get(name)
        if teacher is not None:
            axes.axhline(teacher, color=colour, linestyle="--", linewidth=1)
    if states:
        _dress(axes, sorted(states))
        figure.legend(loc="outside lower left", ncols=4, frameon=False)
        figure.savefig(path)
    return bool(states)


def _teacher_of(done: Sequence[dict]) -> dict:
    """The teacher's figures, of the first variant that has each; one may have measured other distances."""
    return {name: value for record in reversed(done) for name, value in record["figures"]["teacher"].items()}


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """(Bytes, perplexity) of those that no other beats in both, by their bytes."""
    best = []
    for state, value in sorted(points):
        if not best or value < best[-1][1]:
            best.append((state, value))
    return best


def _dress(axes: Axes, states: Sequence[int]) -> None:
    """Logarithmic axes with the states themselves as marks, those left out that would be written over another."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    spread = max(states) / min(states)
    marks = []
    for state in states:
        if not marks or state / marks[-1] > spread**0.1:
            marks.append(state)
    axes.set_xticks(marks, [write_bytes(state) for state in marks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
    axes.set(
        title="Copy recall against memory: lines, the best for their bytes; dashed, the teacher",
        xlabel=f"state of one sequence at {STATE_LENGTH} tokens",
        ylabel="perplexity of a repeated passage",
    )


def label_of(record: dict) -> str:
    """'dim=8, 6 heads': the settings of a variant by their last names, of lists how long they are."""
    named = ((path.rpartition(".")[2], value) for path, value in record["grid"].items())
    return ", ".join(f"{len(v)} {name}" if isinstance(v, list) else f"{name}={v}" for name, v in named)
