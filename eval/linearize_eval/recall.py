"""Recall: can a model use what it read far back? Two measures, both over held-out natural text.

Copy: a text that repeats its first `distance` tokens; perplexity of the repetition. 1 is perfect.
Key lookup: "The code for garden is silver." planted several times in prose with other words, one of them
asked for `distance` tokens later; how often the right word beats the others that were planted.

N rows, T tokens a row, B rows a forward, P planted pairs.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from linearize.errors import DataError
from linearize.output_head import Halves
from linearize_eval.perplexity import evaluation_mode, perplexity, standard_error, token_nll
from linearize_eval.words import KEYS, VALUES

# The first tokens of the repetition do not count. The very first cannot be known to repeat anything, and a
# token or two may have stood in several places; a text is recognisable after a few.
SEAM_TOKENS = 8
# Tokens of prose before each planted sentence up to the one asked for. Those behind it share the distance.
LEAD_TOKENS = 16
PROMPT = "\nThe code for {key} is"
ANSWER = " {value}.\n"


def split_bos(rows: torch.Tensor, bos_token_id: int | None) -> tuple[list[int], torch.Tensor]:
    """Takes the BOS token off rows [N, T] if all begin with it: ([bos] or [], rows [N, T - 1 or T]).

    A repeated text must hold it once, in front, and never in the middle.
    """
    if bos_token_id is not None and bool((rows[:, 0] == bos_token_id).all()):
        return [bos_token_id], rows[:, 1:]
    return [], rows


def copy_rows(rows: torch.Tensor, distance: int, *, bos_token_id: int | None = None) -> torch.Tensor:
    """Rows [N, 2 * distance (+ 1 with BOS)] which say the first `distance` tokens of each row twice.

    Raises DataError if the rows are shorter than that, or `distance` no longer than the uncounted seam.
    """
    bos, body = split_bos(rows, bos_token_id)
    if not SEAM_TOKENS < distance <= body.shape[1]:
        raise DataError(
            f"copy recall over {distance} tokens: the distance must be above {SEAM_TOKENS} and at most the "
            f"row's {body.shape[1]} tokens; give longer rows or other distances"
        )
    text = body[:, :distance]
    front = text.new_tensor(bos).expand(len(text), len(bos))
    return torch.cat([front, text, text], dim=1)


def copy_recall(
    model: torch.nn.Module,
    rows: torch.Tensor,
    *,
    distances: Sequence[int],
    batch_size: int = 1,
    bos_token_id: int | None = None,
    halves: Halves | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Perplexity of the second half of a text that repeats its first `distance` tokens.

    The first SEAM_TOKENS tokens of the repetition are not counted. Of `rows` [N, T] (int64, natural text)
    the first `distance` tokens are used; `bos_token_id` (see `split_bos`) stays in front, unrepeated. `halves` as in
    `token_nll`.

    Returns [{"distance", "perplexity", "error", "nll_by_row", "num_tokens"}], one for each distance. error: one
    standard error of the perplexity, that of the mean NLL over the rows (a row is one sample: its tokens hang
    together) times the perplexity; None for one row.
    Raises DataError if a distance does not fit the rows (see `copy_rows`).
    """
    results = []
    for distance in distances:
        repeated = copy_rows(rows, distance, bos_token_id=bos_token_id)
        nll = token_nll(model, repeated, batch_size=batch_size, halves=halves, on_batch=on_batch)
        counted = nll[:, -(distance - SEAM_TOKENS) :]
        by_row, mean = counted.double().mean(dim=1).tolist(), perplexity(counted)
        error = standard_error(by_row)
        error = None if error is None else error * mean
        figures = {"perplexity": mean, "error": error, "nll_by_row": by_row, "num_tokens": counted.numel()}
        results.append({"distance": distance, **figures})
    return results


@dataclass(frozen=True)
class KeySample:
    """A text that ends in the middle of a planted sentence, just before its value.

    `input_ids` the text; `candidates` the first token of every planted value; `right` the index in it of
    the one that belongs here, which stands `distance` tokens before the place to be predicted.
    """

    input_ids: list[int]
    candidates: list[int]
    right: int
    distance: int


@dataclass(frozen=True)
class _Sentence:
    """A planted sentence as tokens: `prompt` up to the value, `answer` the value and the end."""

    prompt: list[int]
    answer: list[int]


def _sentence(tokenizer, key: str, value: str) -> _Sentence:
    prompt = tokenizer.encode(PROMPT.format(key=key), add_special_tokens=False)
    whole = tokenizer.encode(PROMPT.format(key=key) + ANSWER.format(value=value), add_special_tokens=False)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise DataError(
            f"key recall needs a tokenizer that keeps the tokens of {PROMPT.format(key=key)!r} when "
            f"{ANSWER.format(value=value)!r} follows; this one merges them: leave key recall out"
        )
    return _Sentence(prompt, whole[len(prompt) :])


def distinct_values(tokenizer, num_pairs: int) -> list[str]:
    """The words of VALUES whose first tokens differ from one another, in order.

    Raises DataError if these are fewer than `num_pairs`, or `num_pairs` is not 2 ... len(KEYS).
    """
    if not 2 <= num_pairs <= len(KEYS):
        raise DataError(f"key recall with {num_pairs} pairs: 2 to {len(KEYS)} are possible")
    by_first_token: dict[int, str] = {}
    for value in VALUES:
        by_first_token.setdefault(_sentence(tokenizer, KEYS[0], value).answer[0], value)
    if len(by_first_token) < num_pairs:
        raise DataError(
            f"key recall needs {num_pairs} words that differ in their first token; this tokenizer gives "
            f"{len(by_first_token)}: use fewer pairs or leave key recall out"
        )
    return list(by_first_token.values())


def shortest_key_distance(tokenizer, num_pairs: int) -> int:
    """The shortest distance, in tokens, at which any of `num_pairs` pairs can be asked for."""
    values = distinct_values(tokenizer, num_pairs)
    prompts = [len(_sentence(tokenizer, key, values[0]).prompt) for key in KEYS]
    answers = [len(_sentence(tokenizer, KEYS[0], value).answer) for value in values]
    return num_pairs * (max(prompts) + max(answers))


def build_key_samples(
    tokenizer,
    rows: torch.Tensor,
    *,
    distance: int,
    num_pairs: int,
    num_samples: int,
    seed: int,
) -> list[KeySample]:
    """Texts for the key lookup: prose from `rows` [N, T] with `num_pairs` sentences planted, one asked for.

    Keys, values, prose and which pair is asked for are drawn from `seed` and `distance` alone, so that
    every model is asked the same. The prose begins anywhere in the rows, laid end to end. More of it stands in front
    of the shorter texts, so that all have one length and make a batch.

    Raises DataError if `distance` is below `shortest_key_distance`, or the tokenizer will not do.
    """
    shortest = shortest_key_distance(tokenizer, num_pairs)
    if distance < shortest:
        raise DataError(
            f"key recall over {distance} tokens: {num_pairs} planted sentences need {shortest} or more; ask "
            "at longer distances or plant fewer pairs"
        )
    values = distinct_values(tokenizer, num_pairs)
    bos, body = split_bos(rows, tokenizer.bos_token_id)
    prose = body.flatten().tolist()
    draw = random.Random(f"{seed}/{distance}")
    samples, starts = [], []
    for _ in range(num_samples):
        pairs = zip(draw.sample(KEYS, num_pairs), draw.sample(values, num_pairs), strict=True)
        sentences = [_sentence(tokenizer, key, value) for key, value in pairs]
        right = draw.randrange(num_pairs)
        start = draw.randrange(len(prose))
        stream = (prose[i % len(prose)] for i in itertools.count(start))
        ids = _plant(sentences, right, distance, stream)
        candidates = [sentence.answer[0] for sentence in sentences]
        assert len(set(candidates)) == num_pairs, "the first token of a value depends on its key"
        samples.append(KeySample(ids, candidates, right, distance))
        starts.append(start)
    length = max(len(sample.input_ids) for sample in samples)
    filled = []
    for sample, start in zip(samples, starts, strict=True):
        before = range(start - (length - len(sample.input_ids)), start)
        ids = bos + [prose[i % len(prose)] for i in before] + sample.input_ids
        filled.append(replace(sample, input_ids=ids))
    return filled


def _plant(sentences: list[_Sentence], right: int, distance: int, prose: Iterator[int]) -> list[int]:
    """Token ids: prose with the sentences in order, then the prompt of sentence `right` once more.

    The answer of sentence `right` begins exactly `distance` tokens before the end.
    """
    asked, later = sentences[right], sentences[right + 1 :]
    planted = sum(len(sentence.prompt) + len(sentence.answer) for sentence in later)
    num_prose = distance - len(asked.answer) - planted - len(asked.prompt)
    assert num_prose >= 0, "shortest_key_distance let too short a distance pass"
    gap, rest = divmod(num_prose, len(later) + 1)

    def take(count: int) -> list[int]:
        return [next(prose) for _ in range(count)]

    ids: list[int] = []
    for sentence in sentences[: right + 1]:
        ids += take(LEAD_TOKENS) + sentence.prompt + sentence.answer
    for sentence in later:
        ids += take(gap) + sentence.prompt + sentence.answer
    return ids + take(gap + rest) + asked.prompt


def score_key_samples(
    model: torch.nn.Module,
    samples: Sequence[KeySample],
    *,
    batch_size: int = 1,
    halves: Halves | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict:
    """How often, and how surely, `model` prefers the right value to the others that were planted.

    samples: of one distance and number of pairs, so of one length; `batch_size` of them a forward.

    Returns {"accuracy", "error", "choice_perplexity", "chance", "num_samples"}: accuracy 0 ... 1, a tie for the
    first place counting as its share; error one standard error of it over the samples (None for one);
    choice_perplexity the perplexity among the P candidates alone, 1 for one who knows and P for one who guesses;
    chance 1 / P.
    """
    scores = []
    ids = torch.tensor([sample.input_ids for sample in samples])
    candidates = torch.tensor([sample.candidates for sample in samples])
    right = torch.tensor([[sample.right] for sample in samples])
    with evaluation_mode(model):
        halves = halves or Halves(model)
        for batch, among in zip(ids.split(batch_size), candidates.split(batch_size), strict=True):
            logits = halves.head(halves.states(batch.to(model.device))[:, -1])  # [B, V]
            scores.append(logits.gather(1, among.to(logits.device)).double().cpu())
            on_batch()
    scores = torch.cat(scores)  # [N, P]
    best = scores == scores.amax(1, keepdim=True)
    credit = (best.gather(1, right) / best.sum(1, keepdim=True).clamp_min(1))[:, 0].tolist()
    return {
        "accuracy": sum(credit) / len(credit),
        "error": standard_error(credit),
        "choice_perplexity": perplexity(-scores.log_softmax(1).gather(1, right)),
        "chance": 1 / candidates.shape[1],
        "num_samples": len(samples),
    }


def key_recall(
    model: torch.nn.Module,
    tokenizer,
    rows: torch.Tensor,
    *,
    distances: Sequence[int],
    num_pairs: int = 4,
    num_samples: int = 32,
    batch_size: int = 1,
    seed: int = 0,
) -> list[dict]:
    """Key lookup at each distance: [{"distance", and what `score_key_samples` returns}].

    Texts and DataError as in `build_key_samples`.
    """
    results = []
    for distance in distances:
        samples = build_key_samples(
            tokenizer, rows, distance=distance, num_pairs=num_pairs, num_samples=num_samples, seed=seed
        )
        results.append({"distance": distance, **score_key_samples(model, samples, batch_size=batch_size)})
    return results
