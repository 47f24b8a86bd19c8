"""Which models of transformers can be converted, and that each then is exact; which are refused, and why."""

import copy
import functools

import pytest
import torch
import transformers
from pico import (
    ARCHITECTURES,
    WINDOW,
    attention,
    check_generation,
    convert,
    logits_in_pieces,
    logits_of,
    make_model,
    make_tokens,
    pad,
    relative_error,
)
from transformers import AutoModelForCausalLM

from linearize import linearized_cache
from linearize.architecture import linearize_, probe
from linearize.errors import ArchitectureError, ModelError, RecipeError
from linearize.modeling_linearized import TEACHER, LinearizedAttentionMixin, attention_modules

LENGTH = 24
NAMES = sorted(ARCHITECTURES)
VARIANTS = ["all", "mixed"]


@functools.cache
def base_model(name):
    """Shared by the tests of this file: copied before anything is done to it."""
    return make_model(name)


@functools.cache
def converted(name, variant):
    """Window 5 and 2 sinks; `mixed` keeps the last full-attention layer as it is. Shared, never changed."""
    shapes, _ = probe(base_model(name))
    full = sorted(i for i, shape in shapes.items() if shape.sliding_window is None)
    return convert(copy.deepcopy(base_model(name)), keep_softmax=full[-1:] if variant == "mixed" else [])


@pytest.mark.parametrize("name", NAMES)
def test_base_logits_where_the_window_covers_the_text(name):
    tokens, base = make_tokens(2, LENGTH), base_model(name)
    expected = logits_of(base, tokens)
    model = convert(copy.deepcopy(base), window=LENGTH, sinks=0)
    assert relative_error(logits_of(model, tokens), expected) < 1e-5
    rows = [make_tokens(1, length, seed=length)[0] for length in (5, 11)]
    ids, mask = pad(rows)
    padded = logits_of(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for i, row in enumerate(rows):
        assert relative_error(padded[i, -len(row) :], logits_of(base, row[None])[0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_inside_is_the_base_model(name):
    tokens = make_tokens(2, LENGTH)
    model = copy.deepcopy(converted(name, "all"))
    model.config._attn_implementation = TEACHER
    assert torch.equal(logits_of(model, tokens), logits_of(base_model(name), tokens))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_generation_of_a_left_padded_batch(name, variant):
    model = converted(name, variant)
    tokens = make_tokens(2, LENGTH)
    changed = relative_error(logits_of(model, tokens), logits_of(base_model(name), tokens))
    assert changed > 0.03, "the far term does nothing, so that this test says nothing"
    rows = [make_tokens(1, length, seed=length)[0] for length in (2, 9, 17)]
    ids, mask = pad(rows)
    generated = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    check_generation(model, rows, generated)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_pieces_through_the_cache(name, variant):
    model, tokens = converted(name, variant), make_tokens(2, LENGTH)
    whole = logits_of(model, tokens)
    assert relative_error(logits_in_pieces(model, tokens, [1]), whole) < 1e-5
    assert relative_error(logits_in_pieces(model, tokens, [7, 2, 1, 11, 3]), whole) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, variant, tmp_path):
    model, tokens = converted(name, variant), make_tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    implementation = base_model(name).config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert type(loaded) is type(model)
    assert loaded.config.linear_attention == model.config.linear_attention
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_kept_layers_run_as_in_the_base_model(name):
    """Their masks and, on the same hidden states, their outputs are those of the base model, to the bit."""
    base, model = base_model(name), converted(name, "mixed")
    ids, mask = pad([make_tokens(1, length, seed=length)[0] for length in (7, 16)])
    inside = {index: m for index, m in attention_modules(model).items() if not _is_converted(m)}
    assert inside
    originals = attention_modules(base)
    expected_masks = _record(base, originals, ids, mask)
    for index, (args, kwargs, output) in _record(model, inside, ids, mask).items():
        for extra in ("linear_context", "past_key_values", "layer_past"):
            kwargs.pop(extra, None)
        with torch.no_grad():
            assert torch.equal(originals[index](*args, **kwargs)[0], output[0])
        expected = expected_masks[index][1].get("attention_mask")
        assert (expected is None) == (kwargs.get("attention_mask") is None)
        assert expected is None or torch.equal(kwargs["attention_mask"], expected)


def _is_converted(module):
    return isinstance(module, LinearizedAttentionMixin)


def _record(model, modules, ids, mask):
    """layer index -> (args, kwargs, output) of these attention modules in one forward pass."""
    calls, handles = {}, []
    for index, module in modules.items():

        def hook(module, args, kwargs, output, index=index):
            calls[index] = (args, dict(kwargs), output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    logits_of(model, ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_kept_layers_in_the_implementation_asked_for(implementation, tmp_path):
    tokens = make_tokens(2, LENGTH)
    converted("llama", "mixed").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert attention_modules(model)[1].config._attn_implementation == implementation
    expected = logits_of(converted("llama", "mixed"), tokens)
    assert relative_error(logits_of(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("settings", [
    dict(per="query_head"), dict(name="hedgehog"), dict(sinks=0), dict(window=1), dict(decay=False),
], ids=str)  # fmt: skip
def test_settings(settings, tmp_path):
    model, tokens = convert(make_model("llama"), **settings), make_tokens(2, LENGTH)
    whole = logits_of(model, tokens)
    assert relative_error(logits_in_pieces(model, tokens, [7, 1, 1, 6, 1]), whole) < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), whole)


# ---------------------------------------------------------------------------------------- what is refused

_LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    moe_intermediate_size=16,
)  # fmt: skip
_SHARED = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, head_dim=8, sliding_window=6, altup_num_inputs=2,
    laurel_rank=4, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
    activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
_BESIDE = dict(
    mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
    head_dim=8,
)  # fmt: skip
REFUSED = {
    "falcon": ({}, "declares no attention layers"),
    "bloom": ({}, "declares no attention layers"),
    "mamba": ({}, "declares no attention layers"),
    "stablelm": ({}, "drops the keyword arguments"),
    "nemotron": ({}, "drops the keyword arguments"),
    "deepseek_v2": (dict(_LATENT, head_dim=4), "keys are 12 wide and values 8"),
    "deepseek_v3": (_LATENT, "keys are 12 wide and values 8"),
    "gemma3n_text": (_SHARED, r"layers \[2, 3\] do not each have a cache of their own"),
    "falcon_h1": (_BESIDE, r"layers \[0, 1\] do not each have a cache of their own|drops the keyword"),
    "bart": (dict(is_decoder=True, d_model=32, decoder_layers=2), "layer 0 has more than one attention"),
    "diffllama": ({}, "layer 0 has more than one attention"),
    "doge": ({}, "logits differ from the base model's"),
    "mistral": (dict(sliding_window=8), "no layer is left to convert: .* 2 use a sliding window already"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_architectures_that_are_refused(name):
    settings, reason = REFUSED[name]
    with pytest.raises(ArchitectureError, match=reason):
        linearize_(make_model(name, **settings), attention())


@pytest.mark.parametrize(("keep_softmax", "error", "reason"), [
    ([2], RecipeError, r"layers \[2\] are not full-attention layers .* Those are \[0, 1\]"),
    ([0, 1], ArchitectureError, "no layer is left to convert: .* keeps 2"),
])  # fmt: skip
def test_kept_layers_that_cannot_be(keep_softmax, error, reason):
    with pytest.raises(error, match=reason):
        linearize_(make_model("llama"), attention(keep_softmax=keep_softmax))


def test_a_sliding_layer_cannot_be_kept():
    with pytest.raises(RecipeError, match=r"layers \[0\] .* Those are \[1, 3\]; layers \[0, 2\] already use"):
        linearize_(make_model("gemma2"), attention(keep_softmax=[0]))


def test_models_that_are_not_causal_language_models():
    with pytest.raises(ArchitectureError, match="LlamaModel is not a decoder with a language modelling head"):
        linearize_(make_model("llama").model, attention())
    t5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ArchitectureError, match="T5ForConditionalGeneration is not a decoder"):
        linearize_(transformers.T5ForConditionalGeneration(t5), attention())

    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        """Custom code, of which nothing is known."""

    with pytest.raises(ArchitectureError, match="of transformers itself"):
        linearize_(LlamaForCausalLM(make_model("llama").config), attention())


def test_a_converted_model_is_not_converted_again():
    with pytest.raises(ModelError, match="is converted already"):
        linearize_(copy.deepcopy(converted("llama", "all")), attention())


def test_a_model_spread_over_devices_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    device_map["model.rotary_emb"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ModelError, match="device_map"):
        linearize_(model, attention())


def test_a_cache_that_loses_the_past_is_noticed(monkeypatch):
    def forgetful(self, linear_attn, q, k, v, **options):
        self.num_seen += q.shape[2]
        return linear_attn(q, k, v, **options)[0]

    monkeypatch.setattr(linearized_cache.LinearizedCacheLayer, "attend", forgetful)
    with pytest.raises(ArchitectureError, match="through a cache the logits differ"):
        linearize_(make_model("llama"), attention(window=64))


def test_a_refused_short_text_does_not_depend_on_the_window():
    """The check against the base model says something even where the window is a single token."""
    with pytest.raises(ArchitectureError, match="logits differ from the base model's"):
        linearize_(make_model("doge"), attention(window=1, sinks=0))


def test_converting_changes_no_weight_of_the_base_model():
    base = base_model("llama")
    model = copy.deepcopy(base)
    assert linearize_(model, attention(window=WINDOW)) is model
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.state_dict().items())
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "linear_attn" in name)
