"""Report cards side by side: the teacher once, and the converted row of every folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearize_eval.perplexity import position_label
from linearize_eval.report_text import (
    CONVERTED,
    TEACHER,
    Column,
    find_variant,
    print_unbroken,
    table_columns,
    write_bytes,
)  # fmt: skip

GROUPS = ("perplexity", "text", "recall")
NOT_MEASURED = "-"
SAME = 0.01  # teachers whose figures differ by no more, relatively, are one and the same row


def comparison_rows(reports: Mapping[str, dict]) -> list[tuple[str, ...]]:
    """A heading and the rows of the table: perplexities, KL, recall, and bytes of one sequence's memory by length.

    reports: name -> report (see `report.measure_report`). A figure that a report does not have is "-". The teacher
    comes first, and once more beside each report whose teacher gave other figures.
    """
    columns = {name: _columns(report) for name, report in reports.items()}
    shared = {heading: column for by_heading in columns.values() for heading, column in by_heading.items()}
    headings = sorted(shared, key=lambda heading: GROUPS.index(shared[heading].group))
    lengths = sorted({row["length"] for report in reports.values() for row in report["memory"]["table"]})
    rows = [("", *headings, *(f"state@{position_label(length)}" for length in lengths))]
    teachers: list[dict] = []
    for name, report in reports.items():
        teacher, converted = (find_variant(report, which) for which in (TEACHER, CONVERTED))
        figures = _figures(teacher, columns[name])
        if not any(_same(figures, other) for other in teachers):
            title = f"{TEACHER} of {name}" if teachers else TEACHER
            rows.append((title, *_cells(teacher, headings, columns[name]), *_bytes(report, "kv_bytes", lengths)))
            teachers.append(figures)
        rows.append((name, *_cells(converted, headings, columns[name]), *_bytes(report, "state_bytes", lengths)))
    return rows


def print_comparison(reports: Mapping[str, dict], *, console: Console | None = None) -> None:
    """Prints `comparison_rows`, and says where the reports were not measured on rows of one kind."""
    console = console or Console()
    heading, *rows = comparison_rows(reports)
    print_rows(heading, rows, title="Report cards side by side", console=console)
    kinds = {name: _measured_on(report) for name, report in reports.items()}
    if len(set(kinds.values())) > 1:
        words = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        console.print(Text(f"not measured on the same rows, so do not compare: {words}", style="yellow"))


def print_rows(heading: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, console: Console) -> None:
    """A table with one column of words and figures in the rest, each figure whole whatever the width."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, words in enumerate(heading):
        widest = max((len(row[i]) for row in rows), default=0)
        justify = "right" if i else "left"
        table.add_column(words.replace("@", "@\n"), justify=justify, no_wrap=True, min_width=widest)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    print_unbroken(table, console)


def names_of(folders: Sequence[str]) -> list[str]:
    """The folders' last names, or their whole paths where those are not all different."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _columns(report: dict) -> dict[str, Column]:
    return {c.heading: c for c in table_columns(report) if c.heading != "tokens/s"}


def _figures(variant: dict, columns: dict[str, Column]) -> dict[str, float | None]:
    return {heading: column.figure(variant) for heading, column in columns.items()}


def _cells(variant: dict, headings, columns: dict[str, Column]) -> list[str]:
    return [columns[heading].cell(variant) if heading in columns else NOT_MEASURED for heading in headings]


def _bytes(report: dict, key: str, lengths) -> list[str]:
    at = {row["length"]: write_bytes(row[key]) for row in report["memory"]["table"]}
    return [at.get(length, NOT_MEASURED) for length in lengths]


def _same(one: dict, other: dict) -> bool:
    both = [(one[k] or 0, other[k] or 0) for k in one.keys() & other.keys()]
    return all(abs(a - b) <= SAME * max(abs(a), abs(b)) for a, b in both)


def _measured_on(report: dict) -> str:
    meta = report["meta"]
    text = meta.get("text")
    beside = f" and {text['num_rows']} of {text['row_tokens']} of {text['name']}" if text else ""
    return f"{meta['num_rows']} rows of {meta['row_tokens']}{beside}"
