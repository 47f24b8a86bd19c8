"""Training through torch.compile: the numbers are those without it, layers share what is compiled, nothing stays.

The compiler needs a C++ compiler on a CPU; these tests skip without one.
"""

import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from pico import convert, make_model, make_tokens
from test_train import make_data, settings_of
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from linearize import train as train_module
from linearize.compiled_layers import CompiledLayers, decoder_layers, pays
from linearize.errors import TrainingError
from linearize.finetune import FinetuneStage, add_lora
from linearize.fused_norms import fused_norms
from linearize.match import MatchStage
from linearize.recipe import FinetuneSettings, LoraSettings, LossSettings, MatchSettings, RunSettings
from linearize.run_log import RunLog
from linearize.train import train

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
LORA = LoraSettings(rank=4, dropout=0.3, targets=["q_proj", "down_proj"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def make_batch(length=24):
    starts = torch.arange(length) % 16  # two documents a row
    return {"input_ids": make_tokens(2, length), "position_ids": starts.expand(2, -1), "labels": make_tokens(2, length)}


def make_match(layers=4) -> MatchStage:
    return MatchStage(convert(make_model(num_hidden_layers=layers), heads=[(1, 0)]), MatchSettings())


def make_finetune(layers=3, *, kl=1.0, gradient_checkpointing) -> FinetuneStage:
    model = add_lora(convert(make_model(num_hidden_layers=layers), heads=[(1, 0)]), LORA)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    settings = FinetuneSettings(loss=LossSettings(ce=1.0, kl=kl), lora=LORA)
    return FinetuneStage(model, settings, gradient_checkpointing=gradient_checkpointing)


def step(stage, context, *, length=24) -> tuple[dict, list]:
    """Figures and gradients of one micro-batch, whose dropout is the same every time."""
    torch.manual_seed(3)
    batch = {name: tensor.to(stage.model.device) for name, tensor in make_batch(length).items()}
    with fused_norms(stage.model), context:
        figures = stage.run(batch, scale=0.5, backward=True)
    parameters = [p for group in stage.groups for p in group.parameters]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return figures, gradients


def assert_same(got, wanted):
    (figures, gradients), (wanted_figures, wanted_gradients) = got, wanted
    assert figures.keys() == wanted_figures.keys()
    for name in figures:
        torch.testing.assert_close(figures[name], wanted_figures[name], rtol=1e-5, atol=1e-6)
    assert sum(g is not None and g.norm() > 0 for g in gradients) > 4
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        if other is None:
            assert gradient is None
        else:
            assert (gradient - other).norm() <= 1e-4 * other.norm() + 1e-7


def test_matching_gives_the_same_numbers_and_layers_share_four_graphs():
    """The norm; projections and rotary; the output projection; the rest of the layer. One layer keeps a head."""
    stage = make_match()
    plain = step(stage, nullcontext())
    compiled = CompiledLayers(stage.model)
    assert_same(step(stage, compiled.on()), plain)
    assert counters["stats"]["unique_graphs"] == 4
    assert_same(step(stage, compiled.on()), plain)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize(("gradient_checkpointing", "kl", "graphs"), [(False, 1.0, 8), (True, 0.0, 4)])
def test_finetuning_gives_the_same_numbers_and_drops_the_same(gradient_checkpointing, kl, graphs):
    """Four graphs each of model and teacher, and some again of a first layer that needs no gradient of its input."""
    stage = make_finetune(kl=kl, gradient_checkpointing=gradient_checkpointing)
    names = set(stage.model.state_dict())
    plain = step(stage, nullcontext())
    assert_same(step(stage, CompiledLayers(stage.model).on()), plain)
    assert graphs <= counters["stats"]["unique_graphs"] <= graphs + 3
    assert set(stage.model.state_dict()) == names
    changed = [m for m in stage.model.modules() if {"forward", "call_attention"} & set(vars(m))]
    assert not changed


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_match, lambda: make_finetune(gradient_checkpointing=False)])
def test_on_a_gpu_the_numbers_are_the_same(make):
    stage = make()
    stage.model.to("cuda")
    plain = step(stage, nullcontext(), length=192)
    assert_same(step(stage, CompiledLayers(stage.model).on(), length=192), plain)


def test_layers_are_found_in_their_order_also_under_lora():
    model = make_model(num_hidden_layers=3)
    assert decoder_layers(model) == list(model.model.layers)
    model = add_lora(convert(model), LORA)
    assert decoder_layers(model) == list(model.get_base_model().model.layers)


def test_it_pays_on_a_gpu_where_the_stage_is_long(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert pays(torch.device("cuda"), 10**8) and not pays(torch.device("cuda"), 10**5)
    assert not pays(torch.device("cpu"), 10**8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not pays(torch.device("cuda"), 10**8)


@pytest.mark.parametrize(("choice", "used"), [(True, 2), (False, 0), (None, 0)])
def test_training_steps_are_compiled_and_evaluations_are_not(choice, used, tmp_path, monkeypatch, capsys):
    entered, ran = [], []

    class Watched(CompiledLayers):
        def on(self):
            entered.append(len(ran))
            return nullcontext()

    stage = make_match(2)
    own = stage.run
    monkeypatch.setattr(stage, "run", lambda batch, **options: ran.append(options["backward"]) or own(batch, **options))
    monkeypatch.setattr(train_module, "CompiledLayers", Watched)
    train(
        stage, make_data(), settings_of(steps=2, evaluate_every=1), run=RunSettings(micro_batch=4, compile=choice),
        accelerator=Accelerator(cpu=True), folder=tmp_path, log=RunLog(tmp_path / "log.jsonl"),
    )  # fmt: skip
    assert ran == [False, True, False, True, False]
    assert entered == [1, 3][:used]
    assert ("match: layers are compiled" in capsys.readouterr().out) == bool(used)


@pytest.mark.parametrize("asked", [False, True])
def test_a_compiler_that_fails_is_done_without_unless_asked_for(asked, tmp_path, monkeypatch, capsys):
    class Failing(CompiledLayers):
        @contextmanager
        def on(self):
            yield  # gradients are there already, and must not count twice
            raise TorchDynamoException("no compiler here\nand much more")

    def parameters_after(choice, name):
        stage = make_match(2)
        (tmp_path / name).mkdir()
        train(
            stage, make_data(), settings_of(steps=2, evaluate_every=1), run=RunSettings(micro_batch=4, compile=choice),
            accelerator=Accelerator(cpu=True), folder=tmp_path / name, log=RunLog(tmp_path / name / "log.jsonl"),
        )  # fmt: skip
        return [p.detach() for group in stage.groups for p in group.parameters]

    monkeypatch.setattr(train_module, "CompiledLayers", Failing)
    monkeypatch.setattr(train_module, "pays", lambda *_: True)
    if asked:
        with pytest.raises(TrainingError, match="torch.compile failed: no compiler here. Set run.compile"):
            parameters_after(True, "asked")
        return
    expected, got = parameters_after(False, "plain"), parameters_after(None, "auto")
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert "not compiled, as torch.compile failed: no compiler here" in capsys.readouterr().out
