"""Rows of training text that say a passage twice: which ones, how far apart, and that nothing else changes.

T tokens a row
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from linearize.errors import RecipeError
from linearize.lengths import SHORTEST_REPEATING
from linearize.recipe import MatchSettings, RunSettings, load_recipe
from linearize.repeats import LONGEST, SHORTEST, RepeatedPassages
from linearize.run_log import RunLog
from linearize.sequences import PackedSequences, TokenData
from linearize.train import _Loop

T, ROWS, SEED = 160, 12, (3, 1)


def make_rows(*, packing=True, length=T, seed=0) -> PackedSequences:
    """Documents of 90 to 160 tokens; every token's id says where it stands, so that each occurs once."""
    starts = np.cumsum([0, *np.random.default_rng(seed).integers(90, T, ROWS)])
    tokens = np.arange(1000 * seed, 1000 * seed + ROWS * T).astype("uint16")
    return PackedSequences(tokens, starts[starts < len(tokens)], length, packing, 0)


def changed_rows(plain, repeated) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(plain["input_ids"], repeated["input_ids"], strict=True)) if (a != b).any()]


def test_lengths_and_distances():
    length, repeats = 2048, RepeatedPassages(1.0, SEED)
    found = [repeats.of_row(row, length) for row in range(3000)]
    counts, gaps = (np.array([f(p) for p in found]) for f in (lambda p: p.count, lambda p: p.target - p.source))
    sources, ends = (np.array([f(p) for p in found]) for f in (lambda p: p.source, lambda p: p.target + p.count))
    assert (counts.min(), counts.max()) == (SHORTEST, LONGEST)
    assert (gaps >= counts).all() and sources.min() == 0 and ends.max() == length
    # log-uniform from the passage's length to what the row holds: the logarithms fill their range evenly
    place = np.log(gaps / counts) / np.log((length - counts) / counts)
    assert np.quantile(place, [0.1, 0.25, 0.5, 0.75, 0.9]) == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.03)
    assert {repeats.of_row(row, SHORTEST_REPEATING).count for row in range(5)} == {SHORTEST}
    assert repeats.of_row(0, SHORTEST_REPEATING - 1) is None


def test_the_share_and_the_seed_decide_which_rows():
    def rows(share, seed=SEED):
        return {row for row in range(2000) if RepeatedPassages(share, seed).of_row(row, T)}

    assert len(rows(0.25)) == pytest.approx(500, abs=60) and len(rows(1.0)) == 2000
    assert rows(0.25) < rows(0.5)
    assert rows(0.25) != rows(0.25, (3, 2))
    assert RepeatedPassages(1.0, SEED).of_row(7, T) != RepeatedPassages(1.0, (4, 1)).of_row(7, T)


def test_a_packed_row_is_one_text_that_says_a_passage_twice():
    plain, rows = make_rows(), make_rows().with_repeated_passages(0.5, seed=SEED)
    before, after = plain.batch(range(ROWS)), rows.batch(range(ROWS))
    changed = changed_rows(before, after)
    assert 0 < len(changed) < ROWS and (before["position_ids"][changed][:, -1] < T - 1).any(), "documents begin in rows"
    for i in range(ROWS):
        ids, positions, labels = (after[name][i] for name in ("input_ids", "position_ids", "labels"))
        if i not in changed:
            assert all(torch.equal(before[name][i], after[name][i]) for name in before)
            continue
        passage = rows.repeated.of_row(i, T)
        source = slice(passage.source, passage.source + passage.count)
        target = slice(passage.target, passage.target + passage.count)
        assert torch.equal(ids[target], ids[source]) and torch.equal(ids[source], before["input_ids"][i][source])
        kept = torch.ones(T, dtype=torch.bool)
        kept[target] = False
        assert torch.equal(ids[kept], before["input_ids"][i][kept])
        assert torch.equal(positions, torch.arange(T))
        unlabelled = set((before["labels"][i].masked_fill(~kept, 0) == -100).nonzero().flatten().tolist())
        unlabelled |= {target.start, target.stop} - {T}
        assert set((labels == -100).nonzero().flatten().tolist()) == unlabelled
        assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_a_row_depends_on_its_index_alone():
    rows = make_rows().with_repeated_passages(0.5, seed=SEED)
    whole, again = rows.batch(range(ROWS)), rows.batch([5, 3])
    assert torch.equal(again["input_ids"], whole["input_ids"][[5, 3]])
    assert rows.with_repeated_passages(0, seed=SEED).repeated is None


def test_a_document_of_its_own_row_repeats_within_itself():
    plain, rows = make_rows(packing=False), make_rows(packing=False).with_repeated_passages(1, seed=SEED)
    before, after = plain.batch(range(ROWS)), rows.batch(range(ROWS))
    lengths = before["attention_mask"].sum(1)
    assert changed_rows(before, after) == (lengths >= SHORTEST_REPEATING).nonzero().flatten().tolist()
    assert torch.equal(after["attention_mask"], before["attention_mask"])
    for ids, labels, length in zip(after["input_ids"], after["labels"], lengths.tolist(), strict=True):
        assert (labels[length:] == -100).all() and (ids[length:] == 0).all()
        assert ((labels == ids) | (labels == -100))[:length].all()
        passage = rows.repeated.of_row(int((before["input_ids"][:, 0] == ids[0]).nonzero()), length)
        ends = {} if passage is None else {passage.target, passage.target + passage.count} - {length}
        assert set((labels[:length] == -100).nonzero().flatten().tolist()) == set(ends)


class SeeingStage:
    """Keeps the rows it is given."""

    name, model, order = "finetune", None, 1

    def __init__(self):
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.groups = [SimpleNamespace(name="all", parameters=[self.parameter], lr=0.1)]
        self.trained, self.evaluated = [], []

    def num_terms(self, batch):
        return len(batch["input_ids"])

    def run(self, batch, *, scale, backward):
        (self.trained if backward else self.evaluated).extend(batch["input_ids"].tolist())
        loss = self.parameter.sum()
        if backward:
            loss.backward()
        return {"loss": loss}


def make_loop(folder, stage, share, data) -> _Loop:
    settings = MatchSettings(tokens=6 * 2 * T, batch_tokens=2 * T, evaluate_every=100, repeated_passages=share)
    log = RunLog(folder / "log.jsonl")
    return _Loop(stage, data, settings, RunSettings(seed=3), Accelerator(cpu=True), folder, log)


def test_training_sees_them_and_evaluation_does_not(tmp_path):
    data = TokenData(make_rows(), make_rows(seed=1), "numbers")
    stage = SeeingStage()
    make_loop(tmp_path, stage, 0.5, data).train()
    expected = data.train.with_repeated_passages(0.5, seed=SEED).batch(range(ROWS))  # run.seed and the stage's order
    assert sorted(stage.trained) == sorted(expected["input_ids"].tolist())
    assert stage.trained != sorted(stage.trained) and 0 < len(changed_rows(data.train.batch(range(ROWS)), expected))
    held_out = data.held_out.batch(range(ROWS))["input_ids"].tolist()
    assert stage.evaluated == held_out * (len(stage.evaluated) // ROWS) and len(stage.evaluated) >= 2 * ROWS

    later = SeeingStage()  # as after an interruption
    loop = make_loop(tmp_path, later, 0.5, data)
    loop.step, loop.best = 4, [torch.zeros(1)]
    loop.train()
    assert later.trained == stage.trained[8:]

    off = SeeingStage()
    make_loop(tmp_path, off, 0.0, data).train()
    assert sorted(off.trained) == sorted(data.train.batch(range(ROWS))["input_ids"].tolist())


@pytest.mark.parametrize("name", ["match", "finetune"])
def test_rows_too_short_to_repeat_anything_are_refused(name):
    short = ["data.sequence_length=96", "attention.window=16", f"{name}.repeated_passages=0.1"]
    with pytest.raises(RecipeError, match=f"{name}.repeated_passages: needs sequences of 128 tokens or more; .* is 96"):
        load_recipe("quickstart", short)
    longer = load_recipe("quickstart", [*short, f"{name}.sequence_length=128"])
    assert getattr(longer, name).repeated_passages == 0.1
