"""Which layers, or which kv heads, carry what only softmax can? Measured on a matched model, without training.

Each unit is given its softmax back alone ("singles"); then the best is kept, and the best one to add to it, and so on
("chain"). A set is measured by copy recall over several distances, by KL to the teacher, and by perplexity; the best
is chosen by recall, by KL, or ("recall_then_kl") by recall in the first half of the chain and by KL in the second.

N rows, T tokens a row, B rows a forward, V vocabulary
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from linearize.errors import ModelError
from linearize.kept_softmax import Unit, evenly_spaced, heads_by_layer, units_of
from linearize.output_head import Halves
from linearize.variants import restored_softmax, teacher
from linearize.whole_folder import write_json
from linearize_eval.json_values import finite
from linearize_eval.perplexity import evaluation_mode, nll_and_kl
from linearize_eval.recall import copy_recall

FORMAT = 1
POOL = 24  # units that stand for choice in a round: the best by themselves, so that a choice takes minutes
# what the first half of a choice makes small, and what the second and the order of those not chosen
HALVES = {"recall": ("recall", "recall"), "kl": ("kl", "kl"), "recall_then_kl": ("recall", "kl")}
STATE_TOKENS = 4096  # the length of text at which the table says what a set costs
RANKING_FILE = "ranking.json"


class Scale:
    """Measures one model with any set of units in softmax, always on the same texts.

    rows [N, T] int64: natural text, no padding, on any device; `distances` of copy recall must fit it.
    state_bytes(length): bytes of one sequence of the model as it stands.
    Raises DataError if a distance does not fit the rows.
    """

    def __init__(self, model, rows, *, distances, bos_token_id, batch_size, state_bytes, on_set=lambda: None):
        self.model, self.rows, self.distances = model, rows.to(model.device), list(distances)
        self.options = {"bos_token_id": bos_token_id, "batch_size": batch_size}
        self.state_bytes, self.on_set = state_bytes, on_set
        num_rows = max(1, len(rows) // 2)  # the teacher's states are held in memory
        self.kl_batches = self.rows[:num_rows].split(batch_size)
        with evaluation_mode(model), teacher(model):
            self.halves = Halves(model)
            self.teacher_states = [self.halves.states(batch) for batch in self.kl_batches]

    def score(self, units: Iterable[Unit], by: str) -> float:
        """What a choice makes small: mean copy loss over the distances ("recall") or KL ("kl"), in nats."""
        with restored_softmax(self.model, heads_by_layer(units)):
            if by == "kl":
                score = self._kl_and_nll()[0]
            else:
                score = sum(math.log(c["perplexity"]) for c in self._copy()) / len(self.distances)
        self.on_set()
        return score if math.isfinite(score) else math.inf

    def figures(self, units: Iterable[Unit]) -> dict:
        """Everything of one set: {"kept", "copy": [{"distance", "perplexity"}], "kl", "perplexity", "state_bytes"}."""
        units = list(units)
        with restored_softmax(self.model, heads_by_layer(units)):
            figures = {"kept": [[u.layer, u.head] for u in units], **self._figures()}
        self.on_set()
        return figures

    def teacher_figures(self) -> dict:
        with teacher(self.model):
            return {**self._figures(), "state_bytes": None}

    def _figures(self) -> dict:
        copies = [{k: c[k] for k in ("distance", "perplexity")} for c in self._copy()] if self.distances else []
        kl, nll = self._kl_and_nll()
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return {"copy": copies, "kl": kl, "perplexity": perplexity, "state_bytes": self.state_bytes(STATE_TOKENS)}

    def _copy(self) -> list[dict]:
        return copy_recall(self.model, self.rows, distances=self.distances, halves=self.halves, **self.options)

    def _kl_and_nll(self) -> tuple[float, float]:
        """KL(teacher ‖ model) and the model's loss, means over the predicted tokens, in nats."""
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.rows.device), 0
        with evaluation_mode(self.model):
            for batch, reference in zip(self.kl_batches, self.teacher_states, strict=True):
                nll, kl = nll_and_kl(self.halves.states(batch), batch, reference, head=self.halves.head)
                sums += torch.stack([kl.double().sum(), nll.double().sum()])
                count += nll.numel()
        kl, nll = (sums / count).tolist()
        return kl, nll


def measures(by: str, count: int) -> list[str]:
    """What each round of a choice of `count` units makes small: recall or kl. The first half is rounded up."""
    first, second = HALVES[by]
    return [first] * (count - count // 2) + [second] * (count // 2)


def greedy(
    score: Callable[[list[Unit], str], float], singles: dict[str, dict[Unit, float]], rounds: Iterable[str]
) -> list[Unit]:
    """The chain of a unit a round: the one that brings the score of all kept so far, by the round's measure, lowest.

    singles: {measure: every unit's score by itself}; the best POOL of those not yet kept stand for choice.
    """
    chain = []
    for by in rounds:
        alone = singles[by]
        pool = [u for u in sorted(alone, key=alone.get) if u not in chain][:POOL]
        scores = {u: score([*chain, u], by) if chain else alone[u] for u in pool}
        chain.append(min(pool, key=scores.get))
    return chain


def num_sets(num_units: int, count: int, *, whole: bool) -> int:
    """How many sets `rank` measures: none kept, the singles, the rounds, and the curve beside even spacing."""
    rounds = sum(min(POOL, num_units - chosen) for chosen in range(1, count))
    return 1 + num_units + rounds + 2 * len(curve_sizes(num_units, count, whole=whole))


def curve_sizes(num_units: int, count: int, *, whole: bool) -> list[int]:
    """Numbers of units kept at which the curve is measured: 1 to `count`, and if `whole` on to all in steps."""
    step = max(1, num_units // 30)
    rest = [n for n in range(count + step, num_units, step)] if whole else []
    return sorted({*range(1, count + 1), *rest, *([num_units] if whole else [])})


def rank(scale: Scale, *, unit: str, by: str, count: int, whole: bool = False) -> dict:
    """Ranks the units of scale.model and chooses `count` of them.

    unit: layer or kv_head; by: recall, kl or recall_then_kl. whole: measure the curve up to all units kept; beyond
    `count` units are added in the order of their own scores, that of "singles" (recall_then_kl: by KL).

    Returns {"format", "unit", "by", "distances", "teacher", "none", "singles": [figures], "chain": [[layer, head]],
    "curve": [figures], "even": [figures of as many units evenly spaced]}, figures as of `Scale.figures`.
    """
    units, model = units_of(scale.model, unit), scale.model
    with evaluation_mode(model):
        teacher_figures, none = scale.teacher_figures(), scale.figures([])
        singles = {u: scale.figures([u]) for u in units}
        scores = {m: {u: _score_of(figures, m) for u, figures in singles.items()} for m in HALVES[by]}
        chain = greedy(scale.score, scores, measures(by, min(count, len(units))))
        by_themselves = sorted(units, key=scores[HALVES[by][1]].get)
        order = chain + [u for u in by_themselves if u not in chain]
        sizes = curve_sizes(len(units), len(chain), whole=whole)
        curve = [scale.figures(order[:n]) for n in sizes]
        even = [scale.figures(evenly_spaced(units, n)) for n in sizes]
    return finite(
        {
            "format": FORMAT, "unit": unit, "by": by, "distances": scale.distances, "teacher": teacher_figures,
            "none": none, "singles": [singles[u] for u in by_themselves],
            "chain": [[u.layer, u.head] for u in chain], "curve": curve, "even": even,
        }
    )  # fmt: skip


def _score_of(figures: dict, by: str) -> float:
    """As `Scale.score`, of figures measured before."""
    if by == "kl":
        return figures["kl"] if math.isfinite(figures["kl"]) else math.inf
    logs = [math.log(c["perplexity"]) for c in figures["copy"]]
    score = sum(logs) / len(logs)
    return score if math.isfinite(score) else math.inf


def serves(ranking: dict, *, unit: str, by: str, count: int, distances: list[int]) -> bool:
    """Whether a ranking's chain begins with the `count` units that `rank` would choose by these settings."""
    wanted = {"unit": unit, "by": by, "distances": distances}
    rounds = measures(by, len(ranking["chain"]))[:count]
    return rounds == measures(by, count) and all(ranking[name] == value for name, value in wanted.items())


def chosen_units(ranking: dict, model, count: int) -> list[Unit]:
    """The first `count` units of a ranking's chain, as units of `model`."""
    by_name = {(u.layer, u.head): u for u in units_of(model, ranking["unit"])}
    return [by_name[tuple(pair)] for pair in ranking["chain"][:count]]


def save_ranking(ranking: dict, path: Path) -> None:
    """Writes the ranking as JSON, whole or not at all."""
    write_json(path, ranking, allow_nan=False)


def load_ranking(path: Path) -> dict:
    """A saved ranking. Raises ModelError where the file is damaged or of another version."""
    try:
        ranking = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); delete it and give the command again") from error
    if ranking.get("format") != FORMAT:
        raise ModelError(f"{path} is a ranking of format {ranking.get('format')}, not {FORMAT}; delete it")
    return ranking
