"""The report card in words and tables: for the terminal and for the model card, from the same figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from linearize_eval.harness import task_figures
from linearize_eval.perplexity import bucket_label, position_label

TEACHER, CONVERTED, FAR_OFF, WINDOW_SINKS = "teacher", "converted", "far term off", "window + sinks"
# A difference counts when it exceeds this many standard errors over the rows.
STANDARD_ERRORS = 2
NOT_FINITE = "not finite"
ONE_ROW = "one row is too few to judge"
CHART_FILE = "report.png"


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, how to find its figure in a variant and its error, how to write both."""

    group: Literal["perplexity", "text", "recall"]
    heading: str
    figure: Callable[[dict], float | None]
    write: Callable[[float], str]
    error: Callable[[dict], float | None] = lambda variant: None

    def cell(self, variant: dict) -> str:
        """The figure as printed, with its standard error where there is one: 1.24±0.03."""
        value, error = self.figure(variant), self.error(variant)
        if value is None:
            return NOT_FINITE
        return self.write(value) + ("" if error is None else f"±{self.write(error)}")


@dataclass(frozen=True)
class Verdict:
    """One finding in words: does it speak for the conversion, against it, or is it open?"""

    kind: Literal["good", "bad", "open"]
    text: str


def write_number(value: float) -> str:
    """Three to five digits: 1.24, 20.56, 207.6, 1234, 49.2k."""
    if value >= 10_000:
        return f"{value / 1000:.1f}k" if value < 1e6 else f"{value:.1e}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def write_share(value: float) -> str:
    """0.72 as 72%."""
    return f"{100 * value:.0f}%"


def write_bytes(value: float) -> str:
    """Bytes with a binary unit: 3.1 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def table_columns(report: dict) -> list[Column]:
    """The columns of this report's table, in order."""
    first = report["variants"][0]
    columns = [Column("perplexity", "ppl", lambda v: v["perplexity"], write_number)]
    for i, bucket in enumerate(first["buckets"]):
        label = bucket_label(bucket["start"], bucket["stop"])
        columns.append(
            Column("perplexity", label, lambda v, i=i: v["buckets"][i]["perplexity"], write_number)
        )
    if "kl" in first:
        columns.append(Column("perplexity", "KL", lambda v: v["kl"], lambda value: f"{value:.3g}"))
    if "text" in first:
        columns.append(Column("text", "text@all", lambda v: v["text"]["perplexity"], write_number))
        for i, bucket in enumerate(first["text"]["buckets"]):
            label = f"text@{bucket_label(bucket['start'], bucket['stop'])}"
            columns.append(Column("text", label, lambda v, i=i: v["text"]["buckets"][i]["perplexity"], write_number))
    for i, copy in enumerate(first["copy"]):
        label = f"copy@{position_label(copy['distance'])}"
        figure, error = (lambda v, i=i, k=k: v["copy"][i].get(k) for k in ("perplexity", "error"))
        columns.append(Column("recall", label, figure, write_number, error))
    for i, key in enumerate(first["key"]):
        label = f"key{_num_pairs(key)}@{position_label(key['distance'])}"
        figure, error = (lambda v, i=i, k=k: v["key"][i].get(k) for k in ("accuracy", "error"))
        columns.append(Column("recall", label, figure, write_share, error))
    columns.append(Column("recall", "tokens/s", lambda v: v["tokens_per_second"], write_number))
    return columns


def _num_pairs(key: dict) -> int:
    return key.get("num_pairs") or round(1 / key["chance"])  # which older reports do not say


def find_variant(report: dict, name: str) -> dict | None:
    """The figures of the variant called `name`, or None if it was not measured."""
    return next((variant for variant in report["variants"] if variant["name"] == name), None)


def table_cell(report: dict, variant: dict, column: Column) -> tuple[str, str]:
    """A figure and its ratio to the teacher's; the ratio is "" for the teacher and where there is none."""
    value, cell = column.figure(variant), column.cell(variant)
    teacher = find_variant(report, TEACHER)
    reference = None if teacher is None or teacher is variant else column.figure(teacher)
    if value is None or not reference:
        return cell, ""
    ratio = value / reference
    return cell, f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def legend(report: dict) -> str:
    """What the columns mean and on what they were measured."""
    meta = report["meta"]
    parts = [
        f"ppl: perplexity of {meta['num_rows']} held-out rows of {meta['row_tokens']} tokens, overall and by "
        "position.",
        "copy@d: perplexity of a text's repetition d tokens later (1 is perfect).",
    ]
    if "kl" in report["variants"][0]:
        parts.append("KL: to the teacher, on these rows, mean nats a token.")
    if text := meta.get("text"):
        rows = f"{text['num_rows']} rows of {text['row_tokens']} tokens"
        parts.append(f"text@: perplexity of {text['name']}, {rows}, overall and by position.")
    keys = report["variants"][0]["key"]
    if keys:
        parts.append(
            f"keyP@d: share of {meta['key_questions']} planted facts found d tokens later, among P (chance 1/P)."
        )
    parts.append("±: one standard error over rows, or over questions; a difference counts from two.")
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    size = meta.get("batch_size", 1)  # which reports of before batches do not say
    batch = "1 row" if size == 1 else f"{size} rows"
    parts.append(f"x: against the teacher. tokens/s: this forward of {batch}, {meta['dtype']} on {meta['device']}.")
    return " ".join([*parts, f"{versions}."])


def task_rows(report: dict) -> list[tuple[str, ...]]:
    """lm-eval's figures, if any: a heading, then task, metric and the value ± its error of each variant."""
    tasks = report.get("tasks") or {}
    if not tasks:
        return []
    figures = [task_figures(results) for results in tasks.values()]
    rows = [("task", "metric", *tasks)]
    for row in zip(*figures, strict=True):
        values = [
            NOT_FINITE if f.value is None else f"{f.value:.4f}" + (f" ± {f.error:.4f}" if f.error else "")
            for f in row
        ]
        rows.append((row[0].task, row[0].metric, *values))
    return rows


def memory_line(report: dict) -> str:
    """State of one sequence against the teacher's KV cache at a few lengths."""
    parts = []
    for row in report["memory"]["table"]:
        state, cache = row["state_bytes"], row["kv_bytes"]
        ratio = f"{cache / state:.1f}x less" if cache >= state else f"{state / cache:.1f}x MORE"
        against = f"{write_bytes(state)} against {write_bytes(cache)} ({ratio})"
        parts.append(f"{position_label(row['length'])} tokens {against}")
    return "Memory of one sequence, state against KV cache: " + "; ".join(parts) + "."


def verdicts(report: dict) -> list[Verdict]:
    """Does the far term help, and does the model beat window + sinks of equal bytes? Good or bad news."""
    converted = find_variant(report, CONVERTED)
    if converted is None:
        return []
    if report["far_from"] is None:
        tokens, window = report["meta"]["row_tokens"], report["window"]
        text = f"far term: not measured. Rows of {tokens} tokens never leave the window of {window} tokens."
        return [Verdict("open", text)]
    found = []
    if (far_off := find_variant(report, FAR_OFF)) is not None:
        found.append(_far_verdict(report, converted, far_off))
    if (baseline := find_variant(report, WINDOW_SINKS)) is not None:
        found.append(_baseline_verdict(report, converted, baseline))
    return found


def _far_verdict(report: dict, converted: dict, far_off: dict) -> Verdict:
    cost = _change(converted["far_nll_by_row"], far_off["far_nll_by_row"])
    where = f"perplexity at positions >= {report['far_from']}"
    if cost is None:
        return Verdict("bad", f"far term: {where} is {NOT_FINITE}; no judgement is possible.")
    text = f"far term switched off costs {cost.text} {where}"
    if cost.sign is None:
        return Verdict("open", f"{text}: {ONE_ROW}.")
    if cost.sign > 0:
        return Verdict("good", f"{text}: the far term helps.")
    if cost.sign < 0:
        return Verdict("bad", f"{text}: the far term does NOT help, the model is better WITHOUT it.")
    return Verdict("bad", f"{text}: the far term does NOT help measurably.")


def _baseline_verdict(report: dict, converted: dict, baseline: dict) -> Verdict:
    overall = _change(baseline["nll_by_row"], converted["nll_by_row"])
    far = _change(baseline["far_nll_by_row"], converted["far_nll_by_row"])
    name = WINDOW_SINKS + (f" ({baseline['note']})" if baseline["note"] else "")
    if overall is None or far is None:
        return Verdict("bad", f"against {name}: perplexity is {NOT_FINITE}; no judgement is possible.")
    where = f"at positions >= {report['far_from']}"
    text = f"against {name}: perplexity {overall.text} overall, {far.text} {where}"
    if overall.sign is None or far.sign is None:
        return Verdict("open", f"{text}: {ONE_ROW}.")
    if overall.sign < 0 and far.sign < 0:
        return Verdict("good", f"{text}: the converted model beats it.")
    if far.sign < 0:
        return Verdict("bad", f"{text}: the converted model beats it {where} but NOT overall.")
    if overall.sign < 0:
        return Verdict("bad", f"{text}: the converted model beats it overall but NOT {where}.")
    return Verdict("bad", f"{text}: the converted model does NOT beat it.")


@dataclass(frozen=True)
class _Change:
    """A change of perplexity in words, and its sign: 0 if it is within the noise, None if that is not known."""

    text: str
    sign: int | None


def _change(before: list[float | None], after: list[float | None]) -> _Change | None:
    """From one variant's NLL by row (nats) to another's on the same rows; None if any is not finite."""
    if None in before or None in after:
        return None
    differences = [b - a for a, b in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count == 1:  # nothing to judge the noise by
        return _Change(f"{100 * math.expm1(mean):+.1f} % (one row)", None)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    error_percent = 100 * math.exp(mean) * error
    decimals = 1 if error_percent >= 0.095 else 2  # so that an error is not 0.0
    text = f"{100 * math.expm1(mean):+.{decimals}f} % ± {error_percent:.{decimals}f} %"
    sign = 0 if abs(mean) <= STANDARD_ERRORS * error else 1 if mean > 0 else -1
    return _Change(text, sign)


def print_report(report: dict, *, console: Console | None = None) -> None:
    """Prints the table of variants, what its columns mean, the memory and the verdicts.

    Where one table is too wide for the terminal, perplexity and recall come as two.
    """
    console = console or Console()
    columns = table_columns(report)
    tables = [_table(report, "Report card", columns)]
    if _narrowest(console, tables[0]) > console.width:
        titles = {"perplexity": "Report card: perplexity", "text": "Report card: perplexity of the text"}
        titles["recall"] = "Report card: recall and speed"
        tables = [
            _table(report, title, [column for column in columns if column.group == group])
            for group, title in titles.items()
            if any(column.group == group for column in columns)
        ]
    for table in tables:
        print_unbroken(table, console)
    console.print(Text(legend(report), style="dim"))
    if rows := task_rows(report):
        console.print(_task_table(rows))
    console.print(Text(memory_line(report)))
    for reason in report["left_out"]:
        console.print(Text(f"not measured: {reason}", style="yellow"))
    styles = {"good": "green", "bad": "bold red", "open": "yellow"}
    for verdict in verdicts(report):
        console.print(Text(verdict.text, style=styles[verdict.kind]))


def print_unbroken(table: Table, console: Console) -> None:
    """Prints the table as wide as it needs: a figure cut short is worse than a line too long."""
    if _narrowest(console, table) > console.width:
        table.width = _narrowest(console, table)
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def _narrowest(console: Console, table: Table) -> int:
    """Characters that `table` needs, whatever the console has."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).minimum


def _table(report: dict, title: str, columns: list[Column]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("variant", min_width=14, max_width=30)
    for column in columns:
        table.add_column(column.heading.replace("@", "@\n"), justify="right", no_wrap=True)
    for variant in report["variants"]:
        name = Text(variant["name"], style="bold")
        if variant["note"]:
            name.append(f"\n{variant['note']}", style="not bold dim")
        cells = []
        for column in columns:
            value, ratio = table_cell(report, variant, column)
            cells.append(Text(value).append(f"\n{ratio}", style="dim"))
        table.add_row(name, *cells)
    return table


def _task_table(rows: list[tuple[str, ...]]) -> Table:
    table = Table(title="Tasks", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def report_markdown(report: dict) -> str:
    """The same card as Markdown: verdicts, table, what its columns mean, tasks, memory and the chart."""
    columns = table_columns(report)
    rows = [("variant", *(column.heading for column in columns))]
    for variant in report["variants"]:
        note = f" ({variant['note']})" if variant["note"] else ""
        cells = [table_cell(report, variant, column) for column in columns]
        figures = (f"{value} ({ratio})" if ratio else value for value, ratio in cells)
        rows.append((variant["name"] + note, *figures))
    memory = [("tokens in the sequence", "state", "KV cache of the teacher")]
    for row in report["memory"]["table"]:
        memory.append((f"{row['length']:,}", write_bytes(row["state_bytes"]), write_bytes(row["kv_bytes"])))
    lines = [f"- **{verdict.text}**" for verdict in verdicts(report)]
    lines += [f"- not measured: {reason}" for reason in report["left_out"]]
    lines += ["", *_markdown_table(rows), "", legend(report), ""]
    if tasks := task_rows(report):
        lines += [*_markdown_table(tasks, num_words=2), ""]
    lines += [*_markdown_table(memory, num_words=0), ""]
    lines.append(f"![Perplexity by position; memory by length]({CHART_FILE})")
    return "\n".join(lines).strip() + "\n"


def _markdown_table(rows: list[tuple[str, ...]], *, num_words: int = 1) -> list[str]:
    """Lines of a table: the first row is its heading, the first `num_words` columns hold no figures."""
    sides = ["---"] * num_words + ["---:"] * (len(rows[0]) - num_words)
    return [f"| {' | '.join(row)} |" for row in (rows[0], sides, *rows[1:])]
