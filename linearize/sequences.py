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
from linearize.repeats import RepeatedPassages
from linearize.sources import permutation

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Sequences of tokens, by index, from one flat memory-mapped array.

    tokens: uint16 or uint32 [total]. document_starts: int64 [documents], sorted offsets into tokens. With
    packing, sequence r is tokens[r T : (r + 1) T] (a rest at the end is not used); else it is document r.
    repeated: the sequences, by their index, in which a passage is written a second time as they are read.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    sequence_length: int
    packing: bool
    pad_token_id: int
    repeated: RepeatedPassages | None = None

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length if self.packing else len(self.document_starts)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The sequences as int64 tensors [B, T]; labels are not shifted (the model shifts them).

        packing: input_ids, position_ids and labels. Position ids start at 0, and the label is -100, where a
        document begins and at the start of a row, so that no document is predicted from another. A row that
        repeats a passage is one text, whose positions count on, so that the distance may be the row's own length.
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

    def with_repeated_passages(self, share: float, *, seed: tuple[int, ...]) -> PackedSequences:
        """The same sequences, a share of which repeats a passage; see `RepeatedPassages`. Nothing is copied."""
        return replace(self, repeated=RepeatedPassages(share, seed) if share else None)

    def texts_of_rows(self) -> np.ndarray:
        """[rows] int64: how many texts each packed row holds; a rest of one is one."""
        row, place = np.divmod(self.document_starts, self.sequence_length)
        inside = row[(place > 0) & (row < len(self))]
        return 1 + np.bincount(inside, minlength=len(self))

    def _packed_row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first = row * self.sequence_length
        tokens = np.array(self.tokens[first : first + self.sequence_length], dtype=np.int64)
        begin, end = np.searchsorted(self.document_starts, [first, first + self.sequence_length])
        is_start = np.zeros(self.sequence_length, dtype=bool)
        is_start[self.document_starts[begin:end] - first] = True
        is_start[0] = True
        labels, places = np.where(is_start, IGNORED_LABEL, tokens), np.arange(self.sequence_length)
        if self._repeat(row, tokens, labels):
            return tokens, places, labels
        return tokens, places - np.maximum.accumulate(np.where(is_start, places, 0)), labels

    def _document(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        end = self.document_starts[row + 1] if row + 1 < len(self) else len(self.tokens)
        tokens = np.array(self.tokens[self.document_starts[row] : end], dtype=np.int64)
        labels = tokens.copy()
        self._repeat(row, tokens, labels)
        return tokens, labels

    def _repeat(self, row: int, tokens: np.ndarray, labels: np.ndarray) -> bool:
        """Writes a passage of the row a second time, if it is one that repeats any; whether it is."""
        passage = self.repeated.of_row(row, len(tokens)) if self.repeated else None
        if passage:
            passage.write(tokens, labels, ignored=IGNORED_LABEL)
        return passage is not None


def _pad(rows: list[tuple[np.ndarray, np.ndarray]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    shape = len(rows), max(len(tokens) for tokens, _ in rows)
    # The labels are not made of the ids: the pad token may be the end-of-text token, which is a target.
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED_LABEL)
    mask = torch.zeros_like(input_ids)
    for i, (tokens, targets) in enumerate(rows):
        input_ids[i, : len(tokens)], labels[i, : len(tokens)] = torch.from_numpy(tokens), torch.from_numpy(targets)
        mask[i, : len(tokens)] = 1
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


def text_bounds(position_ids: torch.Tensor, most: int) -> torch.Tensor | None:
    """[most + 1] int32: where each text of packed rows begins and the last one ends, the rows one after the other.

    position_ids [B, T]: a text begins where they do not go on by one, and every row. Places of texts that are not there
    are empty texts at the end; None if there are more than `most`. Waits for the device.
    """
    begins = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, [1, 0], value=True)
    starts = begins.flatten().nonzero()[:, 0]
    if len(starts) > most:
        return None
    return torch.nn.functional.pad(starts, [0, most + 1 - len(starts)], value=position_ids.numel()).int()


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
