"""`linearize convert` from end to end: killed and resumed, on several processes, with bad input, and the plan."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import read_log, save_model, save_recipe, steps_of
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from linearize import cli, convert, errors, plan, shipped
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])


def environment(**more) -> dict:
    return {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(recipe, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "linearize.cli", "convert", str(recipe), *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(recipe, stage: str, step: int) -> None:
    """Runs the recipe until the log shows this step, and kills it there."""
    log = recipe.parent / "out.work" / "log.jsonl"
    process, deadline = start(recipe), time.monotonic() + 120
    while (stage, step) not in steps_of(log):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not any(r.get("done") and r["stage"] == stage for r in read_log(log)), "killed too late to tell anything"


# ------------------------------------------------------------------------------------------- resume, processes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, model, text):
    """The output folder of a run that nothing disturbed, in this process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return convert.convert(load_recipe(save_recipe(folder, model, text, **DROPOUT)))


DROPOUT = {"finetune.lora.dropout": 0.1, "finetune.loss.kl": 1.0}  # random numbers must resume too


def test_killed_in_each_stage_and_resumed_the_run_is_the_same(tmp_path, model, text, uninterrupted):
    recipe = save_recipe(tmp_path, model, text, **DROPOUT)
    kill_at(recipe, "match", 5)
    assert not (tmp_path / "out").exists()
    kill_at(recipe, "finetune", 5)
    assert not (tmp_path / "out").exists()
    process = start(recipe)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "match: done before" in output and "finetune: going on after step 3" in output
    expected, resumed = steps_of(uninterrupted / "log.jsonl"), steps_of(tmp_path / "out" / "log.jsonl")
    assert len(expected) == 16 and resumed == expected, "every loss, also of steps that were done twice, is the same"
    assert [s for s in expected.values() if len(s) != 1] == []
    weights, again = (load_file(f / "model.safetensors") for f in (uninterrupted, tmp_path / "out"))
    assert weights.keys() == again.keys() and all(torch.equal(weights[n], again[n]) for n in weights)
    assert not (tmp_path / "out.work").exists()


def test_a_finished_folder_is_kept_unless_forced(uninterrupted, tmp_path, capsys):
    recipe, before = uninterrupted.parent / "recipe.yaml", (uninterrupted / "log.jsonl").stat()
    assert cli.main(["convert", str(recipe)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (uninterrupted / "log.jsonl").stat() == before


@pytest.mark.parametrize("num_processes", [2])
def test_processes_give_the_losses_of_one(tmp_path, model, text, uninterrupted, num_processes):
    changes = {"finetune.loss.kl": 1.0, "run.micro_batch": 2}
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    convert.convert(load_recipe(save_recipe(one, model, text, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    recipe = save_recipe(several, model, text, **changes)
    command += ["--master_port", str(port), "-m", "linearize.cli", "convert", str(recipe)]
    result = subprocess.run(
        command, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    expected, actual = steps_of(one / "out" / "log.jsonl"), steps_of(several / "out" / "log.jsonl")
    assert expected.keys() == actual.keys()
    for step in expected:
        (a,), (b,) = expected[step], actual[step]
        assert a == pytest.approx(b, rel=1e-5, abs=2e-6), step
    names = [sorted(p.name for p in (f / "out").iterdir()) for f in (one, several)]
    assert names[0] == names[1]
    weights, again = (load_file(f / "out" / "model.safetensors") for f in (one, several))
    for name in weights:
        torch.testing.assert_close(weights[name], again[name], rtol=1e-3, atol=1e-4)
    assert not (several / "out.work").exists()


# -------------------------------------------------------------------------------------------------- bad input


def assert_refused(capsys, recipe, kind, *words, options=()):
    """Python raises the error; the command prints it without a traceback, exits with 2 and leaves nothing."""
    folder = recipe.parent
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(kind) as caught:
        convert.convert(load_recipe(recipe, options))
    assert type(caught.value) is kind
    assert cli.main(["convert", str(recipe), *[word for o in options for word in ("--set", o)]]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "error: " in error
    for word in words:
        assert word in str(caught.value) and word in error, str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before, "something half-written was left"


def test_models_that_are_not_there(tmp_path, model, text, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    recipe = save_recipe(tmp_path, model, text)
    for name, words in {
        "/nowhere/model": ["no such folder"],
        str(tmp_path / "empty"): ["no config.json"],
        "owner/model-that-is-not-here": ["owner/model-that-is-not-here", "does not load"],
        str(tmp_path / "text.gguf"): ["is not a GGUF file"],
        str(tmp_path / "cut.gguf"): ["does not load"],
        str(tmp_path / "missing.gguf"): ["no such file"],
        "package:package_that_is_not_here/model.gguf": ["package_that_is_not_here is not installed"],
        "package:numpy/nothing.gguf": ["nothing.gguf"],
    }.items():
        assert_refused(capsys, recipe, errors.ModelError, *words, options=[f"model.id={name}"])


def test_models_that_are_damaged(tmp_path, model, text, capsys):
    for name in ("weights", "missing", "tokenizer"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"12345678 not weights")
    weights = load_file(tmp_path / "missing" / "model.safetensors")
    weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "missing" / "model.safetensors", metadata={"format": "pt"})
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.unlink()
    recipe = save_recipe(tmp_path, model, text)
    for name, word in {"weights": "does not load", "missing": "q_proj", "tokenizer": "tokenizer"}.items():
        assert_refused(capsys, recipe, errors.ModelError, word, options=[f"model.id={tmp_path / name}"])


def test_an_architecture_that_cannot_be_converted(tmp_path, text, capsys):
    bloom = save_model(tmp_path / "bloom", model_type="bloom", n_layer=2, n_head=4)
    recipe = save_recipe(tmp_path, bloom, text)
    assert_refused(capsys, recipe, errors.ArchitectureError, "BloomForCausalLM cannot be converted", "Llama")


def test_text_that_does_not_do(tmp_path, model, text, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the old king")
    recipe = save_recipe(tmp_path, model, text)
    for name, word in {"empty": "empty", "short": "too short", "missing": "missing.txt"}.items():
        options = [f"data.source={tmp_path / name}.txt"]
        assert_refused(capsys, recipe, errors.DataError, word, options=options)


def test_settings_that_cannot_be(tmp_path, model, text, capsys):
    recipe = save_recipe(tmp_path, model, text)
    for option, word in {
        "attention.window=0": "must be at least 1, is 0",
        "attention.window=64": "with sinks it covers 66 tokens",
        "attention.feature_map.dim=0": "attention.feature_map.dim",
        "attention.keep_softmax.layers=[7]": "attention.keep_softmax.layers: layers [7]",
        "finetune.lora.targets=[q_proj, gate]": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    }.items():
        assert_refused(capsys, recipe, errors.RecipeError, word, options=[option])
    assert_refused(capsys, recipe, errors.TrainingError, "run.trackers: abacus", options=["run.trackers=[abacus]"])
    assert_refused(capsys, recipe, errors.ModelError, "device", options=["run.device=abacus"])


def test_an_output_folder_that_cannot_be(tmp_path, model, text, capsys):
    (tmp_path / "file").write_text("text")
    recipe = save_recipe(tmp_path, model, text)
    for name, word in {"file": "not a conversion of ours", "file/out": "could not be made"}.items():
        assert_refused(capsys, recipe, errors.ExportError, word, options=[f"output.folder={tmp_path / name}"])


def test_a_tokenizer_without_a_pad_token_will_do(tmp_path, text):
    model = save_model(tmp_path / "model", pad=None)
    changes = {"data.packing": False, "match.tokens": 384, "finetune.tokens": 384, "run.micro_batch": 2}
    assert convert.convert(load_recipe(save_recipe(tmp_path, model, text, **changes))).is_dir()


def test_a_run_resumes_only_with_the_settings_it_began_with(tmp_path, model, text, capsys, monkeypatch):
    recipe = save_recipe(tmp_path, model, text)

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert._Run, "finetune", interrupt)
        assert cli.main(["convert", str(recipe)]) == 130
    assert "give the same command again to resume" in capsys.readouterr().err
    work = tmp_path / "out.work"
    for options, word in {
        ("match.lr=0.5", "finetune.lora.rank=2"): "other settings of match",
        ("run.seed=7",): "other settings of run.seed",
    }.items():
        assert_refused(capsys, recipe, errors.TrainingError, word, "--force", options=options)
    (work / "finetune.pt").touch()  # until it has begun, finetuning may change
    assert_refused(
        capsys, recipe, errors.TrainingError, "other settings of finetune", "--force", options=["finetune.lora.rank=2"]
    )
    (work / "finetune.pt").unlink()
    assert (work / "match.pt").exists() and len(steps_of(work / "log.jsonl")) == 8
    folder = convert.convert(load_recipe(recipe, ["run.micro_batch=2", "run.checkpoint_every=2"]))
    assert len(steps_of(folder / "log.jsonl")) == 16


def test_the_report_card_is_kept_between_attempts_unless_its_settings_change(tmp_path, model, text, monkeypatch):
    report = {"evaluate.sequences": 2, "evaluate.sequence_length": 48, "evaluate.recall_distances": [8]}
    changes = {**report, "evaluate.key_recall_samples": 0, "match.tokens": 0, "finetune.tokens": 0}
    recipe = save_recipe(tmp_path, model, text, **changes)

    def interrupt(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert._Run, "export", interrupt)
        measured = []
        for options in ([], [], ["evaluate.sequences=1"]):
            with pytest.raises(KeyboardInterrupt):
                convert.convert(load_recipe(recipe, options))
            measured.append((tmp_path / "out.work" / "report" / "report.json").read_text())
    assert measured[0] == measured[1], "the speeds in it would differ, had it been measured again"
    assert [json.loads(m)["meta"]["num_rows"] for m in measured] == [2, 2, 1]


def test_tensorboard_is_written_beside_the_output(tmp_path, model, text):
    pytest.importorskip("tensorboard")
    changes = {"match.tokens": 384, "finetune.tokens": 384, "run.trackers": ["tensorboard"]}
    folder = convert.convert(load_recipe(save_recipe(tmp_path, model, text, **changes)))
    assert list((tmp_path / "out.logs").rglob("events.out.*")) and (folder / "config.json").exists()


# ---------------------------------------------------------------------------------------------------- the plan

GIVEN = dict(bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, **GIVEN,
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, **GIVEN,
    ),
    "mistralai/Mistral-7B-v0.3": MistralConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32768, sliding_window=None, **GIVEN,
    ),
    "Qwen/Qwen2.5-1.5B": Qwen2Config(
        num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **GIVEN,
    ),
    "SmolLM2-135M": LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, **GIVEN,
    ),
}  # fmt: skip
# recipe -> model, replaced layers, millions of parameters without the new ones (the models' own cards)
SHIPPED = {
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 16, 1235.8),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 32, 8030.3),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", 32, 7248.0),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", 28, 1543.7),
    "smollm2-135m-gpu": ("SmolLM2-135M", 30, 134.5),
    "quickstart": ("SmolLM2-135M", 30, 134.5),
    "default": ("SmolLM2-135M", 30, 134.5),
}


def test_every_shipped_recipe_is_known_here():
    assert sorted(SHIPPED) == [name for name, _ in shipped.list_recipes()]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_plan_of_a_shipped_recipe(name, monkeypatch):
    config_of, num_layers, millions = SHIPPED[name]
    # a copy: the converted model's config is another object, but from_config marks the one it is given
    monkeypatch.setattr(plan, "load_teacher_config", lambda settings: copy.deepcopy(CONFIGS[config_of]))
    recipe = load_recipe("owner/model" if name == "default" else name)
    if name not in ("default", "quickstart"):
        assert config_of in recipe.model.id
    model = plan.build_on_meta(recipe)
    layers, config = linear_attentions(model), CONFIGS[config_of]
    assert len(layers) == num_layers and all(p.device.type == "meta" for p in model.parameters())
    old = sum(p.numel() for n, p in model.named_parameters() if "linear_attn" not in n)
    assert old / 1e6 == pytest.approx(millions, abs=0.06)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, 4  # of taylor, by default
    size = config.hidden_size // heads
    new = (heads + kv_heads) * size * dim + kv_heads * size + heads * (size + 1)
    kept = Counter(layer for layer, _ in recipe.attention.keep_softmax.heads)  # which have no maps
    sizes = {i: sum(p.numel() for p in layer.parameters()) for i, layer in layers.items()}
    assert sizes == {i: new - kept[i] * new // kv_heads for i in layers}
    said = plan.plan(recipe)
    assert f"replaced     {num_layers} of {num_layers} layers: 0-{num_layers - 1}" in said
    keep = recipe.attention.keep_softmax
    assert not keep.count or keep.unit == "kv_head"
    new = new * num_layers - (keep.count + kept.total()) * new // kv_heads
    assert f"{(old + new) / 1e6:,.1f} M parameters, of which {new / 1e6:.2f} M new" in said
    assert "estimate" in said and "sequence_length: " in said


def test_dry_run_writes_nothing(tmp_path, model, text, capsys):
    recipe = save_recipe(tmp_path, model, text, **{"attention.keep_softmax.layers": [0]})
    assert cli.main(["convert", str(recipe), "--dry-run"]) == 0
    assert "replaced     1 of 2 layers: 1" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
