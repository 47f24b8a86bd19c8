"""`linearize bench speculative`: counts of drafted and accepted tokens, and a refusal where tokens differ."""

import copy
from dataclasses import replace

import pytest
import torch
from pico import convert, make_model, make_tokens
from test_export import save_model

from linearize import cli
from linearize.architecture import linearize_
from linearize.export import export
from linearize.loading import load_any
from linearize.recipe import AttentionSettings, FeatureMapSettings
from linearize_eval import speculative_bench as bench


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Arguments: a converted folder, its teacher and a text."""
    teacher = save_model(tmp_path_factory.mktemp("speculative"))
    model, tokenizer = load_any(teacher, device="cpu")
    linearize_(model, AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4)))
    export(model, tokenizer, teacher.parent / "converted", dtype="auto", files={})
    text = teacher.parent / "text.txt"
    text.write_text("the state of the union is the state of the union " * 9, encoding="utf-8")
    options = ["--against", teacher, "--text", text, "--prompts", "16,40", "--new", 20, "--device", "cpu"]
    return ["bench", "speculative", str(teacher.parent / "converted"), *map(str, options)]


def test_every_way_at_every_prompt(words, capsys):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("teacher + converted as draft") == printed.count("converted + prompt lookup") == 2
    assert cli.main([*words, "--prompts", "9k"]) == 2
    assert "a prompt of 9,216 needs as many" in capsys.readouterr().err
    assert cli.main([*words, "--text", "none.txt"]) == 2
    assert "--text none.txt cannot be read" in capsys.readouterr().err


def test_other_tokens_than_plain_ones_are_refused(words, monkeypatch, capsys):
    decode = bench.decode

    def wrong(model, ids, new, what, how):
        row = decode(model, ids, new, what, how)
        return replace(row, tokens=row.tokens + 1) if "draft" in what else row

    monkeypatch.setattr(bench, "decode", wrong)
    assert cli.main(words) == 2
    assert "teacher + converted as draft gives other tokens than teacher" in capsys.readouterr().err


def test_what_is_drafted_and_accepted():
    model, ids = convert(make_model()), make_tokens(1, 12)
    plain = bench.decode(model, ids, 30, "plain", {})
    assert (plain.forwards, plain.drafted, plain.accepted) == (30, 0, None)
    twin = copy.deepcopy(model)
    twin.generation_config.assistant_confidence_threshold = 0.0
    twin.generation_config.num_assistant_tokens = 5
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    drafted = bench.decode(model, ids, 30, "by its twin", dict(assistant_model=twin))
    assert torch.equal(drafted.tokens, plain.tokens)
    assert drafted.accepted == 1 and drafted.forwards == 5 and drafted.drafted == 25  # 5 rounds of 5 + 1
    other = bench.decode(model, ids, 30, "by another", dict(assistant_model=convert(make_model(seed=7))))
    assert torch.equal(other.tokens, plain.tokens)
    assert 0 <= other.accepted < 0.5 and other.forwards > 15
