"""The prompts of `linearize process`: a row's columns through the template, as token ids that fit."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter

from tqdm import tqdm

from .errors import DataError, ModelError
from .lengths import max_positions
from .process_files import BrokenRow
from .state import State


@dataclass
class Prompts:
    """Makes prompts of rows that follow `before` (None: nothing) and leave room for max_new_tokens.

    max_length: the most tokens of a row, those of `before` and of the answer included; None: the model's positions.
    answer: the answers' column, which no row may have. Raises ModelError for chat without a template.
    """

    model: object
    tokenizer: object
    before: State | None
    template: str
    chat: bool
    max_new_tokens: int
    max_length: int | None = None
    answer: str | None = None

    def __post_init__(self):
        if self.chat:
            check_chat(self.tokenizer)

    def tokens(self, row) -> list[int]:
        """The token ids of a row's prompt. Raises DataError for a row that makes none, or too many."""
        # as in training text, half of a surrogate pair, which no tokenizer can encode, becomes '?'
        prompt = fill(self.template, row, answer=self.answer).encode(errors="replace").decode()
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True).input_ids
        else:
            ids = self.tokenizer(prompt, add_special_tokens=self.before is None).input_ids
        if not prompt.strip() or len(ids) == 0:
            raise DataError("the prompt is empty")
        self._check_length(len(ids))
        return ids

    @property
    def past(self) -> int:
        return 0 if self.before is None else self.before.tokens.shape[1]

    def _check_length(self, length: int) -> None:
        positions = max_positions(self.model)
        for most, what in ((positions, "the model's {:,} positions"), (self.max_length, "the {:,} of max_length")):
            if most and self.past + length + self.max_new_tokens > most:
                raise DataError(
                    f"{self.past + length:,} tokens and {self.max_new_tokens:,} new ones are more than "
                    + what.format(most)
                )

    def longest(self, rows: Iterable) -> int:
        """Tokens of the longest prompt that rows make, with what it follows; rows that make none do not count."""
        longest = self.past + 1
        for row in tqdm(rows, desc="finding the longest prompt", unit="row", leave=False):
            try:
                longest = max(longest, self.past + len(self.tokens(row)))
            except DataError:
                continue  # it is reported when its turn comes
        return longest


def check_chat(tokenizer) -> None:
    if tokenizer.chat_template is None:
        raise ModelError("this model's tokenizer has no chat template; leave --chat out")


def columns_of(template: str) -> list[str]:
    """The columns that a template names. Raises DataError for one that is none."""
    try:
        return [re.split(r"[.\[]", name)[0] for _, name, *_ in Formatter().parse(template) if name]
    except ValueError as error:
        raise DataError(f"the template {template!r} is none: {error}. {{{{ and }}}} stand for braces.") from error


def fill(template: str, row, *, answer: str | None = None) -> str:
    """The template with a row's columns. Raises DataError for a row that lacks one, is none, or has one `answer`."""
    if isinstance(row, BrokenRow):
        raise DataError(row.reason)
    if not isinstance(row, dict):
        raise DataError(f"not an object but a {type(row).__name__}")
    if answer in row:
        raise DataError(f"it has a column {answer!r} already, which the answer would replace; name that by --field")
    given = {name: row[name] for name in columns_of(template) if name in row}
    if null := [name for name, value in given.items() if value is None]:
        raise DataError(f"the column {null[0]!r} is null")
    if given and all(isinstance(value, str) and not value.strip() for value in given.values()):
        raise DataError(f"there is no text in {', '.join(map(repr, given))}")
    try:
        return template.format_map(row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError) as error:
        columns = ", ".join(map(str, row))
        raise DataError(f"the template asks for {error}; the row's columns are {columns}") from error


def check_template(template: str, rows: Iterable, *, answer: str | None = None) -> None:
    """Raises DataError for a template that is none, or that fits no row; reads rows up to the first that it fits."""
    columns_of(template)
    if answer == "row":
        raise DataError("--field row: the number of a row has that name; choose another")
    first = None
    for row in rows:
        try:
            fill(template, row, answer=answer)
        except DataError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise DataError(f"the template fits no row, so nothing was done. The first row: {first}. See --template.")
