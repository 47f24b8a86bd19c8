"""Copy recall and key lookup, against models that recall perfectly, wrongly or not at all."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from linearize.errors import DataError
from linearize_eval.recall import (
    SEAM_TOKENS,
    build_key_samples,
    copy_recall,
    copy_rows,
    key_recall,
    shortest_key_distance,
)
from linearize_eval.words import KEYS, VALUES

PROSE = [f"prose{i}" for i in range(200)]
BOS = 1


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "The", "code", "for", "is", ".", *PROSE, *KEYS, *VALUES]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the first token of every " value" is the space."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = word_tokenizer()
VOCAB = len(TOKENIZER)


def prose_rows(num_rows: int, num_tokens: int, bos: bool = False) -> torch.Tensor:
    low = TOKENIZER.convert_tokens_to_ids(PROSE[0])
    rows = torch.randint(low, low + len(PROSE), (num_rows, num_tokens), generator=torch.manual_seed(0))
    if bos:
        rows[:, 0] = BOS
    return rows


class Copier(torch.nn.Module):
    """Says again what stood `distance` tokens before, by `strength`: 0 guesses, below 0 shuns it."""

    device = torch.device("cpu")

    def __init__(self, distance: int, strength: float = 40.0):
        super().__init__()
        self.distance, self.strength = distance, strength

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for batch, row in enumerate(input_ids.tolist()):
            for t in range(self.distance - 1, len(row)):
                logits[batch, t, row[t + 1 - self.distance]] = self.strength
        return CausalLMOutput(logits=logits)


@pytest.mark.parametrize("bos", [False, True])
def test_a_perfect_copier_scores_one_and_a_guesser_the_vocabulary(bos):
    rows = prose_rows(4, 64, bos)
    settings = {"distances": [32], "bos_token_id": BOS, "batch_size": 2}
    (perfect,) = copy_recall(Copier(32), rows, **settings)
    (guesser,) = copy_recall(Copier(32, strength=0.0), rows, **settings)
    (late,) = copy_recall(Copier(33), rows, **settings)
    assert perfect == {
        "distance": 32, "perplexity": pytest.approx(1, abs=1e-6), "error": pytest.approx(0, abs=1e-6),
        "nll_by_row": pytest.approx([0] * 4, abs=1e-6), "num_tokens": 4 * 24,
    }  # fmt: skip
    assert guesser["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert late["perplexity"] > 1000 * VOCAB


def test_only_the_repetition_after_its_seam_counts():
    rows = prose_rows(2, 20)
    repeated = copy_rows(rows, 20)
    assert torch.equal(repeated, torch.cat([rows, rows], dim=1))

    class WrongInCountedPart(Copier):
        def forward(self, input_ids, use_cache):
            output = super().forward(input_ids, use_cache)
            # index i predicts position i + 1: everything before the first counted token is spoilt
            output.logits[:, : 20 + SEAM_TOKENS - 1] *= -1
            return output

    (result,) = copy_recall(WrongInCountedPart(20), rows, distances=[20])
    assert result["perplexity"] == pytest.approx(1, abs=1e-6)


def test_bos_stays_in_front_and_is_not_repeated():
    rows = prose_rows(3, 20, bos=True)
    repeated = copy_rows(rows, 19, bos_token_id=BOS)
    assert repeated.shape == (3, 39)
    assert (repeated == BOS).sum(dim=1).tolist() == [1, 1, 1]
    assert (repeated[:, 0] == BOS).all()
    assert torch.equal(repeated[:, 1:20], repeated[:, 20:])


def test_the_error_of_copy_recall_is_over_rows_not_tokens():
    class GoodAtSomeRows(Copier):
        def forward(self, input_ids, use_cache):
            output = super().forward(input_ids, use_cache)
            output.logits *= input_ids[:, :1, None] % 4 / 40  # by a row's first token
            return output

    rows = prose_rows(6, 40)
    first = rows[0, 0] - rows[0, 0] % 4
    rows[:, 0] = first + torch.tensor([1, 2, 3, 1, 2, 3])
    (figures,) = copy_recall(GoodAtSomeRows(20, 20.0), rows, distances=[20], batch_size=4)
    by_row = figures["nll_by_row"]
    assert len(by_row) == 6 and by_row[0] == pytest.approx(by_row[3]) and by_row[0] > by_row[1] > by_row[2]
    mean = sum(by_row) / 6
    deviation = (sum((x - mean) ** 2 for x in by_row) / 5) ** 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(mean))
    assert figures["error"] == pytest.approx(math.exp(mean) * deviation / 6**0.5)
    (alone,) = copy_recall(Copier(20), rows[:1], distances=[20])
    assert alone["error"] is None, "nothing to judge the noise by"


@pytest.mark.parametrize("distance", [SEAM_TOKENS, 21, 0])
def test_copy_distances_that_do_not_fit_are_refused(distance):
    with pytest.raises(DataError, match="at most the row's 20 tokens"):
        copy_recall(Copier(9), prose_rows(2, 20), distances=[distance])


@pytest.mark.parametrize("distance", [60, 150])
@pytest.mark.parametrize("bos", [False, True])
def test_key_samples_are_what_they_say(distance, bos):
    samples = build_key_samples(
        TOKENIZER, prose_rows(3, 100, bos), distance=distance, num_pairs=5, num_samples=20, seed=3
    )
    assert len(samples) == 20
    assert {sample.right for sample in samples} == set(range(5))
    assert len({len(sample.input_ids) for sample in samples}) == 1, "so that they make a batch"
    for sample in samples:
        words = TOKENIZER.convert_ids_to_tokens(sample.input_ids)
        candidates = TOKENIZER.convert_ids_to_tokens(sample.candidates)
        key = words[-2]
        assert words[-5:] == ["The", "code", "for", key, "is"] and key in KEYS
        assert words[-distance:][0] == candidates[sample.right]
        assert words[-distance - 5 : -distance] == ["The", "code", "for", key, "is"]
        assert len(set(sample.candidates)) == 5
        assert [word for word in words if word in VALUES] == candidates
        assert words.count("<s>") == (1 if bos else 0) and words.index("<s>" if bos else words[0]) == 0
        assert "<unk>" not in words


def ask(model, **settings) -> dict:
    settings = {"distances": [64], "num_pairs": 4, "num_samples": 12, "seed": 0} | settings
    (result,) = key_recall(model, TOKENIZER, prose_rows(3, 100), **settings)
    return result


def test_an_oracle_a_guesser_and_an_anti_oracle_score_as_such():
    oracle, guesser, wrong = ask(Copier(64)), ask(Copier(64, strength=0.0)), ask(Copier(64, strength=-40.0))
    assert oracle["accuracy"] == 1 and oracle["choice_perplexity"] == pytest.approx(1, abs=1e-6)
    assert guesser["accuracy"] == pytest.approx(0.25)
    assert guesser["choice_perplexity"] == pytest.approx(4)
    assert wrong["accuracy"] == 0 and wrong["choice_perplexity"] > 1e6
    assert oracle["chance"] == 0.25 and oracle["num_samples"] == 12 and oracle["distance"] == 64
    assert ask(Copier(65))["accuracy"] == pytest.approx(0.25)  # the distance is exact: one off knows nothing


@pytest.mark.parametrize("batch_size", [5, 100])
def test_questions_in_batches_are_answered_as_one_by_one(batch_size):
    class Wavering(Copier):
        """Knows the answer where the text's tokens add up to an even number."""

        lengths = []

        def forward(self, input_ids, use_cache):
            output = super().forward(input_ids, use_cache)
            output.logits *= 1 - input_ids.sum(1)[:, None, None] % 2
            self.lengths.append(len(input_ids))
            return output

    alone, batched = ask(Wavering(64)), ask(Wavering(64), batch_size=batch_size)
    assert alone == batched and 0.25 < alone["accuracy"] < 1
    assert Wavering.lengths == [1] * 12 + ([5, 5, 2] if batch_size == 5 else [12])
    right = round((alone["accuracy"] * 12 - 3) / 0.75)  # of twelve, the rest guessed among four
    credit = [1.0] * right + [0.25] * (12 - right)
    mean = sum(credit) / 12
    assert alone["error"] == pytest.approx((sum((c - mean) ** 2 for c in credit) / 11 / 12) ** 0.5)


def test_the_same_seed_asks_the_same():
    def build(seed):
        return build_key_samples(
            TOKENIZER, prose_rows(2, 99), distance=64, num_pairs=4, num_samples=3, seed=seed
        )

    assert build(1) == build(1)
    assert build(1) != build(2)


def test_the_shortest_distance_always_holds_the_sentences():
    shortest = shortest_key_distance(TOKENIZER, 6)
    settings = {"num_pairs": 6, "num_samples": 50, "seed": 0}
    build_key_samples(TOKENIZER, prose_rows(2, 99), distance=shortest, **settings)
    with pytest.raises(DataError, match=f"need {shortest} or more"):
        build_key_samples(TOKENIZER, prose_rows(2, 99), distance=shortest - 1, **settings)


def test_values_that_share_their_first_token_are_refused():
    with pytest.raises(DataError, match="this tokenizer gives 1"):
        key_recall(Copier(9), byte_tokenizer(), prose_rows(2, 99), distances=[200], num_pairs=2)


def test_a_tokenizer_that_merges_across_the_answer_is_refused():
    class Merging:
        bos_token_id = None

        def encode(self, text, add_special_tokens):
            return [len(text)] * len(text.split())  # every token changes with what follows

    with pytest.raises(DataError, match="merges them"):
        key_recall(Copier(9), Merging(), prose_rows(2, 99), distances=[200], num_pairs=2)


@pytest.mark.parametrize("num_pairs", [1, len(KEYS) + 1])
def test_numbers_of_pairs_that_cannot_be_asked_are_refused(num_pairs):
    with pytest.raises(DataError, match=f"2 to {len(KEYS)}"):
        key_recall(Copier(9), TOKENIZER, prose_rows(2, 99), distances=[200], num_pairs=num_pairs)


def test_the_planted_words_are_distinct():
    assert len({*KEYS, *VALUES}) == len(KEYS) + len(VALUES)
