"""A plain text file as rows of tokens to measure perplexity on."""

from pathlib import Path

import torch

from .errors import DataError


def read_text_rows(path: str | Path, tokenizer, *, length: int, count: int) -> torch.Tensor:
    """The file's text, tokenised as a whole and cut into rows: [N, length] int64, 1 <= N <= count; a rest is left out.

    The special tokens that the tokenizer adds stand at the start of the first row alone.
    Raises DataError where the file is missing, is not UTF-8 text, or fills no row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluate.text: {path} cannot be read as text: {error}. Give a plain text file.") from error
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    num_rows = min(count, len(ids) // length)
    if not num_rows:
        raise DataError(
            f"evaluate.text: {path} has {len(ids)} tokens, less than one row of evaluate.sequence_length ({length}); "
            "give a longer text or shorter rows"
        )
    return ids[: num_rows * length].view(num_rows, length)
