"""finetune.train: layers. Float32 masters of a model's own weights, and the teacher that stays."""

import copy
import json

import pytest
import torch
from pico import attention, logits_of, make_model, make_tokens, randomise
from test_export import save_model, save_recipe, save_text
from test_train import LENGTH, make_data, run_train
from transformers import AutoModelForCausalLM

from linearize.architecture import linearize_
from linearize.convert import convert
from linearize.finetune import FinetuneStage
from linearize.recipe import FinetuneSettings, LossSettings, load_recipe
from linearize.trained_weights import TrainedWeights
from linearize.variants import teacher


def make_settings(*, steps=3, kl=1.0, lr=1e-3, **changes) -> FinetuneSettings:
    return FinetuneSettings(
        train="layers", tokens=steps * 4 * LENGTH, batch_tokens=4 * LENGTH, lr=lr, evaluate_every=1,
        loss=LossSettings(ce=1.0, kl=kl), **changes,
    )  # fmt: skip


def make_stage(name="llama", *, settings=None, gradient_checkpointing=False, **model):
    converted = linearize_(make_model(name, **model), attention())
    randomise(converted)
    TrainedWeights(converted)
    return FinetuneStage(converted, settings or make_settings(), gradient_checkpointing=gradient_checkpointing)


def make_batch(batch=3, length=LENGTH):
    tokens = make_tokens(batch, length)
    return {"input_ids": tokens, "labels": tokens.clone()}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_masters_get_the_gradients_of_the_weights_summed_over_micro_batches(gradient_checkpointing):
    stage, batches = make_stage(gradient_checkpointing=gradient_checkpointing), [make_batch(2), make_batch(3)]
    plain = copy.deepcopy(make_stage().model).requires_grad_(True).eval()  # without hooks: deepcopy drops them
    for batch in batches:
        stage.run(batch, scale=0.01, backward=True)
        log_p = plain(batch["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
        log_t = logits_of(make_model(), batch["input_ids"])[:, :-1].log_softmax(-1)
        ce = -log_p.gather(-1, batch["labels"][:, 1:, None]).sum()
        (0.01 * (ce + (log_t.exp() * (log_t - log_p)).sum())).backward()
    expected = dict(plain.named_parameters())
    names = {id(p): n for n, p in stage.model.named_parameters()}
    for weight, master in zip(stage.weights.weights, stage.weights.masters, strict=True):
        assert weight.grad is None
        torch.testing.assert_close(master.grad, expected[names[id(weight)]].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_layers_and_norms_train_and_embeddings_stay(name, tmp_path):
    stage = make_stage(name)
    before = {n: p.clone() for n, p in stage.model.named_parameters()}
    run_train(stage, tmp_path, settings=make_settings(), micro_batch=2)
    stage.refresh()
    same = {n for n, p in stage.model.named_parameters() if torch.equal(p, before[n])}
    frozen = {id(p) for p in stage.model.get_input_embeddings().parameters()}
    frozen |= {id(p) for p in stage.model.get_output_embeddings().parameters()}
    assert same == {n for n, p in stage.model.named_parameters() if id(p) in frozen} and same


def test_the_teacher_stays_the_original_and_the_trained_model_comes_back(tmp_path):
    stage, tokens = make_stage(dtype=torch.bfloat16), make_tokens(2, 40)
    original = logits_of(make_model(dtype=torch.bfloat16), tokens)
    run_train(stage, tmp_path, settings=make_settings(lr=1e-2))
    stage.refresh()
    trained = logits_of(stage.model.eval(), tokens)
    with teacher(stage.model):
        assert torch.equal(logits_of(stage.model, tokens), original)
    assert torch.equal(logits_of(stage.model, tokens), trained) and not torch.equal(trained, original)
    states = stage.teacher_states({"input_ids": tokens})
    assert torch.equal(stage.head(states), original[:, :-1])


def test_a_bfloat16_model_loses_no_small_update(tmp_path):
    """Updates far below the weights' last bit move them in the end; the model computes in bfloat16 all along."""
    stage = make_stage(dtype=torch.bfloat16, settings=make_settings(kl=0.0))
    before = [w.clone() for w in stage.weights.weights]
    assert {w.dtype for w in before} == {torch.bfloat16}
    assert {m.dtype for m in stage.weights.masters} == {torch.float32}
    optimizer = torch.optim.SGD(stage.weights.masters, lr=1.0)
    for _ in range(64):
        for master in stage.weights.masters:
            master.grad = master.detach() * 2**-12
        optimizer.step()
        stage.refresh()
    for weight, old in zip(stage.weights.weights, before, strict=True):
        torch.testing.assert_close(weight.float(), old.float() * (1 - 2**-12) ** 64, rtol=2**-8, atol=0)
        assert not torch.equal(weight, old)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path):
    results = []
    for folder, stop in (("whole", None), ("killed", 5)):
        (tmp_path / folder).mkdir()
        options = {"settings": make_settings(steps=6), "data": make_data(), "checkpoint_every": 2}
        if stop:
            stage, run = make_stage(), FinetuneStage.run
            steps = iter(range(stop))

            def interrupted(batch, *, scale, backward, stage=stage, run=run, steps=steps):
                if backward and next(steps, None) is None:
                    raise KeyboardInterrupt
                return run(stage, batch, scale=scale, backward=backward)

            stage.run = interrupted
            with pytest.raises(KeyboardInterrupt):
                run_train(stage, tmp_path / folder, **options)
        stage = make_stage()
        result = run_train(stage, tmp_path / folder, **options)
        stage.refresh()
        results.append((result, [p.clone() for p in stage.model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_convert_exports_the_trained_weights(tmp_path):
    changes = {
        "finetune.train": "layers", "finetune.lr": 1e-2, "evaluate.sequences": 2, "evaluate.sequence_length": 64,
        "evaluate.recall_distances": [16], "evaluate.key_recall_samples": 0, "match.tokens": 0,
    }  # fmt: skip
    recipe = save_recipe(tmp_path, save_model(tmp_path / "model"), save_text(tmp_path / "text.jsonl"), **changes)
    folder = convert(load_recipe(recipe))
    base, made = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "model", folder))
    changed = {n for n, w in base.items() if not torch.equal(w, made[n])}
    assert changed and not any("embed" in n or "lm_head" in n for n in changed)
    rows = {v["name"]: v["perplexity"] for v in json.loads((folder / "report.json").read_text())["variants"]}
    assert rows["teacher"] != rows["converted"]
