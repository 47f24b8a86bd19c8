"""`linearize process`: one answer a row of a file, many rows at once; a slot is filled again as soon as its row ends.

Rows are answered in any order and written in theirs. What is on the disk says where to go on: after a kill the
same command loses no row and repeats none. A bad row goes to OUT.errors.jsonl with the reason. Under
`accelerate launch` each process takes every n-th row, and the first joins what all have written.

B rows decoded at once (slots)
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from .decoding import CHECK_EVERY, Decoder, has_stop
from .errors import LinearizeError
from .kept_softmax import has_softmax
from .loading import load
from .process_files import BrokenRow, Output, is_from_hub, open_rows
from .process_prompts import Prompts, check_template
from .sampling import Sampling
from .state import TOKENS_AT_ONCE, State, read

WAIT = timedelta(days=30)  # of a process for the others, whose rows may be longer
MAX_BATCH = {"cpu": 32, "cuda": 1024}
COMPILED_FROM = 15_000  # steps: compiling 32 layers takes 40 s and saves 2 to 3 ms a step
LEAST_SHARED = 64  # tokens that prompts must share for these to be read apart


@dataclass
class _Slot:
    """A row that is being answered."""

    number: int
    row: dict
    answer: list = field(default_factory=list)


def process(folder, source, target, *, name: str | None = None, split: str | None = None, template: str = "{text}",
            chat: bool = False, prefix: str = "", batch: int | None = None, max_new_tokens: int = 64,
            max_length: int | None = None, sampling: Sampling | None = None, stop: Sequence[str] = (),
            field_name: str = "output", device: str = "auto", mode: str = "auto",
            disable_compile: bool | None = None) -> dict:  # fmt: skip
    """Answers every row of `source` (.jsonl, .parquet, a dataset's folder or hub id) into the .jsonl file `target`.

    name, split: of a hub dataset, which of its configurations and splits (by default "train").
    template: the prompt, with a row's columns in braces. prefix: text before every prompt, read once; in a chat it is
    in the message. batch: None takes what half of the free memory holds. max_length: the most tokens of a row,
    prefix, prompt and answer; longer rows are errors. None: what the longest row needs, for which all prompts are
    counted first where the model keeps softmax, whose memory grows with it. stop: an answer ends with the token that
    completes one of these texts.
    disable_compile: of `Decoder`; None: compiled on a GPU where there may be COMPILED_FROM steps or more. An output
    line is the row with its number as "row" and the answer under `field_name`, a column that no row may have. Returns
    this process's counts. Raises DataError for a file or template that does no row any good.
    """
    rows = open_rows(source, name=name, split=split)
    total = len(rows)
    check_template(template, rows, answer=field_name)
    processes, rank, world = _processes(device)
    from_hub = is_from_hub(source)
    output = Output(target, source=None if from_hub else source, rank=rank, world=world)
    with closing(output):
        where = [str(source), name, split] if from_hub else str(Path(source).resolve())
        settings = dict(model=str(Path(folder).resolve()), source=where, template=template,
                        chat=chat, prefix=prefix, max_new_tokens=max_new_tokens, max_length=max_length,
                        sampling=asdict(sampling or Sampling()), stop=list(stop), field_name=field_name)  # fmt: skip
        output.check_settings(settings, rows=total, first=rank == 0)
        if chat:  # a chat begins with its template; what all of them begin with is found, and read once
            template, prefix = prefix.replace("{", "{{").replace("}", "}}") + template, ""
        model, tokenizer = load(folder, device=processes.device if processes else device)
        before = read(model, tokenizer(prefix, return_tensors="pt").input_ids) if prefix else None
        prompts = Prompts(model, tokenizer, before, template=template, chat=chat, max_new_tokens=max_new_tokens,
                          max_length=max_length, answer=field_name)  # fmt: skip

        def left():
            return ((n, row) for n, row in enumerate(rows) if n % world == rank and not output.is_done(n))

        if prompts.max_length is None and has_softmax(model):
            prompts.max_length = prompts.longest(row for _, row in left()) + max_new_tokens
        decoder = _make_decoder(model, prompts, rows=-(-total // world), batch=batch, sampling=sampling, mode=mode,
                                disable_compile=disable_compile)  # fmt: skip
        if rank == 0 and decoder.compile_seconds is not None:
            print(f"the decode step was compiled in {decoder.compile_seconds:.0f} s")
        work = _Work(model, decoder, before, prompts, stop)
        done = sum(output.is_done(n) for n in range(rank, total, world))
        with tqdm(total=len(range(rank, total, world)), initial=done, unit="row", disable=rank > 0) as bar:
            counts = _answer(work, left(), output, bar, tokenizer, field_name)
    if processes:
        processes.wait_for_everyone()
        processes.destroy_process_group()
    if rank == 0:
        output.finish()
        print(f"{counts['rows']:,} rows answered, {counts['errors']:,} errors, {counts['tokens_s']:,.0f} tokens/s; "
              f"{target}" + (f" (the first of {world} processes)" if world > 1 else ""))  # fmt: skip
        if output.errors.exists():
            print(f"rows that could not be answered, and why: {output.errors}")
    return {**counts, "resumed_at": output.start}


def _answer(work, left: Iterator, output: Output, bar, tokenizer, field_name: str) -> dict:
    """Writes an answer or error for each (number, row), in order, and counts them."""
    counts, began = {"rows": 0, "errors": 0, "tokens": 0}, time.perf_counter()
    for number, row, result in _in_order(work.run, left):
        if isinstance(result, LinearizeError):
            counts["errors"] += 1
            given = row.line if isinstance(row, BrokenRow) else row
            output.write_error({"row": number, "error": str(result), "input": given})
        else:
            counts["rows"] += 1
            counts["tokens"] += len(result)
            text = tokenizer.decode(result, skip_special_tokens=True)
            output.write({**row, "row": number, field_name: text})
        counts["tokens_s"] = counts["tokens"] / (time.perf_counter() - began)
        bar.set_postfix_str(f"{counts['tokens_s']:,.0f} tokens/s", refresh=False)
        bar.update()
    return {"tokens_s": 0.0, **counts}


def _processes(device: str):
    """(accelerate's PartialState or None, this process's number, how many there are)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None, 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=WAIT)
    return state, state.process_index, state.num_processes


def _make_decoder(model, prompts: Prompts, *, rows: int, batch, disable_compile, sampling, mode) -> Decoder:
    """One for so many rows. The rest as given to `process`."""
    batch = batch or pick_batch(model, rows=rows, length=prompts.max_length)
    if disable_compile is None and -(-rows // batch) * prompts.max_new_tokens < COMPILED_FROM:
        disable_compile = True
    return Decoder(
        model, batch=batch, sampling=sampling, mode=mode, pad=prompts.tokenizer.pad_token_id,
        max_length=prompts.max_length, disable_compile=disable_compile,
    )  # fmt: skip


def pick_batch(model, *, rows: int, length: int | None = None) -> int:
    """The most rows at once, a power of two, that half of the free memory holds; no more than there are rows need.

    A row costs its state, of `length` tokens where softmax has been kept, three times (in use, being replaced, being
    read) and logits in float32 four times.
    """
    state = read(model, torch.zeros(1, 1, dtype=torch.long)).num_bytes(length)
    each = 3 * state + 4 * 4 * model.config.get_text_config().vocab_size
    batch, limit = 1, MAX_BATCH.get(model.device.type, MAX_BATCH["cpu"])
    while batch < min(limit, rows) and 2 * batch * each <= free_bytes(model.device) / 2:
        batch *= 2
    return batch


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


class _Work:
    """The slots and what fills them."""

    def __init__(self, model, decoder: Decoder, before: State | None, prompts: Prompts, stop: Sequence[str]):
        self.model, self.decoder, self.before, self.prompts, self.stop = model, decoder, before, prompts, stop
        self.max_new_tokens, self.ends = prompts.max_new_tokens, set(decoder.ends.tolist())
        self.slots: list[_Slot | None] = [None] * len(decoder.token)
        self.shared, self.after_shared = [], None  # token ids after `before` that prompts begin with

    def run(self, rows: Iterator) -> Iterator:
        """Yields (number, row, new token ids or a LinearizeError) as rows end."""
        while True:
            while (free := self.slots.count(None)) and (some := list(islice(rows, free))):
                yield from self._fill(some)
            if not any(self.slots):
                return
            tokens = self.decoder.decode_n(CHECK_EVERY).tolist()
            for index, slot in enumerate(self.slots):
                if slot is not None:
                    yield from self._add(index, tokens[index])

    def _fill(self, rows) -> Iterator:
        """Reads the prompts of (number, row), those of like length together, into free slots."""
        prompts = []
        for number, row in rows:
            try:
                prompts.append((self.prompts.tokens(row), _Slot(number, row)))
            except LinearizeError as error:
                yield number, row, error
        self._find_shared([ids for ids, _ in prompts])
        for group, state in self._read(prompts):
            slots = [slot for _, slot in group]
            free = [i for i, slot in enumerate(self.slots) if slot is None][: len(slots)]
            first = self.decoder.replace_rows(
                free, state, seeds=[slot.number for slot in slots], max_new_tokens=self.max_new_tokens
            )
            for index, slot, token in zip(free, slots, first, strict=True):
                self.slots[index] = slot
                yield from self._add(index, [token])

    def _find_shared(self, prompts: list[list[int]]) -> None:
        """Reads what many prompts begin with; less of it when a prompt shares only a part that is still worth it."""
        if self.shared:
            parts = [os.path.commonprefix([self.shared, ids[:-1]]) for ids in prompts]
            same = min([self.shared, *(part for part in parts if len(part) >= LEAST_SHARED)], key=len)
        else:
            same = os.path.commonprefix([ids[:-1] for ids in prompts])
        if len(same) >= LEAST_SHARED and same != self.shared:
            self.shared, self.after_shared = same, read(self.model, torch.tensor([same]), state=self.before)

    def _read(self, prompts) -> Iterator[tuple[list, State]]:
        """(some of the prompts, the state after each), those of like length together.

        After a state only prompts of one length: padding behind what a window sees would narrow it.
        """
        whole, rest, num = [], [], len(self.shared)
        for ids, slot in prompts:
            shares = num and len(ids) > num and ids[:num] == self.shared
            rest.append((ids[num:], slot)) if shares else whole.append((ids, slot))
        for some, state in ((whole, self.before), (rest, self.after_shared)):
            for group in groups_of_like_length(some, most=2 if state is None else 1):
                ids, mask = _pad_left([ids for ids, _ in group], self.decoder.pad.item())
                yield group, read(self.model, ids, mask, state=state)

    def _add(self, index: int, tokens) -> Iterator:
        """Adds new tokens to a slot's answer; yields it, and frees the slot, where it has ended."""
        slot, tokenizer = self.slots[index], self.prompts.tokenizer
        stops = has_stop(slot.answer + tokens, self.stop, tokenizer, new=len(tokens))  # one look for all of them
        for token in tokens:
            slot.answer.append(token)
            if (
                token in self.ends
                or len(slot.answer) >= self.max_new_tokens
                or (stops and has_stop(slot.answer, self.stop, tokenizer))
            ):
                self.slots[index] = None
                yield slot.number, slot.row, slot.answer
                return


def groups_of_like_length(prompts, *, most: float = 2) -> Iterator[list]:
    """(ids, ...) by length, in groups of a bounded number of tokens, whose longest is `most` times the shortest."""
    group = []
    for prompt in sorted(prompts, key=lambda p: len(p[0])):
        length = len(prompt[0])
        if group and (length > most * len(group[0][0]) or length * (len(group) + 1) > TOKENS_AT_ONCE):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _pad_left(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [B, T] int64."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _in_order(run, rows: Iterator) -> Iterator:
    """The results of run(rows) in the order in which it took the rows: one waits for those before it."""
    due, waiting = deque(), {}

    def noted():
        for number, row in rows:
            due.append(number)
            yield number, row

    for result in run(noted()):
        waiting[result[0]] = result
        while due and due[0] in waiting:
            yield waiting.pop(due.popleft())
    assert not due, "a row got lost"
