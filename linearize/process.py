"""`linearize process`: one answer a row of a file, many rows at once; a slot is filled again as soon as its row ends.

Rows are answered in any order and written in theirs. What is on the disk says where to go on: after a kill the
same command loses no row and repeats none. A bad row goes to OUT.errors.jsonl with the reason.

B rows decoded at once (slots)
"""

import heapq
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .decoding import CHECK_EVERY, Decoder
from .errors import DataError, LinearizeError
from .loading import load
from .sampling import Sampling
from .state import State, read


@dataclass
class _Slot:
    """A row that is being answered."""

    number: int
    row: dict
    answer: list = field(default_factory=list)


def process(folder, source, target, *, template: str = "{text}", chat: bool = False, prefix: str = "", batch: int = 32,
            max_new_tokens: int = 64, sampling: Sampling | None = None, field_name: str = "output",
            device: str = "auto", mode: str = "auto") -> dict:  # fmt: skip
    """Answers every row of `source` (.jsonl, .parquet or a dataset's folder) into the .jsonl file `target`.

    template: the prompt, with a row's columns in braces. prefix: text before every prompt, read once. An output
    line is the row with its number as "row" and the answer under `field_name`. Returns counts. Raises DataError
    for a file or template that does no row any good.
    """
    target, errors = Path(target), Path(f"{target}.errors.jsonl")
    rows = _read_rows(source)
    model, tokenizer = load(folder, device=device)
    start = _resume(target, errors)
    before = None
    if prefix:
        before = read(model, tokenizer(prefix, return_tensors="pt").input_ids)
    decoder = Decoder(model, batch=batch, sampling=sampling, mode=mode, pad=tokenizer.pad_token_id)
    work = _Work(model, tokenizer, decoder, before, template, chat, max_new_tokens)
    counts, began = {"rows": 0, "errors": 0, "tokens": 0, "resumed_at": start}, time.perf_counter()
    with target.open("a", encoding="utf-8") as good, errors.open("a", encoding="utf-8") as bad:
        for number, row, result in _in_order(work.run(_from(rows, start)), start):
            if isinstance(result, LinearizeError):
                counts["errors"] += 1
                _write(bad, {"row": number, "error": str(result), "input": row})
            else:
                counts["rows"] += 1
                counts["tokens"] += len(result)
                text = tokenizer.decode(result, skip_special_tokens=True)
                _write(good, {**row, "row": number, field_name: text})
            seconds = time.perf_counter() - began
            print(f"\r{number + 1:,} rows, {counts['tokens'] / seconds:,.0f} tokens/s", end="", flush=True)
    print(f"\n{counts['rows']:,} rows answered, {counts['errors']:,} errors; {target}")
    if not counts["errors"] and not errors.stat().st_size:
        errors.unlink()
    return counts


class _Work:
    """The slots and what fills them."""

    def __init__(self, model, tokenizer, decoder: Decoder, before: State | None, template, chat, max_new_tokens):
        self.model, self.tokenizer, self.decoder, self.before = model, tokenizer, decoder, before
        self.template, self.chat, self.max_new_tokens = template, chat, max_new_tokens
        self.ends = set(decoder.ends.tolist())
        self.slots: list[_Slot | None] = [None] * len(decoder.token)

    def run(self, rows: Iterator) -> Iterator:
        """Yields (number, row, new token ids or a LinearizeError) as rows end."""
        while True:
            for index, slot in enumerate(self.slots):
                while slot is None and (numbered := next(rows, None)) is not None:
                    number, row = numbered
                    try:
                        state = self._read(row)
                    except LinearizeError as error:
                        yield number, row, error
                        continue
                    slot = self.slots[index] = _Slot(number, row)
                    self._add(slot, [self.decoder.replace(index, state, seed=number)])
                    if self._ended(slot):
                        yield number, row, slot.answer
                        slot = self.slots[index] = None
            if not any(self.slots):
                return
            tokens = self.decoder.decode_n(CHECK_EVERY).tolist()
            for index, slot in enumerate(self.slots):
                if slot is not None:
                    self._add(slot, tokens[index])
                    if self._ended(slot):
                        self.slots[index] = None
                        yield slot.number, slot.row, slot.answer

    def _add(self, slot: _Slot, tokens) -> None:
        for token in tokens:
            if not self._ended(slot):
                slot.answer.append(token)

    def _ended(self, slot: _Slot) -> bool:
        return len(slot.answer) >= self.max_new_tokens or bool(slot.answer) and slot.answer[-1] in self.ends

    def _read(self, row) -> State:
        """The state after a row's prompt. Raises DataError for a row that makes none."""
        if not isinstance(row, dict):
            raise DataError(str(row) if isinstance(row, str) else f"not an object but a {type(row).__name__}")
        try:
            prompt = self.template.format_map(row)
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            columns = ", ".join(map(str, row))
            raise DataError(f"the template asks for {error}; the row's columns are {columns}") from error
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        else:
            options = {"add_special_tokens": self.before is None}
            ids = self.tokenizer(prompt, return_tensors="pt", **options).input_ids
        if not prompt.strip() or ids.shape[1] == 0:
            raise DataError("the prompt is empty")
        longest = getattr(self.model.config, "max_position_embeddings", None)
        past = 0 if self.before is None else self.before.tokens.shape[1]
        if longest and past + ids.shape[1] + self.max_new_tokens > longest:
            raise DataError(
                f"{past + ids.shape[1]} tokens and {self.max_new_tokens} new ones are more than the model's "
                f"{longest} positions"
            )
        return read(self.model, ids.long(), state=self.before)


def _in_order(results: Iterator, first: int) -> Iterator:
    """The same results by number: one waits for those before it."""
    waiting, due = [], first
    for result in results:
        heapq.heappush(waiting, (result[0], result))
        while waiting and waiting[0][0] == due:
            yield heapq.heappop(waiting)[1]
            due += 1
    assert not waiting, "a row got lost"


def _from(rows, start: int) -> Iterator:
    return ((number, row) for number, row in enumerate(rows) if number >= start)


def _read_rows(source) -> Iterator:
    """Rows in order; a line that is no JSON object comes as the text that says so."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _json_lines(path)
    import datasets

    if path.suffix == ".parquet" and path.is_file():
        return iter(datasets.Dataset.from_parquet(str(path)))
    if (path / "dataset_info.json").is_file():
        return iter(datasets.load_from_disk(str(path)))
    raise DataError(f"{source}: no such .jsonl or .parquet file, nor a folder made by Dataset.save_to_disk")


def _json_lines(path: Path) -> Iterator:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                yield "an empty line"
                continue
            try:
                yield json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                yield f"not JSON: {error}"


def _resume(target: Path, errors: Path) -> int:
    """The first row that is not on the disk. Cuts off a line that was being written when the run was killed.

    Raises DataError for files that this command did not write, which stay as they are.
    """
    good, bad = _numbers(target), _numbers(errors)
    start = len(good) + len(bad)
    if sorted(good + bad) != list(range(start)) or sorted(good) != good:
        raise _foreign(target)
    for path in (target, errors):
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    return start


def _numbers(path: Path) -> list[int]:
    """The rows in the whole lines of an output file."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole and text and not text.startswith(b"{"):
        raise _foreign(path)
    try:
        return [int(json.loads(line)["row"]) for line in whole.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise _foreign(path) from error


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} holds what this command did not write; give another output file")


def _write(file, row: dict) -> None:
    """One line, on the disk before the next row's is: files never run ahead of each other by more than the last."""
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    file.flush()
    os.fsync(file.fileno())
