"""A ranking serves other recipes: the names that it writes are what they take."""

import copy
import json
from dataclasses import replace

import pytest
from pico import attention
from test_ranking import base_model

from linearize.architecture import keep_softmax_, linearize_
from linearize.kept_softmax import heads_by_layer
from linearize.recipe import KeepSoftmaxSettings, load_recipe
from linearize_eval.ranking import chosen_units, load_ranking, save_ranking
from linearize_eval.ranking_report import recipe_lines


@pytest.mark.parametrize("unit", ["layer", "kv_head"])
def test_a_ranking_is_reused_by_the_names_it_writes(unit, tmp_path):
    """As saved and as printed, a chain is what another recipe takes, and it keeps what counting would have kept."""
    chain = [[2, 1], [0, 1], [2, 0]] if unit == "kv_head" else [[2, None], [0, None]]
    save_ranking({"format": 1, "unit": unit, "by": "kl", "chain": chain}, tmp_path / "ranking.json")
    ranking, model = load_ranking(tmp_path / "ranking.json"), copy.deepcopy(base_model())
    linearize_(model, attention())
    keep_softmax_(model, heads_by_layer(chosen_units(ranking, model, len(chain))))

    key, named = ("heads", ranking["chain"]) if unit == "kv_head" else ("layers", [i for i, _ in ranking["chain"]])
    as_saved = load_recipe("quickstart", [f"attention.keep_softmax.{key}={json.dumps(named)}"])
    counted, by_name = recipe_lines(ranking, len(chain), KeepSoftmaxSettings()).split("# or, by name: ")
    printed = []
    for lines in (counted, "attention:\n  " + by_name):
        (tmp_path / "recipe.yaml").write_text("model: {id: a/b}\ndata: {source: x.txt}\n" + lines)
        printed.append(load_recipe(tmp_path / "recipe.yaml").attention.keep_softmax)
    assert (printed[0].count, printed[0].by, printed[0].unit) == (len(chain), "kl", unit)
    for keep in (as_saved.attention.keep_softmax, printed[1]):
        other = copy.deepcopy(base_model())
        linearize_(other, replace(attention(), keep_softmax=keep))
        specs = [m.config.linear_attention for m in (model, other)]
        assert [(s["layers"], s["kept_heads"]) for s in specs] == [(specs[0]["layers"], specs[0]["kept_heads"])] * 2
        assert len(specs[0]["layers"]) == (3 if unit == "kv_head" else 2)


def test_what_a_recipe_keeps_already_stays_in_what_it_is_told_to_write():
    ranking = {"unit": "kv_head", "by": "kl", "chain": [[2, 1], [0, 1], [2, 0]]}
    keep = KeepSoftmaxSettings(layers=[1], heads=[[0, 0]], count=2, by="kl", unit="kv_head")
    counted, by_name = recipe_lines(ranking, 2, keep).split("\n  # or, by name: ")
    assert "{layers: [1], heads: [[0, 0]], count: 2, by: kl, unit: kv_head}   # chooses [[0, 1], [2, 1]]" in counted
    assert by_name == "keep_softmax: {layers: [1], heads: [[0, 0], [0, 1], [2, 1]]}"
    whole = {"unit": "layer", "by": "kl", "chain": [[0, None], [2, None]]}
    assert recipe_lines(whole, 1, keep).endswith("# or, by name: keep_softmax: {layers: [0, 1]}")
