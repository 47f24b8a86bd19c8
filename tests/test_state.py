"""A model's memory of a text as a value: saved, loaded, copied, joined and continued, and what is refused."""

import pytest
import torch
from pico import convert, make_model, make_tokens, pad
from safetensors.torch import save_file
from test_export import make_tokenizer

from linearize.decoding import Decoder, generate
from linearize.errors import LinearizeError
from linearize.state import State, StateError, read

BOOK, QUESTION = make_tokens(1, 40, seed=1), make_tokens(1, 5, seed=2)
NEW = 8
KEPT = (dict(keep_softmax=[1]), dict(heads=[(0, 1)]), dict(keep_softmax=[1], heads=[(0, 1)]))


def make(name="llama", seed=0, **settings):
    return convert(make_model(name, seed=seed), **settings)


def answer(model, *texts):
    return generate(model, torch.cat(texts, 1), max_new_tokens=NEW)


@pytest.mark.parametrize(("name", "settings"), [("llama", {}), *(("llama", kept) for kept in KEPT), ("gemma3", {})])
def test_a_saved_text_is_continued_as_if_just_read(tmp_path, name, settings):
    model = make(name, **settings)
    read(model, BOOK).save(tmp_path / "book", model)
    state = State.load(tmp_path / "book", make(name, **settings))
    assert [layer.get_seq_length() for layer in state.cache.layers] == [40] * len(state.cache.layers)
    assert state.lengths.tolist() == [40] and torch.equal(state.tokens, BOOK)
    expected = answer(model, BOOK, QUESTION)
    for _ in range(2):  # the state is a value: the first question leaves no trace
        assert torch.equal(generate(model, QUESTION, state=state, max_new_tokens=NEW), expected)
    assert torch.equal(generate(model, state=state, max_new_tokens=NEW), answer(model, BOOK))
    assert not torch.equal(expected, answer(model, QUESTION)), "the text before matters"


@pytest.mark.parametrize(("saved", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_text_read_in_another_dtype_takes_a_slot_among_others(tmp_path, saved, loaded):
    """All that a row of a batch holds has the batch's dtypes."""
    read(make().to(saved), BOOK).save(tmp_path / "book", make().to(saved))
    model = make().to(loaded)
    state = State.load(tmp_path / "book", model)
    decoder = Decoder(model, batch=2, mode="eager")
    decoder.start(read(model, QUESTION).select([0, 0]))
    first = decoder.replace(1, state)
    assert first == int(generate(model, state=state, max_new_tokens=1))
    assert decoder.decode_one().shape == (2,)


def test_its_size_does_not_depend_on_the_text(tmp_path):
    model = make()
    short, long = (read(model, make_tokens(1, n)) for n in (10, 200))
    assert short.num_bytes() == long.num_bytes()


@pytest.mark.parametrize("settings", [{}, *KEPT])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_chunk_reads_the_same(chunk, settings):
    model = make(**settings)
    ids, mask = pad([BOOK[0], QUESTION[0]])
    whole, pieces = read(model, ids, mask), read(model, ids, mask, chunk=chunk)
    assert torch.allclose(whole.logits, pieces.logits, rtol=1e-3, atol=1e-4)
    assert pieces.lengths.tolist() == [40, 5] and torch.equal(whole.tokens, pieces.tokens)


@pytest.mark.parametrize("settings", [{}, *KEPT])
def test_rows_are_read_in_groups_that_fit(monkeypatch, settings):
    model, rows = make(**settings), make_tokens(5, 20)
    whole = read(model, rows)
    monkeypatch.setattr("linearize.state.TOKENS_AT_ONCE", 40)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **x: calls.append(x["input_ids"].shape) or forward(**x))
    assert torch.allclose(read(model, rows).logits, whole.logits, atol=1e-4)
    assert calls == [(2, 20), (2, 20), (1, 20)]
    if settings:
        calls.clear()
        monkeypatch.setattr("linearize.state.MASK_AT_ONCE", 2 * 7 * 20 + 1)
        assert torch.allclose(read(model, rows).logits, whole.logits, atol=1e-4)
        assert calls[:4] == [(2, 7), (2, 7), (2, 6), (2, 7)], "with softmax, less at once the longer the text"


@pytest.mark.parametrize(
    ("name", "settings"), [("llama", {}), *(("llama", kept) for kept in KEPT), ("gemma3", dict(heads=[(1, 0)]))]
)
def test_copies_and_joined_rows_are_those_rows(name, settings):
    model = make(name, **settings)
    states = [read(model, make_tokens(1, n, seed=n)) for n in (12, 30, 3)]  # gemma3 slides over 6
    joined = State.join(states)
    for chosen in ([0, 1, 1, 2], [1, 1], [2, 0]):
        got = generate(model, state=joined.select(chosen), max_new_tokens=NEW)
        for row, i in zip(got, chosen, strict=True):
            assert torch.equal(row, generate(model, state=states[i], max_new_tokens=NEW)[0])


@pytest.mark.parametrize("settings", KEPT)
def test_bytes_of_a_length_are_foretold(settings):
    model = make(**settings)
    short, long = (read(model, make_tokens(1, n)) for n in (1, 200))
    assert short.num_bytes(200) == long.num_bytes() > short.num_bytes() == long.num_bytes(1)


def test_a_state_of_another_model_or_tokenizer_is_refused(tmp_path):
    model, tokenizer = make(), make_tokenizer()
    path = tmp_path / "book"
    read(model, BOOK).save(path, model, tokenizer)
    State.load(path, model, tokenizer)
    for other in (make(seed=1), make(window=6), make("mistral")):
        with pytest.raises(StateError, match="another model"):
            State.load(path, other)
    tokenizer.add_tokens(["new"])
    with pytest.raises(StateError, match="another tokenizer"):
        State.load(path, model, tokenizer)
    same = make().to(torch.bfloat16)  # loaded in another dtype it is the same model
    assert generate(same, QUESTION, state=State.load(path, same), max_new_tokens=2).shape == (1, 2)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(StateError, match="not a saved state of this version"):
        State.load(tmp_path / "other", model)
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:500])
    with pytest.raises(StateError, match="is not a saved state"):
        State.load(tmp_path / "damaged", model)


def test_empty_rows_are_refused():
    model = make()
    for ids, mask in ((BOOK[:, :0], None), (BOOK, torch.zeros_like(BOOK))):
        with pytest.raises(LinearizeError, match="no empty row"):
            read(model, ids, mask)
    with pytest.raises(LinearizeError, match="2 texts after a state of 3 rows"):
        read(model, BOOK.expand(2, -1), state=read(model, BOOK.expand(3, -1)))


def test_padding_after_a_state_is_refused():
    """It would stand between the past and the new tokens, and narrow their window without a word."""
    model = convert(make_model("llama"))
    state = read(model, make_tokens(1, 9))
    ids, mask = pad([make_tokens(1, 4)[0], make_tokens(1, 6)[0]])
    with pytest.raises(LinearizeError, match="narrow the window"):
        read(model, ids, mask, state=state)
    assert len(read(model, make_tokens(2, 6), state=state)) == 2
