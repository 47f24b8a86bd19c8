"""match.sequence_length and finetune.sequence_length: the same text in rows of another length, all else as before."""

import pytest
import torch
from test_data import DataSettings, make_tokenizer
from test_export import save_recipe, steps_of

from linearize.convert import convert
from linearize.data import build_token_data
from linearize.errors import DataError, RecipeError
from linearize.finetune import FinetuneStage
from linearize.lengths import rows_a_forward
from linearize.match import MatchStage
from linearize.recipe import load_recipe
from linearize.train import _Loop

LENGTHS = {"match.sequence_length": 24, "finetune.sequence_length": 96, "run.micro_batch": 2}  # data's own is 48
BUDGETS = {"match.tokens": 768, "finetune.tokens": 960}  # 192 a step


@pytest.mark.parametrize("length", [8, 24, 32])
def test_rows_of_another_length_are_those_packed_at_that_length(tmp_path, length):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(f'{{"text": "{" ".join(f"w{i}" for i in range(n, n + 9))}"}}\n' for n in range(40)))
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(60))])}
    tokens = 96 * 2  # a multiple of every length

    def build(length):
        data = DataSettings(source=str(source), sequence_length=length, held_out=96 // length)
        tokenizer, folder = make_tokenizer(words=words), tmp_path / f"cache{length}"
        return build_token_data(data, tokenizer, num_train_sequences=tokens // length, cache_dir=folder)

    changed, direct = build(16).at(length, name="match.sequence_length"), build(length)
    for side in ("train", "held_out"):
        ours, expected = getattr(changed, side), getattr(direct, side)
        assert len(ours) == len(expected) == (tokens if side == "train" else 96) // length
        batch, wanted = (x.batch(range(len(x))) for x in (ours, expected))
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
        assert batch["input_ids"].shape[1] == length and (batch["labels"] == -100).sum() > len(ours)


def test_each_stage_trains_and_is_evaluated_at_its_own_length(tmp_path, model, text, monkeypatch):
    shapes = {MatchStage: set(), FinetuneStage: set()}
    for cls, seen in shapes.items():

        def counted(self, batch, *, real=cls.run, seen=seen, **options):
            seen.add((options["backward"], *batch["input_ids"].shape))
            return real(self, batch, **options)

        monkeypatch.setattr(cls, "run", counted)
    folder = convert(load_recipe(save_recipe(tmp_path, model, text, **LENGTHS, **BUDGETS)))
    # micro-batches of 96 tokens, as data's own length gives; 192 held-out tokens
    assert shapes == {MatchStage: {(True, 4, 24), (False, 4, 24)}, FinetuneStage: {(True, 1, 96), (False, 1, 96)}}
    steps = {stage: sum(name == stage for name, _ in steps_of(folder / "log.jsonl")) for stage in ("match", "finetune")}
    assert steps == {"match": 4, "finetune": 5}


def test_interrupted_in_the_longer_stage_it_goes_on_as_it_would_have(tmp_path, model, text, monkeypatch):
    changes = {**LENGTHS, **BUDGETS, "finetune.lora.dropout": 0.1, "run.checkpoint_every": 2}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = convert(load_recipe(save_recipe(tmp_path / "a", model, text, **changes)))
    recipe, real = load_recipe(save_recipe(tmp_path / "b", model, text, **changes)), _Loop.train_step

    def interrupted(self, bar):
        if self.stage.name == "finetune" and self.step == 3:
            raise KeyboardInterrupt
        real(self, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Loop, "train_step", interrupted)
        convert(recipe)
    expected, resumed = steps_of(whole / "log.jsonl"), steps_of(convert(recipe) / "log.jsonl")
    assert expected == resumed and len(expected) == 9


def test_text_too_short_for_a_stage_is_refused_before_anything_is_trained(tmp_path, model, text, monkeypatch):
    monkeypatch.setattr(MatchStage, "run", None)
    changes = {**BUDGETS, "finetune.batch_tokens": 960, "finetune.sequence_length": 240}
    with pytest.raises(DataError, match="finetune.sequence_length: 240 tokens are more than the 192 of the held-out"):
        convert(load_recipe(save_recipe(tmp_path, model, text, **changes)))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"match.sequence_length": 10}, "with sinks it covers 10 tokens, all of match.sequence_length"),
        ({"finetune.sequence_length": 96, "data.packing": False}, "finetune.sequence_length: needs data.packing"),
        ({"finetune.sequence_length": 240}, "finetune.batch_tokens: 192 must be at least one forward pass, 240 by"),
    ],
)
def test_lengths_that_do_not_go_with_the_rest_are_refused(tmp_path, model, text, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(save_recipe(tmp_path, model, text, **changes))


def test_a_stage_may_say_how_many_sequences_a_forward_pass_takes(tmp_path, model, text):
    given = {**LENGTHS, **BUDGETS, "match.micro_batch": 3}
    recipe = load_recipe(save_recipe(tmp_path, model, text, **given))
    assert [rows_a_forward(recipe, stage) for stage in (recipe.match, recipe.finetune)] == [3, 1]
    with pytest.raises(RecipeError, match="192 must be at least one forward pass, 216 by match.micro_batch"):
        load_recipe(save_recipe(tmp_path, model, text, **given | {"match.micro_batch": 9}))
