"""`linearize bench speculative`: what assisted decoding gains, and that it changes no token.

transformers' own assisted generation, greedy, one row: the converted model drafts for its teacher, or its own text is
looked up for what follows (prompt lookup). Beside each, the same model decoding plainly.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from linearize.errors import DataError, LinearizeError


@dataclass(frozen=True)
class Row:
    """One way of decoding one prompt."""

    prompt: int
    what: str
    new: int  # new tokens
    seconds: float  # prefill included
    forwards: int  # of the model that decides
    drafted: int  # tokens it was offered
    tokens: torch.Tensor  # [N] the new tokens

    @property
    def accepted(self) -> float | None:
        """Share of the drafted tokens that were taken; a forward gives one token more than it takes."""
        return (self.new - self.forwards) / self.drafted if self.drafted else None


def bench_speculative(folder, *, against=None, text, prompts=(256, 1024), new=128, lookup=8, dtype="float32",
                      device="auto") -> list[Row]:  # fmt: skip
    """Decodes after the first tokens of `text`, with and without drafts; prints a table and returns its rows.

    Raises LinearizeError where assisted tokens differ from plain ones (in bfloat16 near ties may), DataError where
    the text is no text, or shorter than a prompt.
    """
    from linearize.loading import load, load_any

    try:
        words = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {text} cannot be read: {error}; give a plain text file") from error
    model, tokenizer = load(folder, dtype=dtype, device=device)
    ids = tokenizer(words, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] < max(prompts):
        raise DataError(f"{text} has {ids.shape[1]:,} tokens; a prompt of {max(prompts):,} needs as many")
    ways = [(model, "converted", {}), (model, "converted + prompt lookup", dict(prompt_lookup_num_tokens=lookup))]
    if against:
        teacher = load_any(against, dtype=dtype, device=device)[0]
        ways += [(teacher, "teacher", {}), (teacher, "teacher + converted as draft", dict(assistant_model=model))]
    rows = []
    for prompt in prompts:
        for decider, what, how in ways:
            if model.device.type == "cuda":  # kernels are built
                decode(decider, ids[:, :prompt], min(new, 8), what, how)
            rows.append(decode(decider, ids[:, :prompt], new, what, how))
            if how and not torch.equal(rows[-1].tokens, rows[-2].tokens):
                raise LinearizeError(
                    f"prompt {prompt}: {what} gives other tokens than {rows[-2].what}; in float32 that is a fault"
                )
    _print(rows)
    return rows


def decode(model, ids, new: int, what: str, how: dict) -> Row:
    """Greedy generation after ids [1, T], to `new` tokens, counting the model's forwards and what they were offered."""
    lengths = []

    def count(module, args, kwargs):
        lengths.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            pad_token_id=0, **how,
        )  # fmt: skip
        tokens = out[0, ids.shape[1] :].cpu()
        seconds = time.perf_counter() - start
    finally:
        hook.remove()
    drafted = sum(lengths) - ids.shape[1] - (len(lengths) - 1)  # each forward after the first begins with a known token
    return Row(ids.shape[1], what, len(tokens), seconds, len(lengths), drafted, tokens)


def _print(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Assisted decoding, prefill included; assisted tokens equal the plain ones")
    for column in ("prompt", "how", "tok/s", "over plain", "forwards", "drafted", "accepted"):
        table.add_column(column, justify="left" if column == "how" else "right")
    plain = {}
    for row in rows:
        speed = row.new / row.seconds
        base = plain.setdefault((row.prompt, row.what.split(" + ")[0]), speed)
        accepted = "-" if row.accepted is None else f"{row.accepted:.0%}"
        table.add_row(f"{row.prompt:,}", row.what, f"{speed:,.1f}", f"{speed / base:.2f}", f"{row.forwards:,}",
                      f"{row.drafted:,}", accepted)  # fmt: skip
    Console(width=110).print(table)
