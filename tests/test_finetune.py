"""Finetuning: where LoRA goes, what the losses are, the teacher inside, checkpointing, packing, merging."""

import json

import pytest
import torch
from pico import ARCHITECTURES, attention, logits_of, make_model, make_tokens, randomise, relative_error
from test_train import LENGTH, make_data, make_loop, run_train

from linearize.architecture import linearize_
from linearize.convert import _merge
from linearize.errors import RecipeError, TrainingError
from linearize.finetune import FinetuneStage, add_lora, output_head, projection_names, token_losses
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import FinetuneSettings, LoraSettings, LossSettings

ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_settings(*, ce=1.0, kl=0.0, maps_lr=1e-3, lr=1e-2, targets=ALL, steps=3, dropout=0.0) -> FinetuneSettings:
    return FinetuneSettings(
        tokens=steps * 4 * LENGTH, batch_tokens=4 * LENGTH, lr=lr, maps_lr=maps_lr, evaluate_every=steps,
        lora=LoraSettings(rank=4, targets=list(targets), dropout=dropout), loss=LossSettings(ce=ce, kl=kl),
    )  # fmt: skip


def make_stage(settings=None, *, name="llama", keep_softmax=(), lora_noise=0.0, gradient_checkpointing=False, **model):
    """A tiny converted model under LoRA; `lora_noise` makes the adapters, which begin at 0, do something."""
    settings = settings or make_settings()
    converted = linearize_(make_model(name, **model), attention(keep_softmax=keep_softmax))
    randomise(converted)
    torch.manual_seed(0)
    wrapped = add_lora(converted, settings.lora)
    stage = FinetuneStage(wrapped, settings, gradient_checkpointing=gradient_checkpointing)
    with torch.no_grad():
        for parameter in stage.groups[0].parameters:
            parameter.add_(lora_noise * torch.randn_like(parameter))
    return stage


def make_batch(batch=3, length=LENGTH):
    tokens = make_tokens(batch, length)
    return {"input_ids": tokens, "labels": tokens.clone()}


def adapted(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


# ------------------------------------------------------------------------------------------------ where LoRA goes


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "down_proj"]])
def test_lora_is_on_every_target_of_the_replaced_layers_and_nowhere_else(targets):
    stage = make_stage(make_settings(targets=targets), num_hidden_layers=8, keep_softmax=[1, 5])
    part = {"down_proj": "mlp"}
    expected = {f"model.layers.{i}.{part.get(t, 'self_attn')}.{t}" for i in (0, 2, 3, 4, 6, 7) for t in targets}
    assert adapted(stage.model) == expected
    assert len(stage.groups[0].parameters) == 2 * len(expected)
    trained = {n for n, p in stage.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or ".linear_attn." in n for n in trained)


def test_fused_projections_of_phi3():
    stage = make_stage(make_settings(targets=["qkv_proj", "o_proj"]), name="phi3")
    assert adapted(stage.model) == {f"model.layers.{i}.self_attn.{t}" for i in (0, 1) for t in ("qkv_proj", "o_proj")}
    figures = stage.run(make_batch(), scale=1.0, backward=True)
    assert figures["loss"].isfinite() and all(p.grad is not None for p in stage.groups[0].parameters)


def test_gpt2s_transposed_projections():
    stage = make_stage(make_settings(targets=["c_attn"]), name="gpt2", lora_noise=0.2)
    assert adapted(stage.model) == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}
    tokens = make_tokens(2, 40)
    before = logits_of(stage.model.eval(), tokens)
    assert relative_error(logits_of(_merge(stage.model), tokens), before) < 1e-5


def test_a_name_that_no_layer_has_lists_those_there_are():
    model = linearize_(make_model("phi3"), attention())
    with pytest.raises(RecipeError, match="finetune.lora.targets: q_proj, v_proj not in model.layers.0") as caught:
        projection_names(model, ["q_proj", "v_proj", "o_proj"])
    assert "down_proj, gate_up_proj, o_proj, qkv_proj" in str(caught.value)


def test_a_name_that_one_layer_lacks_is_an_error():
    model = linearize_(make_model("llama", num_hidden_layers=3), attention(keep_softmax=[0]))
    model.model.layers[2].self_attn.query = model.model.layers[2].self_attn.q_proj
    del model.model.layers[2].self_attn.q_proj
    with pytest.raises(RecipeError, match="q_proj not in model.layers.2"):
        projection_names(model, ["q_proj"])
    with pytest.raises(RecipeError, match="query not in model.layers.1"):
        projection_names(model, ["query"])


# ----------------------------------------------------------------------------------------------------- the losses


def test_losses_equal_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 300, 17, generator=generator) for _ in range(2))
    logits.requires_grad_()
    labels = torch.randint(17, (2, 300), generator=generator)
    labels[0, :40] = labels[1, 250:] = -100
    loss, ce, kl = token_losses(logits, labels, teacher, weights=(0.3, 0.7))
    seen = labels != -100
    p, t = logits.softmax(-1), teacher.softmax(-1)
    direct_ce = -p[seen].log().gather(1, labels[seen][:, None]).sum()
    direct_kl = (t * (t.log() - p.log())).sum(-1)[seen].sum()
    torch.testing.assert_close((ce, kl), (direct_ce, direct_kl), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * kl)
    assert not ce.requires_grad and not kl.requires_grad
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    gradient = gradient / 2
    (expected,) = torch.autograd.grad(0.3 * direct_ce + 0.7 * direct_kl, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert token_losses(teacher, labels, teacher)[2].item() == pytest.approx(0, abs=1e-3)


def test_the_stage_weighs_ce_and_kl_of_the_models_logits():
    stage, batch = make_stage(make_settings(ce=0.25, kl=2.0), lora_noise=0.1), make_batch()
    teacher = logits_of(make_model(), batch["input_ids"])[:, :-1].log_softmax(-1)
    figures = stage.run(batch, scale=1 / stage.num_terms(batch), backward=False)
    model = logits_of(stage.model.eval(), batch["input_ids"])[:, :-1].log_softmax(-1)
    ce = torch.nn.functional.nll_loss(model.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    kl = (teacher.exp() * (teacher - model)).sum(-1).mean().item()
    assert ce > 0.1 and kl > 0.1
    assert {n: v.item() for n, v in figures.items()} == pytest.approx(
        {"loss": 0.25 * ce + 2 * kl, "ce": ce, "kl": kl}, rel=1e-4
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_needs_its_logits_whole(name):
    assert output_head(linearize_(make_model(name), attention())) is not None


def test_a_head_that_does_more_is_not_guessed():
    """A model whose logits are made in a way that is not known here keeps to its own."""
    model = linearize_(make_model("llama"), attention())

    def double(module, args, kwargs, output):
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(double, with_kwargs=True)
    assert output_head(model) is None


@pytest.mark.parametrize("name", ["llama", "mixtral", "granite", "cohere", "gemma2", "gpt2"])
def test_losses_from_parts_of_the_states_are_those_of_whole_logits(name, monkeypatch):
    """Scaled and capped logits (Granite, Cohere, Gemma 2) too."""
    monkeypatch.setattr("linearize.finetune.LOSS_CHUNK", 7)
    target = "c_proj" if name == "gpt2" else "o_proj"
    stage, batch = make_stage(make_settings(ce=1.0, kl=1.0, targets=[target]), name=name, lora_noise=0.1), make_batch()
    assert stage.head is not None
    parameters = [p for g in stage.groups for p in g.parameters]
    torch.manual_seed(0)  # GPT-2 drops some
    split, gradients = stage.run(batch, scale=0.1, backward=True), []
    for parameter in parameters:
        gradients.append(parameter.grad)
        parameter.grad = None
    monkeypatch.setattr(stage, "head", None)
    monkeypatch.setattr("linearize.finetune.LOSS_CHUNK", 10**6)
    torch.manual_seed(0)
    whole = stage.run(batch, scale=0.1, backward=True)
    assert {n: v.item() for n, v in split.items()} == pytest.approx({n: v.item() for n, v in whole.items()}, rel=1e-4)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-3


def test_the_teacher_inside_is_the_original_model_also_after_training(tmp_path):
    tokens = make_batch()["input_ids"]
    original = logits_of(make_model(), tokens)[:, :-1]
    stage = make_stage(make_settings(kl=1.0), lora_noise=0.1)
    assert torch.equal(stage.head(stage.teacher_states({"input_ids": tokens})), original)
    before = [p.clone() for group in stage.groups for p in group.parameters]
    result = run_train(stage, tmp_path, settings=make_settings(kl=1.0))
    assert result.num_steps == 3
    trained = torch.load(tmp_path / "finetune.pt", weights_only=True)["parameters"]
    assert not any(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    for parameter, value in zip((p for g in stage.groups for p in g.parameters), trained, strict=True):
        parameter.data.copy_(value)
    assert torch.equal(stage.head(stage.teacher_states({"input_ids": tokens})), original)
    assert all(p.requires_grad for g in stage.groups for p in g.parameters), "switching adapters froze nothing"


@pytest.mark.parametrize("maps_lr", [0.0, 1e-2])
def test_maps_train_along_unless_their_rate_is_zero(tmp_path, maps_lr):
    stage = make_stage(make_settings(maps_lr=maps_lr))
    maps = [p for layer in linear_attentions(stage.model).values() for p in layer.parameters()]
    before = [p.clone() for p in maps]
    assert [group.name for group in stage.groups] == (["lora", "maps"] if maps_lr else ["lora"])
    loop = make_loop(stage, tmp_path, settings=make_settings(maps_lr=maps_lr))
    loop.train_step(loop.log.progress("finetune", start=0, total=1))
    changed = [not torch.equal(p, b) for p, b in zip(maps, before, strict=True)]
    assert all(changed) if maps_lr else not any(changed)
    assert all(p.grad is None for p in maps) or maps_lr


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(name):
    batch, seen = make_batch(), []
    for checkpointing in (False, True):
        stage = make_stage(make_settings(kl=0.5), name=name, lora_noise=0.1, gradient_checkpointing=checkpointing)
        passes = []
        first = next(iter(linear_attentions(stage.model).values()))
        first.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        figures = stage.run(batch, scale=0.01, backward=True)
        gradients = [p.grad for g in stage.groups for p in g.parameters]
        seen.append((figures, gradients, len(passes)))
    assert [passes for *_, passes in seen] == [1, 2], "with checkpointing the forward pass is done again"
    assert seen[0][0] == seen[1][0]
    for a, b in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_packed_documents_are_trained_as_if_apart():
    stage = make_stage(make_settings(kl=1.0), lora_noise=0.1)
    documents, lengths = make_tokens(3, 24), (24, 15, 19)
    apart, num_terms = [], 0
    for tokens, length in zip(documents, lengths, strict=True):
        batch = {"input_ids": tokens[None, :length], "labels": tokens[None, :length]}
        num_terms += stage.num_terms(batch)
        apart.append(stage.run(batch, scale=1.0, backward=True))
    gradients = [p.grad.clone() for g in stage.groups for p in g.parameters]
    for parameter in (p for g in stage.groups for p in g.parameters):
        parameter.grad = None
    row = torch.cat([t[:n] for t, n in zip(documents, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": row, "position_ids": positions, "labels": torch.where(positions == 0, -100, row)}
    assert stage.num_terms(packed) == num_terms
    together = stage.run(packed, scale=1.0, backward=True)
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(figures[name].item() for figures in apart), rel=1e-5)
    for parameter, gradient in zip((p for g in stage.groups for p in g.parameters), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_no_figure_and_no_gradient(tmp_path, packing):
    data, seen = make_data(packing=packing), []
    for micro_batch in (1, 2, 4):
        stage = make_stage(make_settings(kl=0.5), lora_noise=0.1)
        loop = make_loop(stage, tmp_path, data=data, settings=make_settings(kl=0.5), micro_batch=micro_batch)
        seen.append((loop.run_batches(data.train, [3, 0, 5, 1], backward=True), [p.grad for p in loop.parameters]))
    for figures, gradients in seen[1:]:
        assert figures == pytest.approx(seen[0][0], rel=1e-5)
        for gradient, expected in zip(gradients, seen[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_dropout_follows_from_the_step(tmp_path):
    """What is dropped does not depend on how often random numbers were asked for before."""
    losses = []
    for asked in (0, 3):
        settings = make_settings(dropout=0.5)
        stage = make_stage(settings, lora_noise=0.1)
        (tmp_path / str(asked)).mkdir()
        torch.rand(asked)
        run_train(stage, tmp_path / str(asked), settings=settings)
        log = (tmp_path / str(asked) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in log])
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_a_loss_that_is_not_finite_stops(tmp_path):
    stage = make_stage()
    stage.groups[0].parameters[0].data[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="finetune, step 0: not finite: held-out ce, held-out loss"):
        run_train(stage, tmp_path, settings=make_settings())


# -------------------------------------------------------------------------------------------------------- merging


def test_the_merged_model_is_the_trained_one():
    stage, tokens = make_stage(lora_noise=0.2), make_tokens(2, 40)
    model = stage.model.eval()
    before = logits_of(model, tokens)
    with model.disable_adapter():
        assert (logits_of(model, tokens) - before).abs().max() > 0.1, "the adapters do something"
    merged = _merge(model)
    assert not adapted(merged) and not any("lora" in name for name in merged.state_dict())
    assert relative_error(logits_of(merged, tokens), before) < 1e-5


def test_a_bfloat16_model_trains_float32_parameters_by_bfloat16_products():
    """LoRA and maps are float32 and get gradients; LoRA's products run in bfloat16; the loss is near float32's."""
    losses, batch = {}, make_batch()
    for dtype in (torch.float32, torch.bfloat16):
        stage = make_stage(dtype=dtype, lora_noise=0.2)
        seen = []
        lora = next(m for name, m in stage.model.named_modules() if name.endswith("q_proj.lora_A.default"))
        lora.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        losses[dtype] = stage.run(batch, scale=1 / stage.num_terms(batch), backward=True)["loss"].item()
        assert seen == [dtype]
        for parameter in (p for g in stage.groups for p in g.parameters):
            assert parameter.dtype == torch.float32 and parameter.grad.abs().max() > 0
    assert losses[torch.bfloat16] != losses[torch.float32]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=2e-2)


def test_a_bfloat16_model_merges_in_float32():
    stage = make_stage(dtype=torch.bfloat16, lora_noise=0.2)
    projection = stage.model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
    a, b = (projection.lora_A["default"].weight, projection.lora_B["default"].weight)
    assert a.dtype == b.dtype == torch.float32
    weight = projection.base_layer.weight
    expected = (weight.double() + projection.scaling["default"] * (b.double() @ a.double())).bfloat16()
    naive = weight + (projection.scaling["default"] * (b.bfloat16() @ a.bfloat16()))
    merged = _merge(stage.model).model.layers[1].self_attn.k_proj.weight
    assert merged.dtype == torch.bfloat16 and not torch.equal(naive, merged)
    assert (merged != expected).sum() <= 1, "one rounding, at the end"
