"""Generation and the cache of converted models: every way to decode gives what one pass gives."""

import copy
import functools

import pytest
import torch
import transformers
from packaging.version import Version
from pico import (
    SINKS,
    WINDOW,
    check_generation,
    convert,
    logits_in_pieces,
    logits_of,
    make_model,
    make_tokens,
    pad,
    relative_error,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline, set_seed

from linearize.linearized_cache import DRAFT_SLOTS, CacheError, LinearizedCacheLayer
from linearize.modeling_linearized import linear_attentions

every_model = pytest.mark.parametrize("name", ["llama", "mixed"])
# transformers before 5.18 takes tokens back wrongly from a layer that slides, in the base model as well
OLD = Version(transformers.__version__) < Version("5.18")
SLIDING = pytest.param("mixed", marks=pytest.mark.skipif(OLD, reason="transformers before 5.18"))
every_model_that_drafts = pytest.mark.parametrize("name", ["llama", "kept", SLIDING])
GREEDY = dict(do_sample=False, max_new_tokens=14)


@functools.cache
def base_model(name):
    """llama and kept: two layers; mixed: a Gemma3 with two sliding and two full-attention layers."""
    return make_model("gemma3" if name == "mixed" else "llama")


@functools.cache
def converted(name):
    """All layers of llama; of the others one, beside one kept in softmax (and two that slide). Never changed."""
    return convert(copy.deepcopy(base_model(name)), keep_softmax={"llama": [], "kept": [0], "mixed": [3]}[name])


@functools.cache
def draft_model():
    """A small model of the same vocabulary that drafts badly."""
    return make_model("llama", seed=7, num_hidden_layers=1)


def some_rows():
    return [make_tokens(1, length, seed=length)[0] for length in (3, 11, 18)]


def generate(model, ids, mask, **settings):
    options = dict(output_logits=True, return_dict_in_generate=True, **GREEDY)
    return model.generate(input_ids=ids, attention_mask=mask, **{**options, **settings})


def converted_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, LinearizedCacheLayer)]


def num_bytes(cache):
    return sum(layer.num_bytes() for layer in converted_layers(cache))


# --------------------------------------------------------------------------------------------- generation


@every_model
@pytest.mark.parametrize("settings", [{}, dict(prefill_chunk_size=5)], ids=["", "prefill in chunks"])
def test_greedy_in_a_left_padded_batch(name, settings):
    generated = generate(converted(name), *pad(some_rows()), **settings)
    check_generation(converted(name), some_rows(), generated)


@every_model
@pytest.mark.parametrize("settings", [
    dict(do_sample=True, num_return_sequences=3), dict(num_beams=4, num_return_sequences=2),
    dict(do_sample=True, num_beams=3), dict(repetition_penalty=1.3),
], ids=str)  # fmt: skip
def test_the_cache_changes_no_token(name, settings):
    tokens = []
    for use_cache in (True, False):
        set_seed(0)
        generated = generate(converted(name), *pad(some_rows()), use_cache=use_cache, **settings)
        tokens.append(generated.sequences)
    assert tokens[0].shape == (3 * settings.get("num_return_sequences", 1), 18 + 14)
    assert torch.equal(*tokens)


@every_model
def test_continuing_from_a_returned_cache(name):
    model = converted(name)
    ids, mask = pad(some_rows())
    first = generate(model, ids, mask)
    longer = torch.cat([first.sequences, make_tokens(3, 6, seed=50)], 1)
    mask = torch.cat([mask, torch.ones(3, 20, dtype=mask.dtype)], 1)
    generated = generate(model, longer, mask, past_key_values=first.past_key_values)
    check_generation(model, [row[m.bool()] for row, m in zip(longer, mask, strict=True)], generated)


@every_model_that_drafts
@pytest.mark.parametrize("how", ["prompt lookup", "bad draft", "good draft", "itself"])
def test_assisted_decoding(name, how):
    model, prompt = converted(name), make_tokens(1, 20, seed=3)
    prompt = torch.cat([prompt, prompt[:, 4:12]], 1)  # something for prompt lookup to find
    settings = {
        "prompt lookup": dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1),
        "bad draft": dict(assistant_model=draft_model()),
        "good draft": dict(assistant_model=copy.deepcopy(base_model(name))),
        "itself": dict(assistant_model=copy.deepcopy(model)),
    }[how]
    options = dict(do_sample=False, max_new_tokens=40)
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options, **settings), expected)


@every_model_that_drafts
def test_drafting_for_the_base_model(name):
    """The converted model drafts, its teacher decides."""
    base, prompt = base_model(name), make_tokens(1, 20, seed=3)
    options = dict(do_sample=False, max_new_tokens=40)
    expected = base.generate(prompt, **options)
    assistant = copy.deepcopy(converted(name))
    assert torch.equal(base.generate(prompt, assistant_model=assistant, **options), expected)


def test_a_pipeline():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")
    model = converted("llama")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [" ".join(f"w{t}" for t in row.tolist()) for row in some_rows()]
    for batch_size in (1, 3):
        outputs = generator(texts, batch_size=batch_size, return_full_text=False, **GREEDY)
        for row, output in zip(some_rows(), outputs, strict=True):
            new = model.generate(row[None], **GREEDY)[0, len(row) :]
            assert output[0]["generated_text"] == tokenizer.decode(new)


# ---------------------------------------------------------------------------------- what a row depends on


@every_model
def test_later_tokens_change_nothing_earlier(name):
    model, tokens = converted(name), make_tokens(2, 40)
    changed = torch.cat([tokens[:, :25], make_tokens(2, 15, seed=9)], 1)
    a, b = logits_of(model, tokens), logits_of(model, changed)
    assert relative_error(b[:, :25], a[:, :25]) < 1e-5
    assert relative_error(b[:, 25:], a[:, 25:]) > 0.1


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_no_row(name, side):
    model, rows = converted(name), some_rows()
    ids, mask = pad(rows, side=side)
    garbage = torch.where(mask.bool(), ids, 5)  # what stands in padding does not matter
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = logits_of(model, garbage, attention_mask=mask, position_ids=positions)
    order = torch.tensor([2, 0, 1])
    turned = logits_of(model, ids[order], attention_mask=mask[order], position_ids=positions[order])
    for i, row in enumerate(rows):
        alone = logits_of(model, row[None])[0]
        assert relative_error(whole[i][mask[i].bool()], alone) < 1e-5
        assert relative_error(turned[order.tolist().index(i)][mask[i].bool()], alone) < 1e-5


@every_model
def test_packed_documents(name):
    model = converted(name)
    lengths = (9, 1, 150, 8)
    documents = [make_tokens(2, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = torch.cat([logits_of(model, document) for document in documents], 1)
    packed = torch.cat(documents, 1)
    assert relative_error(logits_of(model, packed, position_ids=positions), alone) < 1e-5
    assert relative_error(logits_of(model, packed), alone) > 0.1
    with torch.no_grad():
        assert model(input_ids=packed, position_ids=positions).past_key_values is None


@every_model
def test_packed_documents_have_no_cache(name):
    model, tokens, positions = converted(name), make_tokens(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(CacheError, match="packed documents .* use_cache=False"):
        model(input_ids=tokens, position_ids=positions, use_cache=True)
    with pytest.raises(CacheError, match="packed documents"):
        model(input_ids=tokens, position_ids=positions, past_key_values=model.make_cache())


# --------------------------------------------------------------------------------------- the cache itself


@pytest.mark.parametrize("drafting", [False, True])
def test_memory_does_not_grow(drafting):
    model, cache = converted("llama"), converted("llama").make_cache()
    assert num_bytes(cache) == 0
    if drafting:
        cache.activate_past_recording()
    sizes = []
    with torch.no_grad():
        for length in (30, 270):
            model(input_ids=make_tokens(2, length), past_key_values=cache)
            sizes.append(num_bytes(cache))
    assert cache.get_seq_length() == 300 and sizes[0] == sizes[1] > 0
    stated = sum(layer.state_bytes(dtype_bytes=4) for layer in linear_attentions(model).values())
    flags = len(cache.layers) * ((WINDOW - 1) + 8)  # a byte a slot, and an int64 length
    assert drafting or sizes[0] == 2 * (stated + flags)


@every_model_that_drafts
@pytest.mark.parametrize("before", [2, WINDOW + SINKS, 30, DRAFT_SLOTS + 30], ids=lambda n: f"{n} before")
def test_crop_takes_tokens_back(name, before):
    model, tokens = converted(name), make_tokens(2, before + 9)
    whole = logits_of(model, tokens)
    for activated_at in (0, before):
        cache = model.make_cache()
        with torch.no_grad():
            if activated_at == 0:
                cache.activate_past_recording()
            model(input_ids=tokens[:, :before], past_key_values=cache)
            cache.activate_past_recording()
            model(input_ids=make_tokens(2, 20, seed=8), past_key_values=cache)
            cache.crop(-20)
            assert cache.get_seq_length() == before
            out = model(input_ids=tokens[:, before:], past_key_values=cache).logits
        assert relative_error(out, whole[:, before:]) < 1e-5


def test_crop_that_cannot_be_done():
    model, cache = converted("llama"), converted("llama").make_cache()
    cache.crop(-3)  # nothing there
    with torch.no_grad():
        model(input_ids=make_tokens(1, 30), past_key_values=cache)
    with pytest.raises(CacheError, match="cannot take back 1 tokens: only 0 .* activate_past_recording"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(CacheError, match="negative number"):
        cache.crop(10)
    cache.activate_past_recording()
    with torch.no_grad():
        model(input_ids=make_tokens(1, DRAFT_SLOTS + 20), past_key_values=cache)
    with pytest.raises(CacheError, match=f"at most {DRAFT_SLOTS} at a time"):
        cache.crop(-DRAFT_SLOTS - 1)
    cache.crop(-DRAFT_SLOTS)
    assert cache.get_seq_length() == 50


@every_model
def test_rows_of_the_cache(name):
    model, tokens, more = converted(name), make_tokens(3, 20), make_tokens(3, 9, seed=4)
    rows = torch.tensor([2, 0, 0, 1])
    expected = logits_of(model, torch.cat([tokens[rows], more[rows]], 1))[:, 20:]

    def after(change, then):
        cache = model.make_cache()
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache)
            change(cache)
            return model(input_ids=then, past_key_values=cache).logits

    assert relative_error(after(lambda c: c.reorder_cache(rows), more[rows]), expected) < 1e-5
    assert relative_error(after(lambda c: c.batch_select_indices(rows), more[rows]), expected) < 1e-5
    repeated = after(lambda c: c.batch_repeat_interleave(2), more.repeat_interleave(2, 0))
    expected = logits_of(model, torch.cat([tokens, more], 1))[:, 20:].repeat_interleave(2, 0)
    assert relative_error(repeated, expected) < 1e-5
    moved = after(lambda c: [(layer.offload(), layer.prefetch()) for layer in converted_layers(c)], more)
    assert relative_error(moved, expected[::2]) < 1e-5


def test_reset():
    model, tokens, cache = converted("llama"), make_tokens(2, 20), converted("llama").make_cache()
    with torch.no_grad():
        model(input_ids=make_tokens(2, 30, seed=6), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and num_bytes(cache) == 0
        logits = model(input_ids=tokens, past_key_values=cache).logits
    assert relative_error(logits, logits_of(model, tokens)) < 1e-5


@every_model
def test_state_is_that_of_one_pass(name):
    model, tokens = converted(name), make_tokens(2, 40)
    whole, pieces = model.make_cache(), model.make_cache()
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=whole)
        for piece in tokens.split([17, 1, 1, 14, 7], 1):
            model(input_ids=piece, past_key_values=pieces)
    for a, b in zip(converted_layers(whole), converted_layers(pieces), strict=True):
        assert relative_error(b.state.total, a.state.total) < 1e-5
        assert relative_error(b.state.ring_k, a.state.ring_k) < 1e-5
        assert torch.equal(b.state.ring_valid, a.state.ring_valid)


# ---------------------------------------------------------------------------------------- what is refused


@every_model
def test_caches_of_another_kind(name):
    model, tokens = converted(name), make_tokens(1, 5)
    for cache in (DynamicCache(), DynamicCache(config=base_model(name).config)):
        with pytest.raises(CacheError, match=r"\(DynamicCache\) holds no state .*make_cache"):
            model(input_ids=tokens, past_key_values=cache)
    with pytest.raises(CacheError, match="DynamicCache"):
        model.generate(tokens, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(CacheError, match="belongs to converted layers"):
        base_model(name)(input_ids=tokens, past_key_values=model.make_cache())


@every_model
@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 1, 5, 5), {}, torch.ones(1, 4), torch.ones(2, 5)], ids="4-D dict short batch".split()
)
def test_masks_that_say_too_much_or_too_little(name, mask):
    with pytest.raises(CacheError, match="attention_mask must be .1 rows, 5 tokens or more. of 0 and 1"):
        converted(name)(input_ids=make_tokens(1, 5), attention_mask=mask)


@every_model
@pytest.mark.parametrize("kind", ["sliding_window", "offloaded", "quantized"])
def test_cache_implementations(name, kind):
    with pytest.raises(CacheError, match=f"cache_implementation='{kind}'"):
        converted(name).generate(make_tokens(1, 5), cache_implementation=kind, **GREEDY)


def test_another_attention_implementation_is_never_silent():
    model, tokens = copy.deepcopy(converted("llama")), make_tokens(1, 20)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="would run it as a softmax model"):
        logits_of(model, tokens)


# ------------------------------------------------------------------------------------ training and dtypes


@every_model
def test_gradients_under_checkpointing(name):
    tokens, gradients = make_tokens(2, 24), []
    for checkpointing in (False, True):
        model = copy.deepcopy(converted(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, f"{parameter} learns nothing"
        assert relative_error(gradients[1][parameter], gradient) < 1e-5, parameter


def test_no_cache_under_checkpointing():
    model, tokens = copy.deepcopy(converted("llama")).train(), make_tokens(2, 24)
    expected = model(input_ids=tokens, labels=tokens).loss
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=True).loss.backward()  # as transformers: no cache then
    got = [p.grad for p in model.parameters()]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))
    cache = model.make_cache()
    model(input_ids=tokens, past_key_values=cache)
    assert cache.get_seq_length() == 0


@every_model
def test_bfloat16(name, tmp_path):
    converted(name).save_pretrained(tmp_path)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), make_tokens(2, 40)
    for parameter, tensor in model.named_parameters():
        assert tensor.dtype == (torch.float32 if "linear_attn" in parameter else torch.bfloat16), parameter
    whole = logits_of(model, tokens)
    error = relative_error(whole, logits_of(converted(name), tokens))
    assert relative_error(logits_in_pieces(model, tokens, [17, 1, 4]), whole) < max(0.02, error)
    cache = model.make_cache()
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
    for layer in converted_layers(cache):
        assert layer.state.total.dtype == torch.float32 and layer.state.ring_k.dtype == torch.bfloat16


@every_model
def test_deepcopy(name):
    model, tokens = converted(name), make_tokens(2, 24)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for linear_attn in linear_attentions(twin).values():
            linear_attn.gate_bias.add_(1)
    assert relative_error(logits_of(twin, tokens), logits_of(model, tokens)) > 1e-3
    assert relative_error(logits_in_pieces(twin, tokens, [9, 3]), logits_of(twin, tokens)) < 1e-5
