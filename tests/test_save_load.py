"""Saved folders: they load to the same logits with and without linearize, or fail loudly; and peft."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from pico import (
    convert,
    logits_in_pieces,
    logits_of,
    make_model,
    make_tokens,
    pad,
    relative_error,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
import linearize_kernels
from linearize import modeling_linearized
from linearize.modeling_linearized import LinearizedAttentionMixin, attention_modules, linear_attentions

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
CODE = {
    "modeling_linearized.py": linearize,
    "linear_attention.py": linearize,
    "linearized_cache.py": linearize,
    "softmax_heads.py": linearize,
    "reference.py": linearize_kernels,
    "feature_maps.py": linearize_kernels,
    "state.py": linearize_kernels,
}


@functools.cache
def converted():
    """A llama of three layers, of which the middle one is kept in softmax. Never changed."""
    return convert(make_model("llama", num_hidden_layers=3), keep_softmax=[1])


@pytest.fixture
def folder(tmp_path):
    converted().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------------------------- what is in the folder


def test_config_json(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "linearized" and config["base_model_type"] == "llama"
    assert config["architectures"] == ["LinearizedLlamaForCausalLM"]
    assert config["hidden_size"] == 32 and config["linear_attention"]["layers"] == [0, 2]
    assert not [key for key in config if key.startswith("_") or "implementation" in key]
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded).__name__ == "LinearizedLlamaConfig" and loaded.model_type == "linearized"
    assert converted().config.model_type == "linearized"  # in memory as well


def test_code_files_are_the_packages_own(folder):
    assert {path.name for path in folder.glob("*.py")} == set(CODE)
    for name, package in CODE.items():
        assert (folder / name).read_bytes() == (Path(package.__file__).parent / name).read_bytes(), name


def test_code_files_are_saved_by_the_main_process_alone(tmp_path):
    converted().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


# -------------------------------------------------------------------------------------- loading, unharmed


def test_sharded(tmp_path):
    converted().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), make_tokens()
    assert torch.equal(logits_of(loaded, tokens), logits_of(converted(), tokens))


def test_bfloat16(folder, tmp_path):
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), make_tokens()
    for index, linear_attn in linear_attentions(model).items():
        original = linear_attentions(converted())[index].state_dict()
        assert all(torch.equal(tensor, original[n]) for n, tensor in linear_attn.state_dict().items())
    model.save_pretrained(tmp_path / "bf16")
    dtypes = {n: t.dtype for n, t in load_file(tmp_path / "bf16" / "model.safetensors").items()}
    assert {d for n, d in dtypes.items() if "linear_attn" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "linear_attn" not in n} == {torch.bfloat16}
    for dtype in ("auto", torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=dtype)
        assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_loaded_from_disk_and_tied(tmp_path):
    """As users have it: the base model comes from a folder, has tied embeddings and is in bfloat16."""
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model, tokens = convert(base), make_tokens()
    model.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


def test_experts_of_a_model_loaded_from_disk(tmp_path):
    """transformers joins the experts' weights under other names when it loads them, and undoes it to save."""
    make_model("mixtral").save_pretrained(tmp_path / "base")
    model, tokens = convert(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), make_tokens()
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
        loaded.save_pretrained(tmp_path / "model")


def test_offloaded_to_disk(folder, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "disk")
    tokens = make_tokens()
    assert torch.equal(logits_of(loaded, tokens), logits_of(converted(), tokens))
    assert relative_error(logits_in_pieces(loaded, tokens, [7, 1]), logits_of(converted(), tokens)) < 1e-5


def test_generation_settings_are_kept(tmp_path):
    model = copy.deepcopy(converted())
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.repetition_penalty == 1.25


def test_a_base_model_that_transformers_does_not_know(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_type": "llama99"}))
    with pytest.raises(ValueError, match="has no 'llama99': install a newer one"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_no_upload_without_the_code(tmp_path):
    with pytest.raises(ValueError, match=r"call model.push_to_hub\(...\) instead"):
        converted().save_pretrained(tmp_path, push_to_hub=True)


def test_installed_code_wins_over_the_folders(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__ == "linearize.modeling_linearized"
    assert isinstance(loaded, modeling_linearized.LinearizedMixin)


# -------------------------------------------------------------------------------------- without linearize

_PROLOGUE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("linearize", "linearize_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, inputs, result = sys.argv[1:]
"""


def run_without_linearize(script, *arguments, tmp_path):
    """A fresh interpreter that cannot import linearize or linearize_kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROLOGUE + script, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def test_without_linearize_but_with_trusted_code(folder, tmp_path):
    rows = [make_tokens(1, length, seed=length)[0] for length in (3, 11, 18)]
    ids, mask = pad(rows)
    options = dict(do_sample=False, max_new_tokens=10)
    torch.save({"tokens": make_tokens(2, 100), "ids": ids, "mask": mask, "options": options}, tmp_path / "inputs")
    done = run_without_linearize(
        """
x = torch.load(inputs)
out = {}
for name in (folder, result + "_again"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        logits = model(input_ids=x["tokens"], use_cache=False).logits
    generated = model.generate(input_ids=x["ids"], attention_mask=x["mask"], **x["options"])
    out[name] = logits, generated, type(model.model.layers[0].self_attn).__name__
    model.save_pretrained(result + "_again")
assert not any(m.partition(".")[0].startswith("linearize") for m in sys.modules)
torch.save(out, result)
""",
        folder,
        tmp_path / "inputs",
        tmp_path / "result",
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = logits_of(converted(), make_tokens(2, 100))
    tokens = converted().generate(input_ids=ids, attention_mask=mask, **options)
    results = torch.load(tmp_path / "result")
    assert len(results) == 2
    for logits, generated, attention in results.values():
        assert attention == "LinearizedLlamaAttention"
        assert torch.equal(logits, expected)
        assert torch.equal(generated, tokens)
    again = tmp_path / "result_again"
    for name in CODE:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    loaded = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(logits_of(loaded, make_tokens(2, 100)), expected)


def test_without_linearize_and_without_trust(folder, tmp_path):
    done = run_without_linearize("AutoModelForCausalLM.from_pretrained(folder)", folder, "", "", tmp_path=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr or "does not recognize this architecture" in done.stderr
    for path in folder.glob("*.py"):  # a folder that lost its code
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    done = run_without_linearize(
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        folder,
        "",
        "",
        tmp_path=tmp_path,
    )
    assert done.returncode != 0 and "linearized" in done.stderr


# -------------------------------------------------------------------------------- weights that do not fit

KEY = "model.layers.2.self_attn.linear_attn.k_map"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda w: w.pop(KEY), f"1 missing keys, for example {KEY}"),
    (lambda w: w.pop("model.norm.weight"), "1 missing keys, for example model.norm.weight"),
    (lambda w: w.update({KEY + "_old": torch.ones(2)}), f"1 unexpected keys, for example {KEY}_old"),
    (lambda w: w.update({KEY: torch.ones(2, 8, 5)}), f"1 mismatched keys, for example .*{KEY}.*5.*4"),
], ids=["missing", "base weight missing", "unexpected", "wrong shape"])  # fmt: skip
def test_weights_that_do_not_fit(folder, damage, message):
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, **options)


# --------------------------------------------------------------------------------------------------- peft


def with_lora():
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=PROJECTIONS, modules_to_save=["linear_attn"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(converted()), config)


def train(model, steps=3):
    """A few large steps; the parameters that they moved, by name, and the losses."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-2)
    tokens, losses = make_tokens(4, 32, seed=1), []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name for name, p in trainable.items() if not torch.equal(p, before[name])}, losses


def test_lora(folder, tmp_path):
    model, tokens = with_lora().train(), make_tokens()
    moved, losses = train(model)
    assert losses[-1] < losses[0]
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == wanted, f"not trained: {wanted - moved}"
    assert len([name for name in wanted if "linear_attn" in name]) == 2 * 6
    assert all(torch.isfinite(p).all() for p in model.parameters())
    expected = logits_of(model.eval(), tokens)
    assert relative_error(expected, logits_of(converted(), tokens)) > 0.05

    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, tokens), expected)
    ids, mask = pad([make_tokens(1, length, seed=length)[0] for length in (3, 11)])
    options = dict(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    assert torch.equal(loaded.generate(**options), model.generate(**options))
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))

    merged = model.merge_and_unload()
    assert relative_error(logits_of(merged, tokens), expected) < 1e-5
    assert [isinstance(m, LinearizedAttentionMixin) for m in attention_modules(merged).values()] == [
        True,
        False,
        True,
    ]
    assert type(merged).__name__ == "LinearizedLlamaForCausalLM"
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, tokens), logits_of(merged, tokens))


def test_an_adapter_folder_loads_by_itself(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=PROJECTIONS, modules_to_save=["linear_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    train(model, steps=1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded.eval(), make_tokens()), logits_of(model.eval(), make_tokens()))


def test_the_adapter_of_a_bfloat16_model_trains_in_float32(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=PROJECTIONS, modules_to_save=["linear_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    moved, _ = train(model, steps=1)
    assert any("linear_attn" in name for name in moved)
