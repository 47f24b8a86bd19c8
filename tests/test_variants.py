"""The teacher and the ablations that a report card compares, and the bytes that make a comparison fair."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.architecture import linearize_
from linearize.finetune import add_lora
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import AttentionSettings, FeatureMapSettings, LoraSettings
from linearize.variants import ablated_attention, equal_window, report_variants, softmax_attention

TOKENS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))


def make_models(**attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
    settings = AttentionSettings(**{"window": 6, "sinks": 2, "feature_map": FeatureMapSettings(dim=4), **attention})
    return base, linearize_(copy.deepcopy(base), settings)


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def window_logits(base, window, sinks):
    """The base model under a window-and-sinks mask, by transformers' own softmax."""
    i, j = torch.arange(40)[:, None], torch.arange(40)
    mask = (j <= i) & ((i - j < window) | (j < sinks))
    with torch.no_grad():
        return base(TOKENS, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits


def test_the_teacher_is_the_base_model_bit_for_bit():
    base, model = make_models()
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    with softmax_attention(model):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("window,sinks", [(6, 2), (11, 2), (3, 0)])
def test_far_term_off_is_softmax_under_a_window_mask(window, sinks):
    base, model = make_models()
    expected = window_logits(base, window, sinks)
    with ablated_attention(model, far=False, window=window, sinks=sinks):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_no_feature_map_is_softmax_under_a_window_mask(tmp_path):
    """The baseline as a model of its own: no far term, next to no state but the window, the same when reloaded."""
    base, model = make_models(feature_map=FeatureMapSettings(name="none"))
    torch.testing.assert_close(logits(model), window_logits(base, 6, 2), rtol=1e-4, atol=1e-5)
    layer = next(iter(linear_attentions(model).values()))
    assert layer.state_bytes(dtype_bytes=4) < 1.5 * layer.token_bytes(dtype_bytes=4) * (5 + 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    with_cache = model(TOKENS[:, :30], use_cache=True).logits
    torch.testing.assert_close(with_cache, logits(model)[:, :30], rtol=1e-4, atol=1e-5)


def test_window_off_leaves_the_far_term_alone():
    """Every token, the newest included, then weighs as the series says; the gate cancels."""
    _, model = make_models()
    with ablated_attention(model, window=0, sinks=0):
        before = logits(model)
        for layer in linear_attentions(model).values():
            layer.gate_bias.data += 5.0
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_models_are_as_before_afterwards_even_after_an_error():
    _, model = make_models()
    before = logits(model)
    for context in (softmax_attention(model), ablated_attention(model, far=False, window=0, sinks=0)):
        with pytest.raises(KeyError), context:
            assert not torch.equal(logits(model), before)
            raise KeyError
        assert torch.equal(logits(model), before)


def test_rows_of_the_report_card_are_what_they_are_called():
    """Of a model with LoRA: teacher and untrained window know nothing of it, the others do."""
    base, model = make_models()
    model = add_lora(model, LoraSettings(rank=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    window = equal_window(linear_attentions(model).values(), dtype_bytes=4)
    expected = {"teacher": logits(base), "converted": logits(model)}
    with ablated_attention(model, far=False):
        expected["far term off"] = logits(model)
    with ablated_attention(model, window=0, sinks=0):
        expected["window off"] = logits(model)
    expected["window + sinks"] = window_logits(base, window, 2)
    variants, notes = report_variants(model)
    assert list(variants) == list(expected) and f"window {window} + 2 sinks" in notes["window + sinks"]
    for name, variant in variants.items():
        with variant():
            got = logits(model)
        errors = {other: (got - x).norm() / x.norm() for other, x in expected.items()}
        assert errors.pop(name) < 1e-5 and min(errors.values()) > 1e-2, name


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("name", ["taylor", "hedgehog"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_the_state(per, name, dtype):
    _, model = make_models(feature_map=FeatureMapSettings(name=name, dim=4, per=per))
    model = model.to(dtype)
    cache = model.make_cache()
    with torch.no_grad():
        model(TOKENS, past_key_values=cache, use_cache=True)
    for index, layer in linear_attentions(model).items():
        state = cache.layers[index].state
        bookkeeping = state.ring_valid.nbytes + state.length.nbytes
        assert state.num_bytes() - bookkeeping == TOKENS.shape[0] * layer.state_bytes(dtype_bytes=dtype.itemsize)


@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_equal_window_is_the_smallest_that_costs_no_less(dtype_bytes):
    _, model = make_models()
    layers = linear_attentions(model).values()
    window = equal_window(layers, dtype_bytes=dtype_bytes)
    converted = sum(layer.state_bytes(dtype_bytes=dtype_bytes) for layer in layers)

    def kept(window):
        return sum(2 * x.num_kv_heads * x.head_dim * dtype_bytes * (window - 1 + x.sinks) for x in layers)

    assert kept(window) >= converted > kept(window - 1)
