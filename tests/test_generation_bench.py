"""`linearize bench generation`: table, file and picture of small runs, cells that do not fit, and what is refused."""

import csv
import subprocess

import pytest
import torch
from pico import convert, make_model, make_tokens
from test_export import save_model

from linearize import cli, cli_values
from linearize.architecture import linearize_
from linearize.export import export
from linearize.loading import load_any
from linearize.recipe import AttentionSettings, FeatureMapSettings
from linearize.state import read
from linearize.static_cache import StaticCache
from linearize_eval import generation_bench as bench
from linearize_eval import generation_measure, generation_models, softmax_choice


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
    results = bench.bench_generation(
        folder, against=teacher, prompts=[16, 32], new=4, batches=[1, 2], dtype="float32", device="cpu",
        output=tmp_path / "run", own_process=False,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "CPU threads" in printed and "GB/s" in printed and "Timed:" not in printed
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert len(rows) == len(results)
    cells = [(r["side"], int(r["prompt"]), int(r["batch"])) for r in rows]
    assert sorted(cells) == sorted((s, p, b) for s in bench.SIDES for p in (16, 32) for b in (1, 2))
    assert all(float(r["decode_tokens_s"]) > 0 and float(r["prefill_tokens_s"]) > 0 for r in rows)
    assert {(r["side"], r["how"]) for r in rows} == {
        ("converted", "eager"), ("teacher-static", "static"), ("teacher-dynamic", "eager")
    }  # fmt: skip
    held = {(r["side"], int(r["prompt"])): int(r["bytes_a_row"]) for r in rows}
    assert held["converted", 16] == held["converted", 32]
    token = 2 * 2 * 2 * 8 * 4  # K, V, layers, heads, dim
    assert held["teacher-dynamic", 16] == token * (16 + 4 - 1 + generation_measure.WARMUP)
    assert held["teacher-static", 16] == token * generation_measure.SLOTS
    assert "Converted over teacher" in printed and printed.count("each at its best") == 2
    assert (tmp_path / "run.png").stat().st_size > 10000
    ratios = list(csv.DictReader((tmp_path / "run.ratios.csv").open()))
    assert [(r["prompt"], r["at"]) for r in ratios] == [
        (p, at) for p in ("16", "32") for at in ("batch 1", "batch 2", "each at its best")
    ]
    decode = {(r["side"], r["prompt"], r["batch"]): float(r["decode_tokens_s"]) for r in rows}
    for r in ratios[:2]:
        sides = decode["converted", "16", r["batch"]], decode[r["teacher"], "16", r["batch"]]
        assert float(r["decode_tokens_s_ratio"]) == pytest.approx(sides[0] / sides[1]) and float(r["bytes_a_row_ratio"])


def test_an_empty_prompt(folder, teacher, tmp_path):
    results = bench.bench_generation(
        folder, against=teacher, cells=[(0, 2)], new=9, dtype="float32", device="cpu", own_process=False,
        output=tmp_path / "run",
    )  # fmt: skip
    for r in results:
        assert r.prefill_tokens_s is None and r.total_tokens_s == pytest.approx(r.decode_tokens_s) and r.steps == 8
    made_up = generation_measure.Cell("converted", 0, 9, 2, made_up=True)
    assert generation_measure.measure(load_any(folder, device="cpu")[0], made_up, 1e9).decode_ms > 0


def test_a_cell_in_a_process_of_its_own(folder, capsys, tmp_path):
    words = ("--cells", "32:1", "--new", 9, "--steps", 4, "--made-up", "--output", tmp_path / "run")
    assert run(folder, *words, "--profile") == 0
    printed = capsys.readouterr().out
    assert "4 decode steps from the middle of 8" in printed and "us a step" in printed and "aten::mm" in printed
    (row,) = csv.DictReader((tmp_path / "run.csv").open())
    assert row["steps"] == "4" and row["how"] == "eager; memory made up" and row["prefill_tokens_s"] == ""
    assert 0.05 < float(row["resident_gb"]) <= float(row["peak_gb"]) < 2


def test_a_process_that_fails_tells_why(folder, tmp_path):
    cell = generation_measure.Cell("converted", 8, 4, 1)
    options = dict(folder=str(tmp_path / "nothing"), against=None, shape=None, dtype="float32", device="cpu",
                   window=None, map_dim=None)  # fmt: skip
    with pytest.raises(bench.LinearizeError, match="converted, prompt 8: .*is not a model folder"):
        bench.in_own_process(cell, options, 1e9)


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (
            "a warning\nerror: it does not load: no such model\nCheck the network\n",
            "it does not load: no such model\nCheck",
        ),
        ("Traceback\nRuntimeError: a reason\n", "RuntimeError: a reason"),
        ("", "exit status 3"),
    ],
)
def test_what_a_process_says_is_told_whole(monkeypatch, stderr, told):
    ended = subprocess.CompletedProcess([], 3, "", stderr)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(bench.LinearizeError, match=f"converted, prompt 8: {told}"):
        bench.in_own_process(generation_measure.Cell("converted", 8, 4, 1), {"device": "cpu"}, 1e9)


@pytest.mark.parametrize("kind", ["converted", "teacher"])
def test_made_up_memory_is_that_of_a_text(kind):
    model = make_model()
    model = convert(model) if kind == "converted" else model
    made_up, real = generation_measure.made_up_state(model, 40), read(model, torch.full((1, 40), 5))
    assert made_up.num_bytes() == real.num_bytes() and torch.equal(made_up.lengths, real.lengths)
    logits = []
    for state in (made_up, read(model, torch.full((1, 40), 6))):
        decoder = generation_measure.Decoder(model, batch=1, mode="eager", eos=[])
        decoder.start(state)
        assert decoder.decode_n(3).shape == (1, 3)
        assert generation_measure.cache_bytes(decoder.cache) > 0
        logits.append(state.logits)
    assert all(x.isfinite().all() for x in logits)


def test_a_batch_that_does_not_fit_is_a_row_without_figures(monkeypatch, capsys):
    tried = []

    def fails(model, cell, rate):
        tried.append(cell.batch)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "measure", fails)
    monkeypatch.setattr(bench, "largest_batch", lambda *_: 128)
    result = bench._largest(None, generation_measure.Cell("converted", 8, 4, "max"), 1e9)
    assert result.decode_ms is None and result.how == "does not fit"
    assert tried[:4] == [128, 112, 96, 84] and tried[-1] == 1
    bench._report(result, None, first=True)
    assert "does not fit" in capsys.readouterr().out


def test_the_largest_batch_is_of_what_the_decoder_holds():
    """Bytes of a row as estimated, beside those of the cache that a decoder makes of a batch that fills a GPU."""
    for side, batch in (("converted", 72), ("teacher-static", 2)):
        model = make_model(num_key_value_heads=4, hidden_size=256, head_dim=64, vocab_size=32)
        model = convert(model, dim=16, window=64) if side == "converted" else model
        cell = generation_measure.Cell(side, 1024, 128, batch)
        held = StaticCache(model, batch=batch, slots=1216).num_bytes() / batch
        assert held < generation_measure.row_bytes(model, cell) < 1.1 * held


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
    weight_bytes = generation_models.weight_bytes
    assert weight_bytes(tied) == weight_bytes(untied) == sum(p.nbytes for p in tied.parameters())
    assert generation_models.is_converted(convert(tied)) and not generation_models.is_converted(untied)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_softmax_of_one_token_by_groups(eager, groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = (torch.arange(9) < torch.tensor([[5], [9]]))[:, None, None]
    every = [x.repeat_interleave(4 // groups, 1) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *every, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(softmax_choice.one_token(q, k, v, mask, 0.3, eager=eager), expected)


def test_the_teacher_decodes_the_same_by_the_chosen_softmax(monkeypatch):
    model, ids = make_model(), torch.randint(3, 96, (2, 12))
    states = read(model, ids)

    def tokens():
        decoder = generation_measure.Decoder(model, batch=2, mode="static", eos=[], max_length=64)
        decoder.start(states)
        return decoder.decode_n(20)

    expected, one_token, asked = tokens(), softmax_choice.one_token, []
    monkeypatch.setattr(
        softmax_choice, "one_token", lambda *a, **kw: asked.append(kw["eager"]) or one_token(*a, **kw)
    )
    for name in ("eager", "efficient"):
        monkeypatch.setattr(softmax_choice, "measure_kernels", lambda *_, name=name, **__: {name: 1.0, "cuDNN": 2.0})
        words, _ = softmax_choice.use_fastest(model, batch=2, slots=64, growing=False)
        assert words == f"{name} 1 us a layer (cuDNN 2)"
        assert torch.equal(tokens(), expected)
        assert asked == [name == "eager"] * 42  # two layers, twenty steps, one that the decoder looks at
        asked.clear()


def test_random_weights_of_a_shape(monkeypatch):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    monkeypatch.setitem(bench.SHAPES, "tiny", sizes)
    (result,) = bench.bench_generation(
        shape="tiny", prompts=[8], new=3, batches=[2], sides=["converted"], dtype="float32", device="cpu", window=5,
        own_process=False,
    )  # fmt: skip
    assert result.decode_ms > 0 and result.total_tokens_s < result.decode_tokens_s


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, tmp_path):
    """Both sides in a graph; the largest batch is found, and kept in the file line by line."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    monkeypatch.setitem(bench.SHAPES, "tiny", {**sizes, "num_key_value_heads": 2})
    monkeypatch.setattr(generation_measure, "MAX_BATCH", 67)
    results = bench.bench_generation(
        shape="tiny", cells=[(1, 2), (128, 4), (128, "max")], new=200, steps=16, device="cuda", output=tmp_path / "run"
    )
    assert [r.batch for r in results] == [2, 4, 64] * 3 and all(r.decode_ms > 0 for r in results)
    for r in results:
        assert r.how.startswith("eager" if r.side == "teacher-dynamic" else "graph")
        assert ("us a layer" in r.how) == (r.side != "converted")
        assert r.steps == 16 and r.total_tokens_s > 0 and 0 < r.roofline_percent < 100
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 10


def test_what_is_refused(folder, capsys):
    for words, said in (
        ((folder, "--shape", "based-1.3b"), "not both"),
        ((), "not both"),
        ((folder, "--sides", "teacher-static"), "--against says which"),
        ((folder, "--sides", "pupil"), "choose from converted"),
        ((folder, "--new", 1), "at least 2"),
        ((folder, "--batches", "1,max", "--prompts", "8", "--new", 2), "found on a GPU"),
        ((folder, "--cells", "8:1,8:max", "--new", 2), "found on a GPU"),
        (("--shape", "gpt-9"), "choose from llama-3.1-8b"),
        ((folder, "--output", "none/run"), "create it first"),
    ):
        assert run(*words) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.out == "", "before anything is measured"
    assert cli_values.pairs("0:128, 8k:max") == [(0, 128), (8192, "max")]
    for option, given, said in (
        ("--cells", "1k", "must be prompt:batch pairs"),
        ("--cells", "1:2:3", "must be prompt:batch pairs"),
        ("--cells", "max:1", "at least 1, is 'max'"),
        ("--cells", "1k:0", "at least 1, is '0'"),
        ("--prompts", "8k,max", "at least 1, is 'max'"),
    ):
        with pytest.raises(SystemExit):
            run(folder, option, given)
        assert said in capsys.readouterr().err


def test_bench_kernels_passes_its_arguments_through(monkeypatch):
    given = []
    monkeypatch.setattr("linearize_kernels.bench.main", given.append)
    assert cli.main(["bench", "kernels", "--only", "decode", "--csv", "x.csv"]) == 0
    assert given == [["--only", "decode", "--csv", "x.csv"]]


def test_softmax_keys_count_as_far_as_rows_reach():
    shape = 2 * 8 * 4  # k and v of a kv head of 8, float32
    for settings, heads in (({}, 0), (dict(heads=[(0, 1)]), 1), (dict(keep_softmax=[1], heads=[(0, 1)]), 3), (None, 4)):
        model = make_model() if settings is None else convert(make_model(), **settings)
        decoder = generation_measure.Decoder(model, batch=3, mode="eager")
        decoder.prefill(make_tokens(3, 30))
        held = generation_measure.cache_bytes(decoder.cache)
        for length, gone in ((40, 0), (30, 0), (10, 20)):
            read_bytes = generation_measure.bytes_read(decoder.cache, length)
            assert read_bytes == pytest.approx(held - 3 * gone * heads * shape)
