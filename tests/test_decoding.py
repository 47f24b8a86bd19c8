"""Static decoding: the tokens of `model.generate` by every mode, with and without a graph; ends, streams, samples."""

import gc
import weakref

import pytest
import torch
from pico import convert, make_model, make_tokens, pad, relative_error

from linearize.decoding import Decoder, generate
from linearize.errors import LinearizeError
from linearize.modeling_linearized import attention_modules
from linearize.sampling import Sampler, Sampling, uniform
from linearize.state import State, read
from linearize.static_cache import StaticError

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NEW = 9
ROWS = [make_tokens(1, n, seed=n)[0] for n in (21, 9, 14)]
pytestmark = pytest.mark.usefixtures("fold_early")


def make(model="llama", **settings):
    return convert(make_model(model), **settings).to(DEVICE)


def batch():
    return tuple(x.to(DEVICE) for x in pad(ROWS))


def expected(model, ids, mask, *, new=NEW, **options):
    """The new tokens of transformers' own loop."""
    options |= dict(max_new_tokens=new, do_sample=False, pad_token_id=0)
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_greedy_tokens_are_those_of_model_generate(name):
    model, (ids, mask) = make(name), tuple(x[:2] for x in batch())
    reference = expected(model, ids, mask)
    assert len(reference.unique()) > 6, "a constant answer would prove nothing"
    for mode in ("eager", "static"):
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, mode=mode), reference), mode


@pytest.mark.parametrize(
    "settings", [dict(heads=[(0, 1)], per="query_head"), dict(name="hedgehog"), dict(window=1)]
)
def test_what_cannot_be_static_decodes_through_its_own_cache(settings):
    model, (ids, mask) = make(**settings), batch()
    decoder = Decoder(model, batch=3)
    assert decoder.graph is None and decoder.why_eager
    assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, decoder=decoder), expected(model, ids, mask))
    with pytest.raises(StaticError):
        Decoder(model, batch=3, mode="static")


# what is kept in softmax: nothing linear, layers, single kv heads, both, and all heads of a converted layer
KEPT = {
    "a teacher": None,
    "a layer": dict(keep_softmax=[0]),
    "heads": dict(heads=[(0, 1), (1, 0)]),
    "a layer and a head": dict(keep_softmax=[0], heads=[(1, 1)]),
    "every head of a layer": dict(heads=[(1, 1)]),
}


def make_kept(name):
    model = make_model().to(DEVICE) if name == "a teacher" else make(**KEPT[name])
    if name == "every head of a layer":
        for module in list(attention_modules(model).values())[1:]:
            module.linear_attn = module.linear_attn.keeping(module.linear_attn.heads.linear)
    return model


@pytest.mark.parametrize("name", [name for name in KEPT if name != "a layer"])
def test_kept_softmax_decodes_in_a_fixed_number_of_slots(name):
    model, (ids, mask) = make_kept(name), (x[:2] for x in batch())
    reference = expected(model, ids, mask, new=6)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=6, mode="static"), reference)


@pytest.mark.parametrize("name", ["a layer", "heads"])
def test_slots_that_are_too_few_are_refused(name):
    model, (ids, mask) = make_kept(name), (x[:2] for x in batch())
    decoder = Decoder(model, batch=2, mode="static", max_length=21)
    with pytest.raises(StaticError, match="21 tokens read, and the decoder's softmax slots hold 21"):
        decoder.prefill(ids, mask)
    with pytest.raises(StaticError, match="9 tokens read and 13 to come, and"):
        decoder.replace(0, read(model, ids[1:, 12:]), max_new_tokens=13)
    decoder = Decoder(model, batch=2, mode="static", max_length=22)
    decoder.prefill(ids, mask)
    decoder.decode_one()
    with pytest.raises(StaticError, match="are full"):
        decoder.decode_one()
    with pytest.raises(StaticError, match="no max_length is given"):
        Decoder(model, batch=2, mode="static")


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3_next", "gpt_oss"])
def test_models_with_other_layers(name):
    model, ids = make(name), make_tokens(2, 15).to(DEVICE)
    got = generate(model, ids, max_new_tokens=NEW)
    assert torch.equal(got, expected(model, ids, torch.ones_like(ids)))


def test_softcap_is_refused_where_it_is_met():
    model = convert(make_model("gemma2", layer_types=["full_attention"] * 4)).to(DEVICE)
    ids = make_tokens(1, 8).to(DEVICE)
    with pytest.raises(StaticError, match="softcap"):
        generate(model, ids, max_new_tokens=2, mode="static")


def test_one_decoder_serves_one_prompt_after_another():
    model = make()
    decoder = Decoder(model, batch=1, mode="static")
    for seed in (1, 2):
        ids = make_tokens(1, 11 + seed, seed=seed).to(DEVICE)
        first = decoder.prefill(ids)
        tokens = torch.cat([first[:, None], decoder.decode_one()[:, None], decoder.decode_n(NEW - 2)], 1)
        assert torch.equal(tokens, expected(model, ids, torch.ones_like(ids)))


def test_samples_are_the_same_in_static_state():
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=[5, 2])
    model, (ids, mask) = make(), (x[:2] for x in batch())
    eager, static, greedy = (
        generate(model, ids, mask, max_new_tokens=NEW, mode=mode, sampling=how)
        for mode, how in (("eager", sampling), ("static", sampling), ("eager", None))
    )
    assert torch.equal(static, eager) and not torch.equal(eager, greedy)


@pytest.mark.parametrize("name", ["a teacher", "heads"])
def test_one_text_in_every_row_is_loaded_without_a_copy_of_each(name, monkeypatch):
    """From one row: the same memory as from as many copies."""
    model, seen = make_kept(name), []
    text = read(model, make_tokens(1, 21).to(DEVICE))
    for state in (text.select([0, 0, 0]), State.join([text] * 3)):
        decoder = Decoder(model, batch=3, mode="static", max_length=32)
        for layer in decoder.cache.layers:
            watched = lambda x, rows, order, load=layer.load: (seen.append(len(order)), load(x, rows, order))  # noqa: E731
            monkeypatch.setattr(layer, "load", watched)
        decoder.start(state)
        rows = decoder.decode_n(3)
        assert (rows == rows[0]).all()
        assert torch.equal(rows[0], expected(model, text.tokens, torch.ones_like(text.tokens), new=4)[0, 1:])
    assert set(seen[: len(seen) // 2]) == {1} and set(seen[len(seen) // 2 :]) == {3}


def test_far_tokens_matter_in_static_decoding():
    model, ids = make(decay=False), make_tokens(1, 40).to(DEVICE)
    other = ids.clone()
    other[:, 10] = (ids[:, 10] + 1) % 90 + 3
    got = [Decoder(model, batch=1, mode="static") for _ in range(2)]
    logits = []
    for decoder, prompt in zip(got, (ids, other), strict=True):
        decoder.prefill(prompt)
        decoder.token.fill_(5)
        decoder.sampler.pick = lambda x, _: logits.append(x) or x.argmax(-1)
        decoder.decode_one()
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_rows_end_at_eos_each_for_itself():
    model, (ids, mask) = make(), batch()
    free = expected(model, ids, mask)
    eos = [free[0, 3].item(), free[2, 7].item()]
    reference = expected(model, ids, mask, eos_token_id=eos)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, eos=eos, pad=0), reference)
    rows = [row.tolist() for row in reference]
    assert any(row[-1] == 0 for row in rows), "a row ended early"
    decoder = Decoder(model, batch=3, eos=eos, pad=0)
    tokens = torch.cat([decoder.prefill(ids, mask)[:, None], decoder.decode_n(NEW - 1)], 1)
    assert torch.equal(tokens[:, : reference.shape[1]], reference), "on the device too"


def test_a_slot_is_filled_again_while_the_others_go_on():
    model, modes = make(), ("eager", "static")
    texts = [make_tokens(1, n, seed=n).to(DEVICE) for n in (10, 14, 12)]
    alone = [expected(model, x, torch.ones_like(x), new=7)[0].tolist() for x in texts]
    for mode in modes:
        decoder = Decoder(model, batch=2, mode=mode)
        answers = [[decoder.replace(i, read(model, texts[i]))] for i in range(2)]
        for row, new in zip(answers, decoder.decode_n(3).tolist(), strict=True):
            row += new
        third = [decoder.replace(0, read(model, texts[2]))]
        more = decoder.decode_n(3).tolist()
        assert answers[0] == alone[0][:4] and answers[1] + more[1] == alone[1] and third + more[0] == alone[2][:4]


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "eager") for name in KEPT), ("a teacher", "static"), ("a layer and a head", "static")]
)
def test_softmax_rows_of_other_lengths_take_their_slots(name, mode):
    """Shorter, longer and padded texts after one another; each row as if alone, and no more memory than they need."""
    model, lengths = make_kept(name), (10, 14, 3, 25)
    texts = [make_tokens(1, n, seed=n).to(DEVICE) for n in lengths]
    alone = [expected(model, x, torch.ones_like(x), new=7)[0].tolist() for x in texts]
    decoder = Decoder(model, batch=2, mode=mode, max_length=32)
    ids, mask = (x.to(DEVICE) for x in pad([texts[1][0], texts[2][0]]))
    padded = read(model, ids, mask)  # as process reads them: the short one stands behind 11 columns of padding

    def put(slot, state):
        return [decoder.replace(slot, state, max_new_tokens=7)]

    both = read(model, *(x.to(DEVICE) for x in pad([texts[1][0], texts[0][0]])))
    answers = [[t] for t in decoder.replace_rows([1, 0], both, seeds=[0, 0], max_new_tokens=7)][::-1]
    for row, new in zip(answers, decoder.decode_n(3).tolist(), strict=True):
        row += new
    answers[0] = put(0, padded.select([1]))  # the row of 10 goes, one of 3 comes, the one of 14 goes on
    for row, new in zip(answers, decoder.decode_n(3).tolist(), strict=True):
        row += new
    assert answers == [alone[2][:4], alone[1]]
    answers[1] = put(1, read(model, texts[3]))
    for row, new in zip(answers, decoder.decode_n(6).tolist(), strict=True):
        row += new
    assert answers == [alone[2] + [0] * 3, alone[3]], "a row ends after as many tokens as it was given"
    assert decoder.finished.all() and decoder.position.tolist() == [3 + 6, 25 + 6]
    answers = put(0, read(model, texts[2])), put(1, read(model, texts[2]))
    if mode == "eager":
        assert decoder.mask.shape[1] == 3, "columns of texts that are gone are gone"


def test_rows_that_have_ended_stay_within_learned_positions():
    model = convert(make_model("gpt2", max_position_embeddings=24)).to(DEVICE)
    text = make_tokens(1, 20).to(DEVICE)
    decoder = Decoder(model, batch=2, mode="eager")
    answer = [decoder.replace(0, read(model, text), max_new_tokens=4), *decoder.decode_n(12)[0].tolist()]
    assert answer == expected(model, text, torch.ones_like(text), new=4)[0].tolist() + [0] * 9


def test_the_memory_of_a_long_run_is_bounded():
    for name, columns in ((None, None), ("heads", 30 + 5)):
        model = make_kept(name) if name else make()
        decoder, text = Decoder(model, batch=2, mode="eager"), read(model, make_tokens(1, 30).to(DEVICE))
        for i in range(20):
            decoder.replace(i % 2, text, max_new_tokens=9)
            decoder.decode_n(5)
            assert decoder.mask is None or decoder.mask.shape[1] <= columns + 5
        assert (decoder.mask is None) == (name is None)


def test_pieces_join_to_the_whole_and_stop_strings_end_rows():
    class Letters:  # token id -> one character
        def decode(self, tokens):
            return "".join(chr(200 + t) for t in tokens)

    model, (ids, mask) = make(), batch()
    pieces = []
    whole = generate(model, ids, mask, max_new_tokens=NEW, on_tokens=pieces.append)
    assert torch.equal(torch.cat(pieces, 1), whole.cpu())
    stop = Letters().decode(whole[1, 2:4].tolist())
    end = Letters().decode(whole[1].tolist()).index(stop) + 2
    got = generate(model, ids, mask, max_new_tokens=NEW, stop_strings=[stop], tokenizer=Letters())
    assert torch.equal(got[1, :end], whole[1, :end]) and not got[1, end:].any()
    with pytest.raises(LinearizeError, match="need the tokenizer"):
        generate(model, ids, mask, max_new_tokens=2, stop_strings=["x"])


def test_samples_belong_to_a_rows_seed():
    model, (ids, mask) = make(), batch()
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.98, min_p=0.001, repetition_penalty=1.1, seed=[7, 8, 9])
    first, again = (generate(model, ids, mask, max_new_tokens=NEW, sampling=sampling) for _ in range(2))
    assert torch.equal(first, again)
    other = generate(model, ids, mask, max_new_tokens=NEW, sampling=Sampling(temperature=1.5, seed=1))
    assert not torch.equal(first, other)
    alone = Sampling(**{**vars(sampling), "seed": 8})
    assert torch.equal(generate(model, ROWS[1][None].to(DEVICE), max_new_tokens=NEW, sampling=alone)[0], first[1])


def test_draws_follow_the_distribution():
    rows, vocabulary = 20000, 6
    sampler = Sampler(Sampling(temperature=1.0, seed=3), batch=rows, vocabulary=vocabulary, device=DEVICE)
    logits = torch.tensor([0.0, 1.0, -1.0, -torch.inf, 2.0, 0.5], device=DEVICE)
    sampler.start(torch.zeros(rows, 1, dtype=torch.long, device=DEVICE))
    draws = [sampler.pick(logits.expand(rows, -1)) for _ in range(2)]
    assert (draws[0] == draws[1]).float().mean() < 0.6, "another number each time"
    for tokens in draws:
        counts = tokens.bincount(minlength=vocabulary) / rows
        assert torch.allclose(counts, logits.softmax(-1), atol=0.015) and counts[3] == 0
    u = uniform(torch.arange(100000), torch.zeros(100000, dtype=torch.long))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001


def test_repetition_penalty_is_transformers_own():
    model, (ids, mask) = make(), batch()
    reference = expected(model, ids, mask, repetition_penalty=1.7)
    got = generate(model, ids, mask, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1.7))
    sampler = Sampler(Sampling(repetition_penalty=1.3), batch=1, vocabulary=4, device=DEVICE)
    sampler.start(torch.tensor([[0, 1]], device=DEVICE))
    for logits, token in (([5.0, 0, 4.0, 0], 2), ([-1.0, -1.1, -9, -1.2], 3), ([5.0, 0, 4.5, 3.6], 0)):
        assert sampler.pick(torch.tensor([logits], device=DEVICE)).item() == token, "and the picked ones count"
    # transformers counts the padding token as seen; the rows without padding agree to the token
    assert torch.equal(got[0], reference[0]) and not torch.equal(reference, expected(model, ids, mask))


def test_what_is_refused():
    model, (ids, mask) = make(), batch()
    for wrong in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(min_p=2), dict(repetition_penalty=0)):
        with pytest.raises(LinearizeError, match="must be"):
            Sampling(**wrong)
    with pytest.raises(LinearizeError, match="pad on the left"):
        generate(model, ids.flip(1), mask.flip(1), max_new_tokens=2)
    with pytest.raises(LinearizeError, match="2 seeds for 3 rows"):
        generate(model, ids, mask, max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=[1, 2]))
    with pytest.raises(LinearizeError, match="brings its own"):
        generate(model, ids, mask, max_new_tokens=2, decoder=Decoder(model, batch=3), sampling=Sampling())
    with pytest.raises(LinearizeError, match="a state of 3 rows for a decoder of 2"):
        Decoder(model, batch=2).start(read(model, ids, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_graph_replays_what_the_step_does(dtype, temperature):
    model = make(window=16, dim=8).to(dtype)
    (ids, mask), tokens = batch(), {}
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=1)
    for mode in ("static", "graph"):
        decoder = Decoder(model, batch=3, sampling=sampling, mode=mode, disable_compile=True)
        for _ in range(2):  # the second time in buffers that were used
            first = decoder.prefill(ids, mask)
            tokens[mode] = torch.cat([first[:, None], decoder.decode_n(150)], 1)
    assert torch.equal(tokens["static"], tokens["graph"])


@pytest.mark.gpu
def test_a_graph_gives_the_eager_tokens():
    model, (ids, mask) = make(), batch()
    for disable_compile in (True, None):
        decoder = Decoder(model, batch=3, disable_compile=disable_compile)
        assert decoder.graph is not None, decoder.why_eager
        assert (decoder.compile_seconds is None) == bool(disable_compile), decoder.why_not_compiled
        got = generate(model, ids, mask, max_new_tokens=40, decoder=decoder)
        assert torch.equal(got, expected(model, ids, mask, new=40))


@pytest.mark.gpu
def test_a_compiled_graph_in_bfloat16_is_as_exact_as_the_step_as_it_is():
    settings, (ids, mask) = dict(window=16, dim=8), batch()
    low = make(**settings).bfloat16()
    decoders = [Decoder(m, batch=3, mode="graph", disable_compile=off)
                for m, off in ((make(**settings), True), (low, True), (low, False))]  # fmt: skip
    for decoder in decoders:
        decoder.prefill(ids, mask)
    errors = []
    for _ in range(60):
        for decoder in decoders:
            decoder.token.copy_(decoders[0].token)
        for decoder in decoders:
            decoder.decode_one()
        errors.append([relative_error(d.logits, decoders[0].logits) for d in decoders])
    _, plain, compiled = torch.tensor(errors).mean(0)
    assert 0 < compiled < 1.5 * plain < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("name", KEPT)
def test_a_graph_with_kept_softmax_gives_the_eager_tokens(name):
    model, (ids, mask) = make_kept(name), batch()
    decoder = Decoder(model, batch=3, mode="graph", max_length=200)
    got = generate(model, ids, mask, max_new_tokens=40, decoder=decoder)
    assert decoder.graph is not None and torch.equal(got, expected(model, ids, mask, new=40))
    for i in (2, 0, 1):  # the same graph, row by row
        row = ids[i : i + 1, mask[i].bool()]
        first = decoder.replace(0, read(model, row), max_new_tokens=20)
        answer = [first, *decoder.decode_n(19)[0].tolist()]
        assert answer == expected(model, row, torch.ones_like(row), new=20)[0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, KEPT["a layer and a head"]])
def test_decode_n_never_waits_for_the_device(settings):
    model, (ids, mask) = make(**settings), batch()
    sampling = Sampling(temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)
    decoder = Decoder(model, batch=3, sampling=sampling, mode="graph", max_length=120)
    decoder.prefill(ids, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = decoder.decode_n(80)
        with pytest.raises(RuntimeError):  # the mode does notice a wait
            tokens.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.shape == (3, 80)


def test_a_decoder_is_freed_when_nobody_has_it():
    """Without waiting for the garbage collector: its memory may be most of a GPU's."""
    decoder = Decoder(convert(make_model("llama")), batch=1, mode="static")
    gone = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()
