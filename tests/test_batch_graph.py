"""Micro-batches as a CUDA graph: the numbers are those without it, whatever the batch, and a refusal stops nothing."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from pico import convert, make_model, make_tokens
from test_train import make_data, make_match, settings_of

from linearize import train as train_module
from linearize.batch_graph import WARM_UP, BatchGraph, NotRecorded, least_special, why_not
from linearize.errors import RecipeError, TrainingError
from linearize.finetune import FinetuneStage, add_lora
from linearize.match import MatchStage
from linearize.recipe import FinetuneSettings, LoraSettings, LossSettings, MatchSettings, RunSettings, load_recipe
from linearize.run_log import RunLog
from linearize.train import train
from linearize.trained_weights import TrainedWeights

LORA = LoraSettings(rank=4, dropout=0.3, targets=["q_proj", "down_proj"])
WIDE = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)  # heads of 64, which the kernels take


def test_reasons_against_a_recording():
    cuda, model, rows, settings = torch.device("cuda"), make_model(), make_data().train, MatchSettings()
    assert why_not(cuda, model, rows, settings) == ""
    assert "cpu" in why_not(torch.device("cpu"), model, rows, settings)
    assert "data.packing" in why_not(cuda, model, make_data(packing=False).train, settings)
    assert "rows of 8193" in why_not(cuda, model, replace(rows, sequence_length=8193), settings)
    assert "window_dropout" in why_not(cuda, model, rows, MatchSettings(window_dropout=0.1))
    model.gradient_checkpointing_enable()
    assert "gradient_checkpointing" in why_not(cuda, model, rows, settings)


@pytest.mark.parametrize("change", ["run.gradient_checkpointing=true", "match.window_dropout=0.1"])
def test_a_recipe_that_asks_for_what_cannot_be_recorded_is_refused(change):
    load_recipe("quickstart", ["run.cuda_graph=null", change])
    with pytest.raises(RecipeError, match="run.cuda_graph: .* cannot be recorded; set it to null"):
        load_recipe("quickstart", ["run.cuda_graph=true", change])


def test_a_rehearsal_has_what_masks_are_made_for():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    packed = least_special({"input_ids": tokens, "position_ids": torch.arange(5).expand(2, -1)})
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]] * 2 and packed["input_ids"] is tokens


def parameters_after(folder, choice):
    stage = make_match()
    folder.mkdir()
    train(
        stage, make_data(), settings_of(steps=3), run=RunSettings(micro_batch=1, cuda_graph=choice),
        accelerator=Accelerator(cpu=True), folder=folder, log=RunLog(folder / "log.jsonl"),
    )  # fmt: skip
    return [p.detach() for group in stage.groups for p in group.parameters]


class Refusing:
    """A BatchGraph whose recording fails at the third micro-batch."""

    def __init__(self, run, device):
        self.run, self.calls = run, 0

    def __call__(self, batch, *, scale):
        self.calls += 1
        if self.calls == 3:
            raise NotRecorded("something waits")
        return self.run(batch, scale=scale)


def test_what_cannot_be_recorded_runs_plainly_unless_it_was_asked_for(tmp_path, monkeypatch, capsys):
    with pytest.raises(TrainingError, match="run.cuda_graph: match cannot be recorded: it runs on cpu"):
        parameters_after(tmp_path / "cpu", True)
    expected = parameters_after(tmp_path / "plain", False)
    monkeypatch.setattr(train_module, "BatchGraph", Refusing)
    monkeypatch.setattr(train_module, "why_not", lambda *_: "")
    with pytest.raises(TrainingError, match="match: no CUDA graph: something waits. Set run.cuda_graph"):
        parameters_after(tmp_path / "asked", True)
    capsys.readouterr()
    got = parameters_after(tmp_path / "auto", None)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert "not recorded as a CUDA graph: something waits" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ on a GPU


def matching():
    return MatchStage(convert(make_model(**WIDE), heads=[(1, 0)]).to("cuda"), MatchSettings())


def finetuning():
    model = add_lora(convert(make_model(**WIDE), heads=[(1, 0)]).to("cuda"), LORA)
    settings = FinetuneSettings(loss=LossSettings(ce=1.0, kl=1.0), lora=LORA)
    return FinetuneStage(model, settings)


def training_layers():
    model = convert(make_model(**WIDE), heads=[(1, 0)]).to("cuda")
    TrainedWeights(model)
    return FinetuneStage(model, FinetuneSettings(train="layers", loss=LossSettings(ce=1.0, kl=1.0)))


def make_batch(number: int, length: int = 192, *, whole=()) -> dict[str, torch.Tensor]:
    """Rows of one document for numbers in `whole`, or of documents of another length every time."""
    positions = torch.arange(length) % (length if number in whole else 40 + 17 * number)
    tokens = make_tokens(2, length, seed=number)
    batch = {"input_ids": tokens, "position_ids": positions.expand(2, -1), "labels": tokens}
    return {name: tensor.to("cuda") for name, tensor in batch.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [(5,), (0, 1, 2, 3)])
@pytest.mark.parametrize("make", [matching, finetuning, training_layers])
def test_recorded_micro_batches_have_the_numbers_of_others(make, whole):
    """Figures and gradients of eight batches in turn, dropout included; one has another shape."""
    stage = make()
    parameters = [p for group in stage.groups for p in group.parameters]

    def run(batch, *, scale):
        return stage.run(batch, scale=scale, backward=True)

    def numbers(function, number):
        torch.manual_seed(number)
        batch = make_batch(number, 128 if number == 6 else 192, whole=whole)
        figures = function(batch, scale=torch.tensor(1 / (1 + number), device="cuda"))
        values = [v.clone() for v in figures.values()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        return values, gradients

    recorded = BatchGraph(run, torch.device("cuda"))
    for number in range(8):
        wanted, got = numbers(run, number), numbers(recorded, number)
        assert (recorded.graph is not None) == (number >= WARM_UP)
        for name, x, y in zip(("figures", "gradients"), got, wanted, strict=True):
            x, y = (torch.cat([v.flatten() for v in part]) for part in (x, y))
            assert y.norm() > 0 and (x - y).norm() <= 1e-4 * y.norm(), f"batch {number}: {name}"


@pytest.mark.gpu
def test_what_waits_for_the_device_is_refused_and_has_not_run():
    total = torch.zeros((), device="cuda")

    def run(batch, *, scale):
        total.add_(scale)
        return {"loss": torch.tensor(total.item(), device="cuda")}

    recorded, scale = BatchGraph(run, torch.device("cuda")), torch.ones((), device="cuda")
    batch = {"position_ids": torch.zeros(1, 4, dtype=torch.long, device="cuda")}
    for _ in range(WARM_UP):
        recorded(batch, scale=scale)
    torch.manual_seed(0)
    wanted = torch.rand(4, device="cuda")
    torch.manual_seed(0)
    with pytest.raises(NotRecorded):
        recorded(batch, scale=scale)
    assert total.item() == WARM_UP
    assert torch.equal(torch.rand(4, device="cuda"), wanted)  # random numbers go on as if nothing had been tried
