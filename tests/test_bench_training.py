"""The benchmark of the training stages: tiny runs on a CPU, through the real training loop."""

import csv

import pytest
import torch
from transformers import LlamaConfig

from linearize_eval import bench_training
from linearize_eval.bench_training import Speed, measure_training

PICO = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(("stage", "documents"), [("match", 1), ("match", 2), ("finetune", 1)])
def test_it_trains_and_counts_the_tokens_of_a_step(stage, documents, monkeypatch):
    recorded = []
    step = bench_training.RunLog.step

    class Watched(bench_training.RunLog):
        def step(self, bar, stage, number, *, tokens_per_second, **figures):
            recorded.append(tokens_per_second)
            step(self, bar, stage, number, tokens_per_second=tokens_per_second, **figures)

    monkeypatch.setattr(bench_training, "RunLog", Watched)
    options = dict(batch=2, length=192, steps=5, skip=2, documents=documents, device="cpu")
    speed = measure_training(stage, "pico", LlamaConfig(**PICO), **options)
    assert len(recorded) == 5
    mean = 3 / sum(1 / each for each in recorded[2:])
    assert speed.tokens_per_second == pytest.approx(mean, rel=1e-3)
    assert speed.first_seconds == pytest.approx(384 / recorded[0], rel=1e-3) and not speed.compiled
    assert speed.peak_gib > 0.01 and 0 < speed.last_loss < speed.first_loss


def test_a_run_whose_steps_are_all_skipped_is_refused():
    with pytest.raises(ValueError, match="none is left"):
        measure_training("match", "pico", LlamaConfig(**PICO), batch=1, length=64, steps=3, skip=3, device="cpu")


@pytest.mark.parametrize("name", list(bench_training.SHAPES))
def test_shapes_are_those_of_the_models(name):
    config = LlamaConfig(**bench_training.SHAPES[name])
    assert config.head_dim == 64


def test_a_line_for_what_did_not_fit():
    assert bench_training._line(Speed("match", "1b", 64, 2048, 1, 64, 16, False)).endswith("out of memory")


def test_a_profile_shows_operators_of_two_more_steps(capsys):
    options = dict(batch=1, length=96, steps=2, skip=1, device="cpu")
    speed = measure_training("match", "pico", LlamaConfig(**PICO), **options, profile=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a step: ") and lines[0].endswith(" operators")
    products = [line for line in lines if line.endswith("x  aten::mm")]
    assert len(products) == 1
    layers = 2  # of seven projections each, in a step
    assert int(products[0].split(" ms")[1].split()[0]) == 7 * layers
    assert speed.tokens_per_second > 0


def test_the_command_measures_every_combination(monkeypatch, capsys, tmp_path):
    def measured(stage, name, config, *, batch, length, documents, window, map_dim, compile, **options):
        assert options == dict(steps=10, by_text=None, profile=False) and config.head_dim == 64
        assert (documents, window, map_dim) == (4, 214, 4)
        if batch == 8:
            raise torch.OutOfMemoryError
        return Speed(stage, name, batch, length, documents, window, map_dim, compile, 1000.0, 2.0, 3.0, 0.5, 0.25)

    monkeypatch.setattr(bench_training, "measure_training", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    recipe = ["--window", "214", "--map-dim", "4", "--documents", "4"]
    rows = bench_training.main(["--shapes", "135m", "--batches", "4,8", *recipe, "--csv", str(tmp_path / "rows.csv")])
    assert [(row.stage, row.batch, row.compiled) for row in rows] == [
        (stage, batch, compiled) for stage in bench_training.STAGES for batch in (4, 8) for compiled in (False, True)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8 and len(lines[2]) == len(lines[1]) and "1,000" in lines[2]
    assert lines[4].endswith("out of memory")
    assert lines[0].endswith("window 214, map dim 4, documents a sequence 4")
    with open(tmp_path / "rows.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 8 and {(row["window"], row["map_dim"], row["documents"]) for row in written} == {
        ("214", "4", "4")
    }


def test_window_and_map_dim_reach_the_layers(monkeypatch):
    models, convert = [], bench_training.linearize_

    def watched(*arguments):
        models.append(convert(*arguments))
        return models[-1]

    monkeypatch.setattr(bench_training, "linearize_", watched)
    options = dict(batch=1, length=32, steps=2, skip=1, window=7, map_dim=3, device="cpu")
    speed = measure_training("match", "pico", LlamaConfig(**PICO), **options)
    assert (speed.window, speed.map_dim) == (7, 3)
    layers = [layer.self_attn.linear_attn for layer in models[0].model.layers]
    assert [(layer.window, layer.q_map.shape[-1]) for layer in layers] == [(7, 3)] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--shapes", "7b"], "7b: none of 135m, 1b"), (["--window", "0"], "at least 1, is '0'"),
     (["--batches", "4,x"], "at least 1, is 'x'")],
)  # fmt: skip
def test_unknown_choices_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_training.main(arguments)
    assert said in capsys.readouterr().err
