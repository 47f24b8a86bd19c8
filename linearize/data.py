"""Training and held-out sequences: documents are tokenised, packed and kept on disk as memory-mapped tokens.

Whole documents go to one side: first to the held-out one until that is full, then to training. The result is
cached in a folder whose name is a hash of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from linearize.errors import DataError
from linearize.sequences import PackedSequences, TokenData
from linearize.sources import Columns, Document, Sources, find_sources, iterate_documents
from linearize.sources import find_package_files as find_package_files  # part of this module's interface
from linearize.whole_folder import create_folder

_FORMAT = 1  # of the cache; raise it when the same settings give other tokens
_BATCH_DOCUMENTS = 256  # tokenised at once; or fewer, of so many characters: few at first, as they may do, then more
_FIRST_CHARACTERS, _MOST_CHARACTERS = 1 << 16, 1 << 22


def build_token_data(
    data: Any, tokenizer: Any, *, num_train_sequences: int, cache_dir: Path, num_cached: int = 0
) -> TokenData:
    """Token data for the recipe's data section, from the cache if it is there, else read and tokenised.

    Documents get the special tokens that the tokenizer adds, and its end-of-text token at the end; those of
    fewer than 2 tokens, and any whose text is among the held-out ones, are left out. With packing they are
    laid end to end in rows of `data.sequence_length`; without, each is a row, cut to that length.

    `data.messages` names a column of chats, rendered by the tokenizer's chat template. A `data.column` of
    several columns joined by '+' (instruction+input+output) is rendered as a chat of one turn, the last one
    being the answer, if the tokenizer has a chat template; else its texts are joined by blank lines.

    num_train_sequences: reading stops there; with less text than that there are fewer sequences, and
    `batch_indices` repeats them. cache_dir: made if absent; several processes may call at once. num_cached: training
    sequences to cache, if more are needed of the same cache by others; what is returned does not depend on it.

    Raises DataError when the source cannot be read or cannot fill `data.held_out` sequences and one more.
    """
    assert num_train_sequences > 0
    sources = find_sources(data.source)
    num_cached = max(num_cached, num_train_sequences)
    key = _cache_key(data, sources, tokenizer, num_train_sequences=num_cached)
    folder = Path(cache_dir) / key
    if not folder.exists():
        limits = {"train": num_cached, "held_out": data.held_out}
        create_folder(folder, partial(_write_tokens, data, sources, tokenizer, limits))
    read = _read_tokens(folder, data, tokenizer)
    return replace(read, train=read.train.first(num_train_sequences))


# The text and the tokens of a document ----------------------------------------------------------------------


def _chat_renderer(data: Any, tokenizer: Any) -> Callable[[Document], str] | None:
    """What renders a document by the chat template; None when documents are plain text."""
    columns = Columns.of(data)
    if getattr(tokenizer, "chat_template", None) is None:
        if columns.chat:
            raise DataError(
                f"data.messages is {data.messages!r}, but the tokenizer has no chat template. "
                "Use the tokenizer of an instruction-tuned model, set tokenizer.chat_template, "
                "or name a column of plain text in data.column."
            )
        return None
    if not columns.chat and len(columns.names) == 1:
        return None

    from jinja2 import TemplateError

    def render(document: Document) -> str:
        messages = document.values[0] if columns.chat else _instruction_messages(document)
        if not messages:
            return ""
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError(
                f"{document.where}: the tokenizer's chat template refuses this chat: {error}. "
                f"Its roles are {[message['role'] for message in messages]}."
            ) from error

    return render


def _instruction_messages(document: Document) -> list[dict[str, str]]:
    question, answer = _join(document.values[:-1]), document.values[-1]
    if not question or not answer.strip():
        return []
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _join(texts: list[str]) -> str:
    return "\n\n".join(text for text in texts if text.strip())


def _tokenize(
    documents: Iterable[Document], data: Any, tokenizer: Any, counts: Counter
) -> Iterator[tuple[str, list[int]]]:
    """(text, ids with the end-of-text token) of every document that is not empty."""
    eos_id, eos_text = tokenizer.eos_token_id, tokenizer.eos_token
    chat = _chat_renderer(data, tokenizer)
    for batch in _text_batches(documents, chat or (lambda document: _join(document.values)), counts):
        # A chat template writes the special tokens itself. verbose=False: no warning that a text is long.
        encoded = tokenizer(batch, add_special_tokens=chat is None, verbose=False)["input_ids"]
        for text, ids in zip(batch, encoded, strict=True):
            # Templates often end with the end-of-text token and a line break.
            ended = ids[-1:] == [eos_id] or (chat and eos_text and text.rstrip().endswith(eos_text))
            yield text, ids if ended or eos_id is None else [*ids, eos_id]


def _text_batches(
    documents: Iterable[Document], render: Callable[[Document], str], counts: Counter
) -> Iterator[list[str]]:
    batch, num_characters, limit = [], 0, _FIRST_CHARACTERS
    for document in documents:
        counts["documents"] += 1
        text = render(document)
        if not text.strip():
            counts["empty"] += 1
            continue
        batch.append(text)
        num_characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or num_characters >= limit:
            yield batch
            batch, num_characters, limit = [], 0, min(2 * limit, _MOST_CHARACTERS)
    if batch:
        yield batch


# The cache --------------------------------------------------------------------------------------------------


def _cache_key(data: Any, sources: Sources, tokenizer: Any, *, num_train_sequences: int) -> str:
    settings = [data.name, data.split, data.column, data.messages, data.sequence_length, data.packing]
    settings += [data.held_out, data.streaming, data.seed, num_train_sequences]
    content = [_FORMAT, sources.identity(), settings, _tokenizer_content(tokenizer)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _tokenizer_content(tokenizer: Any) -> list:
    """All that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str())
        for leftover_of_last_call in ("truncation", "padding"):
            content.pop(leftover_of_last_call, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return [type(tokenizer).__name__, content, special]


def _write_tokens(data: Any, sources: Sources, tokenizer: Any, limits: dict[str, int], folder: Path) -> None:
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 65535 else "uint32"
    documents = iterate_documents(data, sources, scratch=folder)
    sides = {name: _Side(folder / name, data, dtype, limit=limit) for name, limit in limits.items()}
    counts = Counter()
    try:
        _distribute(_tokenize(documents, data, tokenizer, counts), **sides, counts=counts)
    finally:
        for side in sides.values():
            side.close()
    _check_enough(**sides, sources=sources, data=data, counts=counts)
    meta = {
        "dtype": dtype,
        "num_tokens": {name: side.num_tokens for name, side in sides.items()},
        "num_documents": {name: len(side.starts) for name, side in sides.items()},
        "description": _describe(**sides, sources=sources),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _Side:
    """Train or held-out tokens while they are written: `path`.tokens and, on close, `path`.starts."""

    def __init__(self, path: Path, data: Any, dtype: str, *, limit: int):
        self._path, self._file, self._dtype = path, path.with_suffix(".tokens").open("wb"), dtype
        self._length, self._packing = data.sequence_length, data.packing
        self.limit = limit  # sequences asked for
        self.starts, self.num_tokens = array("q"), 0

    @property
    def num_sequences(self) -> int:
        return self.num_tokens // self._length if self._packing else len(self.starts)

    @property
    def is_full(self) -> bool:
        return self.num_sequences >= self.limit

    def add(self, ids: list[int]) -> int:
        """Append a document, cut to what still fits. Returns the number of sequences this completed."""
        before = self.num_sequences
        room = self.limit * self._length - self.num_tokens if self._packing else self._length
        self.starts.append(self.num_tokens)
        np.asarray(ids[:room], dtype=self._dtype).tofile(self._file)
        self.num_tokens += min(len(ids), room)
        return self.num_sequences - before

    def close(self) -> None:
        self._file.close()
        np.asarray(self.starts, dtype=np.int64).tofile(self._path.with_suffix(".starts"))

    def __str__(self) -> str:
        documents, tokens = len(self.starts), self.num_tokens
        return f"{self.num_sequences:,} sequences ({documents:,} documents, {tokens:,} tokens)"


def _distribute(
    tokenized: Iterable[tuple[str, list[int]]], *, train: _Side, held_out: _Side, counts: Counter
) -> None:
    held_out_texts = set()
    total = train.limit + held_out.limit
    with tqdm(total=total, desc="tokenizing", unit=" sequences", delay=2, leave=False) as progress:
        for text, ids in tokenized:
            if len(ids) < 2:  # nothing to predict
                counts["short"] += 1
            elif not held_out.is_full:
                held_out_texts.add(text)
                progress.update(held_out.add(ids))
            elif text in held_out_texts:
                counts["repeated"] += 1
            else:
                progress.update(train.add(ids))
            if train.is_full:
                return


def _check_enough(*, train: _Side, held_out: _Side, sources: Sources, data: Any, counts: Counter) -> None:
    if counts["documents"] == counts["empty"]:
        raise DataError(
            f"{sources}: all {counts['documents']} documents are empty. Check the files, "
            f"data.column ({data.column!r}) and data.messages ({data.messages!r})."
        )
    if train.num_sequences > 0:  # so the held-out side, which comes first, is full
        return
    raise DataError(
        f"{sources} is too short for {data.held_out} held-out sequences and 1 to train on, of "
        f"{data.sequence_length} tokens: {counts['documents']} documents gave {held_out} held out and "
        f"{train} to train on. Left out: {counts['empty']} empty, {counts['short']} of fewer than 2 tokens, "
        f"{counts['repeated']} that repeat a held-out one. Each document, such as a .txt file, goes to one "
        "side only. Add text, cut it into more documents, or lower data.held_out or data.sequence_length."
    )


def _describe(*, train: _Side, held_out: _Side, sources: Sources) -> str:
    epochs = train.limit / train.num_sequences
    repeats = f" ({train.limit:,} asked for: {epochs:.1f} epochs)" if epochs > 1 else ""
    return f"{sources}: {train} to train on{repeats}, {held_out} held out"


def _read_tokens(folder: Path, data: Any, tokenizer: Any) -> TokenData:
    # The end-of-text token serves where there is no pad token: the mask and the labels say what is padding.
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(token for token in ids if token is not None)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sides = {}
        for name in ("train", "held_out"):
            starts = _map(folder / f"{name}.starts", "int64", num=meta["num_documents"][name])
            tokens = _map(folder / f"{name}.tokens", meta["dtype"], num=meta["num_tokens"][name])
            sides[name] = PackedSequences(tokens, starts, data.sequence_length, data.packing, pad_token_id)
    except (OSError, ValueError) as error:
        raise DataError(f"the token cache {folder} is damaged ({error}). Delete it.") from error
    return TokenData(**sides, description=meta["description"])


def _map(path: Path, dtype: str, *, num: int) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r", shape=num) if num else np.empty(0, dtype=dtype)
