"""Finding and reading documents: local files, files inside installed packages, datasets of the hub.

A source is a path or glob of .parquet, .jsonl, .json or .txt files, `package:NAME/GLOB`, or the id of a hub
dataset (`user/name`, a revision behind `@`). `iterate_documents` gives their documents in a seeded order.
"""

from __future__ import annotations

import difflib
import glob
import importlib.util
import json
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from linearize.errors import DataError
from linearize.hub_datasets import hub_errors, is_hub_id, load_hub

FILE_TYPES = (".parquet", ".jsonl", ".json", ".txt")
SHUFFLE_BUFFER = 1000  # documents held in memory to shuffle a stream

_TYPES = ", ".join(FILE_TYPES)
_PACKAGE = "package:"
_HUB_ADVICE = (
    f"Check the id, data.name, data.split and connection, or name local files ({_TYPES}) in data.source."
)
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Sources:
    """What the recipe's `data.source` names: files and hub datasets, each once."""

    files: tuple[Path, ...]
    hub: tuple[str, ...]

    def identity(self) -> list:
        """What a cache of these documents depends on: path, size and time of every file, and the hub ids."""
        stats = [(str(path.resolve()), path.stat()) for path in self.files]
        return [[[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats], list(self.hub)]

    def __str__(self) -> str:
        names = [path.name for path in self.files]
        return ", ".join([*(names if len(names) <= 3 else [f"{len(names)} files"]), *self.hub])


@dataclass(frozen=True)
class Document:
    """One row. `values`: [text], or the texts of an instruction row's columns, or [messages]; texts may be
    empty. `where` (file and line or row) is for error messages."""

    where: str
    values: list


def find_package_files(spec: str) -> list[Path]:
    """The files, sorted, that `package:NAME/GLOB` names inside an installed package. The package is not
    imported: it may hold nothing but data. Raises DataError when it is not installed or no file matches."""
    name, _, pattern = spec.removeprefix(_PACKAGE).partition("/")
    pattern = pattern.strip("/")
    if not name.isidentifier() or not pattern:
        raise DataError(
            f"{spec!r} must read package:NAME/GLOB: the import name of an installed package and "
            "a pattern of files inside it, as in package:my_corpus/data/*.parquet."
        )
    found = importlib.util.find_spec(name)
    if found is None:
        raise DataError(f"{spec!r}: {name} is not installed. Install it: pip install --no-deps {name}")
    roots = [Path(root) for root in found.submodule_search_locations or ()]
    files = {path for root in roots for path in root.glob(pattern) if path.is_file()}
    if not files:
        places = ", ".join(map(str, roots)) or "nowhere: it is a single module"
        raise DataError(
            f"{spec!r}: no file of the installed package {name!r} matches {pattern!r} (looked in "
            f"{places}). package:{name}/**/* would be every file of it."
        )
    return sorted(files)


def find_sources(source: str | list[str]) -> Sources:
    """Resolve the recipe's `data.source` without reading any document.

    Raises DataError when it is empty, when a path or pattern matches no file, or for a file of unknown type.
    """
    files: list[Path] = []
    hub: list[str] = []
    for item in [source] if isinstance(source, str) else source:
        if item.startswith(_PACKAGE):
            files += find_package_files(item)
        elif is_hub_id(item, FILE_TYPES):
            hub.append(item)
        else:
            files += _find_files(item)
    for path in files:
        if path.suffix.lower() not in FILE_TYPES:
            raise DataError(f"{path}: unknown file type {path.suffix!r}; data.source reads {_TYPES}.")
    if not files and not hub:
        raise DataError(f"data.source is empty. Name files ({_TYPES}), package:NAME/GLOB or a hub dataset.")
    # Each file once, however many patterns or links name it: or a document could be on both sides.
    # Links are not resolved otherwise, as what they point to (a blob of a hub cache) may have no file type.
    unique = {path.resolve(): path for path in files}
    return Sources(tuple(unique.values()), tuple(dict.fromkeys(hub)))


def _find_files(item: str) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        raise DataError(f"{item!r} is a folder. Name the files in it, for example {path}/**/*.parquet.")
    # A name that exists is taken as it stands, even if it holds characters of a pattern.
    matches = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    files = [match.absolute() for match in matches if match.is_file()]
    if not files:
        raise DataError(
            f"no file matches {item!r} (looked from {Path.cwd()}). Check the path; data.source "
            "also takes package:NAME/GLOB and the id of a hub dataset (user/name)."
        )
    return files


@dataclass(frozen=True)
class Columns:
    """The columns read from every row, and whether the (one) column holds chat messages."""

    names: tuple[str, ...]
    chat: bool

    @classmethod
    def of(cls, data: Any) -> Columns:
        """From a recipe's data section: `messages`, else `column` split at '+'."""
        return cls((data.messages,), True) if data.messages else cls(tuple(data.column.split("+")), False)

    def check(self, present: Iterable[str], *, where: str) -> None:
        """Raises DataError, naming the columns that are there, unless all of ours are."""
        present = list(present)
        for name in self.names:
            if name not in present:
                near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"{where} has no column {name!r}; it has {', '.join(map(repr, present))}."
                    f"{hint} Set data.column (or data.messages for chats)."
                )

    def document(self, row: Any, *, where: str) -> Document:
        """The row's document. Raises DataError for a missing column or one that is not text (or messages)."""
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {type(row).__name__}. Each row must be an object of columns.")
        self.check(row, where=where)
        read = _read_messages if self.chat else _read_text
        return Document(where, [read(row[name], where=f"{where}: column {name!r}") for name in self.names])


def _read_text(value: Any, *, where: str) -> str:
    if value is None:  # as `input` often is in instruction rows
        return ""
    if not isinstance(value, str):
        hint = " If these are chats, set data.messages." if isinstance(value, list) else ""
        raise DataError(f"{where} holds {type(value).__name__}, not text. Set data.column to texts.{hint}")
    return _encodable(value)


def _encodable(text: str) -> str:
    # JSON may hold half of a surrogate pair, which no tokenizer can encode: it becomes '?'.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _read_messages(value: Any, *, where: str) -> list[dict]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f"{where} holds {type(value).__name__}, not a list of messages {{role, content}} or "
            "{from, value}. For plain text, name it in data.column and leave data.messages out."
        )
    return [_read_message(message, where=where) for message in value]


def _read_message(message: dict, *, where: str) -> dict:
    # Columnar files give a message null for every key it lacks; chat templates ask whether a key is there.
    message = {key: entry for key, entry in message.items() if entry is not None}
    if "role" not in message and "from" in message:
        speaker, said = message.pop("from"), message.pop("value", "")
        message = {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": said, **message}
    role, content = message.get("role"), message.get("content", "")
    if role not in _ROLES or not isinstance(content, str):
        known = ", ".join(sorted(_ROLES | set(_SHAREGPT_ROLES)))
        raise DataError(
            f"{where}: a message has role {role!r} and content of type {type(content).__name__}. "
            f"The content must be text and the role one of {known}."
        )
    return {**message, "content": _encodable(content)}


def read_file(path: Path, columns: Columns) -> Iterator[Document]:
    """Every document of one file, in its order; a .txt file is one document. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        yield _read_text_file(path, columns)
        return
    for where, row in _parquet_rows(path, columns) if suffix == ".parquet" else _json_rows(path):
        yield columns.document(row, where=where)


def _read_text_file(path: Path, columns: Columns) -> Document:
    if columns.chat or len(columns.names) > 1:
        raise DataError(
            f"{path}: a .txt file is one plain document, it has no {'+'.join(columns.names)!r}. "
            "Use .jsonl or .parquet, or leave data.messages out and name one data.column."
        )
    try:
        return Document(str(path), [path.read_text(encoding="utf-8-sig")])
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it, e.g. by iconv -t UTF-8.") from error


def _parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns.check(file.schema_arrow.names, where=str(path))
            batches = file.iter_batches(batch_size=256, columns=list(columns.names))
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}. Fetch or write it again.") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if path.suffix.lower() == ".json" and start.startswith(b"["):
            for number, row in enumerate(_parse_json(file.read(), where=str(path)), start=1):
                yield f"{path} row {number}", row
            return
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if line.strip():
                yield where, _parse_json(line, where=where)


def _parse_json(text: bytes, *, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # malformed, or bytes that are not UTF-8
        raise DataError(
            f"{where} is not JSON: {error}. Each line must be one JSON object (a .json file may "
            "also be one list of objects); mend or remove it."
        ) from error


def iterate_documents(data: Any, sources: Sources, *, scratch: Path) -> Iterator[Document]:
    """Every document of the sources, once, in an order that `data.seed` decides.

    streaming=False: one permutation over all documents; those of files are first copied to a temporary file
    in the folder `scratch`, so that memory stays small. streaming=True: no more is read than is asked for
    and a shuffle buffer of `SHUFFLE_BUFFER` documents; the sources (all files being one) take turns.

    Raises DataError for anything that cannot be read.
    """
    columns = Columns.of(data)
    return _streamed(data, sources, columns) if data.streaming else _permuted(data, sources, columns, scratch)


def permutation(num: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """int64 [num]: the order of `num` things in an epoch. NumPy promises that the stream of RandomState never
    changes (that of default_rng may), so a run resumed elsewhere sees the same order."""
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num)


def _permuted(data: Any, sources: Sources, columns: Columns, scratch: Path) -> Iterator[Document]:
    parts: list = [_HubDocuments(_load_hub(data, name, columns), name, columns) for name in sources.hub]
    if sources.files:
        documents = chain.from_iterable(read_file(path, columns) for path in sources.files)
        progress = tqdm(documents, desc="reading", unit=" documents", delay=2, leave=False)
        parts.insert(0, _Spool(progress, scratch))
    ends = list(accumulate(len(part) for part in parts))
    order = permutation(ends[-1], seed=data.seed).tolist()
    places = ((bisect_right(ends, index), index) for index in order)
    return (parts[part][index - (ends[part - 1] if part else 0)] for part, index in places)


class _Spool:
    """Documents in a temporary file, read back by index: an exact shuffle without holding them in memory."""

    def __init__(self, documents: Iterable[Document], folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends = array("q", [0])
        for document in documents:
            # default=str: messages may carry metadata, such as times, that JSON has no type for.
            line = json.dumps([document.where, document.values], default=str).encode()
            self._ends.append(self._ends[-1] + self._file.write(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Document:
        self._file.seek(self._ends[index])
        return Document(*json.loads(self._file.read(self._ends[index + 1] - self._ends[index])))


@dataclass(frozen=True)
class _HubDocuments:
    """The documents, by index, of a downloaded hub dataset."""

    rows: Any  # datasets.Dataset
    name: str
    columns: Columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        return self.columns.document(self.rows[index], where=f"hub dataset {self.name!r} row {index}")


def _streamed(data: Any, sources: Sources, columns: Columns) -> Iterator[Document]:
    streams = [_hub_stream(data, name, columns) for name in sources.hub]
    if sources.files:
        streams.insert(0, _file_stream(data, sources.files, columns))
    while streams:  # one document of each in turn, until the last is empty
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


def _file_stream(data: Any, files: tuple[Path, ...], columns: Columns) -> Iterator[Document]:
    from datasets import IterableDataset

    # A list among the arguments is what datasets takes for the shards, whose order it shuffles too.
    arguments = {"files": list(files), "columns": columns}
    rows = IterableDataset.from_generator(_generate_rows, gen_kwargs=arguments)
    for row in rows.shuffle(seed=data.seed, buffer_size=SHUFFLE_BUFFER):
        yield Document(**row)


def _generate_rows(files: list[Path], columns: Columns) -> Iterator[dict]:
    for document in chain.from_iterable(read_file(path, columns) for path in files):
        yield {"where": document.where, "values": document.values}


def _hub_stream(data: Any, name: str, columns: Columns) -> Iterator[Document]:
    rows = _load_hub(data, name, columns).shuffle(seed=data.seed, buffer_size=SHUFFLE_BUFFER)
    with hub_errors(name, _HUB_ADVICE):
        for row in rows:
            yield columns.document(row, where=f"hub dataset {name!r}")


def _load_hub(data: Any, name: str, columns: Columns) -> Any:
    """datasets.Dataset, or IterableDataset when streaming, of `user/name` or `user/name@revision`."""
    rows = load_hub(name, data.name, data.split, streaming=data.streaming, advice=_HUB_ADVICE)
    with hub_errors(name, _HUB_ADVICE):
        if rows.column_names is None:  # a stream may not know before its first row
            return rows
        columns.check(rows.column_names, where=f"hub dataset {name!r}")
        return rows.select_columns(list(columns.names))
