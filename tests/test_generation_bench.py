"""`linearize bench`: the table, file and picture of a small run, memory cells that do not fit, and what is refused."""

import csv

import pytest
import torch
from pico import convert, make_model, make_tokens
from test_export import save_model

from linearize import cli
from linearize.architecture import linearize_
from linearize.decoding import Decoder
from linearize.export import export
from linearize.loading import load_any
from linearize.recipe import AttentionSettings, FeatureMapSettings
from linearize_eval import generation_bench as bench


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def folder(teacher):
    model, tokenizer = load_any(teacher, device="cpu")
    linearize_(model, AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4)))
    export(model, tokenizer, teacher.parent / "converted", dtype="auto", files={})
    return teacher.parent / "converted"


def run(*words) -> int:
    return cli.main(["bench", "generation", *map(str, words), "--device", "cpu", "--dtype", "float32"])


def test_every_side_prompt_and_batch_is_measured(folder, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(folder, "--against", teacher, "--prompts", "16,32", "--new", 4, "--batches", "1,2", "--output", out) == 0
    printed = capsys.readouterr().out
    assert "CPU threads" in printed and "GB/s" in printed
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    cells = [(r["side"], int(r["prompt"]), int(r["batch"])) for r in rows]
    assert sorted(cells) == sorted((s, p, b) for s in bench.SIDES for p in (16, 32) for b in (1, 2))
    assert all(float(r["decode_tokens_s"]) > 0 and float(r["prefill_tokens_s"]) > 0 for r in rows)
    held = {(r["side"], int(r["prompt"])): int(r["bytes_a_row"]) for r in rows}
    assert held["converted", 16] == held["converted", 32]
    assert held["teacher-dynamic", 16] == 2 * 2 * 2 * 8 * 4 * (16 + 4 - 1 + bench._WARMUP)  # K, V, layers, heads, dim
    assert "Decoding: converted over teacher" in printed and printed.count("each at its best") == 2
    assert (tmp_path / "run.png").stat().st_size > 10000


def test_a_batch_that_does_not_fit_is_a_row_without_figures(monkeypatch, capsys):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "measure", fails)
    result = bench._try(None, "converted", 8, 4, 64, 1e9)
    assert result.decode_ms is None and result.step == "does not fit"
    bench._report(result, None, first=True)
    assert "does not fit" in capsys.readouterr().out


def test_ratios_take_the_better_teacher_and_each_sides_best():
    def cell(side, batch, rate):
        return bench.Result(side, 8, 4, batch, decode_ms=1.0, decode_tokens_s=rate)

    cells = [cell("converted", 1, 30.0), cell("converted", 8, 200.0), cell("teacher-static", 1, 60.0)]
    cells += [cell("teacher-dynamic", 1, 20.0), cell("teacher-dynamic", 4, 50.0)]
    cells += [bench.Result("teacher-static", 8, 4, 8)]  # did not fit
    assert [(what, ratio) for _, what, _, _, ratio in bench.compare(cells)] == [
        ("batch 1", 0.5), ("each at its best", 200 / 60)
    ]  # fmt: skip
    assert bench.compare(cells[:2]) == []


def test_weights_and_cache_are_counted_once():
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    assert bench.weight_bytes(tied) == bench.weight_bytes(untied) == sum(p.nbytes for p in tied.parameters())


def test_random_weights_of_a_shape(monkeypatch):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    monkeypatch.setitem(bench.SHAPES, "tiny", sizes)
    (result,) = bench.bench_generation(
        shape="tiny", prompts=[8], new=3, batches=[2], sides=["converted"], dtype="float32", device="cpu", window=5
    )
    assert result.decode_ms > 0 and result.total_tokens_s < result.decode_tokens_s


def test_what_is_refused(folder, capsys):
    for words, said in (
        ((folder, "--shape", "based-1.3b"), "not both"),
        ((), "not both"),
        ((folder, "--sides", "teacher-static"), "--against says which"),
        ((folder, "--sides", "pupil"), "choose from converted"),
        ((folder, "--new", 1), "at least 2"),
        ((folder, "--batches", "max", "--prompts", "8"), "found on a GPU"),
        (("--shape", "gpt-9"), "choose from llama-3.1-8b"),
    ):
        assert run(*words) == 2
        assert said in capsys.readouterr().err


def test_bench_kernels_passes_its_arguments_through(monkeypatch):
    given = []
    monkeypatch.setattr("linearize_kernels.bench.main", given.append)
    assert cli.main(["bench", "kernels", "--only", "decode", "--csv", "x.csv"]) == 0
    assert given == [["--only", "decode", "--csv", "x.csv"]]


def test_bytes_that_grow_count_as_far_as_rows_reach():
    shape = 2 * 8 * 4  # k and v of a kv head of 8, float32
    for settings, heads in (({}, 0), (dict(heads=[(0, 1)]), 1), (dict(keep_softmax=[1], heads=[(0, 1)]), 3), (None, 4)):
        model = make_model() if settings is None else convert(make_model(), **settings)
        assert bench._bytes_a_token(model) == heads * shape
        decoder = Decoder(model, batch=3, mode="eager")
        decoder.prefill(make_tokens(3, 30))
        held = bench.cache_bytes(decoder.cache)
        assert bench.bytes_read(decoder.cache, 30) == bench.bytes_read(decoder.cache, 40) == held
        assert bench.bytes_read(decoder.cache, 10) == pytest.approx(held - 3 * 20 * heads * shape)
