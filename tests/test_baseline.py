"""The baseline by one setting: a window of equal bytes, finetuned on the same text, as the card's last row."""

import copy

import pytest
from pico import attention, make_model
from test_export import REPORT, save_model, save_recipe, save_text

from linearize import cli
from linearize.architecture import keep_softmax_, linearize_
from linearize.convert import convert
from linearize.errors import ModelError, RecipeError
from linearize.loading import load
from linearize.modeling_linearized import linear_attentions
from linearize.plan import plan
from linearize.recipe import load_recipe
from linearize_eval.baseline import load_baseline, with_baseline
from linearize_eval.memory import state_bytes
from linearize_eval.report import load_report
from linearize_eval.report_text import verdicts

SMALL = {"attention.window": 4, "attention.feature_map.dim": 1, "finetune.tokens": 384, "match.tokens": 384}
SMALL |= {**REPORT, "evaluate.recall_distances": [12]}
ONE_SETTING = {"attention.feature_map.name": "equal_window"}


@pytest.mark.parametrize("kept", [[], [(0, 1)]])
def test_it_takes_the_bytes_of_the_taylor_state_and_has_no_far_term(kept):
    base = make_model()
    ours = linearize_(copy.deepcopy(base), attention(heads=kept, decay=False))
    settings = attention(heads=kept, name="equal_window", decay=False)
    model = linearize_(base, settings)
    assert state_bytes(model, 300) >= state_bytes(ours, 300)
    layer = next(iter(linear_attentions(model).values()))
    spare = state_bytes(model, 300) - state_bytes(ours, 300)
    far = 4 * layer.num_kv_heads * (3 * (layer.head_dim + 1) + layer.window - 1)  # of the kernels' smallest map
    token = sum(x.token_bytes(dtype_bytes=4) for x in linear_attentions(model).values())
    assert spare < token + len(linear_attentions(model)) * 2 * far, "no wider than that"
    assert model.config.linear_attention["feature_map"] == "none" and not layer.far_enabled
    assert layer.window == model.config.linear_attention["window"] > settings.window


def test_heads_chosen_later_change_nothing_of_the_window():
    model = linearize_(make_model(), attention(name="equal_window"))
    named = linearize_(make_model(), attention(name="equal_window", heads=[(0, 1)]))
    keep_softmax_(model, {0: [1]})
    assert model.config.linear_attention == named.config.linear_attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(ours, baseline, what trained them): the same recipe but for one setting; ours was given the baseline."""
    root = tmp_path_factory.mktemp("baseline")
    model, text = save_model(root / "m"), save_text(root / "t.jsonl")
    made = {}
    for name, changes in (("baseline", ONE_SETTING), ("ours", {"evaluate.baseline": str(root / "baseline")})):
        settings = {**SMALL, **changes, "output.folder": str(root / name)}
        made[name] = convert(load_recipe(save_recipe(root, model, text, **settings)))
    return made["ours"], made["baseline"]


def test_one_setting_converts_it_and_it_is_finetuned_alone(folders):
    ours, baseline = folders
    assert "match" not in (baseline / "README.md").read_text().split("## Measured")[0]
    assert "finetune: 384 tokens" in (baseline / "README.md").read_text()
    assert "which is all it sees: a baseline" in (baseline / "README.md").read_text()
    report = load_report(baseline)
    assert [variant["name"] for variant in report["variants"]] == ["teacher", "converted", "window + sinks"]
    trained, untrained = report["variants"][1:]
    assert trained["perplexity"] != untrained["perplexity"] and "untrained, the same window" in untrained["note"]
    loaded = load(baseline, device="cpu")[0]
    assert f"window {loaded.config.linear_attention['window']} + 2 sinks" in untrained["note"]


def test_the_card_has_the_finetuned_baseline_as_its_last_row(folders, capsys):
    ours, baseline = folders
    report, row = load_report(ours), load_report(baseline)["variants"][1]
    assert [v["name"] for v in report["variants"]] == [
        "teacher", "converted", "far term off", "window off", "window + sinks",
    ]  # fmt: skip
    last = report["variants"][-1]
    assert last["nll_by_row"] == row["nll_by_row"] and last["copy"] == row["copy"]
    assert str(baseline) in last["note"] and "untrained" not in last["note"] and report["left_out"] == []
    assert any(str(baseline) in verdict.text for verdict in verdicts(report))
    assert cli.main(["report", str(ours), str(baseline)]) == 0
    shown = capsys.readouterr().out
    assert "do not compare" not in shown and "baseline" in shown


def test_reports_that_do_not_compare_are_refused(folders, capsys):
    ours, baseline = (load_report(folder) for folder in folders)
    with pytest.raises(ModelError, match="linear attention.*equal_window"):
        load_baseline(folders[0])
    other = copy.deepcopy(baseline)
    other["variants"][0]["nll_by_row"][0] += 0.5
    with pytest.raises(ModelError, match="teacher has other losses"):
        with_baseline(ours, other, "x")
    other = copy.deepcopy(baseline)
    other["variants"][0]["copy"][0]["distance"] = 9
    with pytest.raises(ModelError, match="its columns are"):
        with_baseline(ours, other, "x")
    assert cli.main(["report", *map(str, folders), "--baseline", str(folders[1])]) == 2
    assert "of one report card" in capsys.readouterr().err


def test_a_baseline_of_other_texts_leaves_the_untrained_row_and_says_so(folders, tmp_path):
    model, text = save_model(tmp_path / "m"), save_text(tmp_path / "t.jsonl")
    changes = {"evaluate.baseline": str(folders[1]), "evaluate.recall_distances": [10], "finetune.tokens": 0}
    changes |= {"match.tokens": 0, "attention.window": 4}
    report = load_report(convert(load_recipe(save_recipe(tmp_path, model, text, **{**REPORT, **changes}))))
    assert "untrained" in report["variants"][-1]["note"]
    assert any("was not measured on the same texts" in reason for reason in report["left_out"])
    recipe = load_recipe(save_recipe(tmp_path, model, text, **{**changes, **REPORT, "evaluate.baseline": "nowhere"}))
    with pytest.raises(ModelError, match="no report card in nowhere"):
        convert(recipe, force=True)


def test_a_window_wider_than_the_sequences_is_refused(tmp_path):
    model, text = save_model(tmp_path / "m"), save_text(tmp_path / "t.jsonl")
    changes = {**ONE_SETTING, "attention.feature_map.dim": 16}
    with pytest.raises(RecipeError, match="attention.window: with sinks it covers"):
        convert(load_recipe(save_recipe(tmp_path, model, text, **changes)))


def test_the_plan_counts_no_matching(tmp_path):
    model, text = save_model(tmp_path / "m"), save_text(tmp_path / "t.jsonl")
    words = plan(load_recipe(save_recipe(tmp_path, model, text, **{**SMALL, **ONE_SETTING})))
    assert "none map" in words and "replaced     2 of 2 layers" in words
