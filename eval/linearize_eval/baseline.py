"""The report card's last row: a window and sinks of equal bytes, finetuned in a conversion of its own.

`attention.feature_map.name: equal_window` converts it; its own card, measured on the same texts, gives the row.
"""

from pathlib import Path

from linearize.errors import ModelError
from linearize_eval.report import load_report
from linearize_eval.report_text import CONVERTED, FAR_OFF, TEACHER, WINDOW_SINKS, find_variant, table_columns

SAME_TEXT = 0.02  # nats: what a teacher's mean NLL of one row may differ by, in another dtype or batch


def load_baseline(folder: str | Path) -> dict:
    """The report in `folder`. Raises ModelError unless it is of a model without a far term."""
    report = load_report(folder)
    if find_variant(report, FAR_OFF) is not None:
        raise ModelError(
            f"{folder} cannot be a baseline: its model has linear attention. Convert one with "
            "--set attention.feature_map.name=equal_window"
        )
    return report


def with_baseline(report: dict, baseline: dict, name: str) -> dict:
    """`report` with the converted row of `baseline`, a report called `name`, in place of the untrained window + sinks.

    Raises ModelError unless both were measured on the same texts, in the same columns.
    """
    reason = _difference(report, baseline)
    if reason:
        raise ModelError(
            f"the baseline {name} was not measured on the same texts: {reason}. Convert it by the same recipe but for "
            "attention.feature_map.name"
        )
    note = find_variant(baseline, WINDOW_SINKS)["note"].partition(", untrained")[0]
    row = {**find_variant(baseline, CONVERTED), "name": WINDOW_SINKS, "note": f"{note}, trained: {name}"}
    kept = [variant for variant in report["variants"] if variant["name"] != WINDOW_SINKS]
    return {**report, "variants": [*kept, row]}


def _difference(report: dict, baseline: dict) -> str | None:
    """What keeps the two reports' rows from being compared, if anything."""
    ours, theirs = ([c.heading for c in table_columns(r)] for r in (report, baseline))
    if ours != theirs:
        return f"its columns are {' '.join(theirs)}, here they are {' '.join(ours)}"
    ours, theirs = (find_variant(r, TEACHER)["nll_by_row"] for r in (report, baseline))
    if len(ours) != len(theirs):
        return f"it has {len(theirs)} rows, here there are {len(ours)}"
    if any(a is None or b is None or abs(a - b) > SAME_TEXT for a, b in zip(ours, theirs, strict=True)):
        return "its teacher has other losses"
    return None
