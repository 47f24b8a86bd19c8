"""`attention.keep_softmax.by: recall_then_kl`: half of a choice by recall, the rest by KL beside the first."""

import json
import math

import pytest
from test_ranking import converted, make_recipe
from test_ranking import paths as paths

from linearize import cli
from linearize.errors import RecipeError
from linearize.kept_softmax import units_of
from linearize.recipe import load_recipe
from linearize_eval import ranking as ranking_module
from linearize_eval.ranking import num_sets, rank, serves

UNITS = units_of(converted(), "kv_head")  # eight
RECALL = [3.2, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]  # what each takes off the score
KL = [2.0, 7.0, 1.0, 8.0, 2.5, 8.5, 1.8, 3.0]
SAME = [(5, 3), (5, 7), (3, 1)]  # pairs of which, by either measure, the second takes off only half beside the first


class KnownScale:
    """In place of `ranking.Scale`: the scores are known, and every set is counted."""

    model, distances = converted(), [16]

    def __init__(self):
        self.num_sets = 0

    def score(self, units, by):
        self.num_sets += 1
        return score(units, by)

    def figures(self, units):
        self.num_sets += 1
        copy = [{"distance": 16, "perplexity": math.exp(score(units, "recall"))}]
        return {"kept": [[u.layer, u.head] for u in units], "copy": copy, "kl": score(units, "kl")}

    def teacher_figures(self):
        return {}


def score(units, by):
    gains, kept = {"recall": RECALL, "kl": KL}[by], {UNITS.index(u) for u in units}
    return 50 - sum(gains[i] for i in kept) + sum(gains[b] / 2 for a, b in SAME if {a, b} <= kept)


def choose(by, count, *, whole=False):
    """(the chain as units, the ranking, the sets measured)."""
    scale = KnownScale()
    ranking = rank(scale, unit="kv_head", by=by, count=count, whole=whole)
    return named(ranking["chain"]), ranking, scale.num_sets


def named(pairs):
    by_name = {(u.layer, u.head): u for u in UNITS}
    return [by_name[tuple(pair)] for pair in pairs]


@pytest.mark.parametrize("pool", [24, 3])
@pytest.mark.parametrize(("count", "half"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (7, 4)])
def test_half_by_recall_and_the_rest_by_kl_beside_it(count, half, pool, monkeypatch):
    monkeypatch.setattr(ranking_module, "POOL", pool)
    chain, ranking, _ = choose("recall_then_kl", count)
    assert ranking["by"] == "recall_then_kl" and len(set(chain)) == count
    assert chain[:half] == choose("recall", count)[0][:half]
    for place in range(half, count):
        left = sorted((u for u in UNITS if u not in chain[:place]), key=lambda u: score([u], "kl"))
        assert chain[place] == min(left[:pool], key=lambda u: score([*chain[:place], u], "kl"))


def test_it_is_neither_of_the_two():
    chains = {by: [UNITS.index(u) for u in choose(by, 4)[0]] for by in ("recall", "kl", "recall_then_kl")}
    assert chains == {"recall": [5, 4, 2, 0], "kl": [5, 1, 4, 0], "recall_then_kl": [5, 4, 1, 0]}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_those_not_chosen_follow_by_their_own_kl(count):
    chain, ranking, measured = choose("recall_then_kl", count, whole=True)
    assert measured == num_sets(len(UNITS), count, whole=True)
    by_themselves = sorted(UNITS, key=lambda u: score([u], "kl"))
    assert named(ranking["curve"][-1]["kept"]) == chain + [u for u in by_themselves if u not in chain]
    assert named(figures["kept"][0] for figures in ranking["singles"]) == by_themselves
    assert choose("recall_then_kl", count)[2] == num_sets(len(UNITS), count, whole=False)


@pytest.mark.parametrize(("by", "length", "wanted", "count", "expected"), [
    ("recall_then_kl", 4, "recall_then_kl", 4, True), ("recall_then_kl", 12, "recall_then_kl", 6, False),
    ("recall_then_kl", 12, "recall_then_kl", 10, False), ("recall_then_kl", 12, "recall_then_kl", 11, True),
    ("recall_then_kl", 6, "recall_then_kl", 12, False), ("recall_then_kl", 1, "recall_then_kl", 2, False),
    ("recall", 4, "recall_then_kl", 4, False), ("kl", 4, "recall_then_kl", 4, False),
    ("recall_then_kl", 4, "kl", 2, False), ("recall_then_kl", 4, "recall", 2, False),
    ("recall", 12, "recall", 6, True), ("kl", 12, "kl", 6, True), ("kl", 6, "kl", 12, False),
])  # fmt: skip
def test_a_chain_serves_where_it_begins_alike(by, length, wanted, count, expected):
    """Of twelve the first six are by recall; of eleven too, and the others the same."""
    ranking = {"unit": "layer", "by": by, "distances": [16], "chain": [[i, None] for i in range(length)]}
    assert serves(ranking, unit="layer", by=wanted, count=count, distances=[16]) is expected
    assert not serves(ranking, unit="kv_head", by=wanted, count=count, distances=[16])
    assert not serves(ranking, unit="layer", by=wanted, count=count, distances=[16, 24])


def test_another_count_is_ranked_again(paths, tmp_path, capsys):
    keep = {"by": "recall_then_kl", "unit": "kv_head", "count": 4}
    recipe = make_recipe(tmp_path / "a", paths, **{"attention.keep_softmax": keep})
    assert cli.main(["rank-layers", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "greedily by recall_then_kl up to 4" in said and "the best 6 of 6 by kl" in said
    first = json.loads((tmp_path / "a" / "out.ranking" / "ranking.json").read_text())
    assert cli.main(["convert", str(recipe), "--set", "attention.keep_softmax.count=2"]) == 0
    assert "match: done before" in capsys.readouterr().out
    second = json.loads((tmp_path / "a" / "out" / "ranking.json").read_text())
    assert second["by"] == "recall_then_kl" and len(second["chain"]) == 2 and second["chain"][0] == first["chain"][0]
    kept = load_recipe(tmp_path / "a" / "out" / "recipe.yaml").attention.keep_softmax
    assert kept.heads == sorted(second["chain"])


def test_it_needs_distances_of_recall():
    choice = ["attention.keep_softmax.count=2", "attention.keep_softmax.by=recall_then_kl"]
    with pytest.raises(RecipeError, match="by: recall_then_kl needs an evaluate.recall_distances of 16 to"):
        load_recipe("quickstart", [*choice, "evaluate.recall_distances=[100000]"])
