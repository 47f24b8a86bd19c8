"""`model.generate` over a `GraphCache`: transformers' own loop gives the same tokens, and what cannot be is refused."""

import copy

import pytest
import torch
from pico import convert, make_model, make_tokens, pad

from linearize import GraphCache
from linearize.decoding import CHECK_EVERY, generate
from linearize.linearized_cache import CacheError
from linearize.static_cache import StaticError

ON_GPU = torch.cuda.is_available()
DEVICE, MODES = ("cuda", ("eager", "static", "graph")) if ON_GPU else ("cpu", ("eager", "static"))
NEW = 6
KEPT = {"linear": {}, "kept": dict(keep_softmax=[0], heads=[(1, 1)])}
OPTIONS = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
pytestmark = pytest.mark.usefixtures("fold_early")


def make(kept="linear", **settings):
    return convert(make_model("llama"), **KEPT[kept], **settings).to(DEVICE)


def batch():
    ids, mask = pad([make_tokens(1, n, seed=n)[0] for n in (21, 9)])
    return dict(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE))


def calls_of(model):
    """The lengths of what the model's layers get from now on."""
    calls = []
    model.model.register_forward_pre_hook(lambda _, a, k: calls.append(k["input_ids"].shape[1]), with_kwargs=True)
    return calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", KEPT)
def test_tokens_and_logits_of_generate(kept, mode):
    model, inputs = make(kept), batch()
    options = dict(OPTIONS, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(**inputs, **options)
    assert len(expected.sequences.unique()) > NEW, "a constant answer would prove nothing"
    cache = GraphCache(model, batch=2, mode=mode, max_length=30)
    calls = calls_of(model)
    for _ in range(2):
        got = model.generate(**inputs, past_key_values=cache, **options)
        assert torch.equal(got.sequences, expected.sequences)
        for mine, theirs in zip(got.logits, expected.logits, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-3)
        assert cache.get_seq_length() == 21 + NEW - 1
        cache.reset()
    if mode != "graph":
        assert calls == [21, *[1] * (NEW - 1)] * 2, "all of it went through the cache"


@pytest.mark.parametrize("kept", KEPT)
def test_samples_processors_and_ends_are_generates_own(kept):
    model, inputs = make(kept), batch()
    free = model.generate(**inputs, **OPTIONS)
    options = dict(max_new_tokens=NEW, do_sample=True, top_k=20, repetition_penalty=1.3, pad_token_id=0,
                   eos_token_id=free[0, 23].item())  # fmt: skip
    outputs = []
    for cache in (None, GraphCache(model, batch=2, mode="eager", max_length=30)):
        torch.manual_seed(3)
        outputs.append(model.generate(**inputs, past_key_values=cache, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kept", KEPT)
def test_a_text_goes_on_and_may_be_read_in_pieces(kept):
    model, ids = make(kept), make_tokens(1, 25).to(DEVICE)
    expected = model.generate(ids, **OPTIONS)
    cache = GraphCache(model, mode="eager", max_length=60)
    calls = calls_of(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=10, **OPTIONS), expected)
    assert calls[:3] == [10, 10, 5]
    more = torch.cat([expected, make_tokens(1, 4, seed=8).to(DEVICE)], 1)
    calls.clear()
    assert torch.equal(model.generate(more, past_key_values=cache, **OPTIONS), model.generate(more, **OPTIONS))
    assert calls[: 5 + NEW - 1] == [1] * (5 + NEW - 1), "after steps, token by token; the last new one was not read"


def test_it_sees_weights_that_change():
    model, inputs = make(), batch()
    cache, answers = GraphCache(model, batch=2, mode="static"), []
    for seed in (0, 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * seed * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE))
        cache.reset()
        answers.append(model.generate(**inputs, past_key_values=cache, **OPTIONS))
        assert torch.equal(answers[-1], model.generate(**inputs, **OPTIONS))
    assert not torch.equal(*answers)


def test_cache_implementation_static(monkeypatch):
    model, inputs = make("kept"), batch()
    if not ON_GPU:
        with pytest.raises(StaticError, match="a graph needs a CUDA GPU"):
            model.generate(**inputs, cache_implementation="static", **OPTIONS)
        init = GraphCache.__init__
        monkeypatch.setattr(GraphCache, "__init__", lambda self, *a, **k: init(self, *a, mode="eager", **k))
    expected = model.generate(**inputs, **OPTIONS)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **OPTIONS), expected)
    kept = model._graph_cache[1]
    shorter = {name: x[:, 10:] for name, x in inputs.items()}
    model.generate(**shorter, cache_implementation="static", **OPTIONS)
    assert model._graph_cache[1] is kept, "made once"
    for more in (dict(num_return_sequences=2, do_sample=True), dict(max_new_tokens=NEW + 1)):
        model.generate(**inputs, cache_implementation="static", **{**OPTIONS, **more})
        assert model._graph_cache[1] is not kept
        kept = model._graph_cache[1]
    assert copy.deepcopy(model)._graph_cache[1] is None
    assert torch.equal(copy.deepcopy(model).generate(**inputs, cache_implementation="static", **OPTIONS), expected)
    other = make()
    model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)  # the same weights elsewhere
    model.generate(**inputs, cache_implementation="static", **{**OPTIONS, **more})
    assert model._graph_cache[1] is not kept and not hasattr(other, "_graph_cache")


def test_what_is_refused(monkeypatch):
    model, inputs = make(), batch()
    cache = GraphCache(model, batch=2, mode="eager")
    with pytest.raises(CacheError, match="beams"):
        four = GraphCache(model, batch=4, mode="eager")
        model.generate(**inputs, past_key_values=four, **{**OPTIONS, "num_beams": 2})
    row = dict(input_ids=inputs["input_ids"][:1])
    with pytest.raises(CacheError, match="a GraphCache of 2 rows"):
        model.generate(**row, past_key_values=cache, **OPTIONS)
    with pytest.raises(CacheError, match="assisted decoding need"):
        model.generate(**row, past_key_values=GraphCache(model, mode="eager"), prompt_lookup_num_tokens=3, **OPTIONS)
    for options in (dict(num_beams=2), dict(prompt_lookup_num_tokens=3)):
        with pytest.raises(CacheError, match="is for greedy search and sampling"):
            model.generate(**row, cache_implementation="static", **{**OPTIONS, **options})
    with monkeypatch.context() as patch:
        patch.setattr("linearize.linearized_cache.__name__", "transformers_modules.x.linearized_cache")
        with pytest.raises(CacheError, match="needs linearize"):  # the code of an exported folder
            model.generate(**row, cache_implementation="static", **OPTIONS)
    with pytest.raises(CacheError, match="another model"):
        make().generate(**inputs, past_key_values=cache, **OPTIONS)
    with pytest.raises(CacheError, match="the last token alone"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(CacheError, match="leave position_ids out"):
        model.generate(**row, past_key_values=GraphCache(model, mode="eager"), **OPTIONS,
                       position_ids=torch.arange(21, device=DEVICE)[None] + 1)  # fmt: skip
    kept = make("kept")
    with pytest.raises(StaticError, match="are full"):
        kept.generate(**inputs, past_key_values=GraphCache(kept, batch=2, mode="static", max_length=23), **OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one():
    model, ids = make(), make_tokens(2, 21)
    expected = generate(model, ids, max_new_tokens=2 * CHECK_EVERY, mode="graph").cpu()
    model.to("cuda:1")
    for mode in MODES:
        assert torch.equal(generate(model, ids, max_new_tokens=2 * CHECK_EVERY, mode=mode).cpu(), expected), mode
    assert torch.cuda.current_device() == 0
