"""The benchmark of the matching stage: a tiny run on a CPU, through the real training loop."""

import pytest
from transformers import LlamaConfig

from linearize_eval import bench_matching
from linearize_eval.bench_matching import Speed, measure_matching

PICO = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize("documents", [1, 2])
def test_it_trains_and_counts_the_tokens_of_a_step(documents, monkeypatch):
    recorded = []
    step = bench_matching.RunLog.step

    class Watched(bench_matching.RunLog):
        def step(self, bar, stage, number, *, tokens_per_second, **figures):
            recorded.append(tokens_per_second)
            step(self, bar, stage, number, tokens_per_second=tokens_per_second, **figures)

    monkeypatch.setattr(bench_matching, "RunLog", Watched)
    options = dict(batch=2, length=192, steps=5, skip=2, documents=documents, device="cpu")
    speed = measure_matching("pico", LlamaConfig(**PICO), **options)
    assert len(recorded) == 5
    mean = 3 / sum(1 / each for each in recorded[2:])
    assert speed.tokens_per_second == pytest.approx(mean, rel=1e-3)
    assert speed.peak_gib > 0.01 and 0 < speed.last_loss < speed.first_loss


def test_a_run_whose_steps_are_all_skipped_is_refused():
    with pytest.raises(ValueError, match="none is left"):
        measure_matching("pico", LlamaConfig(**PICO), batch=1, length=64, steps=3, skip=3, device="cpu")


@pytest.mark.parametrize("name", list(bench_matching.SHAPES))
def test_shapes_are_those_of_the_models(name):
    config = LlamaConfig(**bench_matching.SHAPES[name])
    assert config.head_dim == 64


def test_a_line_for_what_did_not_fit():
    assert bench_matching._line(Speed("1b", 64, 2048, 1, None, None, None, None)).endswith("out of memory")


def test_unknown_shapes_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_matching.main(["--shapes", "7b"])
    assert "7b: none of 135m, 1b" in capsys.readouterr().err
