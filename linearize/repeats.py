"""Passages that stand twice in a row of training text.

Prose seldom says again, word for word, what it said a thousand tokens before, so it hardly teaches recall. Where a
passage does stand again, the original model knows every token of it but the first few, and a student that does not
recall it is far from that distribution.
"""

from dataclasses import dataclass

import numpy as np

from linearize.lengths import SHORTEST_REPEATING

PART = 4  # a passage takes a quarter of its row at most, so that there are distances to choose from
SHORTEST, LONGEST = SHORTEST_REPEATING // PART, 256  # tokens of a passage


@dataclass(frozen=True)
class Passage:
    """`count` tokens from `source` on stand again from `target` on, in place of what was there; they do not overlap."""

    source: int
    target: int
    count: int

    def write(self, tokens: np.ndarray, labels: np.ndarray, *, ignored: int) -> None:
        """Writes the passage again in a row's tokens [T], and its labels [T], in place.

        Where the repetition begins and where the text goes on behind it, nothing foretells the token: label `ignored`.
        """
        begin, end = self.target, self.target + self.count
        tokens[begin:end] = tokens[self.source : self.source + self.count]
        labels[begin:end] = tokens[begin:end]
        labels[begin] = labels[end : end + 1] = ignored


@dataclass(frozen=True)
class RepeatedPassages:
    """Which rows of a text repeat a passage, and which one: by seed and index of the row, so the same whenever asked.

    share: of the rows, 0 to 1; those of a smaller share are among those of a larger. seed: any number of integers >= 0.
    """

    share: float
    seed: tuple[int, ...]

    def of_row(self, row: int, length: int) -> Passage | None:
        """The passage that a row of so many tokens repeats, or None; None too for less than SHORTEST_REPEATING.

        Lengths are uniform from SHORTEST to LONGEST, or to a quarter of a shorter row. Distances from one beginning
        to the other are log-uniform, from the passage's length to the longest that the row holds.
        """
        draw = np.random.default_rng([*self.seed, row])
        if draw.random() >= self.share or length < SHORTEST_REPEATING:
            return None
        count = int(draw.integers(SHORTEST, min(LONGEST, length // PART) + 1))
        longest = length - count
        distance = min(longest, int(count * ((longest + 1) / count) ** draw.random()))
        source = int(draw.integers(longest - distance + 1))
        return Passage(source, source + distance, count)
