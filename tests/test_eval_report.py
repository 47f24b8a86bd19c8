"""The report card: measured on a tiny model, printed, drawn, saved and read back."""

import copy
import io
import json
import math
from contextlib import contextmanager, nullcontext

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.errors import DataError, ModelError
from linearize_eval.chart import STYLES, draw_report, smooth_by_position, top_of_axis
from linearize_eval.memory import kv_cache_bytes
from linearize_eval.perplexity import perplexity_by_position
from linearize_eval.report import far_start, load_report, measure_report, save_report
from linearize_eval.report_text import (
    NOT_FINITE,
    memory_line,
    print_report,
    report_markdown,
    table_cell,
    table_columns,
    verdicts,
    write_bytes,
    write_number,
)
from linearize_eval.words import KEYS, VALUES

NAMES = ("teacher", "converted", "far term off", "window off", "window + sinks")
NOTES = {"window + sinks": "window 11 + 4 sinks, untrained, [equal] bytes"}
STATE_BYTES = 5000


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<unk>", "The", "code", "for", "is", ".", *KEYS, *VALUES])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=220,
    )
    return LlamaForCausalLM(config)


@contextmanager
def scaled_logits(model, factor: float):
    """The model with its logits times `factor`, by its last norm: another distribution, undone on leaving."""
    before = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            model.model.norm.weight.copy_(before)


def held_out_rows() -> torch.Tensor:
    return torch.randint(0, 120, (4, 128), generator=torch.manual_seed(1))


def measure(model, **settings) -> dict:
    factors = dict(zip(NAMES, (1, 2, 20, 40, 30), strict=True))
    defaults = {
        "variants": {name: lambda f=factor: scaled_logits(model, f) for name, factor in factors.items()},
        "notes": NOTES,
        "rows": held_out_rows(),
        "window": 16,
        "recall_distances": [64],
        "state_bytes": STATE_BYTES,
        "kv_bytes": lambda length: kv_cache_bytes(model.config, length, 4),
        "key_recall_samples": 3,
        "progress": False,
    }
    return measure_report(model, build_tokenizer(), **(defaults | settings))


@pytest.fixture(scope="module")
def report() -> dict:
    return measure(build_model())


def test_figures_are_those_of_each_variant(report):
    model, rows = build_model(), held_out_rows()
    assert [variant["name"] for variant in report["variants"]] == list(NAMES)
    assert report["edges"] == [1, 16, 128]
    for variant, factor in zip(report["variants"], (1, 2, 20, 40, 30), strict=True):
        with scaled_logits(model, factor):
            expected = perplexity_by_position(model, rows, edges=[1, 16, 128])
        assert variant["perplexity"] == pytest.approx(expected["perplexity"])
        assert variant["buckets"] == expected["buckets"]
        nll = np.array(expected["nll_by_position"])
        assert variant["far_perplexity"] == pytest.approx(math.exp(nll[15:].mean()), rel=1e-5)
        assert np.mean(variant["far_nll_by_row"]) == pytest.approx(nll[15:].mean(), rel=1e-5)
        assert np.mean(variant["nll_by_row"]) == pytest.approx(nll.mean(), rel=1e-5)
        assert variant["tokens_per_second"] > 0
        assert [copied["distance"] for copied in variant["copy"]] == [64]
        assert [asked["distance"] for asked in variant["key"]] == [64]
    assert report["variants"][4]["note"] == NOTES["window + sinks"]


def test_memory_at_the_promised_lengths(report):
    table = {row["length"]: row for row in report["memory"]["table"]}
    assert list(table) == [1024, 8192, 32768]
    assert table[8192] == {"length": 8192, "state_bytes": STATE_BYTES, "kv_bytes": 8192 * 2 * 2 * 2 * 8 * 4}


def test_a_state_that_grows_is_given_by_length():
    report = measure(
        build_model(), state_bytes=lambda length: 7 * length, recall_distances=[], key_recall_samples=0
    )
    assert [row["state_bytes"] for row in report["memory"]["table"]] == [7168, 57344, 229376]


def test_meta_says_what_was_measured_and_with_what(report):
    meta = report["meta"]
    assert (meta["num_rows"], meta["row_tokens"], meta["dtype"], meta["device"]) == (4, 128, "float32", "cpu")
    assert meta["versions"]["torch"] == torch.__version__


def test_distances_that_do_not_fit_are_left_out_and_said():
    # Rows of 128, a model of 220 positions. Repeated, 120 tokens take 240; asked for once, they fit.
    report = measure(build_model(), recall_distances=[4, 64, 100, 120, 500], key_recall_samples=1)
    assert [copied["distance"] for copied in report["variants"][0]["copy"]] == [64, 100]
    assert [asked["distance"] for asked in report["variants"][0]["key"]] == [64, 100, 120]
    reasons = report["left_out"]
    assert [reason.split(":")[0] for reason in reasons] == [
        "copy recall over 4 tokens",
        "copy recall over 120 tokens",
        "copy recall over 500 tokens",
        "key recall over 4 tokens",
        "key recall over 500 tokens",
    ]
    assert any("240 tokens do not fit the model's 220 positions" in reason for reason in reasons)
    for reason in reasons:
        assert reason in printed(report, 300) and reason in report_markdown(report)


def test_a_reason_that_is_the_same_of_each_distance_is_said_once():
    report = measure(build_model(), recall_distances=[64, 100], key_recall_pairs=[99], key_recall_samples=1)
    (reason,) = report["left_out"]
    assert reason.startswith("key recall with 99 pairs")


def test_several_numbers_of_pairs_are_asked_and_those_that_do_not_fit_are_said():
    report = measure(build_model(), recall_distances=[64], key_recall_pairs=[2, 3, 12], key_recall_samples=6)
    for variant in report["variants"]:
        assert [(key["distance"], key["num_pairs"]) for key in variant["key"]] == [(64, 2), (64, 3)]
        assert [key["chance"] for key in variant["key"]] == [1 / 2, pytest.approx(1 / 3)]
    assert len(report["left_out"]) == 1 and "12 planted sentences" in report["left_out"][0]
    headings = [column.heading for column in table_columns(report)]
    assert headings[-3:] == ["key2@64", "key3@64", "tokens/s"]
    key = report["variants"][1]["key"][1]
    assert f"{100 * key['accuracy']:.0f}%±{100 * key['error']:.0f}%" in printed(report, 300).split()


def test_all_texts_go_in_batches_of_as_many_tokens(monkeypatch):
    model, sizes = build_model(), []
    real = type(model.model).forward

    def counted(self, input_ids, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return real(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    settings = {"recall_distances": [64, 100], "key_recall_samples": 5, "batch_tokens": 400}
    measure(model, variants={"teacher": nullcontext}, text=("t", held_out_rows()[:, :100]), **settings)
    sizes = [size for size in sizes if size[1] > 3]  # without the probes of the output head
    assert sizes[:4] == [(3, 128), (1, 128), (4, 100), (3, 128)], "rows, the text, a copy of 64 tokens"
    assert {rows * length <= 400 for rows, length in sizes} == {True}
    keys = [rows for rows, length in sizes if length not in (100, 128, 200)]
    assert sum(keys) == 10 and len(keys) < 8


def test_key_lookup_can_be_left_out():
    report = measure(build_model(), key_recall_samples=0)
    assert all(variant["key"] == [] for variant in report["variants"])
    assert report["left_out"] == []
    assert "key@" not in report_markdown(report)


def test_rows_that_cannot_be_measured_are_refused():
    with pytest.raises(DataError, match="2 tokens or more"):
        measure(build_model(), rows=torch.zeros(3, 1, dtype=torch.long))


def test_progress_goes_to_stderr_and_changes_nothing(capsys, report):
    again = measure(build_model(), progress=True)
    assert again["variants"][1]["nll_by_position"] == report["variants"][1]["nll_by_position"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("window", "num_tokens", "start"),
    [(64, 1024, 256), (64, 512, 256), (64, 300, 64), (300, 1024, 300), (64, 64, None), (64, 65, 64)],
)
def test_far_start(window, num_tokens, start):
    assert far_start(window, num_tokens) == start


def printed(report: dict, width: int) -> str:
    stream = io.StringIO()
    print_report(report, console=Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [24, 60, 200])
def test_the_printed_table_holds_every_figure_at_any_width(report, width):
    words = printed(report, width).split()
    teacher = report["variants"][0]
    for variant in report["variants"]:
        for column in table_columns(report):
            value, ratio = table_cell(report, variant, column)
            assert value in words
            assert variant is teacher or not column.figure(teacher) or ratio in words
    assert write_number(report["variants"][3]["buckets"][1]["perplexity"]) in words
    text = " ".join(words)
    assert memory_line(report) in text
    for verdict in verdicts(report):
        assert verdict.text in text
    assert "".join(NOTES["window + sinks"].split()) in "".join(printed(report, 300).split())


def test_ratios_are_to_the_teacher(report):
    teacher, converted = report["variants"][:2]
    column = table_columns(report)[0]
    assert table_cell(report, teacher, column)[1] == ""
    ratio = converted["perplexity"] / teacher["perplexity"]
    assert table_cell(report, converted, column)[1] == f"{ratio:.2f}x"


def test_markdown_holds_the_same_figures(report):
    text = report_markdown(report)
    table_lines = [line for line in text.splitlines() if line.startswith("|")]
    for variant in report["variants"]:
        line = next(line for line in table_lines if line.startswith(f"| {variant['name']} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell, column in zip(cells[1:], table_columns(report), strict=True):
            value, ratio = table_cell(report, variant, column)
            assert cell == (f"{value} ({ratio})" if ratio else value)
    for row in report["memory"]["table"]:
        state, cache = write_bytes(row["state_bytes"]), write_bytes(row["kv_bytes"])
        assert f"| {row['length']:,} | {state} | {cache} |" in table_lines
    for verdict in verdicts(report):
        assert verdict.text in text


def with_far(report: dict, **nll_by_row: list[float]) -> dict:
    """The report with other NLLs, overall and far, for the variants named (spaces as underscores)."""
    changed = copy.deepcopy(report)
    changed["far_from"] = 256
    for variant in changed["variants"]:
        key = variant["name"].replace(" + ", "_").replace(" ", "_")
        if key in nll_by_row:
            variant["far_nll_by_row"] = variant["nll_by_row"] = nll_by_row[key]
    return changed


BASE = [2.0, 3.0, 2.5, 4.0]
BETTER = [1.9, 2.89, 2.41, 3.9]
NOISE = [2.2, 2.8, 2.75, 3.8]


@pytest.mark.parametrize(
    ("far_off", "kind", "words"),
    [
        (BASE, "good", "costs +10.5 % ± 0.5 % perplexity at positions >= 256: the far term helps."),
        (NOISE, "bad", "does NOT help measurably"),
        ([1.8, 2.78, 2.32, 3.8], "bad", "the model is better WITHOUT it"),
        ([1.9002, 2.8902, 2.4101, 3.9001], "good", "costs +0.02 % ± 0.00 % perplexity"),
        ([1.901, 2.891, 2.409, 3.9], "bad", "costs +0.03 % ± 0.05 % perplexity"),
    ],
)
def test_the_verdict_on_the_far_term(report, far_off, kind, words):
    changed = with_far(report, converted=BETTER, far_term_off=far_off)
    verdict = verdicts(changed)[0]
    assert verdict.kind == kind and words in verdict.text
    if far_off is BASE:
        mean, error = 0.1, np.std([0.1, 0.11, 0.09, 0.1], ddof=1) / 2
        assert f"+{100 * math.expm1(mean):.1f} % ± {100 * math.exp(mean) * error:.1f} %" in verdict.text


@pytest.mark.parametrize(
    ("converted", "kind", "words"),
    [
        (BETTER, "good", "the converted model beats it."),
        (NOISE, "bad", "does NOT beat it"),
        ([2.5, 3.5, 3.0, 4.6], "bad", "does NOT beat it"),
    ],
)
def test_the_verdict_on_window_and_sinks(report, converted, kind, words):
    changed = with_far(report, converted=converted, window_sinks=BASE)
    verdict = verdicts(changed)[1]
    assert verdict.kind == kind and words in verdict.text and NOTES["window + sinks"] in verdict.text


def test_better_only_far_or_only_overall_is_said(report):
    changed = with_far(report, converted=BETTER, window_sinks=BASE)
    changed["variants"][1]["nll_by_row"] = [x + 0.5 for x in BASE]
    assert "beats it at positions >= 256 but NOT overall" in verdicts(changed)[1].text
    changed = with_far(report, converted=BETTER, window_sinks=BASE)
    changed["variants"][1]["far_nll_by_row"] = [x + 0.5 for x in BASE]
    assert "beats it overall but NOT at positions >= 256" in verdicts(changed)[1].text


def test_one_row_has_no_error_bar_and_judges_nothing(report):
    changed = with_far(report, converted=[2.0], far_term_off=[2.1], window_sinks=[2.2])
    far, baseline = verdicts(changed)
    assert "+10.5 % (one row)" in far.text and "-18.1 % (one row)" in baseline.text
    for verdict in (far, baseline):
        assert verdict.kind == "open" and verdict.text.endswith("one row is too few to judge.")


def test_rows_within_the_window_judge_nothing():
    report = measure(build_model(), window=128, key_recall_samples=0, recall_distances=[])
    (verdict,) = verdicts(report)
    assert verdict.kind == "open" and "never leave the window of 128" in verdict.text


def test_a_variant_that_blows_up_is_shown_and_saved(tmp_path):
    model = build_model()
    broken = {"teacher": nullcontext, "converted": lambda: scaled_logits(model, float("nan"))}
    report = measure(model, variants=broken | {"far term off": nullcontext, "window + sinks": nullcontext})
    assert report["variants"][1]["perplexity"] is None
    save_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert NOT_FINITE in printed(report, 200) and NOT_FINITE in report_markdown(report)
    assert [verdict.kind for verdict in verdicts(report)] == ["bad", "bad"]


def test_report_is_saved_as_json_and_read_back(report, tmp_path):
    folder = tmp_path / "new" / "folder"
    save_report(report, folder)
    assert load_report(folder) == report
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.png").is_file()


def test_missing_damaged_and_foreign_reports_are_refused(tmp_path):
    with pytest.raises(ModelError, match="linearize convert"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 1, ')
    with pytest.raises(ModelError, match="damaged"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 99}')
    with pytest.raises(ModelError, match="format 99"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ModelError, match="format None"):
        load_report(tmp_path)


def test_the_chart_is_a_png_with_a_line_for_each_variant(report, tmp_path):
    report, path = copy.deepcopy(report), tmp_path / "chart.png"
    for i, variant in enumerate(report["variants"]):  # apart from one another and all within the axis
        variant["nll_by_position"] = [3 + 0.2 * i] * 127
    draw_report(report, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    for colour, _ in STYLES[: len(NAMES)]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=-1).sum() > 200


def test_a_broken_variant_does_not_squeeze_the_chart():
    good, better, broken = np.array([30.0, 20.0]), np.array([25.0, 15.0]), np.array([9000.0, 800.0])
    assert top_of_axis([good, better, broken]) == 37.5
    assert top_of_axis([good, better]) is None
    assert top_of_axis([np.array([np.nan, np.nan]), good]) == 37.5
    assert top_of_axis([np.array([np.nan, np.nan])]) is None


def task_results(value: float) -> dict:
    metrics = {"alias": "piqa", "acc,none": value, "acc_stderr,none": 0.0163, "ppl,none": float("nan")}
    return {"results": {"piqa": metrics | {"ppl_stderr,none": "N/A"}}, "n-shot": {"piqa": 0}}


def test_tasks_are_saved_printed_and_written_beside_the_teachers(report, tmp_path):
    with_tasks = report | {"tasks": {"teacher": task_results(0.6512), "converted": task_results(0.6049)}}
    save_report(with_tasks, tmp_path)  # the NaN too
    loaded = load_report(tmp_path)
    assert "| piqa | acc | 0.6512 ± 0.0163 | 0.6049 ± 0.0163 |" in report_markdown(loaded)
    assert f"| piqa | ppl | {NOT_FINITE} | {NOT_FINITE} |" in report_markdown(loaded)
    text = " ".join(printed(loaded, 120).split())
    assert "piqa acc 0.6512 ± 0.0163 0.6049 ± 0.0163" in text
    assert "piqa" not in printed(report | {"tasks": {}}, 120)


def test_smoothing_keeps_a_constant_and_covers_every_position():
    centres, values = smooth_by_position(np.full(1023, math.log(7)))
    np.testing.assert_allclose(values, 7)
    assert centres[0] == 1 and (np.diff(centres) > 0).all() and 700 < centres[-1] < 1023
    spike = np.zeros(1023)
    for position in (1, 2, 100, 1023):
        spike[:] = 0
        spike[position - 1] = 1
        assert (smooth_by_position(spike)[1] > 1).sum() == 1


def test_kl_is_to_the_teacher_and_the_batch_changes_no_figure(report):
    model, rows = build_model(), held_out_rows()

    def log_softmax(factor):
        with torch.no_grad(), scaled_logits(model, factor):
            return model(rows).logits[:, :-1].double().log_softmax(-1)

    reference = log_softmax(1)
    for variant, factor in zip(report["variants"], (1, 2, 20, 40, 30), strict=True):
        expected = (reference.exp() * (reference - log_softmax(factor))).sum(-1).mean().item()
        assert variant["kl"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert report["variants"][0]["kl"] == 0 and report["variants"][1]["kl"] > 0.001
    batched = measure(build_model(), batch_tokens=3 * 128)  # of four rows
    assert batched["meta"]["batch_size"] == 3
    for one, several in zip(report["variants"], batched["variants"], strict=True):
        assert one["nll_by_row"] == pytest.approx(several["nll_by_row"], rel=1e-5)
        assert one["kl"] == pytest.approx(several["kl"], rel=1e-4, abs=1e-7)
        assert one["copy"][0]["perplexity"] == pytest.approx(several["copy"][0]["perplexity"], rel=1e-4)


def test_perplexity_of_a_text_is_measured_and_shown_beside(report):
    text = torch.randint(0, 120, (3, 100), generator=torch.manual_seed(7))
    model = build_model()
    with_text = measure(model, text=("wiki.txt", text), batch_tokens=256)
    for variant, factor in zip(with_text["variants"], (1, 2, 20, 40, 30), strict=True):
        with scaled_logits(model, factor):
            expected = perplexity_by_position(model, text, edges=[1, 16, 100])
        assert variant["text"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
        assert [b["stop"] for b in variant["text"]["buckets"]] == [16, 100]
    shown = printed(with_text, 300)
    assert "perplexity of wiki.txt, 3 rows of 100 tokens" in " ".join(shown.split())
    for words in (printed(with_text, 40).split(), shown.split()):
        assert write_number(with_text["variants"][1]["text"]["buckets"][1]["perplexity"]) in words
    assert "text@16-100" in report_markdown(with_text) and "text@" not in report_markdown(report)


def test_a_report_of_before_kl_and_text_is_still_shown(report):
    old = copy.deepcopy(report)
    for variant in old["variants"]:
        del variant["kl"]
    del old["meta"]["text"], old["meta"]["batch_size"]
    assert "KL" not in printed(old, 300) and "KL" in printed(report, 300)
