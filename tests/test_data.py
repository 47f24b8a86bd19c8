"""Tokenising, packing, the token cache and the order of batches."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from linearize.data import build_token_data
from linearize.errors import DataError
from linearize.recipe import DataSettings
from linearize.sequences import batch_indices

NUM_DOCUMENTS = 60
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<' + m.role + '> ' + m.content + ' </s>\n' }}{% endfor %}"
)


def make_tokenizer(*, eos="</s>", pad=None, bos=False, chat_template=None, words=None):
    if words is None:
        names = ["<unk>", "</s>", "<pad>", "<s>", "\n", "<system>", "<user>", "<assistant>"]
        names += [f"d{i}" for i in range(NUM_DOCUMENTS)] + [f"n{i}" for i in range(50)]
        words = {word: i for i, word in enumerate(names)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=eos, pad_token=pad, model_max_length=8
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_texts():
    """Document i begins with the word d<i>, which no other has, and has 2 to 24 words."""
    words = ([f"n{i * j % 50}" for j in range(1, 2 + i % 23)] for i in range(NUM_DOCUMENTS))
    return [" ".join([f"d{i}", *some]) for i, some in enumerate(words)]


def section(source, **changes):
    settings = dict(
        source=str(source),
        name=None,
        split="train",
        column="text",
        messages=None,
        sequence_length=16,
        packing=True,
        held_out=3,
        streaming=False,
        seed=0,
    )
    return SimpleNamespace(**{**settings, **changes})


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_texts(tmp_path / "corpus.jsonl", make_texts())


def build(tmp_path, data, *, tokenizer=None, num_train_sequences=1000, cache="cache"):
    tokenizer, cache_dir = tokenizer or make_tokenizer(), tmp_path / cache
    return build_token_data(data, tokenizer, num_train_sequences=num_train_sequences, cache_dir=cache_dir)


def fails(tmp_path, data, *parts, tokenizer=None):
    with pytest.raises(DataError) as caught:
        build(tmp_path, data, tokenizer=tokenizer)
    for part in parts:
        assert part in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == [], "nothing is left behind"


def rows(side):
    return side.batch(range(len(side)))["input_ids"].tolist()


def unpadded(side, tokenizer):
    """The documents of unpacked rows as words, sorted."""
    batch = side.batch(range(len(side)))
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return sorted(" ".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()])) for ids, mask in pairs)


def all_documents(tmp_path, data, tokenizer):
    data.packing, data.held_out, data.sequence_length = False, 0, 64
    return unpadded(build(tmp_path, data, tokenizer=tokenizer).train, tokenizer)


def first_words(side, tokenizer):
    """The documents, by the word that only they have, in the order in which they begin."""
    names = tokenizer.convert_ids_to_tokens([token for row in rows(side) for token in row])
    return [name for name in names if name[0] == "d"]


def test_little_more_is_tokenised_than_asked_for(tmp_path, monkeypatch):
    """The first texts at once are few; of the same texts in larger pieces the tokens are the same."""
    source = write_texts(tmp_path / "a.jsonl", [" ".join(f"n{(i + j) % 50}" for j in range(2000)) for i in range(60)])
    settings, sizes = section(source, sequence_length=500), []
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", counting(sizes, type(tokenizer).__call__))
    few = build(tmp_path, settings, tokenizer=tokenizer, num_train_sequences=1)
    assert len(sizes) == 1 and sum(sizes) < 20  # documents of 6,900 characters
    more = build(tmp_path, settings, tokenizer=tokenizer, num_train_sequences=200)
    assert sizes[2] > 1.5 * sizes[1] and rows(more.train)[:1] == rows(few.train)
    monkeypatch.setattr("linearize.data._FIRST_CHARACTERS", 1 << 22)
    assert rows(build(tmp_path, settings, num_train_sequences=200, cache="other").train) == rows(more.train)


def counting(sizes, call):
    """A tokenizer's call that notes how many texts it is given."""
    return lambda self, batch, **options: sizes.append(len(batch)) or call(self, batch, **options)


# Packing ----------------------------------------------------------------------------------------------------


def test_packed_batch_of_a_hand_made_example(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["n0 n1", "n0 n1 n2 n3 n4 n5"])
    tokenizer = make_tokenizer()
    # Documents of 3 and 7 tokens; the seed puts the shorter one first.
    data = build(tmp_path, section(source, sequence_length=5, held_out=0, seed=1), tokenizer=tokenizer)
    n, eos = tokenizer.convert_tokens_to_ids("n0"), tokenizer.eos_token_id
    batch = data.train.batch([0, 1])
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[n, n + 1, eos, n, n + 1], [n + 2, n + 3, n + 4, n + 5, eos]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, n + 1, eos, -100, n + 1], [-100, n + 3, n + 4, n + 5, eos]]
    assert data.train.batch([1])["labels"].tolist() == batch["labels"][1:].tolist()
    for index in (2, -1):
        with pytest.raises(IndexError):
            data.train.batch([index])


def test_packing_keeps_every_token_in_order(tmp_path, corpus):
    tokenizer = make_tokenizer()
    data = build(tmp_path, section(corpus), tokenizer=tokenizer)
    tokens = {text.split()[0]: tokenizer(text + " </s>", verbose=False)["input_ids"] for text in make_texts()}
    seen = {}
    for name, side in (("held_out", data.held_out), ("train", data.train)):
        seen[name] = first_words(side, tokenizer)
        assert len(set(seen[name])) == len(seen[name])
        assert seen[name] != sorted(seen[name], key=list(tokens).index), "documents are shuffled"
        flat = [token for row in rows(side) for token in row]
        assert flat == [token for document in seen[name] for token in tokens[document]][: len(flat)]
    assert len(data.held_out) == 3
    num_left = sum(len(ids) for document, ids in tokens.items() if document not in seen["held_out"])
    assert 0 <= num_left - 16 * len(data.train) < 16, "only the last, partial row is missing"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_held_out_and_train_share_no_document(tmp_path, corpus, packing, streaming):
    tokenizer = make_tokenizer()
    data = build(tmp_path, section(corpus, packing=packing, streaming=streaming), tokenizer=tokenizer)
    held_out, train = first_words(data.held_out, tokenizer), first_words(data.train, tokenizer)
    assert held_out and train and not set(held_out) & set(train)
    assert len(data.held_out) == 3


def test_a_repeated_text_is_not_on_both_sides(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", [f"d{i % 4} n1 n2" for i in range(400)])
    tokenizer = make_tokenizer()
    data = build(tmp_path, section(source, sequence_length=4, held_out=2), tokenizer=tokenizer)
    held_out, train = first_words(data.held_out, tokenizer), first_words(data.train, tokenizer)
    assert held_out and train and not set(held_out) & set(train)


def test_streaming_gives_the_same_documents(tmp_path, corpus):
    tokenizer = make_tokenizer()
    expected = sorted(f"{text} </s>" for text in make_texts())
    for streaming in (True, False):
        assert all_documents(tmp_path, section(corpus, streaming=streaming), tokenizer) == expected


def test_reading_stops_at_the_sequences_asked_for(tmp_path, corpus):
    data = build(tmp_path, section(corpus), num_train_sequences=2)
    assert len(data.train) == 2 and len(data.held_out) == 3
    assert len(data.train.document_starts) < 10
    assert "epochs" not in data.description


@pytest.mark.parametrize("packing", [True, False])
def test_the_description_counts_and_says_when_text_repeats(tmp_path, corpus, packing):
    data = build(tmp_path, section(corpus, packing=packing))
    assert data.description.startswith("corpus.jsonl: ") and "1,000 asked for" in data.description
    assert f"{1000 / len(data.train):.1f} epochs" in data.description
    for side in (data.train, data.held_out):
        counts = f"{len(side)} sequences ({len(side.document_starts)} documents, {len(side.tokens)} tokens)"
        assert counts in data.description


@pytest.mark.parametrize(
    "kinds, before, behind",
    [({}, "", " </s>"), ({"bos": True}, "<s> ", " </s>"), ({"eos": None}, "", "")],
    ids=str,
)
def test_tokens_before_and_behind_a_document(tmp_path, kinds, before, behind):
    source = write_texts(tmp_path / "a.jsonl", ["n0 n1", "n2 n3 </s>"])
    found = all_documents(tmp_path, section(source), make_tokenizer(**kinds))
    assert found == [f"{before}n0 n1{behind}", f"{before}n2 n3 </s>"], "one end-of-text token, not two"


@pytest.mark.parametrize("last_id, dtype", [(65_534, np.uint16), (65_535, np.uint32), (200_000, np.uint32)])
def test_the_vocabulary_decides_the_width(tmp_path, corpus, last_id, dtype):
    words = {"<unk>": 0, "</s>": 1, **{f"d{i}": last_id - i for i in range(NUM_DOCUMENTS)}}
    data = build(tmp_path, section(corpus, held_out=0), tokenizer=make_tokenizer(words=words))
    assert isinstance(data.train.tokens, np.memmap) and data.train.tokens.dtype == dtype
    assert max(map(max, rows(data.train))) == last_id


def test_long_documents_are_silent(tmp_path, capsys, caplog):
    logger = logging.getLogger("transformers")  # it does not propagate
    logger.addHandler(caplog.handler)
    build(tmp_path, section(write_texts(tmp_path / "a.jsonl", ["n1 " * 300, "n2 " * 300])))
    logger.removeHandler(caplog.handler)
    printed = capsys.readouterr()
    assert printed.out == printed.err == "", "no progress bar in the first 2 s"
    assert caplog.text == "", "no warning that a document is longer than the model's limit"


# One document a row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad, eos, pad_id", [("<pad>", "</s>", 2), (None, "</s>", 1), (None, None, 0)])
def test_unpacked_rows_are_padded_and_cut(tmp_path, pad, eos, pad_id):
    long = "n0 n1 n2 n3 n4 n5 n6"
    source = write_texts(tmp_path / "a.jsonl", [long, "n0 n1", "n0", long])
    tokenizer = make_tokenizer(pad=pad, eos=eos)
    data = build(tmp_path, section(source, held_out=0, packing=False, sequence_length=5), tokenizer=tokenizer)
    n = tokenizer.convert_tokens_to_ids("n0")
    expected = [[n, n + 1, n + 2, n + 3, n + 4]] * 2 + ([[n, n + 1, 1], [n, 1]] if eos else [[n, n + 1]])
    batch = data.train.batch(range(len(data.train)))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert len(data.train) == len(expected)
    for ids, mask, labels in zip(*(batch[name].tolist() for name in batch), strict=True):
        length = sum(mask)
        expected.remove(ids[:length])
        assert mask == [1] * length + [0] * (5 - length)
        assert ids[length:] == [pad_id] * (5 - length)
        assert labels == ids[:length] + [-100] * (5 - length), "an end-of-text token is a target"


# The cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_tokenizing(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("tokenised")

    return lambda: monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)


@pytest.mark.parametrize("streaming", [True, False])
def test_same_seed_same_tokens(tmp_path, corpus, streaming):
    first = build(tmp_path, section(corpus, streaming=streaming), cache="a")
    again = build(tmp_path, section(corpus, streaming=streaming), cache="b")
    other = build(tmp_path, section(corpus, streaming=streaming, seed=1), cache="a")
    assert rows(first.train) == rows(again.train) and rows(first.held_out) == rows(again.held_out)
    assert rows(first.train) != rows(other.train)


def test_a_second_call_reads_the_cache(tmp_path, corpus, no_tokenizing):
    tokenizer = make_tokenizer(pad="<pad>")
    first = build(tmp_path, section(corpus), tokenizer=tokenizer)
    tokenizer(["n0", "n0 n1"], padding=True, truncation=True, max_length=2)  # leaves its mark in the backend
    no_tokenizing()
    for same in (tokenizer, make_tokenizer(pad="<pad>")):
        again = build(tmp_path, section(corpus), tokenizer=same)
        assert rows(again.train) == rows(first.train) and rows(again.held_out) == rows(first.held_out)
        assert again.description == first.description
    (folder,) = (tmp_path / "cache").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["held_out.starts", "held_out.tokens", "meta.json", "train.starts", "train.tokens"]


OTHER_SETTINGS = dict(sequence_length=8, packing=False, held_out=2, seed=3, streaming=True, column="body")


@pytest.mark.parametrize("change", [*OTHER_SETTINGS, "file", "limit", "tokenizer", "template"])
def test_the_cache_is_for_these_settings_only(tmp_path, corpus, no_tokenizing, change):
    rows = [{"text": text, "body": text} for text in make_texts()]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    build(tmp_path, section(corpus))
    if change == "file":
        corpus.write_text(corpus.read_text() + "\n")
    changes = {"tokenizer": {"bos": True}, "template": {"chat_template": CHAT_TEMPLATE}}
    tokenizer = make_tokenizer(**changes.get(change, {}))
    data = section(corpus, **{name: value for name, value in OTHER_SETTINGS.items() if name == change})
    no_tokenizing()
    with pytest.raises(AssertionError, match="tokenised"):
        build(tmp_path, data, tokenizer=tokenizer, num_train_sequences=7 if change == "limit" else 1000)


def test_of_two_processes_the_slower_takes_the_faster_ones_cache(tmp_path, corpus, monkeypatch):
    """While the first call tokenises, a second one begins and finishes."""
    tokenize, faster = PreTrainedTokenizerFast.__call__, []

    def overtaken(self, *args, **kwargs):
        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", tokenize)
        faster.append(build(tmp_path, section(corpus)))
        (folder,) = [path for path in (tmp_path / "cache").iterdir() if ".tmp-" not in path.name]
        (folder / "winner").touch()
        return tokenize(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", overtaken)
    slower = build(tmp_path, section(corpus))
    assert rows(slower.train) == rows(faster[0].train)
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "winner").exists()


@pytest.mark.parametrize("name", ["train.tokens", "held_out.starts", "meta.json"])
def test_a_damaged_cache_is_named(tmp_path, corpus, name):
    build(tmp_path, section(corpus))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-2])
    with pytest.raises(DataError, match=f"{folder} is damaged.*Delete"):
        build(tmp_path, section(corpus))


# Chats and instructions -------------------------------------------------------------------------------------


def write_chats(path, *chats):
    path.write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    return section(path, messages="chat")


def test_chats_go_through_the_template(tmp_path):
    openai = [{"role": "system", "content": "n0"}, {"role": "user", "content": "n1"}]
    sharegpt = [{"from": "human", "value": "n4"}, {"from": "gpt", "value": "n5"}]
    data = write_chats(tmp_path / "chats.jsonl", openai, sharegpt, [])
    # bos=True: the template, not the tokenizer, decides on special tokens. It ends with </s> itself.
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE, bos=True)
    found = all_documents(tmp_path, data, tokenizer)
    assert found == ["<system> n0 </s> \n <user> n1 </s> \n", "<user> n4 </s> \n <assistant> n5 </s> \n"]
    tokenizer.chat_template = "{{ messages[-1].content }}"
    assert all_documents(tmp_path, data, tokenizer) == ["n1 </s>", "n5 </s>"]


def test_instruction_columns(tmp_path):
    records = [
        {"instruction": "n1", "input": "n2", "output": "n3"},
        {"instruction": "n4", "input": None, "output": "n5"},
        {"instruction": "n6", "input": "", "output": ""},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = section(tmp_path / "a.jsonl", column="instruction+input+output")
    chats = all_documents(tmp_path, data, make_tokenizer(chat_template=CHAT_TEMPLATE))
    with_input, without = "<user> n1 \n \n n2 </s> \n <assistant> n3", "<user> n4 </s> \n <assistant> n5"
    assert chats == [f"{with_input} </s> \n", f"{without} </s> \n"]
    plain = ["n1 \n \n n2 \n \n n3 </s>", "n4 \n \n n5 </s>", "n6 </s>"]
    assert all_documents(tmp_path, data, make_tokenizer()) == plain


def test_chat_errors(tmp_path):
    data = write_chats(tmp_path / "a.jsonl", [{"role": role, "content": "n1"} for role in ("user", "tool")])
    fails(tmp_path, data, "'chat'", "has no chat template", "data.column")
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    fails(tmp_path, data, "a.jsonl line 1", "no tools here", "['user', 'tool']", tokenizer=tokenizer)


# Too little text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [["", " \n", None], []])
def test_empty_documents_only(tmp_path, texts):
    source = write_texts(tmp_path / "a.jsonl", texts)
    fails(tmp_path, section(source), f"all {len(texts)} documents are empty")


def test_too_little_text(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["n1 n2 n3"] * 4 + [""])
    counts = "5 documents gave 1 sequences (4 documents, 16 tokens) held out"
    fails(tmp_path, section(source, held_out=2), "a.jsonl is too short for 2 held-out", counts, "1 empty")
    fails(tmp_path, section(source, held_out=1), "0 sequences (0 documents, 0 tokens) to train on")
    fails(tmp_path, section(source, held_out=1, sequence_length=4), "3 that repeat a held-out one")
    (tmp_path / "c.txt").write_text("n1 " * 1000)
    fails(tmp_path, section(tmp_path / "c.txt"), "too short", "such as a .txt file", "data.held_out")


# Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num, batch_size", [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_batches_cover_every_sequence_once_an_epoch(num, batch_size):
    steps = (batch_indices(num, batch_size=batch_size, step=step, seed=0) for step in range(3 * num))
    flat = [index for step in steps for index in step]
    assert len(flat) == 3 * num * batch_size
    epochs = [flat[i : i + num] for i in range(0, len(flat), num)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    if num > 8:
        assert len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has its own order"


def test_a_batch_depends_on_its_arguments_only():
    steps = [batch_indices(50, batch_size=8, step=step, seed=5) for step in range(20)]
    assert [batch_indices(50, batch_size=8, step=step, seed=5) for step in reversed(range(20))] == steps[::-1]
    halves = [batch_indices(50, batch_size=4, step=step, seed=5) for step in range(40)]
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == steps
    assert batch_indices(50, batch_size=8, step=0, seed=6) != steps[0]
    # Written down: a run resumed with another version of NumPy sees the same order.
    assert batch_indices(10, batch_size=10, step=0, seed=0) == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


def test_the_recipes_data_section_has_what_is_read(tmp_path, corpus):
    data = DataSettings(source=str(corpus), sequence_length=16, held_out=2)
    assert len(build(tmp_path, data).held_out) == 2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num", [1, 3, 7])
def test_a_larger_cache_gives_the_sequences_of_one_of_its_own(tmp_path, corpus, packing, num):
    data, tokenizer = section(corpus, packing=packing), make_tokenizer()
    options = {"num_train_sequences": num, "cache_dir": tmp_path / "shared", "num_cached": 12}
    shared, own = build_token_data(data, tokenizer, **options), build(tmp_path, data, num_train_sequences=num)
    build_token_data(data, tokenizer, **{**options, "num_train_sequences": 12, "num_cached": 0})
    assert len(list((tmp_path / "shared").iterdir())) == 1, "one tokenisation for all"
    assert len(shared.train) == len(own.train) == num
    for side in ("train", "held_out"):
        one, other = getattr(shared, side), getattr(own, side)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.document_starts.tolist() == other.document_starts.tolist()
