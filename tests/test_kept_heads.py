"""Single kv heads kept in softmax inside converted layers: exact in every mode, nothing stored for them but their keys.

B batch, T time, G kv heads
"""

import copy
import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import (
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
from safetensors.torch import load_file
from test_save_load import run_without_linearize
from transformers import AutoModelForCausalLM

from linearize.architecture import linearize_
from linearize.calibrate import calibrate
from linearize.errors import RecipeError
from linearize.linear_attention import LinearAttention
from linearize.match import MatchStage
from linearize.modeling_linearized import LinearizedAttentionMixin, attention_modules, linear_attentions
from linearize.recipe import MatchSettings
from linearize.variants import softmax_attention

# name -> (architecture, settings of it, what is kept); llama and the others have 2 kv heads of 2 query heads each
MODELS = {
    "gqa": ("llama", {}, dict(heads=[(0, 1), (1, 0)])),
    "mha": ("llama", dict(num_key_value_heads=4), dict(heads=[(0, 0), (0, 2), (1, 3)])),
    "one layer": ("llama", {}, dict(heads=[(1, 1)])),
    "beside a kept layer": ("llama", dict(num_hidden_layers=3), dict(keep_softmax=[1], heads=[(2, 0)])),
    "map a query head": ("llama", {}, dict(heads=[(0, 1), (1, 0)], per="query_head")),
    "eager": ("llama", dict(attn_implementation="eager"), dict(heads=[(0, 1), (1, 0)])),
    "softcap": ("gemma2", {}, dict(heads=[(1, 1), (3, 0)])),
    "sink logits": ("gpt_oss", {}, dict(heads=[(1, 0), (3, 1)])),
    "sliding": ("gemma3", {}, dict(heads=[(1, 0)])),
}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def base_model(name):
    architecture, settings, _ = MODELS[name]
    return make_model(architecture, **settings)


@functools.cache
def converted(name):
    """Never changed."""
    return convert(copy.deepcopy(base_model(name)), **MODELS[name][2])


def rows_of(*lengths):
    return [make_tokens(1, length, seed=length)[0] for length in lengths]


@every_model
def test_it_is_neither_the_base_model_nor_all_linear(name):
    tokens, model = make_tokens(2, 24), copy.deepcopy(converted(name))
    architecture, settings, kept = MODELS[name]
    linear_only = convert(make_model(architecture, **settings), **{**kept, "heads": ()})
    for mine, theirs in zip(linear_attentions(model).values(), linear_attentions(linear_only).values(), strict=True):
        mine.load_state_dict({n: mine.heads.linear_part(p, dim=0)[0] for n, p in theirs.state_dict().items()})
    logits = logits_of(model, tokens)
    assert relative_error(logits, logits_of(base_model(name), tokens)) > 0.02
    assert relative_error(logits, logits_of(linear_only, tokens)) > 0.02


@every_model
def test_base_logits_where_the_window_covers_the_text(name):
    base, tokens = base_model(name), make_tokens(2, 24)
    model = convert(copy.deepcopy(base), **MODELS[name][2], window=24, sinks=0)
    assert relative_error(logits_of(model, tokens), logits_of(base, tokens)) < 1e-5


@every_model
@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 12, 3)], ids=str)
def test_pieces_give_what_one_pass_gives(name, sizes):
    tokens = make_tokens(2, 40)
    assert relative_error(logits_in_pieces(converted(name), tokens, sizes), logits_of(converted(name), tokens)) < 1e-5


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    rows = rows_of(3, 11, 29)
    ids, mask = pad(rows, side=side)
    padded = logits_of(converted(name), ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for i, row in enumerate(rows):
        assert relative_error(padded[i, mask[i].bool()], logits_of(converted(name), row[None])[0]) < 1e-5


@every_model
@pytest.mark.parametrize("settings", [{}, dict(prefill_chunk_size=5)], ids=["", "prefill in chunks"])
def test_generation_of_a_left_padded_batch(name, settings):
    ids, mask = pad(rows_of(3, 11, 18))
    generated = converted(name).generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=14, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    check_generation(converted(name), rows_of(3, 11, 18), generated)


@pytest.mark.parametrize("name", ["gqa", "mha", "eager", "softcap"])
def test_packed_documents_do_not_see_each_other(name):
    rows = rows_of(9, 1, 17)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = logits_of(converted(name), torch.cat(rows)[None], position_ids=position_ids)[0]
    for row, logits in zip(rows, packed.split([9, 1, 17]), strict=True):
        assert relative_error(logits, logits_of(converted(name), row[None])[0]) < 1e-5


# ----------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", ["gqa", "mha", "beside a kept layer"])
def test_only_the_kept_heads_grow(name):
    model = converted(name)
    cache, sizes = model.make_cache(), []
    with torch.no_grad():
        for length in (30, 20):
            model(input_ids=make_tokens(2, length), past_key_values=cache)
            sizes.append({i: cache.layers[i].num_bytes() for i in linear_attentions(model)})
    for index, linear in linear_attentions(model).items():
        growth = len(linear.heads.kept) * 2 * linear.head_dim * 4
        assert sizes[1][index] - sizes[0][index] == 2 * 20 * growth
        flags = 2 * (WINDOW - 1 + 8)
        assert sizes[1][index] == 2 * (linear.state_bytes(dtype_bytes=4) + 50 * growth) + flags
        linear_heads = linear.heads.num_kv_heads - len(linear.heads.kept)
        assert linear.token_bytes(dtype_bytes=4) == 2 * linear_heads * linear.head_dim * 4


@pytest.mark.parametrize("name", ["gqa", "mha", "sink logits"])
def test_beams_reorder_the_kept_heads_too(name):
    ids, mask = pad(rows_of(3, 11, 18))
    outputs = [
        converted(name).generate(input_ids=ids, attention_mask=mask, num_beams=4, max_new_tokens=12, use_cache=c)
        for c in (True, False)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("operation", ["repeat", "select", "reset", "crop", "offload"])
def test_the_cache_operations_reach_the_kept_heads(operation):
    model, tokens = converted("gqa"), make_tokens(3, 30)
    cache, more, past = model.make_cache(), make_tokens(3, 6, seed=9), tokens
    cache.activate_past_recording()
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
        if operation == "repeat":
            cache.batch_repeat_interleave(2)
            past, more = tokens.repeat_interleave(2, 0), make_tokens(6, 6, seed=9)
        elif operation == "select":
            cache.batch_select_indices(torch.tensor([2, 0]))
            past, more = tokens[[2, 0]], more[:2]
        elif operation == "reset":
            cache.reset()
            past = tokens[:, :0]
        elif operation == "crop":
            cache.crop(-4)
            past = tokens[:, :-4]
        else:
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
        out = model(input_ids=more, past_key_values=cache).logits
    assert cache.get_seq_length() == past.shape[1] + 6
    assert relative_error(out, logits_of(model, torch.cat([past, more], 1))[:, -6:]) < 1e-5


def test_assisted_decoding():
    model, prompt = converted("gqa"), make_tokens(1, 20, seed=3)
    prompt = torch.cat([prompt, prompt[:, 4:12]], 1)
    plain = model.generate(prompt, do_sample=False, max_new_tokens=30)
    assisted = model.generate(
        prompt, do_sample=False, max_new_tokens=30, prompt_lookup_num_tokens=4, max_matching_ngram_size=1
    )
    assert torch.equal(plain, assisted)


# ------------------------------------------------------------------------------- parameters, files, training


@pytest.mark.parametrize("name", ["gqa", "mha", "map a query head"])
def test_kept_heads_own_no_parameters(name):
    for linear in linear_attentions(converted(name)).values():
        left = linear.heads.num_kv_heads - len(linear.heads.kept)
        ratio = linear.heads.num_heads // linear.heads.num_kv_heads
        assert linear.q_map.shape[0] == linear.gate_bias.shape[0] == left * ratio
        assert linear.k_map.shape[0] == left * (ratio if "query" in name else 1)


@pytest.mark.parametrize("name", ["gqa", "beside a kept layer", "sink logits"])
def test_a_saved_model_gives_the_same_logits(name, tmp_path):
    model, tokens = converted(name), make_tokens(2, 40)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    stated = json.loads((tmp_path / "config.json").read_text())["linear_attention"]
    kept = {(i, h) for i, heads in zip(stated["layers"], stated["kept_heads"], strict=True) for h in heads}
    assert kept == set(MODELS[name][2]["heads"])
    stored = sum(w.numel() for n, w in load_file(tmp_path / "model.safetensors").items() if ".linear_attn." in n)
    assert stored == sum(p.numel() for linear in linear_attentions(model).values() for p in linear.parameters())


def test_a_folder_from_before_heads_could_be_kept_loads(tmp_path):
    model = convert(make_model("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["linear_attention"]["kept_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = make_tokens()
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path), tokens), logits_of(model, tokens))


def test_a_folder_with_other_kept_heads_than_weights_is_refused(tmp_path):
    converted("one layer").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linear_attention"]["kept_heads"] = [[], []]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mismatched keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_loads_without_linearize(tmp_path):
    model, tokens = converted("gqa"), make_tokens(2, 40)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens")
    script = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokens, cache = torch.load(inputs), model.make_cache()
with torch.no_grad():
    torch.save([model(x, past_key_values=cache).logits for x in tokens.split([30, 10], 1)], result)
"""
    paths = [tmp_path / name for name in ("model", "tokens", "logits")]
    done = run_without_linearize(script, *paths, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert relative_error(torch.cat(torch.load(paths[2]), 1), logits_of(model, tokens)) < 1e-5


def test_lora_reaches_every_projection_and_the_maps():
    model = copy.deepcopy(converted("gqa"))
    wanted = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=wanted, init_lora_weights=False))
    for linear in linear_attentions(model).values():
        linear.requires_grad_(True)
    model(input_ids=make_tokens(2, 30), labels=make_tokens(2, 30)).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (2 * len(wanted) + 6)
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("name", ["gqa", "mha", "map a query head", "softcap", "sink logits"])
def test_calibration_sets_the_linear_heads_as_it_would_without_kept_ones(name):
    architecture, settings, kept = MODELS[name]
    some, none = (
        linearize_(make_model(architecture, **settings), attention(**{**kept, **heads}))
        for heads in ({}, {"heads": ()})
    )
    for model in (some, none):
        calibrate(model, {"input_ids": make_tokens(3, 40)})
    for mine, theirs in zip(linear_attentions(some).values(), linear_attentions(none).values(), strict=True):
        assert mine.heads.kept
        for parameter, p in theirs.named_parameters():
            (expected,) = mine.heads.linear_part(p, dim=0)
            torch.testing.assert_close(mine.state_dict()[parameter], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "mha", "sink logits"])
def test_matching_trains_the_linear_heads_on_their_own_error(name):
    model, seen = copy.deepcopy(converted(name)), {}
    stage = MatchStage(model, MatchSettings())
    batch = {"input_ids": make_tokens(3, 40)}
    figures = stage.run(batch, scale=1.0, backward=True)

    def observer(module, q, k, v, out, *, scaling, softcap, sink_logits, **_):
        if isinstance(module, LinearizedAttentionMixin):
            heads = module.linear_attn.heads
            q, k, v, out = heads.linear_part(q, k, v, out.transpose(1, 2))
            sinks = None if sink_logits is None else heads.linear_part(sink_logits, dim=0)[0]
            predicted, _ = module.linear_attn(q, k, v, scaling=scaling, softcap=softcap, sink_logits=sinks)
            error = (predicted - out).square().sum((1, 2, 3)) / out.square().sum((1, 2, 3))
            seen[f"layer {module.layer_idx}"] = error.sum()

    with torch.no_grad(), softmax_attention(model):
        model(**batch, use_cache=False, observer=observer)
    assert len(seen) == 2 and figures.keys() == {*seen, "loss"}
    assert [figures[n].item() for n in seen] == pytest.approx([error.item() for error in seen.values()], rel=1e-5)
    assert all(p.grad.abs().max() > 0 for linear in linear_attentions(model).values() for p in linear.parameters())


# ---------------------------------------------------------------------------------- mistakes, and all heads


def test_a_layer_kept_head_by_head_is_a_kept_layer():
    by_head = linearize_(make_model("llama"), attention(heads=[(0, 0), (0, 1)]))
    assert list(linear_attentions(by_head)) == [1]
    assert not isinstance(attention_modules(by_head)[0], LinearizedAttentionMixin)


def test_keeping_all_heads_gives_the_base_model():
    model = copy.deepcopy(converted("gqa"))
    for module in attention_modules(model).values():
        module.linear_attn = module.linear_attn.keeping(module.linear_attn.heads.linear)
        assert module.linear_attn.heads.kept == (0, 1)
    tokens = make_tokens(2, 40)
    assert relative_error(logits_of(model, tokens), logits_of(base_model("gqa"), tokens)) < 1e-6


def test_keeping_more_heads_is_converting_with_them():
    model = copy.deepcopy(converted("one layer"))
    more = linear_attentions(model)[0].keeping([0])
    whole = linear_attentions(model)[0]
    assert more.heads.kept == (0,)
    assert torch.equal(more.q_map, whole.q_map[2:]) and torch.equal(more.k_map, whole.k_map[1:])
    assert more.q_map.data_ptr() != whole.q_map.data_ptr()


@pytest.mark.parametrize(("heads", "message"), [
    ([(2, 0)], r"layers \[2\] are not full-attention layers"), ([(0, 2)], "layer 0 has kv heads 0 to 1, not 2"),
])  # fmt: skip
def test_heads_that_are_not_there(heads, message):
    with pytest.raises(RecipeError, match=message):
        linearize_(make_model("llama"), attention(heads=heads))
    with pytest.raises(ValueError, match="kept kv heads"):
        LinearAttention(
            num_heads=4, num_kv_heads=2, head_dim=8, window=5, sinks=2, feature_map="taylor", map_dim=4, per="kv_head",
            decay=False, kept=[2],
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """The linear heads by the kernels, the kept ones by SDPA: logits and gradients as on a CPU, in any pieces."""
    shape = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3)
    model = convert(make_model("llama", **shape), window=16, dim=16, decay=False, heads=[(0, 0), (0, 2), (2, 1)])
    tokens, tolerance = make_tokens(2, 200), {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    on_gpu = copy.deepcopy(model).to("cuda")
    if dtype == torch.bfloat16:
        for name, parameter in on_gpu.named_parameters():
            parameter.data = parameter.data if ".linear_attn." in name else parameter.data.to(dtype)
    expected = logits_of(model, tokens)
    assert relative_error(logits_of(on_gpu, tokens.cuda()).cpu(), expected) < tolerance
    assert relative_error(logits_in_pieces(on_gpu, tokens.cuda(), [90, 1]).cpu(), expected) < tolerance
    gradients = []
    for m in (model, on_gpu):
        for linear in linear_attentions(m).values():
            linear.requires_grad_(True)
        m(input_ids=tokens.to(m.device), labels=tokens.to(m.device), use_cache=False).loss.backward()
        gradients.append(linear_attentions(m)[0].q_map.grad.cpu())
    assert gradients[0].shape == (3, 64, 16) and relative_error(*gradients[::-1]) < 3 * tolerance
