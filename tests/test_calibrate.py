"""Calibration: closed-form starting values that beat window + sinks before any gradient step."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.architecture import linearize_
from linearize.calibrate import GATE_OFF, calibrate
from linearize.match import MatchStage, relative_error
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import AttentionSettings, FeatureMapSettings, MatchSettings
from linearize.variants import ablated_attention, softmax_attention


def make_model(*, layers=2, attention=None, scale=3.0):
    """A random Llama with attention sharp enough to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(scale * 10)
    settings = attention or AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4))
    return linearize_(model, settings)


def output_errors(model, tokens, **ablation):
    """Relative error of every layer's output, teacher-forced."""
    errors = {}

    def observer(module, q, k, v, out, *, scaling, softcap, sink_logits, **_):
        predicted, _ = module.linear_attn(q, k, v, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
        errors[module.layer_idx] = relative_error(predicted, out.transpose(1, 2)).mean().item()

    with torch.no_grad(), ablated_attention(model, **ablation), softmax_attention(model):
        model(tokens, use_cache=False, observer=observer)
    return errors


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("name", ["taylor", "hedgehog"])
def test_no_layer_starts_worse_than_window_and_sinks(name, per):
    feature_map = FeatureMapSettings(name=name, dim=4, per=per)
    model = make_model(attention=AttentionSettings(window=6, sinks=2, feature_map=feature_map))
    tokens = torch.randint(64, (6, 80), generator=torch.Generator().manual_seed(1))
    random = output_errors(model, tokens)
    report = calibrate(model, {"input_ids": tokens})
    calibrated, window = output_errors(model, tokens), output_errors(model, tokens, far=False)
    for index in report:
        assert window[index] > 1e-3, "nothing to win: the far term carries no weight in this model"
        assert calibrated[index] <= window[index] * (1 + 1e-5)
        assert random[index] > calibrated[index]
    fresh = torch.randint(64, (6, 80), generator=torch.Generator().manual_seed(2))
    calibrated, window = output_errors(model, fresh), output_errors(model, fresh, far=False)
    assert sum(calibrated.values()) < sum(window.values())


def test_the_report_says_what_the_layer_does():
    """Its errors are those of the layer itself, run by the reference attention."""
    model = make_model()
    tokens = torch.randint(64, (4, 50), generator=torch.Generator().manual_seed(1))
    report = calibrate(model, {"input_ids": tokens})
    powers = {}

    def observer(module, q, k, v, out, *, scaling, **_):
        predicted, _ = module.linear_attn(q, k, v, scaling=scaling)
        out = out.transpose(1, 2)
        powers[module.layer_idx] = ((predicted - out).square().sum() / out.square().sum()).item()

    with torch.no_grad(), softmax_attention(model):
        model(tokens, use_cache=False, observer=observer)
    for index, figures in report.items():
        assert figures["error"] == pytest.approx(powers[index], rel=1e-3)


def test_packed_documents_and_padding_are_respected():
    """Documents side by side calibrate as the same documents apart; padding changes nothing."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(64, (1, 40), generator=generator), torch.randint(64, (1, 40), generator=generator)
    packed, apart, padded = make_model(), make_model(), make_model()
    positions = torch.cat([torch.arange(40), torch.arange(40)])[None]
    calibrate(packed, {"input_ids": torch.cat([a, b], 1), "position_ids": positions})
    calibrate(apart, {"input_ids": torch.cat([a, b], 0)})
    rows = torch.cat([torch.cat([a, b], 0), torch.full((2, 7), 5)], 1)
    mask = (torch.arange(47) < 40).long().expand(2, -1)
    calibrate(padded, {"input_ids": rows, "attention_mask": mask})
    for other in (packed, padded):
        for mine, theirs in zip(linear_attentions(other).values(), linear_attentions(apart).values(), strict=True):
            torch.testing.assert_close(mine.gate_weight, theirs.gate_weight, rtol=2e-2, atol=2e-3)
            torch.testing.assert_close(mine.key_center, theirs.key_center, rtol=1e-3, atol=1e-4)


def test_text_within_the_window_leaves_the_layer_alone():
    model = make_model()
    before = {i: layer.gate_bias.clone() for i, layer in linear_attentions(model).items()}
    report = calibrate(model, {"input_ids": torch.arange(6)[None]})
    for index, layer in linear_attentions(model).items():
        assert torch.equal(layer.gate_bias, before[index])
        assert report[index]["error"] == pytest.approx(0, abs=1e-8)
    assert GATE_OFF < -20


def test_one_matching_step_lowers_every_layers_error():
    model = make_model()
    tokens = torch.randint(64, (4, 60), generator=torch.Generator().manual_seed(3))
    calibrate(model, {"input_ids": tokens})
    stage = MatchStage(model, MatchSettings(lr=1e-3))
    before = stage.run({"input_ids": tokens}, scale=1 / 4, backward=True)
    for parameter in (p for g in stage.groups for p in g.parameters):
        parameter.data -= 1e-4 * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
    after = stage.run({"input_ids": tokens}, scale=1 / 4, backward=False)
    assert len(before) == 3 and all(after[name] < before[name] for name in before)


def test_gradients_of_matching_reach_every_parameter_and_no_weight_of_the_model():
    settings = AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4), decay=True)
    model = make_model(attention=settings)
    stage = MatchStage(model, MatchSettings(lr=1e-3))
    stage.run({"input_ids": torch.randint(64, (2, 60))}, scale=1.0, backward=True)
    for layer in linear_attentions(model).values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for n, p in model.named_parameters() if "linear_attn" not in n)
