"""Choosing the next token on the device, without the host waiting: every operation can be in a CUDA graph.

The filters are transformers' own (temperature, top-k, top-p, min-p, in its order). Each row draws one number
from a hash of its seed and its count of tokens, so that a row's samples do not depend on its batch.

B batch, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .errors import LinearizeError
from .rows import put, take

_RANDOM_BITS = 23  # the largest draw times a float32 total stays below the total


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default the likeliest one. Raises LinearizeError for values out of range."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # on tokens of the prompt and of the answer, as in transformers
    seed: int | Sequence[int] | None = None  # row r draws by seed + r; or one a row; None: another every time

    def __post_init__(self):
        ranges = {
            "temperature must be at least 0": self.temperature >= 0,
            "top-k must be a whole number, 0 for off": self.top_k >= 0,
            "top-p must be in (0, 1]": 0 < self.top_p <= 1,
            "min-p must be in [0, 1]": 0 <= self.min_p <= 1,
            "repetition-penalty must be above 0": self.repetition_penalty > 0,
            "a seed must be a whole number of 64 bits": not isinstance(self.seed, int) or -(2**63) <= self.seed < 2**63,
        }
        wrong = [text for text, fine in ranges.items() if not fine]
        if wrong:
            raise LinearizeError(f"{'; '.join(wrong)}. Given: {self}")

    def filters(self) -> list:
        """transformers' processors for what is on."""
        if self.temperature == 0:
            return []
        return [TemperatureLogitsWarper(float(self.temperature))] * (self.temperature != 1) + [
            warper(value)
            for warper, value, off in (
                (TopKLogitsWarper, self.top_k, 0),
                (TopPLogitsWarper, self.top_p, 1),
                (MinPLogitsWarper, self.min_p, 0),
            )
            if value != off
        ]

    def row_seeds(self, numbers: Sequence[int]) -> torch.Tensor:
        """[B] int64 on the CPU, for rows of these numbers, which count where one seed is for all."""
        if self.seed is None:
            return torch.randint(2**62, (len(numbers),))
        if isinstance(self.seed, int):
            return self.seed + torch.tensor(list(numbers))
        if len(self.seed) != len(numbers):
            raise LinearizeError(f"{len(self.seed)} seeds for {len(numbers)} rows: give one, or one a row")
        return torch.tensor(list(self.seed))


class Sampler:
    """Picks tokens for B rows; its memory (seeds, counts, tokens seen) has static shape and is changed in place."""

    def __init__(self, sampling: Sampling, *, batch: int, vocabulary: int, device):
        self.sampling, self.filters = sampling, sampling.filters()
        self.rows = torch.arange(batch, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.long, device=device)
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)
        penalised = sampling.repetition_penalty != 1
        self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device) if penalised else None
        self.true = torch.tensor(True, device=device)

    def start(self, tokens, rows=None, *, numbers: Sequence[int] | None = None) -> None:
        """Begins these rows, indices (None: all), again after prompts [rows, T], -1 where there is no token.

        numbers: see row_seeds.
        """
        numbers = range(len(tokens)) if numbers is None else numbers
        put(self.seeds, rows, self.sampling.row_seeds(numbers).to(self.seeds.device))
        put(self.counts, rows, torch.zeros_like(take(self.counts, rows)))
        if self.seen is not None:
            marks = torch.zeros(len(tokens), self.seen.shape[1] + 1, dtype=torch.bool, device=tokens.device)
            put(self.seen, rows, marks.scatter_(1, tokens + 1, True)[:, 1:])

    def pick(self, logits, rows=None):
        """logits [rows, V] -> tokens [rows]. rows: indices, or None for all."""
        as_they_are = self.sampling.temperature == 0 and self.seen is None  # no copy of what is only compared
        scores = logits if as_they_are else logits.float()
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            seen = take(self.seen, rows)
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        for filter_scores in self.filters:
            scores = filter_scores(None, scores)
        tokens = scores.argmax(-1) if self.sampling.temperature == 0 else self._draw(scores.softmax(-1), rows)
        if self.seen is not None:
            self.seen.index_put_((take(self.rows, rows), tokens), self.true)
        return tokens

    def _draw(self, probabilities, rows):
        """The first token whose running sum passes the row's number."""
        sums = probabilities.cumsum(-1)
        draw = uniform(take(self.seeds, rows), take(self.counts, rows))
        put(self.counts, rows, take(self.counts, rows) + 1)
        passed = (sums > draw[:, None] * sums[:, -1:]) & (probabilities > 0)
        return passed.int().argmax(-1)


def uniform(seeds, counts):
    """[B] float32 in [0, 1), a hash (SplitMix64) of two int64 each: the same on every device."""
    z = _scramble(seeds + _signed(0x9E3779B97F4A7C15)) + counts * _signed(0x9E3779B97F4A7C15)
    return _shift(_scramble(z), 64 - _RANDOM_BITS).float() * 2.0**-_RANDOM_BITS


def _scramble(z):
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z, bits: int):
    """To the right, as if unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
