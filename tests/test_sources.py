"""Finding and reading documents: file types, packages, hub datasets, chats, orders, and every mistake."""

import gzip
import json
import sys
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearize import sources
from linearize.errors import DataError
from linearize.sources import find_package_files, find_sources, iterate_documents

TEXTS = [f"text {i}" for i in range(40)]


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def streaming(request):
    return request.param


def section(source, **changes):
    source = source if isinstance(source, list) else str(source)
    settings = dict(source=source, name=None, split="train", column="text", messages=None)
    settings |= dict(streaming=False, seed=0)
    return SimpleNamespace(**{**settings, **changes})


def read(tmp_path, data):
    """The values of every document, in the order of the seed."""
    found = iterate_documents(data, find_sources(data.source), scratch=tmp_path)
    return [document.values for document in found]


def texts(tmp_path, data):
    return [text for (text,) in read(tmp_path, data)]


def fails(tmp_path, data, *parts):
    with pytest.raises(DataError) as caught:
        read(tmp_path, data)
    for part in parts:
        assert part in str(caught.value)
    assert not isinstance(caught.value.__cause__, DataError), "an error of ours is not wrapped again"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def serve(monkeypatch, rows, calls=None):
    """Let the hub hold one dataset, under any name."""

    def load_dataset(*args, **kwargs):
        if calls is not None:
            calls.append((args, kwargs))
        dataset = datasets.Dataset.from_list(rows)
        return dataset.to_iterable_dataset() if kwargs["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


# What is read -----------------------------------------------------------------------------------------------


def test_every_file_type_and_mixed_sources(tmp_path, streaming):
    pq.write_table(pa.table({"text": ["one", None, "two"], "x": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n\n{"text": "four"}')
    (tmp_path / "c.json").write_text('\n [{"text": "five"}, {"text": "six"}]')
    (tmp_path / "d.json").write_text('{"text": "seven"}\n{"text": "eight \\u00e9"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.txt").write_text("nine\n\nten\n")
    (tmp_path / "f[0].txt").write_text("eleven")
    (tmp_path / "blob").write_text('{"text": "twelve"}')
    (tmp_path / "g.jsonl").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "h.jsonl").symlink_to(tmp_path / "g.jsonl")
    # d.json is named twice, and so is the blob.
    patterns = ["*.parquet", "[b-d].js*", "sub/**/*.txt", "f[0].txt", "d.json", "[gh].jsonl"]
    found = texts(tmp_path, section([f"{tmp_path}/{pattern}" for pattern in patterns], streaming=streaming))
    assert sorted(found) == sorted(
        [
            "one",
            "",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight é",
            "nine\n\nten\n",
            "eleven",
            "twelve",
        ]
    )


def test_package_files_are_found_without_importing(tmp_path, monkeypatch):
    package = tmp_path / "site" / "some_corpus"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.txt").write_text("one")
    (package / "data" / "b.txt").write_text("two")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert [path.name for path in find_package_files("package:some_corpus/data/*.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in find_package_files("package:some_corpus/**/b.txt")] == ["b.txt"]
    assert sorted(texts(tmp_path, section("package:some_corpus/data/*.txt"))) == ["one", "two"]
    assert "some_corpus" not in sys.modules
    with pytest.raises(DataError, match=r"matches 'data/\*.gguf'"):
        find_package_files("package:some_corpus/data/*.gguf")
    with pytest.raises(DataError, match="pip install --no-deps absent_corpus"):
        find_package_files("package:absent_corpus/*.txt")
    with pytest.raises(DataError, match="single module"):
        find_package_files("package:this/*.txt")
    for spec in ("package:some_corpus", "package:/x.txt", "package:some.corpus/x.txt"):
        with pytest.raises(DataError, match="package:NAME/GLOB"):
            find_package_files(spec)


def test_hub_datasets_go_through_load_dataset(tmp_path, monkeypatch, streaming):
    calls = []
    serve(monkeypatch, [{"body": text, "id": 3} for text in TEXTS], calls)
    data = section("user/set@v1.0", name="small", split="validation", column="body", streaming=streaming)
    found = texts(tmp_path, data)
    assert sorted(found) == sorted(TEXTS) and found != TEXTS
    arguments = {"split": "validation", "revision": "v1.0", "streaming": streaming}
    assert calls == [(("user/set", "small"), arguments)]
    data.column = "bdy"
    fails(tmp_path, data, "hub dataset 'user/set@v1.0' has no column 'bdy'", "Did you mean 'body'?")
    data.column = "id"
    fails(tmp_path, data, "hub dataset 'user/set@v1.0'", "column 'id' holds int, not text")


def test_files_and_hub_datasets_together(tmp_path, monkeypatch, streaming):
    serve(monkeypatch, [{"text": text} for text in TEXTS[:10]])
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[10:]])
    found = texts(tmp_path, section(["user/set", str(file)], streaming=streaming))
    assert sorted(found) == sorted(TEXTS)
    from_hub = [text in TEXTS[:10] for text in found]
    if streaming:
        assert from_hub == [False, True] * 10 + [False] * 20, "sources take turns"
    else:
        assert from_hub != sorted(from_hub) and from_hub != sorted(from_hub, reverse=True), "one permutation"


def test_messages(tmp_path, streaming):
    openai = [{"role": "system", "content": "Hé"}, {"role": "user", "content": "a"}]
    sharegpt = [
        {"from": "human", "value": "b"},
        {"from": "gpt", "value": "c"},
        {"from": "tool", "value": "d"},
    ]
    renamed = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"m": openai}, {"m": sharegpt}, {"m": []}, {"m": None}])
    found = [messages for (messages,) in read(tmp_path, section(source, messages="m", streaming=streaming))]
    assert sorted(found, key=len) == [[], [], openai, renamed]


def test_nulls_of_columnar_messages_are_left_out(tmp_path):
    named = {"role": "assistant", "content": "b", "name": "x"}
    chat = [{"role": "user", "content": "a", "name": None}, named]
    pq.write_table(pa.table({"messages": [chat]}), tmp_path / "a.parquet")
    ((found,),) = read(tmp_path, section(tmp_path / "a.parquet", messages="messages"))
    assert found == [{"role": "user", "content": "a"}, named]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b \\ud83d\\ude00"}\n')
    assert texts(tmp_path, section(tmp_path / "a.jsonl")) == ["a ? b \N{GRINNING FACE}"]


def test_the_seed_decides_the_order(tmp_path, streaming):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    sections = [section(source, streaming=streaming, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (texts(tmp_path, data) for data in sections)
    assert first == again and first != other and first != TEXTS
    assert sorted(first) == sorted(other) == sorted(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], "no temporary file is left"


def test_streaming_reads_no_more_than_the_buffer_ahead(tmp_path, monkeypatch):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": "some words"}] * 3000) for i in range(2)]
    num_read = 0
    original = sources.Columns.document

    def counting(self, row, *, where):
        nonlocal num_read
        num_read += 1
        return original(self, row, where=where)

    monkeypatch.setattr(sources.Columns, "document", counting)
    data = section([str(path) for path in paths], streaming=True)
    documents = iterate_documents(data, find_sources(data.source), scratch=tmp_path)
    for _ in range(16):
        next(documents)
    assert 16 <= num_read <= 16 + sources.SHUFFLE_BUFFER


# Mistakes ---------------------------------------------------------------------------------------------------


def test_source_errors(tmp_path):
    fails(tmp_path, section([]), "data.source is empty")
    fails(tmp_path, section(tmp_path / "none.jsonl"), "no file matches", "none.jsonl")
    fails(tmp_path, section("none.jsonl"), "no file matches", "none.jsonl")
    fails(tmp_path, section(tmp_path / "*.parquet"), "no file matches", "*.parquet")
    (tmp_path / "folder").mkdir()
    fails(tmp_path, section(tmp_path / "folder"), "is a folder", "folder/**/*.parquet")
    (tmp_path / "a.csv").write_text("text\none\n")
    fails(tmp_path, section(tmp_path / "a.csv"), "a.csv", "'.csv'", ".parquet, .jsonl, .json, .txt")
    fails(tmp_path, section("package:absent_corpus/*.txt"), "pip install --no-deps absent_corpus")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_column_errors(tmp_path, kind, streaming):
    path = tmp_path / f"a.{kind}"
    row = {"content": "one", "count": 3, "chat": [{"role": "user", "content": "one"}]}
    if kind == "jsonl":
        write_jsonl(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)

    def column(name):
        return section(path, column=name, streaming=streaming)

    fails(
        tmp_path,
        column("contents"),
        f"a.{kind}",
        "no column 'contents'",
        "'content', 'count', 'chat'",
        "Did you mean 'content'?",
    )
    fails(tmp_path, column("content+answer"), "no column 'answer'")
    fails(tmp_path, column("count"), "1: column 'count' holds int, not text")
    fails(tmp_path, column("chat"), "column 'chat' holds list, not text", "data.messages")


def test_rows_that_cannot_be_read(tmp_path):
    def content(name, data, *parts):
        (tmp_path / name).write_bytes(data)
        fails(tmp_path, section(tmp_path / name), *parts)

    content("a.jsonl", b'{"text": "one"}\n\n{"text": "two\n', "a.jsonl line 3 is not JSON")
    content("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not JSON", "utf-8")
    content("a.jsonl", b'"one"\n', "a.jsonl line 1 holds str")
    content("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', "a.jsonl line 2 has no column 'text'", "'body'")
    content("a.json", b'{\n "text": "one"\n}\n', "a.json line 1 is not JSON", "list of objects")
    content("a.json", b'[{"text": "one"}, 3]', "a.json row 2 holds int")
    content("a.txt", b"one \xff", "a.txt is not UTF-8")
    content("a.parquet", gzip.compress(b"not parquet"), "a.parquet cannot be read as parquet")
    (tmp_path / "a.txt").write_text("one")
    fails(tmp_path, section(tmp_path / "a.txt", column="a+b"), "a.txt", "one plain document", "'a+b'")
    fails(tmp_path, section(tmp_path / "a.txt", messages="chat"), "a.txt", "one plain document", "'chat'")


@pytest.mark.parametrize(
    "chat, parts",
    [
        ([{"role": "narrator", "content": "a"}], ["role 'narrator'", "assistant"]),
        ([{"from": "narrator", "value": "a"}], ["role 'narrator'", "human"]),
        ([{"content": "a"}], ["role None"]),
        ([{"role": "user", "content": 3}], ["type int"]),
        (["a"], ["not a list of messages"]),
        ("a", ["not a list of messages", "data.column"]),
    ],
    ids=str,
)
def test_message_errors(tmp_path, chat, parts):
    source = write_jsonl(tmp_path / "a.jsonl", [{"m": chat}])
    fails(tmp_path, section(source, messages="m"), "a.jsonl line 1: column 'm'", *parts)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach"),
        ValueError("BuilderConfig 'x' not found"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        RuntimeError("scripts are not supported"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_errors_name_the_dataset(tmp_path, monkeypatch, error, streaming):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = section("user/set", streaming=streaming)
    fails(tmp_path, data, "'user/set'", str(error), "local files", "data.split")


def test_a_hub_stream_that_breaks_names_the_dataset(tmp_path, monkeypatch):
    def broken():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    fails(tmp_path, section("user/set", streaming=True), "'user/set'", "reset by peer")
