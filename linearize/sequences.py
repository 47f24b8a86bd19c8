"""Sequences of tokens by index, as batches, and which of them a step of training takes.

B batch, T sequence length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from linearize.errors import DataError
from linearize.sources import permutation

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Sequences of tokens, by index, from one flat memory-mapped array.

    tokens: uint16 or uint32 [total]. document_starts: int64 [documents], sorted offsets into tokens. With
    packing, sequence r is tokens[r T : (r + 1) T] (a rest at the end is not used); else it is document r.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    sequence_length: int
    packing: bool
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length if self.packing else len(self.document_starts)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The sequences as int64 tensors [B, T]; labels are not shifted (the model shifts them).

        packing: input_ids, position_ids and labels. Position ids start at 0, and the label is -100, where a
        document begins and at the start of a row, so that no document is predicted from another.
        else: input_ids, attention_mask and labels; T is the longest document of the batch, padding is on the
        right and has label -100. Raises IndexError.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sequence {index} of {len(self)}")
        rows = [self._packed_row(int(i)) if self.packing else self._document(int(i)) for i in indices]
        if not self.packing:
            return _pad(rows, pad_token_id=self.pad_token_id)
        names = ("input_ids", "position_ids", "labels")
        return {name: torch.from_numpy(np.stack([row[i] for row in rows])) for i, name in enumerate(names)}

    def first(self, count: int) -> PackedSequences:
        """The first `count` sequences, as if reading had stopped there; all, where there are no more."""
        if count >= len(self):
            return self
        end = count * self.sequence_length if self.packing else int(self.document_starts[count])
        starts = self.document_starts[: np.searchsorted(self.document_starts, end)]
        return replace(self, tokens=self.tokens[:end], document_starts=starts)

    def at(self, length: int) -> PackedSequences:
        """The same tokens in rows of `length`; what does not fill one at the end is not used. Only with packing."""
        assert self.packing
        return replace(self, sequence_length=length)

    def _packed_row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first = row * self.sequence_length
        tokens = np.array(self.tokens[first : first + self.sequence_length], dtype=np.int64)
        begin, end = np.searchsorted(self.document_starts, [first, first + self.sequence_length])
        is_start = np.zeros(self.sequence_length, dtype=bool)
        is_start[self.document_starts[begin:end] - first] = True
        is_start[0] = True
        places = np.arange(self.sequence_length)
        positions = places - np.maximum.accumulate(np.where(is_start, places, 0))
        return tokens, positions, np.where(is_start, IGNORED_LABEL, tokens)

    def _document(self, row: int) -> np.ndarray:
        end = self.document_starts[row + 1] if row + 1 < len(self) else len(self.tokens)
        return np.array(self.tokens[self.document_starts[row] : end], dtype=np.int64)


def _pad(rows: list[np.ndarray], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = 1
    # From the mask, not from the id: the pad token may be the end-of-text token, which is a target.
    labels = torch.where(mask.bool(), input_ids, IGNORED_LABEL)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True, eq=False)
class TokenData:
    """Sequences to train on, sequences never trained on, and their counts in words."""

    train: PackedSequences
    held_out: PackedSequences
    description: str

    def at(self, length: int, *, name: str) -> TokenData:
        """The same text in rows of `length`, on both sides.

        Raises DataError, which calls the setting `name`, where a side does not fill one row.
        """
        sides = {"train": self.train.at(length), "held_out": self.held_out.at(length)}
        for side, sequences in sides.items():
            if not len(sequences):
                raise DataError(
                    f"{name}: {length} tokens are more than the {len(sequences.tokens):,} of the "
                    f"{side.replace('_', '-')} text. Lower it, or raise data.held_out or the tokens to train on."
                )
        return replace(self, **sides)


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model's forward takes of a batch of `PackedSequences`: everything but the labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def batch_indices(num_sequences: int, *, batch_size: int, step: int, seed: int) -> list[int]:
    """The sequences of a step's batch, from the arguments alone: a run resumes exactly, on any number of
    processes. Every epoch is a seeded permutation of all sequences; a batch may span two (or more) epochs."""
    assert num_sequences > 0 and batch_size > 0 and step >= 0
    places = range(step * batch_size, (step + 1) * batch_size)
    return [
        int(_epoch(num_sequences, seed, place // num_sequences)[place % num_sequences]) for place in places
    ]


@lru_cache(maxsize=2)
def _epoch(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num_sequences, seed=seed, epoch=epoch)
