"""The memory that a plan foretells: what was measured, and what each setting must change."""

import copy

import pytest
import torch
from test_convert import CONFIGS

from linearize import plan
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import load_recipe


def training_gib(monkeypatch, *changes, device="cuda", recipe="smollm2-135m-gpu"):
    monkeypatch.setattr(plan, "load_teacher_config", lambda settings: copy.deepcopy(CONFIGS["SmolLM2-135M"]))
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device(device))
    recipe = load_recipe(recipe, list(changes))
    model = plan.build_on_meta(recipe)
    return plan._training_bytes(recipe, model, linear_attentions(model)) / 2**30


def test_the_estimate_is_near_what_was_measured(monkeypatch):
    """On one H100 finetuning took 27 GiB and matching 1.6, in 32k and 64k tokens a forward pass."""
    assert training_gib(monkeypatch) == pytest.approx(27, rel=0.15)
    assert training_gib(monkeypatch, "finetune.tokens=0") == pytest.approx(1.6, rel=0.15)


def test_logits_are_never_whole(monkeypatch):
    """Twice the tokens: twice the activations, and the same logits."""
    once, twice = (training_gib(monkeypatch, f"run.micro_batch={rows}") for rows in (8, 16))
    logits = 6 * plan.LOSS_CHUNK * 49152 * 2 / 2**30
    weights = 2 * 134.7e6 / 2**30
    assert twice - weights - logits == pytest.approx(2 * (once - weights - logits), rel=1e-2)


def test_checkpointing_takes_less_and_all_weights_take_more(monkeypatch):
    lora = training_gib(monkeypatch)
    assert training_gib(monkeypatch, "run.gradient_checkpointing=true") < lora / 5
    layers = training_gib(monkeypatch, "finetune.train=layers")
    assert layers - lora == pytest.approx(16 * (134.7e6 - 49152 * 576) / 2**30, rel=1e-2)
    assert training_gib(monkeypatch, device="cpu") > 1.5 * lora
