"""Choosing what stays softmax: the switch, the measures, the greedy choice, and `rank-layers` and `convert` with it."""

import copy
import functools
import json
import math
from itertools import pairwise

import pytest
import torch
from pico import attention, convert, logits_in_pieces, logits_of, make_model, make_tokens, relative_error
from safetensors.torch import load_file
from test_export import read_log, save_model, save_recipe, save_text

from linearize import cli, plan, softmax_heads
from linearize.architecture import keep_softmax_, linearize_
from linearize.errors import RecipeError
from linearize.kept_softmax import Unit, evenly_spaced, heads_by_layer, units_of, written_down
from linearize.modeling_linearized import LinearizedAttentionMixin, attention_modules, linear_attentions
from linearize.recipe import AttentionSettings, KeepSoftmaxSettings, load_recipe
from linearize.variants import ablated_attention, restored_softmax, softmax_attention
from linearize_eval import ranking as ranking_module
from linearize_eval.perplexity import perplexity, token_nll
from linearize_eval.ranking import Scale, curve_sizes, greedy, num_sets, rank
from linearize_eval.recall import copy_recall

LAYERS = 4
TOKENS = make_tokens(2, 40)
SETS = [{1: [0]}, {0: [0, 1]}, {0: [1], 2: [0, 1], 3: [0]}]  # {layer: kv heads}, of 4 layers of 2


@functools.cache
def base_model():
    return make_model("llama", num_hidden_layers=LAYERS)


@functools.cache
def converted():
    """Never changed."""
    return convert(copy.deepcopy(base_model()))


# --------------------------------------------------------------------------------------- the switch, for good


@pytest.mark.parametrize("heads", SETS, ids=str)
def test_what_is_measured_is_what_keeping_makes(heads):
    model = copy.deepcopy(converted())
    before, mask = logits_of(model, TOKENS), (torch.arange(40) > 3).long().expand(2, -1)
    with restored_softmax(model, heads):
        measured, padded = logits_of(model, TOKENS), logits_of(model, TOKENS, attention_mask=mask)
    assert torch.equal(logits_of(model, TOKENS), before) and relative_error(measured, before) > 0.01
    keep_softmax_(model, heads)
    assert relative_error(logits_of(model, TOKENS), measured) < 1e-5
    assert relative_error(logits_of(model, TOKENS, attention_mask=mask)[:, 4:], padded[:, 4:]) < 1e-5
    assert relative_error(logits_in_pieces(model, TOKENS, [9, 1]), measured) < 1e-5
    whole = [layer for layer, kept in heads.items() if len(kept) == 2]
    assert list(linear_attentions(model)) == [i for i in range(LAYERS) if i not in whole]
    for layer in whole:
        assert not isinstance(attention_modules(model)[layer], LinearizedAttentionMixin)


@pytest.mark.parametrize("heads", SETS, ids=str)
def test_keeping_afterwards_is_converting_with_them_kept(heads, tmp_path):
    model = copy.deepcopy(converted())
    keep_softmax_(model, heads)
    settings = attention(heads=[(layer, head) for layer, kept in heads.items() for head in kept])
    named = linearize_(copy.deepcopy(base_model()), settings)
    assert named.config.linear_attention == model.config.linear_attention
    named.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(named, TOKENS), logits_of(model, TOKENS))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {n for n in weights if "linear_attn" in n} == {n for n in named.state_dict() if "linear_attn" in n}


def test_all_restored_is_the_teacher_even_after_an_error():
    model = copy.deepcopy(converted())
    before = logits_of(model, TOKENS)
    with pytest.raises(KeyError), restored_softmax(model, {i: [0, 1] for i in range(LAYERS)}):
        assert relative_error(logits_of(model, TOKENS), logits_of(base_model(), TOKENS)) < 1e-6
        raise KeyError
    assert torch.equal(logits_of(model, TOKENS), before) and model.config._has_softmax is False


def test_nothing_kept_is_lost_in_an_ablation():
    model = copy.deepcopy(converted())
    keep_softmax_(model, {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [0]})
    for linear in linear_attentions(model).values():
        linear.window = 40  # the one linear head is exact too, until it is ablated
    expected = logits_of(base_model(), TOKENS)
    assert relative_error(logits_of(model, TOKENS), expected) < 1e-5
    with ablated_attention(model, far=False):
        assert relative_error(logits_of(model, TOKENS), expected) < 1e-5
    with ablated_attention(model, far=False, window=1, sinks=0):
        one_head = relative_error(logits_of(model, TOKENS), expected)
    with ablated_attention(converted(), far=False, window=1, sinks=0):
        all_heads = relative_error(logits_of(converted(), TOKENS), expected)
    assert 0.01 < one_head < 0.7 * all_heads
    with softmax_attention(model):
        assert relative_error(logits_of(model, TOKENS), expected) < 1e-6


@pytest.mark.parametrize("given", [{}, {"attention_mask": torch.ones(2, 40, dtype=torch.long)}], ids=["", "ones"])
def test_without_padding_there_is_no_mask(given, monkeypatch):
    """Then SDPA takes its causal kernels."""
    seen = []

    def softmax_function(module):
        function = own(module)
        return lambda *args, **kwargs: seen.append(args[4]) or function(*args, **kwargs)

    own = softmax_heads.softmax_function
    monkeypatch.setattr(softmax_heads, "softmax_function", softmax_function)
    model = convert(copy.deepcopy(base_model()), heads=[(0, 1), (2, 0)])
    seen.clear()
    logits_of(model, TOKENS, **given)
    assert seen == [None, None]
    logits_of(model, TOKENS, attention_mask=(torch.arange(40) > 3).long().expand(2, -1))
    assert seen[2] is not None


# -------------------------------------------------------------------------------------------- units and choice


def test_units():
    layers, heads = units_of(converted(), "layer"), units_of(converted(), "kv_head")
    assert [str(u) for u in layers] == ["0", "1", "2", "3"]
    assert [str(u) for u in heads] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]
    partly = convert(copy.deepcopy(base_model()), keep_softmax=[0], heads=[(2, 1)])
    assert [str(u) for u in units_of(partly, "kv_head")] == ["1.0", "1.1", "2.0", "3.0", "3.1"]
    assert heads_by_layer([heads[5], layers[0], heads[4]]) == {0: [0, 1], 2: [0, 1]}
    assert heads_by_layer(units_of(partly, "layer")) == {1: [0, 1], 2: [0], 3: [0, 1]}


@pytest.mark.parametrize(("total", "count", "expected"), [(30, 4, [3, 11, 18, 26]), (4, 1, [2]), (3, 3, [0, 1, 2])])
def test_even_spacing(total, count, expected):
    assert evenly_spaced(list(range(total)), count) == expected


def test_the_choice_is_written_down_by_name():
    keep = KeepSoftmaxSettings(layers=[5], heads=[[2, 1]], count=2)
    named = written_down(keep, [Unit(3, None, (0, 1)), Unit(2, None, (0,))])
    assert (named.layers, named.heads, named.count) == ([2, 3, 5], [], 0)
    named = written_down(keep, [Unit(4, 0, (0,)), Unit(2, 0, (0,))])
    assert (named.layers, named.heads, named.count) == ([5], [[2, 0], [2, 1], [4, 0]], 0)


def test_greedy_takes_what_adds_most_not_what_is_best_alone():
    units = [Unit(i, None, (0,)) for i in range(4)]
    gains = {0: 5, 1: 4, 2: 3, 3: 1}

    def score(kept):  # 0 and 1 do the same
        layers = {u.layer for u in kept}
        return 20 - sum(gains[i] for i in layers) + (4 if {0, 1} <= layers else 0)

    chain = greedy(lambda kept, by: score(kept), {"kl": {u: score([u]) for u in units}}, ["kl"] * 4)
    assert [u.layer for u in chain] == [0, 2, 3, 1]


def test_a_round_measures_no_more_than_the_pool(monkeypatch):
    monkeypatch.setattr(ranking_module, "POOL", 2)
    units = [Unit(i, None, (0,)) for i in range(5)]
    asked = []

    def score(kept, by):
        asked.append([u.layer for u in kept])
        return -10 * (4 in asked[-1]) - len(kept)

    chain = greedy(score, {"kl": {u: float(u.layer) for u in units}}, ["kl"] * 3)
    assert [u.layer for u in chain] == [0, 1, 2] and asked == [[0, 1], [0, 2], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize(("total", "count", "whole", "sizes"), [
    (4, 2, False, [1, 2]), (4, 2, True, [1, 2, 3, 4]), (90, 3, True, [1, 2, 3, *range(6, 90, 3), 90]),
])  # fmt: skip
def test_where_the_curve_is_measured(total, count, whole, sizes):
    assert curve_sizes(total, count, whole=whole) == sizes


# ------------------------------------------------------------------------------------------------ the measures


def make_scale(model, *, on_set=lambda: None, rows=None, **options):
    rows = make_tokens(4, 60, seed=5) if rows is None else rows
    given = {"distances": [16, 28], "bos_token_id": None, "batch_size": 3, "state_bytes": lambda n: n, **options}
    return Scale(model, rows, on_set=on_set, **given)


def test_figures_are_those_of_the_model_with_the_set_kept():
    rows, unit = make_tokens(4, 60, seed=5), Unit(1, 0, (0,))
    model = copy.deepcopy(converted())
    scale = make_scale(model)
    figures = scale.figures([unit])
    score = {by: scale.score([unit], by) for by in ("recall", "kl")}
    keep_softmax_(model, {1: [0]})
    copies = [c["perplexity"] for c in copy_recall(model, rows, distances=[16, 28])]
    assert [c["perplexity"] for c in figures["copy"]] == pytest.approx(copies, rel=1e-5)
    assert score["recall"] == pytest.approx(sum(map(math.log, copies)) / 2, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(perplexity(token_nll(model, rows[:2])), rel=1e-5)
    mine, theirs = (logits_of(m, rows[:2])[:, :-1].double().log_softmax(-1) for m in (model, base_model()))
    kl = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
    assert figures["kl"] == score["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert figures["kept"] == [[1, 0]] and figures["state_bytes"] == 4096


def exact_but_for(layer):
    """Far beyond what the text needs, the window of every layer but one: only that one differs from the teacher."""
    model = copy.deepcopy(converted())
    for index, linear in linear_attentions(model).items():
        linear.window = 6 if index == layer else 100
    return model


@pytest.mark.parametrize("by", ["recall", "kl", "recall_then_kl"])
def test_the_layer_that_differs_is_found(by):
    model = exact_but_for(2)
    sets = []
    scale = make_scale(model, on_set=lambda: sets.append(1))
    result = rank(scale, unit="layer", by=by, count=2, whole=True)
    assert len(sets) == num_sets(4, 2, whole=True)
    kl = {figures["kept"][0][0]: figures["kl"] for figures in result["singles"]}
    assert abs(kl[2]) < 1e-6 and all(kl[i] == pytest.approx(result["none"]["kl"], rel=1e-3) for i in (0, 1, 3))
    assert result["none"]["kl"] > 0.01 and abs(result["teacher"]["kl"]) < 1e-7
    assert [len(f["kept"]) for f in result["curve"]] == [1, 2, 3, 4] == [len(f["kept"]) for f in result["even"]]
    assert [f["kept"] for f in result["even"][:2]] == [[[2, None]], [[1, None], [3, None]]]
    assert abs(result["curve"][-1]["kl"]) < 1e-6
    if by == "kl":
        assert result["chain"][0] == [2, None] and result["curve"][0]["kept"] == [[2, None]]
    scores = [sum(math.log(c["perplexity"]) for c in f["copy"]) for f in result["singles"]]
    assert by != "recall" or scores == sorted(scores) and result["chain"][0] == result["singles"][0]["kept"][0]


def test_the_head_that_differs_is_found():
    model = exact_but_for(1)
    projection = attention_modules(model)[1].o_proj.weight  # of the outputs of query heads 0 ... 3, 8 wide
    with torch.no_grad():
        projection[:, :16] = 0  # what kv head 0 says is not heard
    result = rank(make_scale(model), unit="kv_head", by="kl", count=1)
    assert result["chain"] == [[1, 1]] and abs(result["curve"][0]["kl"]) < 1e-6
    assert result["singles"][1]["kl"] == pytest.approx(result["none"]["kl"], rel=1e-3)


# -------------------------------------------------------------------------------------- recipes and whole runs


@pytest.mark.parametrize(("settings", "message"), [
    (dict(heads=[[1]]), r"heads: must be \[layer, head\] pairs"), (dict(heads=[[1, -1]]), r"from 0, is \[1, -1\]"),
    (dict(heads=[[1, 0], [1, 0]]), "must not repeat an entry"),
    (dict(layers=[1], heads=[[1, 0]]), "kept whole by layers"),
    (dict(count=4), "count: 4 would leave nothing to convert; of 4 at most 3"),
    (dict(count=7, unit="kv_head", heads=[[0, 1]]), "of 7 at most 6"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(RecipeError, match=message):
        keep = KeepSoftmaxSettings(**settings)
        linearize_(copy.deepcopy(base_model()), AttentionSettings(window=5, sinks=2, keep_softmax=keep))


def test_from_the_command_line_and_back(tmp_path):
    overrides = ["attention.keep_softmax.heads=[[3, 0], [17, 2]]", "attention.keep_softmax.layers=0,1", "data.source=x"]
    recipe = load_recipe("quickstart", overrides)
    assert recipe.attention.keep_softmax == KeepSoftmaxSettings(layers=[0, 1], heads=[[3, 0], [17, 2]])
    with pytest.raises(RecipeError, match="is a group; set one of attention.keep_softmax.layers"):
        load_recipe("quickstart", ["attention.keep_softmax=[0, 1]"])
    with pytest.raises(RecipeError, match="recall needs an evaluate.recall_distances of 16 to"):
        load_recipe("quickstart", ["attention.keep_softmax.count=2", "evaluate.recall_distances=[100000]"])


def test_distances_that_are_ranked():
    def distances(row, sequence):
        lengths = [f"evaluate.sequence_length={row}", f"data.sequence_length={sequence}", "match.tokens=0"]
        lengths.append("finetune.tokens=0")  # their steps would be too short for some of these
        return load_recipe("quickstart", [*lengths, "evaluate.recall_distances=[700,15,16,300,256]"]).rank_distances

    assert distances(512, 512) == [16, 256] and distances(512, 1024) == [16, 256, 300]
    assert distances(1400, 512) == [16, 256, 300, 700] and distances(600, 4096) == [16, 256, 300]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    return save_model(folder / "model", layers=3), save_text(folder / "text.jsonl")


def make_recipe(folder, paths, **changes):
    folder.mkdir(exist_ok=True)
    short = {"match.tokens": 384, "finetune.tokens": 384, "data.sequence_length": 64, "data.held_out": 6}
    return save_recipe(folder, *paths, **{
        **short, "evaluate.recall_distances": [16, 24], "evaluate.sequence_length": 64,
        "evaluate.key_recall_samples": 0, **changes,
    })  # fmt: skip


def test_rank_layers_then_convert_goes_on(paths, tmp_path, capsys):
    recipe, folder = make_recipe(tmp_path / "a", paths), tmp_path / "a" / "out.ranking"
    assert cli.main(["rank-layers", str(recipe), "--set", "attention.keep_softmax.count=2"]) == 0
    said = capsys.readouterr().out
    result = json.loads((folder / "ranking.json").read_text())
    assert (folder / "ranking.png").read_bytes().startswith(b"\x89PNG") and "evenly spaced" in said
    assert result["distances"] == [16, 24] and len(result["singles"]) == 3 and len(result["curve"]) == 3
    teacher = [c["perplexity"] for c in result["teacher"]["copy"]]
    assert [c["perplexity"] for c in result["curve"][-1]["copy"]] == pytest.approx(teacher, rel=1e-4)
    sizes = [result["none"], *result["curve"]]
    grown = [after["state_bytes"] - before["state_bytes"] for before, after in pairwise(sizes)]
    assert len(set(grown)) == 1 and sizes[-1]["state_bytes"] == 3 * 4096 * 2 * 2 * 8 * 4
    chain = [layer for layer, _ in result["chain"]]
    assert f"keep_softmax: {{layers: {sorted(chain)}}}" in said

    assert cli.main(["convert", str(folder / "recipe.yaml"), "--set", "evaluate.sequences=0"]) == 0
    config = json.loads((tmp_path / "a" / "out-kept" / "config.json").read_text())
    assert config["linear_attention"]["layers"] == [i for i in range(3) if i not in chain]
    capsys.readouterr()

    assert cli.main(["convert", str(recipe), "--set", "attention.keep_softmax.count=1"]) == 0
    said = capsys.readouterr().out
    assert "match: done before" in said and f"layers {chain[0]}" in said
    written = load_recipe(recipe.parent / "out" / "recipe.yaml").attention.keep_softmax
    assert (written.layers, written.count) == ([chain[0]], 0)
    config = json.loads((recipe.parent / "out" / "config.json").read_text())
    assert config["linear_attention"]["layers"] == [i for i in range(3) if i != chain[0]]
    assert f"layers {chain[0]}, which stayed softmax" in (recipe.parent / "out" / "README.md").read_text()
    assert (recipe.parent / "out" / "ranking.json").is_file()


def test_an_interrupted_choice_is_not_made_again(paths, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path / "a", paths, **{"attention.keep_softmax": {"count": 2, "unit": "kv_head"}})
    from linearize import convert as module

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "finetune", interrupt)
        assert cli.main(["convert", str(recipe)]) == 130
    path = tmp_path / "a" / "out.work" / "ranking.json"
    saved = json.loads(path.read_text())
    saved["chain"] = [[2, 1], [0, 0]]  # what the ranking says is what is done
    path.write_text(json.dumps(saved))
    assert cli.main(["convert", str(recipe)]) == 0
    folder = tmp_path / "a" / "out"
    assert load_recipe(folder / "recipe.yaml").attention.keep_softmax.heads == [[0, 0], [2, 1]]
    assert json.loads((folder / "config.json").read_text())["linear_attention"]["kept_heads"] == [[0], [], [1]]
    assert [r["kept"] for r in read_log(folder / "log.jsonl") if r["stage"] == "choose"][-1] == [[2, 1], [0, 0]]


def test_another_measure_ranks_again_and_finetunes_anew(paths, tmp_path, monkeypatch, capsys):
    recipe = make_recipe(tmp_path / "a", paths, **{"attention.keep_softmax.count": 1})
    from linearize import convert as module

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "report", interrupt)
        assert cli.main(["convert", str(recipe)]) == 130
    path = tmp_path / "a" / "out.work" / "ranking.json"
    assert json.loads(path.read_text())["by"] == "recall" and path.with_name("finetune.pt").exists()
    capsys.readouterr()
    by = ["--set", "attention.keep_softmax.by=kl"]
    assert cli.main(["convert", str(recipe), *by]) == 0
    said = capsys.readouterr().out
    assert "match: done before" in said and "finetune: done before" not in said and "by kl: layers" in said
    assert json.loads((tmp_path / "a" / "out" / "ranking.json").read_text())["by"] == "kl"


def test_ranking_by_recall_needs_a_distance(paths, tmp_path, capsys):
    settings = {"attention.keep_softmax": {"by": "recall"}, "evaluate.recall_distances": [4]}
    recipe = make_recipe(tmp_path / "a", paths, **settings)  # nothing to choose: right for `convert`
    assert cli.main(["rank-layers", str(recipe)]) == 2
    assert "recall needs an evaluate.recall_distances of 16 to" in capsys.readouterr().err


def test_even_needs_no_ranking(paths, tmp_path, capsys):
    recipe = make_recipe(tmp_path / "a", paths, **{"attention.keep_softmax": {"count": 1, "by": "even"}})
    assert cli.main(["rank-layers", str(recipe)]) == 2
    assert "even measures nothing" in capsys.readouterr().err
    assert cli.main(["convert", str(recipe)]) == 0
    assert load_recipe(tmp_path / "a" / "out" / "recipe.yaml").attention.keep_softmax.layers == [1]
    assert not (tmp_path / "a" / "out" / "ranking.json").exists()


def test_the_plan_says_what_is_chosen_later(paths, tmp_path):
    changes = {"attention.keep_softmax": {"count": 2, "unit": "kv_head", "heads": [[0, 1]]}}
    said = plan.plan(load_recipe(make_recipe(tmp_path / "a", paths, **changes)))
    assert "chosen       after matching: 2 kv heads, by recall" in said and "replaced     3 of 3 layers" in said
    assert f"kept cache   of what stays softmax by this recipe, MiB: {3 * 2 * 8 * 2 / 1024:,.1f} at 1024" in said
    keep = {"layers": [0], "count": 1}  # two layers, 64 bytes a token each
    whole = plan.plan(load_recipe(make_recipe(tmp_path / "b", paths, **{"attention.keep_softmax": keep})))
    sizes = [f"{2 * 64 * n / 1024:,.1f} at {n * 1024}" for n in (1, 8, 32)]
    assert f"MiB: {', '.join(sizes)}" in whole
    assert "0.1" in said.partition("kept         single kv heads in softmax: ")[2].partition("\n")[0]
