"""The memory that a plan foretells: what was measured, and what each setting must change."""

import copy

import pytest
import torch
from pico import convert, make_model
from test_convert import CONFIGS

from linearize import plan
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import FeatureMapSettings, load_recipe

ROWS_OF_16K = "run.micro_batch=8", "finetune.batch_tokens=16384"


def training_gib(monkeypatch, *changes, device="cuda", recipe="smollm2-135m-gpu"):
    monkeypatch.setattr(plan, "load_teacher_config", lambda settings: copy.deepcopy(CONFIGS["SmolLM2-135M"]))
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device(device))
    recipe = load_recipe(recipe, list(changes))
    model = plan.build_on_meta(recipe)
    return plan._training_bytes(recipe, model, linear_attentions(model)) / 2**30


def test_the_estimate_is_near_what_was_measured(monkeypatch):
    """Finetuning took 5.6 GiB, 12.6 and 27 in 8k, 16k and 32k tokens a forward pass, matching 1.6 in 64k."""
    assert 5.6 < training_gib(monkeypatch) < 1.25 * 5.6
    assert training_gib(monkeypatch, *ROWS_OF_16K) == pytest.approx(12.6, rel=0.15)
    larger = ["run.micro_batch=16", "finetune.batch_tokens=65536"]
    assert training_gib(monkeypatch, *larger) == pytest.approx(27, rel=0.15)
    assert training_gib(monkeypatch, "finetune.tokens=0") == pytest.approx(1.6, rel=0.15)


@pytest.mark.parametrize(
    "name, dim, expected",
    [("taylor", "null", 4), ("hedgehog", "null", 64), ("hedgehog", 8, 8), ("equal_window", "null", 4)],
)
def test_a_maps_dimension_is_its_own_unless_it_is_set(monkeypatch, name, dim, expected):
    """SmolLM2's heads have 64 dimensions. The baseline is as wide as the bytes of the Taylor map's default."""
    monkeypatch.setattr(plan, "load_teacher_config", lambda settings: copy.deepcopy(CONFIGS["SmolLM2-135M"]))
    changes = [f"attention.feature_map.name={name}", f"attention.feature_map.dim={dim}", "run.device=cpu"]
    recipe = load_recipe("smollm2-135m-gpu", changes)
    model = plan.build_on_meta(recipe)
    assert model.config.linear_attention["map_dim"] == expected
    said = plan.plan(recipe)
    assert f"    dim: {dim}  # " in said
    assert name == "equal_window" or f"{name} map of dimension {expected}\n" in said


def test_a_default_map_is_no_wider_than_the_heads():
    model = convert(make_model("llama", num_hidden_layers=2), name="hedgehog", dim=None)
    layer = linear_attentions(model)[0]
    assert layer.q_map.shape[1:] == layer.k_map.shape[1:] == (layer.head_dim, layer.head_dim)
    assert layer.head_dim < 64 == FeatureMapSettings(name="hedgehog").width(128)


def test_logits_are_never_whole(monkeypatch):
    """Twice the tokens: twice the activations, and the same logits."""
    steps = "finetune.batch_tokens=16384"
    once, twice = (training_gib(monkeypatch, steps, f"run.micro_batch={rows}") for rows in (4, 8))
    logits = 6 * plan.LOSS_CHUNK * 49152 * 2 / 2**30
    weights = 2 * 134.7e6 / 2**30
    assert twice - weights - logits == pytest.approx(2 * (once - weights - logits), rel=1e-2)


def test_checkpointing_takes_less_and_all_weights_take_more(monkeypatch):
    lora = training_gib(monkeypatch, *ROWS_OF_16K)
    assert training_gib(monkeypatch, *ROWS_OF_16K, "run.gradient_checkpointing=true") < lora / 5
    layers = training_gib(monkeypatch, *ROWS_OF_16K, "finetune.train=layers")
    assert layers - lora == pytest.approx(16 * (134.7e6 - 49152 * 576) / 2**30, rel=1e-2)
    assert training_gib(monkeypatch, *ROWS_OF_16K, device="cpu") > 1.5 * lora
