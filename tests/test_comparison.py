"""Report cards side by side."""

import copy
import io

import pytest
from rich.console import Console
from test_eval_report import build_model, measure

from linearize_eval.comparison import comparison_rows, names_of, print_comparison
from linearize_eval.report_text import NOT_FINITE, write_number


@pytest.fixture(scope="module")
def report() -> dict:
    return measure(build_model(), key_recall_samples=0)


def changed(report: dict, **figures) -> dict:
    other = copy.deepcopy(report)
    other["variants"][1] |= figures
    return other


def test_the_teacher_comes_once_and_every_folder_has_its_converted_row(report):
    other = changed(report, perplexity=12.345, kl=None)
    other["variants"][0]["perplexity"] *= 1.001  # measured in other batches
    other["memory"]["table"][1]["state_bytes"] = 3 * 2**20
    heading, *rows = comparison_rows({"a": report, "b": other})
    assert heading == ("", "ppl", "<16", "16-128", "KL", "copy@64", "state@1k", "state@8k", "state@32k")
    assert [row[0] for row in rows] == ["teacher", "a", "b"]
    assert rows[1][1] == write_number(report["variants"][1]["perplexity"]) and rows[2][1] == "12.35"
    copied = report["variants"][1]["copy"][0]
    assert rows[1][5] == f"{write_number(copied['perplexity'])}±{write_number(copied['error'])}"
    assert rows[0][4] == "0" and rows[2][4] == NOT_FINITE
    assert [row[7] for row in rows] == ["2.0 MiB", "4.9 KiB", "3.0 MiB"]


def test_what_a_report_lacks_is_left_open_and_other_teachers_are_named(report):
    other = copy.deepcopy(report)
    for variant in other["variants"]:
        del variant["kl"]
        variant["copy"][0]["distance"] = 32
        variant["text"] = {"perplexity": 7.0, "buckets": []}
    other["variants"][0]["perplexity"] *= 2
    other["meta"]["num_rows"] = 3
    heading, *rows = comparison_rows({"a": report, "b": other})
    assert heading[1:8] == ("ppl", "<16", "16-128", "KL", "text@all", "copy@64", "copy@32")
    assert [row[0] for row in rows] == ["teacher", "a", "teacher of b", "b"]
    assert [row[4] for row in rows[2:]] == ["-", "-"] and [row[5] for row in rows] == ["-", "-", "7.00", "7.00"]
    assert (rows[1][7], rows[3][6]) == ("-", "-")


@pytest.mark.parametrize("width", [20, 200])
def test_every_figure_is_printed_whole_and_other_rows_are_warned_of(report, width):
    def printed(reports) -> str:
        stream = io.StringIO()
        print_comparison(reports, console=Console(file=stream, width=width))
        return " ".join(stream.getvalue().split())

    same, other = {"a": report, "b": report}, copy.deepcopy(report)
    for row in comparison_rows(same)[1:]:
        assert " ".join(row) in printed(same)
    assert "do not compare" not in printed(same)
    other["meta"]["num_rows"] = 3
    assert "do not compare: a: 4 rows of 128; b: 3 rows of 128" in printed({"a": report, "b": other})


def test_names_are_the_last_ones_where_they_differ():
    assert names_of(["runs/a/", "other/b"]) == ["a", "b"]
    assert names_of(["runs/a", "other/a"]) == ["runs/a", "other/a"]
