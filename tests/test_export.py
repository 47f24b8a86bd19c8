"""The exported folder: the same logits again, everything that belongs in it, and all of it or nothing.

Also the tiny model, text and recipe that the tests of whole conversions start from.
"""

import errno
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from pico import VOCABULARY, make_model, make_tokens
from pico import convert as convert_pico
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from linearize import export as export_module
from linearize import modeling_linearized
from linearize.convert import convert
from linearize.errors import ExportError
from linearize.export import check_free, export
from linearize.loading import load
from linearize.model_card import model_card
from linearize.recipe import load_recipe
from linearize_eval.report_text import write_number

SPECIAL = ["<s>", "</s>", "<pad>"]
WORDS = "the a one old new king town river runs sees takes gives red blue slow to from and of in".split()
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def make_tokenizer(*, pad="<pad>", chat_template=None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, 259 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)
    fast.chat_template = chat_template
    return fast


def save_model(folder: Path, *, model_type="llama", layers=2, dtype=torch.float32, pad="<pad>", chat_template=None,
               **settings) -> Path:  # fmt: skip
    """A random model of width 32 with its tokenizer, attention sharp enough that the far term matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{
            "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2, **settings,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.7
    )
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(pad=pad, chat_template=chat_template).save_pretrained(folder)
    return folder


def save_text(path: Path, *, documents=60, words=40) -> Path:
    """Documents of random sentences, one a line of JSON."""
    choose = random.Random(0)
    lines = [json.dumps({"text": " ".join(choose.choices(WORDS, k=words))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_recipe(folder: Path, model, text, **changes) -> Path:
    """recipe.yaml: 8 steps of matching and 8 of finetuning, no report card."""
    settings = {
        "model.id": str(model), "attention.window": 8, "attention.sinks": 2, "attention.feature_map.dim": 4,
        "data.source": str(text), "data.sequence_length": 48, "data.held_out": 4, "calibrate.sequences": 2,
        "run.checkpoint_every": 3, "run.device": "cpu", "evaluate.sequences": 0, "output.folder": str(folder / "out"),
    }  # fmt: skip
    for stage in ("match", "finetune"):
        settings |= {f"{stage}.tokens": 1536, f"{stage}.batch_tokens": 192, f"{stage}.evaluate_every": 2}
    sections: dict = {}
    for name, value in {**settings, **changes}.items():
        *path, last = name.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")  # JSON is YAML
    return path


def read_log(path: Path) -> list[dict]:
    """Records of a log, the line that is being written left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(path: Path) -> dict[tuple, set]:
    """(stage, step) -> the different (loss, gradient norm, layers) that were logged for it."""
    steps: dict[tuple, set] = {}
    for record in read_log(path):
        if "grad_norm" in record:
            figures = (record["loss"], record["grad_norm"], *record.get("layers", ()))
            steps.setdefault((record["stage"], record["step"]), set()).add(figures)
    return steps


SHORT = {"match.tokens": 384, "finetune.tokens": 384}  # two steps each
REPORT = {
    "evaluate.sequences": 2, "evaluate.sequence_length": 48, "evaluate.recall_distances": [8],
    "evaluate.key_recall_samples": 0,
}  # fmt: skip
CALIBRATED_ONLY = {"match.tokens": 0, "finetune.tokens": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), chat_template=CHAT)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model_folder, text):
    """A finished conversion with a report card."""
    return convert(load_recipe(save_recipe(tmp_path_factory.mktemp("run"), model_folder, text, **SHORT, **REPORT)))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def export_pico(model, folder, **options):
    export(model, make_tokenizer(), folder, **{"dtype": "auto", "files": {"README.md": "about"}, **options})


# ---------------------------------------------------------------------------------------- what the folder holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloads_bit_identical_in_every_way(tmp_path, dtype):
    model, tokens = convert_pico(make_model(dtype=dtype)), make_tokens(2, 40)
    export_pico(model, tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        load(tmp_path / "out", dtype=name, device="cpu")[0],
    ):
        assert again.dtype == dtype and type(again) is type(model)
        assert torch.equal(logits(again.eval(), tokens), logits(model, tokens))


def test_the_folder_is_complete(converted, model_folder):
    names = {path.name for path in converted.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "recipe.yaml", "README.md", "report.json", "report.png", "log.jsonl", "modeling_linearized.py",
    }  # fmt: skip
    before, after = AutoTokenizer.from_pretrained(model_folder), AutoTokenizer.from_pretrained(converted)
    assert after.chat_template == CHAT and after.get_vocab() == before.get_vocab()
    assert after("the old king").input_ids == before("the old king").input_ids
    before, after = (GenerationConfig.from_pretrained(f).to_diff_dict() for f in (model_folder, converted))
    assert after == before and after["temperature"] == 0.7
    assert sorted(p.name for p in converted.parent.iterdir()) == ["out", "recipe.yaml"], "nothing is left beside it"


def test_the_model_card_has_the_reports_figures(converted):
    card, report = (converted / "README.md").read_text(), json.loads((converted / "report.json").read_text())
    assert [v["name"] for v in report["variants"]] == [
        "teacher", "converted", "far term off", "window off", "window + sinks"
    ]  # fmt: skip
    for variant in report["variants"]:
        assert f"{write_number(variant['perplexity'])}" in card, variant["name"]
    done = {r["stage"]: r for r in read_log(converted / "log.jsonl") if r.get("done")}
    for stage in ("match", "finetune"):
        assert f"- {stage}: 384 tokens in 2 steps, held-out loss {done[stage]['first_error']:.4g} before" in card
    assert (converted / "recipe.yaml").read_text() in card
    spec = json.loads((converted / "config.json").read_text())["linear_attention"]
    assert f"linear attention (taylor, dimension {spec['map_dim']}) on everything between" in card
    recipe = load_recipe(converted / "recipe.yaml", ["attention.sinks=0"])
    cards = card, model_card(recipe, [], None, window=spec["window"], map_dim=spec["map_dim"])
    assert [f"newest {spec['window']}\ntokens and the first " in x for x in cards] == [True, False]


def test_the_recipe_in_the_folder_reproduces_it(converted, tmp_path):
    recipe = load_recipe(converted / "recipe.yaml")
    assert recipe == load_recipe(converted.parent / "recipe.yaml")
    again = convert(load_recipe(converted / "recipe.yaml", [f"output.folder={tmp_path / 'again'}"]))
    assert steps_of(again / "log.jsonl") == steps_of(converted / "log.jsonl")
    weights, expected = (load_file(f / "model.safetensors") for f in (again, converted))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_output_dtype_casts_the_weights_and_not_the_linear_attention(tmp_path, model_folder, text):
    changes = {**CALIBRATED_ONLY, "output.dtype": "bfloat16"}
    folder = convert(load_recipe(save_recipe(tmp_path, model_folder, text, **changes)))
    dtypes = {".linear_attn." in name: w.dtype for name, w in load_file(folder / "model.safetensors").items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert "None: calibrated only." in (folder / "README.md").read_text()
    assert load(folder, device="cpu")[0].dtype == torch.float32, "auto on a CPU"


# ------------------------------------------------------------------------------------------------ all or nothing


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(model, folder, **_):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["copying", "weights"])
def test_a_full_disk_leaves_nothing_and_can_be_resumed(tmp_path, model_folder, text, monkeypatch, where):
    recipe = load_recipe(save_recipe(tmp_path, model_folder, text, **SHORT))
    with monkeypatch.context() as patch:
        if where == "copying":
            patch.setattr(export_module.shutil, "copyfile", full_disk)
        else:
            cls = modeling_linearized.LinearizedLlamaForCausalLM
            patch.setattr(cls, "save_pretrained", full_disk_in_safetensors, raising=False)
        with pytest.raises(ExportError, match="No space left on device.*give the same command again"):
            convert(recipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.work", "recipe.yaml"]
    before = steps_of(tmp_path / "out.work" / "log.jsonl")
    folder = convert(recipe)
    assert steps_of(folder / "log.jsonl") == before, "no step was done again"
    assert len([r for r in read_log(folder / "log.jsonl") if "grad_norm" in r]) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_folder_that_loads_to_another_model_is_not_left(tmp_path, monkeypatch):
    model, write = convert_pico(make_model()), export_module._write

    def write_and_change(model, *args):
        write(model, *args)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.01)

    monkeypatch.setattr(export_module, "_write", write_and_change)
    with pytest.raises(ExportError, match="loads to another model: logits differ by up to"):
        export_pico(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_change_of_the_far_term_alone_is_found(tmp_path, monkeypatch):
    model, write = convert_pico(make_model()), export_module._write

    def write_and_change(model, *args):
        write(model, *args)
        with torch.no_grad():
            model.model.layers[1].self_attn.linear_attn.gate_bias.add_(0.1)

    monkeypatch.setattr(export_module, "_write", write_and_change)
    with pytest.raises(ExportError, match="loads to another model"):
        export_pico(model, tmp_path / "out")


def test_a_folder_that_does_not_load_is_not_left(tmp_path, monkeypatch):
    write = export_module._write

    def write_and_break(model, tokenizer, folder, *args):
        write(model, tokenizer, folder, *args)
        (folder / "model.safetensors").unlink()
        other = convert_pico(make_model(num_hidden_layers=1))
        other.save_pretrained(folder / "other")
        shutil.copyfile(folder / "other" / "model.safetensors", folder / "model.safetensors")

    monkeypatch.setattr(export_module, "_write", write_and_break)
    with pytest.raises(ExportError, match="does not load again.*missing keys"):
        export_pico(convert_pico(make_model()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_finished_folders_need_force_and_foreign_ones_are_never_touched(tmp_path):
    model, folder = convert_pico(make_model()), tmp_path / "out"
    folder.mkdir()
    check_free(folder, force=False)  # an empty folder is free
    export_pico(model, folder)
    with pytest.raises(ExportError, match="finished conversion.*--force"):
        check_free(folder, force=False)
    check_free(folder, force=True)
    export_pico(model, folder, files={"README.md": "newer"})
    assert (folder / "README.md").read_text() == "newer"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    teacher, damaged, file = tmp_path / "teacher", tmp_path / "damaged", tmp_path / "file"
    make_model().save_pretrained(teacher)
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    file.write_text("text")
    for path in (foreign, teacher, damaged, file):
        for force in (False, True):
            with pytest.raises(ExportError, match="not a conversion of ours"):
                check_free(path, force=force)


def test_force_replaces_the_folder_and_starts_over(tmp_path, model_folder, text):
    recipe = load_recipe(save_recipe(tmp_path, model_folder, text, **CALIBRATED_ONLY))
    folder = convert(recipe)
    config = json.loads((folder / "config.json").read_text())
    other = load_recipe(tmp_path / "recipe.yaml", ["attention.window=6"])
    with pytest.raises(ExportError, match="--force"):
        convert(other)
    assert json.loads((folder / "config.json").read_text()) == config
    convert(other, force=True)
    assert json.loads((folder / "config.json").read_text())["linear_attention"]["window"] == 6
    assert VOCABULARY < config["vocab_size"]
