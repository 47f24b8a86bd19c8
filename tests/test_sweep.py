"""`linearize sweep`: the product of grids, resumed, with a failing variant, one tokenisation and one table."""

import csv
import json
import math
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from rich.console import Console
from test_export import REPORT, SHORT, save_model, save_recipe, save_text, steps_of

from linearize import cli, data
from linearize.convert import convert
from linearize.errors import LinearizeError, RecipeError
from linearize.recipe import load_recipe
from linearize_eval import sweep as sweep_module
from linearize_eval.report import load_report
from linearize_eval.sweep import plan_sweep, sweep, variant_name
from linearize_eval.sweep_results import draw_results, figures_of, frontier, label_of, show_results

TOKENS_GRID = ["match.tokens=384,768"]
GRID = ["attention.feature_map.dim=2,4", "match.lr=1e-3,1e-2"]
TINY = {**SHORT, **REPORT, "finetune.tokens": 0, "evaluate.recall_distances": [12, 20]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), save_text(folder / "text.jsonl")


def rows_of(folder: Path) -> list[dict]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_is_multiplied_and_named(tmp_path, inputs):
    recipe = str(save_recipe(tmp_path, *inputs, **TINY))
    variants = plan_sweep(recipe, tmp_path / "s", grid=GRID, overrides=["run.seed=3"])
    assert [v.grid for v in variants] == [
        {"attention.feature_map.dim": dim, "match.lr": lr} for dim in (2, 4) for lr in (0.001, 0.01)
    ]
    assert variants[1].name == "attention.feature_map.dim=2,match.lr=0.01"
    assert variants[1].recipe.output_folder == tmp_path / "s" / variants[1].name
    assert (variants[1].recipe.attention.feature_map.dim, variants[1].recipe.match.lr) == (2, 0.01)
    assert variants[0].recipe.run.seed == 3
    lists = plan_sweep(recipe, tmp_path, grid=["attention.keep_softmax.heads=[],[[0, 1], [1, 0]]"], overrides=[])
    assert [v.recipe.attention.keep_softmax.heads for v in lists] == [[], [[0, 1], [1, 0]]]
    assert lists[1].name == "attention.keep_softmax.heads=[[0,1],[1,0]]"


def test_names_are_those_of_files():
    assert "/" not in variant_name({"model.id": "a/b"}) and len(variant_name({"data.source": "x" * 400})) < 150
    assert variant_name({"model.id": "a/b"}) != variant_name({"model.id": "a_b"})


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (["match.lr"], "write it as"),
        (["match.lrr=1,2"], "did you mean 'match.lr'"),
        (["match.lr=1,x"], "match.lr"),
        (["match.lr=0.001,1e-3"], "gives a variant twice"),
        (["match.lr=1", "match.lr=2"], "named twice"),
        (["output.folder=a,b"], "not in where it goes"),
        (["evaluate.sequences=2,0"], "no report card"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_made(tmp_path, inputs, grid, words):
    recipe = str(save_recipe(tmp_path, *inputs, **TINY))
    with pytest.raises(RecipeError, match=words):
        sweep(recipe, grid=grid)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_several_processes_are_refused(tmp_path, inputs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LinearizeError, match="one process"):
        sweep(str(save_recipe(tmp_path, *inputs, **TINY)), grid=GRID)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, inputs):
    """The folder of a sweep that was interrupted in its third variant; how often text was tokenised; what was done."""
    folder = tmp_path_factory.mktemp("swept")
    recipe = str(save_recipe(folder, *inputs, **TINY))
    tokenised, converted, write = [], [], data._write_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_write_tokens", lambda *args: (tokenised.append(1), write(*args)))

        def interrupted(recipe, **options):
            if len(converted) == 2:
                raise KeyboardInterrupt
            converted.append(recipe.output_folder.name)
            return convert(recipe, **options)

        patch.setattr(sweep_module, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(recipe, grid=GRID)
        before = rows_of(folder / "out.sweep")
        patch.setattr(sweep_module, "convert", lambda r, **o: (converted.append(r.output_folder.name), convert(r, **o)))
        result = sweep(recipe, grid=GRID)
    return result, recipe, tokenised, converted, before


def test_weights_that_were_not_kept_are_said_to_be_missing(swept, capsys):
    sweep(swept[1], grid=GRID, keep_models=True)
    assert capsys.readouterr().out.count("done before without --keep-models: has no weights") == 4


def test_an_interrupted_sweep_goes_on_and_tokenises_once(swept):
    folder, recipe, tokenised, converted, before = swept
    names = [f"attention.feature_map.dim={dim},match.lr={lr}" for dim in (2, 4) for lr in (0.001, 0.01)]
    assert converted == names, "each once"
    assert tokenised == [1] and not (folder / "tokens").exists()
    assert len(before) == 2
    for name in names:
        kept = sorted(path.name for path in (folder / name).iterdir())
        assert kept == ["log.jsonl", "recipe.yaml", "report.json", "report.png"]


def test_variants_that_train_on_more_or_less_share_one_tokenisation(tmp_path, inputs, monkeypatch):
    tokenised, write = [], data._write_tokens
    monkeypatch.setattr(data, "_write_tokens", lambda *args: (tokenised.append(args[3]["train"]), write(*args)))
    recipe = save_recipe(tmp_path, *inputs, **TINY)
    folder = sweep(str(recipe), grid=TOKENS_GRID)
    assert tokenised == [16], "768 tokens in sequences of 48"
    alone = convert(load_recipe(recipe))  # 384
    assert tokenised == [16, 8]
    assert steps_of(folder / "match.tokens=384" / "log.jsonl") == steps_of(alone / "log.jsonl") != {}
    assert float(rows_of(folder)[0]["perplexity"]) == load_report(alone)["variants"][1]["perplexity"]


def test_results_are_those_of_the_reports(swept):
    folder = swept[0]
    rows = rows_of(folder)
    assert [(r["attention.feature_map.dim"], r["match.lr"]) for r in rows] == [
        ("2", "0.001"), ("2", "0.01"), ("4", "0.001"), ("4", "0.01"),
    ]  # fmt: skip
    assert rows[:2] == swept[4]
    for row in rows:
        name = f"attention.feature_map.dim={row['attention.feature_map.dim']},match.lr={row['match.lr']}"
        report = load_report(folder / name)
        converted, far_off = report["variants"][1:3]
        assert float(row["perplexity"]) == converted["perplexity"] and float(row["kl"]) == converted["kl"] > 0
        assert [float(row[f"copy@{d}"]) for d in (12, 20)] == [c["perplexity"] for c in converted["copy"]]
        cost = 100 * (far_off["far_perplexity"] / converted["far_perplexity"] - 1)
        assert float(row["far_off_cost_percent"]) == pytest.approx(cost, rel=1e-6)
        assert 0 < float(row["minutes"]) < 2 and row["error"] == ""
    states = [int(row["state_bytes_4k"]) for row in rows]
    assert states[0] == states[1] < states[2] == states[3]
    assert rows[0]["perplexity"] != rows[1]["perplexity"], "the learning rates differ"


def test_the_picture_has_points_of_both_distances(swept, tmp_path):
    pixels = (matplotlib.image.imread(swept[0] / "results.png")[..., :3] * 255).round().astype(int)
    for colour in ("#000000", "#0072B2"):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=-1).sum() > 100
    assert not draw_results([{"figures": None, "grid": {}}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_frontier_is_of_what_nothing_smaller_beats():
    points = [(2, 6.0), (1, 5.0), (2, 4.0), (3, 4.0), (5, 2.0), (4, 1.0)]
    assert frontier(points) == [(1, 5.0), (2, 4.0), (4, 1.0)] and frontier([]) == []


def test_more_distances_than_styles_are_all_drawn(tmp_path, monkeypatch):
    labels, draw = [], Axes.plot

    def plot(axes, *args, **options):
        labels.append(options.get("label"))
        return draw(axes, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    copies = {f"copy@{n}": 2.0 for n in range(9)}
    figures = {**copies, "state_bytes_4k": 5, "teacher": copies}
    assert draw_results([{"figures": figures, "grid": {}}], tmp_path / "a.png")
    assert [label for label in labels if label] == [f"copy at distance {n}" for n in range(9)]


def test_a_distance_of_one_variant_alone_has_its_teacher(tmp_path, monkeypatch, capsys):
    levels = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **options: levels.append(y))
    figures = [{"copy@12": 3.0, "state_bytes_4k": 5, "teacher": {"perplexity": 9.0, "copy@12": 1.5}},
               {"copy@24": 4.0, "state_bytes_4k": 5, "teacher": {"perplexity": 9.1, "copy@24": 1.75}}]  # fmt: skip
    records = [{"figures": f, "grid": {}, "minutes": 1, "error": None} for f in figures]
    show_results(tmp_path, load_recipe("quickstart"), records, console=Console(width=200))
    assert levels == [1.5, 1.75]
    assert "perplexity 9.00, copy@24 1.75, copy@12 1.50." in capsys.readouterr().out


def test_a_point_says_the_settings_and_how_long_lists_are():
    grid = {"attention.keep_softmax.heads": [[18, 2], [8, 0]], "match.lr": 0.1}
    assert label_of({"grid": grid}) == "2 heads, lr=0.1"


def test_a_line_leads_along_the_frontier(tmp_path, monkeypatch):
    lines, draw = [], Axes.plot

    def plot(axes, *args, **options):
        lines.append((args[:2], options))
        return draw(axes, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    copies = [(8, 3.0), (1, 5.0), (2, 7.0), (4, None)]
    figures = [{"copy@12": copy, "state_bytes_4k": size, "teacher": {"copy@12": 1.2}} for size, copy in copies]
    assert draw_results([{"figures": f, "grid": {"match.lr": 1}} for f in figures], tmp_path / "a.png")
    assert [data for data, options in lines if options.get("drawstyle")] == [((1, 8), (5.0, 3.0))]
    (tmp_path / "a.png").unlink()
    nothing = [{"figures": {**f, "copy@12": None}, "grid": {}} for f in figures]
    assert not draw_results(nothing, tmp_path / "a.png") and not (tmp_path / "a.png").exists()


def test_a_failed_variant_is_reported_and_the_others_go_on(tmp_path, inputs, capsys, monkeypatch):
    recipe = str(save_recipe(tmp_path, *inputs, **TINY))
    command = ["sweep", recipe, "--grid", "attention.keep_softmax.layers=[9],[1]", "--keep-models"]
    assert cli.main(command) == 2  # there is no layer 9
    printed = capsys.readouterr()
    assert "1 of 2 variants failed" in printed.err and "layers [9]" in printed.err
    folder = tmp_path / "out.sweep"
    failed, good = rows_of(folder)
    assert "RecipeError" in failed["error"] and failed["perplexity"] == ""
    assert float(good["perplexity"]) > 1 and good["attention.keep_softmax.layers"] == "[1]"
    assert list((folder / "attention.keep_softmax.layers=[1]").glob("*.safetensors")), "--keep-models"
    report = load_report(folder / "attention.keep_softmax.layers=[1]")
    state = {row["length"]: row["state_bytes"] for row in report["memory"]["curve"]}
    assert int(good["state_bytes_4k"]) == state[4096] > state[1024], "one layer's cache grows"
    assert "[1]" in printed.out and "RecipeError" in printed.out
    assert cli.main([*command[:-1]]) == 2
    assert "done before" in capsys.readouterr().out
    assert list((folder / "attention.keep_softmax.layers=[1]").glob("*.safetensors")), "kept then, kept now"
    assert cli.main(["sweep", recipe, "--grid", "match.lr=1e-3", "--set", "match.clip=0.5"]) == 2
    assert "other settings of match" in capsys.readouterr().err
    assert cli.main(["sweep", recipe, "--grid", "match.lr=1e-3"]) == 0, "another grid of the same recipe"
    assert [(row["match.lr"], row["attention.keep_softmax.layers"]) for row in rows_of(folder)] == [
        ("0.001", "[]"), ("0.01", "[1]"), ("0.01", "[9]"),
    ]  # fmt: skip


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path, inputs, monkeypatch):
    recipe, seen = str(save_recipe(tmp_path, *inputs, **TINY)), []

    def meanwhile(variant, **_):
        with pytest.raises(LinearizeError, match="another sweep is running there"):
            sweep(recipe, grid=GRID[1:])
        seen.append(variant.output_folder.name)
        raise RuntimeError("far enough")

    monkeypatch.setattr(sweep_module, "convert", meanwhile)
    for _ in range(2):  # the lock is gone with the sweep that held it
        with pytest.raises(LinearizeError, match="1 of 1 variants failed"):
            sweep(recipe, grid=["match.lr=1e-3"])
    assert seen == ["match.lr=0.001"] * 2


def test_running_out_of_memory_is_a_failure_of_one_variant(tmp_path, inputs, monkeypatch):
    def too_large(recipe, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweep_module, "convert", too_large)
    with pytest.raises(LinearizeError, match=r"2 of 2 variants failed:\n.*lr=0.001: RuntimeError: out of memory"):
        sweep(str(save_recipe(tmp_path, *inputs, **TINY)), grid=GRID[1:])
    assert [row["error"] for row in rows_of(tmp_path / "out.sweep")] == ["RuntimeError: out of memory"] * 2
    record = tmp_path / "out.sweep" / "match.lr=0.001.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "minutes": 7.0}))
    with pytest.raises(LinearizeError):
        sweep(str(tmp_path / "recipe.yaml"), grid=GRID[1:])
    assert rows_of(tmp_path / "out.sweep")[0]["minutes"] == "7.0", "those of tries before count"


def test_figures_that_are_not_finite_are_left_open(swept):
    (folder, *_), name = swept, "attention.feature_map.dim=2,match.lr=0.001"
    report = load_report(folder / name)
    report["variants"][2]["far_nll_by_row"] = [None, 1.0]
    assert figures_of(report)["far_off_cost_percent"] is None
    report["variants"][1]["far_nll_by_row"], report["variants"][2]["far_nll_by_row"] = [1.0, 2.0], [1.5, 2.5]
    assert figures_of(report)["far_off_cost_percent"] == pytest.approx(100 * math.expm1(0.5))
    report["variants"][1]["far_nll_by_row"] = None
    assert figures_of(report)["far_off_cost_percent"] is None
    assert json.dumps(figures_of(report))
