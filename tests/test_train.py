"""The training loop and the matching stage: schedule, accumulation, clipping, stopping, resuming, bad numbers.

B batch, T time
"""

import errno
import io
import json
import math
import types
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from pico import attention, convert, make_model, make_tokens

from linearize import train as train_module
from linearize.architecture import linearize_
from linearize.errors import TrainingError
from linearize.match import MatchStage, relative_error
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import MatchSettings, RunSettings
from linearize.run_log import RunLog
from linearize.sequences import PackedSequences, TokenData
from linearize.train import ParameterGroup, _Loop, train
from linearize.variants import softmax_attention

LENGTH = 24


def make_data(*, num_train=8, num_held_out=2, packing=True, seed=0) -> TokenData:
    """Random tokens in documents of different lengths."""
    random = numpy.random.default_rng(seed)

    def sequences(count):
        tokens = random.integers(3, 96, count * LENGTH).astype("uint16")
        if packing:
            starts = numpy.unique([0, *random.integers(1, len(tokens), 2 * count)])
        else:
            starts = numpy.cumsum([0, *random.integers(LENGTH // 2, LENGTH, count - 1)])
            tokens = tokens[: starts[-1] + LENGTH]
        return PackedSequences(tokens, starts, LENGTH, packing, 0)

    return TokenData(sequences(num_train), sequences(num_held_out), "random tokens")


def settings_of(*, steps=6, batch=4, **changes) -> MatchSettings:
    values = {"tokens": steps * batch * LENGTH, "batch_tokens": batch * LENGTH, "evaluate_every": 2, **changes}
    return MatchSettings(**values)


def make_loop(stage, folder, *, settings=None, data=None, accelerator=None, **run) -> _Loop:
    log = RunLog(folder / "log.jsonl")
    accelerator = accelerator or Accelerator(cpu=True)
    settings = settings or settings_of()
    return _Loop(stage, data or make_data(), settings, RunSettings(**run), accelerator, folder, log)


def run_train(stage, folder, *, settings=None, data=None, micro_batch=4, **run):
    log = RunLog(folder / "log.jsonl")
    return train(
        stage, data or make_data(), settings or settings_of(), run=RunSettings(micro_batch=micro_batch, **run),
        accelerator=Accelerator(cpu=True), folder=folder, log=log,
    )  # fmt: skip


def make_match(*, layers=2, dtype=torch.float32, lr=1e-2) -> MatchStage:
    """Matching of a tiny Llama whose maps are all random."""
    model = convert(make_model("llama", num_hidden_layers=layers, dtype=dtype))
    return MatchStage(model, MatchSettings(lr=lr))


def parameters_of(stage) -> list[torch.Tensor]:
    return [p.detach().clone() for group in stage.groups for p in group.parameters]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class ToyStage:
    """One parameter that falls by about lr a step; held-out errors are read from a list."""

    name, model, order = "match", None, 0

    def __init__(self, errors, *, interrupt_at=None):
        self.parameter = torch.nn.Parameter(torch.zeros(3))
        self.groups = [ParameterGroup("layer 0", [self.parameter], 0.1)]
        self.errors, self.interrupt_at, self.num_steps = errors, interrupt_at, 0

    def num_terms(self, batch):
        return batch["input_ids"].shape[0]

    def run(self, batch, *, scale, backward):
        if not backward:
            return {"loss": self.errors.pop(0) * scale * batch["input_ids"].shape[0]}
        if self.num_steps == self.interrupt_at:
            raise KeyboardInterrupt
        self.num_steps += 1
        loss = scale * batch["input_ids"].sum() / 100 * self.parameter.sum()  # gradients of different sizes
        loss.backward()
        return {"loss": loss}


# --------------------------------------------------------------------------------------------------- the loop


def test_schedule_is_a_linear_warm_up_then_a_cosine_to_a_tenth(tmp_path):
    loop = make_loop(ToyStage([]), tmp_path, settings=settings_of(steps=20, warmup=0.2))
    rates = []
    for step in range(20):
        loop.step = step
        rates.append(loop.schedule())
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]
    assert rates[4:] == pytest.approx(cosine, rel=1e-12)
    loop.step = 20
    assert loop.schedule() == pytest.approx(0.1)


def test_every_group_follows_the_schedule_from_its_own_rate(tmp_path):
    stage = make_match(lr=0.04)
    stage.groups[1] = ParameterGroup("layer 1", stage.groups[1].parameters, 0.02)
    run_train(stage, tmp_path, settings=settings_of(steps=4, warmup=0.5))
    logged = [r["lr"] for r in records(tmp_path) if "lr" in r]
    assert logged == pytest.approx([0.02, 0.04, 0.04, 0.04 * 0.55])
    state = torch.load(tmp_path / "match.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["lr"] for g in state] == pytest.approx([0.04 * 0.55, 0.02 * 0.55])


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_no_figure_and_no_gradient(tmp_path, packing):
    data, seen = make_data(packing=packing), []
    for micro_batch in (1, 2, 4):
        stage = make_match()
        loop = make_loop(stage, tmp_path, data=data, micro_batch=micro_batch)
        figures = loop.run_batches(data.train, [3, 0, 5, 1], backward=True)
        seen.append((figures, [p.grad for p in loop.parameters]))
    for figures, gradients in seen[1:]:
        assert figures == pytest.approx(seen[0][0], rel=1e-5)
        for gradient, expected in zip(gradients, seen[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_step_waits_once_and_reads_each_sequence_once(tmp_path, monkeypatch):
    """Numbers are read off the device in one copy, and the tokens of a step once, whatever the micro-batches."""
    data, read, waits = make_data(), [], []
    batch, tolist = PackedSequences.batch, torch.Tensor.tolist
    loop = make_loop(make_match(), tmp_path, data=data, micro_batch=2)
    bar = loop.log.progress("match", start=0, total=1)
    monkeypatch.setattr(PackedSequences, "batch", lambda self, i: read.extend(i) or batch(self, i))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append("tolist") or tolist(self))
    for name in ("item", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"waits by {name}"))
    monkeypatch.setattr(loop.optimizer, "step", lambda: None)  # AdamW keeps its step count on the CPU, and reads it
    loop.train_step(bar)
    assert len(read) == len(set(read)) == 4 and waits == ["tolist"]


def windows_seen(stage, folder, **settings) -> list[int]:
    """The windows of the first layer, call by call, while a stage trains."""
    seen, layer = [], next(iter(linear_attentions(stage.model).values()))
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.window))
    run_train(stage, folder, settings=settings_of(evaluate_every=1000, **settings), micro_batch=2)
    assert seen[0] == layer.window and seen[-1] == layer.window, "held-out text always has the whole window"
    return seen[1:-1]


def test_the_window_is_shorter_at_random_and_ever_more_seldom(tmp_path):
    stage = make_match(layers=1)
    seen = windows_seen(stage, tmp_path, steps=60, window_dropout=1.0)
    assert set(seen) == {5, 2, 1} and len(seen) == 120
    full = [sum(w == 5 for w in part) for part in (seen[:40], seen[40:80], seen[80:])]
    assert seen[0] < 5 and full[0] < 14 < full[1] < 27 < full[2], full


def test_no_window_is_dropped_unless_asked(tmp_path):
    assert set(windows_seen(make_match(layers=1), tmp_path, steps=4)) == {5}


def test_a_dropped_window_follows_from_the_step(tmp_path):
    seen = []
    for asked in (0, 3):
        stage = make_match(layers=1)
        torch.rand(asked)
        (tmp_path / str(asked)).mkdir()
        seen.append(windows_seen(stage, tmp_path / str(asked), steps=8, window_dropout=0.5))
    assert seen[0] == seen[1] and len(set(seen[0])) > 1


def test_each_layer_is_clipped_alone(tmp_path):
    stage = make_match()
    loop = make_loop(stage, tmp_path, settings=settings_of(clip=0.5))
    for group, size in zip(stage.groups, (100.0, 0.01), strict=True):
        for parameter in group.parameters:
            parameter.grad = torch.full_like(parameter, size)
    before = [p.grad.clone() for p in stage.groups[1].parameters]
    _, norms = loop.clip({"loss": torch.tensor(1.0)})
    total = torch.cat([p.grad.flatten() for p in stage.groups[0].parameters]).norm().item()
    assert total == pytest.approx(0.5, rel=1e-4) and norms["gradient of layer 0"] > 1000
    assert all(torch.equal(p.grad, b) for p, b in zip(stage.groups[1].parameters, before, strict=True))


def test_early_stopping_leaves_the_best_parameters(tmp_path):
    stage = ToyStage([5.0, 4.0, 3.0, 3.5, 3.4])
    result = run_train(stage, tmp_path, settings=settings_of(steps=40, patience=2, warmup=0))
    assert (result.num_steps, result.best_step, result.first_error, result.best_error) == (8, 4, 5.0, 3.0)
    ran_on = torch.load(tmp_path / "match.pt", weights_only=True)["parameters"][0]
    assert (ran_on < stage.parameter - 0.1).all(), "training went on past the best step"
    four_steps = ToyStage([5.0, 4.0, 3.0, 3.5, 3.4])
    (tmp_path / "four").mkdir()
    loop = make_loop(four_steps, tmp_path / "four", settings=settings_of(steps=40, patience=2, warmup=0), micro_batch=4)
    bar = loop.log.progress("match", start=0, total=4)
    for _ in range(4):
        loop.train_step(bar)
    assert torch.equal(stage.parameter, four_steps.parameter)


def test_without_patience_it_never_stops_early(tmp_path):
    result = run_train(ToyStage([float(i) for i in range(9)]), tmp_path, settings=settings_of(steps=8, patience=0))
    assert (result.num_steps, result.best_step) == (8, 0)


def test_an_interrupted_stage_goes_on_as_if_nothing_had_been(tmp_path):
    errors = [5.0, 4.0, 3.0, 3.5, 2.0]
    whole, killed, resumed = ToyStage(list(errors)), ToyStage(list(errors), interrupt_at=5), ToyStage([3.5, 2.0])
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    expected = run_train(whole, folders[0], settings=settings_of(steps=8), checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        run_train(killed, folders[1], settings=settings_of(steps=8), checkpoint_every=4)
    result = run_train(resumed, folders[1], settings=settings_of(steps=8), checkpoint_every=4)
    assert resumed.num_steps == 4, "only what was lost is done again"
    assert result == expected and torch.equal(resumed.parameter, whole.parameter)
    again = ToyStage([], interrupt_at=0)
    assert run_train(again, folders[1], settings=settings_of(steps=8), checkpoint_every=4) == expected
    assert torch.equal(again.parameter, whole.parameter), "a finished stage is read, not done again"


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    class Full(ToyStage):
        def run(self, batch, *, scale, backward):
            if backward and self.num_steps == 4:
                monkeypatch.setattr(train_module.torch, "save", full_disk)
            return super().run(batch, scale=scale, backward=backward)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        run_train(Full([5.0] * 5), tmp_path, settings=settings_of(steps=8), checkpoint_every=2)
    assert torch.load(tmp_path / "match.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "match.tmp").exists()


def test_fewer_sequences_than_processes_is_an_error(tmp_path):
    accelerator = types.SimpleNamespace(num_processes=5)
    with pytest.raises(TrainingError, match="match.batch_tokens = 96 holds 4 sequences"):
        make_loop(ToyStage([]), tmp_path, accelerator=accelerator)


def test_trackers_get_steps_that_only_grow(tmp_path):
    sent = []
    trackers = types.SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)))
    log = RunLog(tmp_path / "log.jsonl", trackers=trackers)
    for before, stage in ((0, "match"), (2, "finetune")):
        log.steps_before = before
        bar = log.progress(stage, start=0, total=2)
        for step in (1, 2):
            log.step(bar, stage, step, loss=0.5, layers=[1, 2], tokens_per_second=10.0)
    assert [step for step, _ in sent] == [1, 2, 3, 4]
    assert sent[2][1]["finetune/loss"] == 0.5 and "finetune/layers" not in sent[2][1]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    log = RunLog(path)
    log.write(step=2)
    log.close()
    RunLog(path).close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_stops_the_log_with_a_clear_error():
    log = RunLog(Path("/dev/full"), enabled=False)
    raw = open("/dev/full", "wb", buffering=0)  # unbuffered, so that closing it does not write again
    log._file = io.TextIOWrapper(raw, write_through=True)
    with pytest.raises(TrainingError, match="could not be written: .*No space left"):
        log.write(step=1)


# --------------------------------------------------------------------------------------------------- matching


def test_the_loss_is_error_power_over_output_power_of_each_sequence():
    stage, tokens = make_match(), make_tokens(3, LENGTH)
    expected = {}

    def observer(module, q, k, v, out, *, scaling, **_):
        predicted, _ = module.linear_attn(q, k, v, scaling=scaling)
        out = out.transpose(1, 2)
        ratios = [((p - o) ** 2).sum() / (o**2).sum() for p, o in zip(predicted, out, strict=True)]
        expected[f"layer {module.layer_idx}"] = sum(ratios) / 3

    with torch.no_grad(), softmax_attention(stage.model):
        stage.model(tokens, use_cache=False, observer=observer)
    figures = stage.run({"input_ids": tokens}, scale=1 / 3, backward=False)
    expected["loss"] = (expected["layer 0"] + expected["layer 1"]) / 2
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_packed_documents_are_matched_as_if_apart():
    stage, documents, lengths = make_match(), make_tokens(3, LENGTH), (24, 15, 19)
    errors, powers = torch.zeros(2), torch.zeros(2)

    def observer(module, q, k, v, out, *, scaling, **_):
        predicted, _ = module.linear_attn(q, k, v, scaling=scaling)
        errors[module.layer_idx] += (predicted - out.transpose(1, 2)).square().sum()
        powers[module.layer_idx] += out.square().sum()

    with torch.no_grad(), softmax_attention(stage.model):
        for tokens, length in zip(documents, lengths, strict=True):
            stage.model(tokens[None, :length], use_cache=False, observer=observer)
    row = torch.cat([t[:n] for t, n in zip(documents, lengths, strict=True)])[None]
    batch = {"input_ids": row, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    figures = stage.run(batch, scale=1.0, backward=False)
    for index in (0, 1):
        assert figures[f"layer {index}"].item() == pytest.approx((errors / powers)[index].item(), rel=1e-4)


def test_the_loss_ignores_padding_and_scale():
    out, predicted = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    error = relative_error(predicted, out, valid)
    torch.testing.assert_close(error[:1], relative_error(predicted[:1, :, :4], out[:1, :, :4]))
    torch.testing.assert_close(error, relative_error(7 * predicted, 7 * out, valid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_loss_is_that_of_its_formula(dtype):
    out = torch.randn(2, 4, 6, 8).to(dtype)
    predicted = (out + 0.3 * torch.randn(2, 4, 6, 8)).to(dtype).requires_grad_()
    valid, weights = torch.rand(2, 6) < 0.7, torch.tensor([0.5, 2.0])
    (relative_error(predicted, out, valid) * weights).sum().backward()
    mask, exact = valid[:, None, :, None], predicted.detach().double().requires_grad_()
    powers = [(x * mask).square().sum((1, 2, 3)) for x in (exact - out.double(), out.double())]
    (powers[0] / powers[1] * weights).sum().backward()
    assert predicted.grad.dtype == dtype
    error = (predicted.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert 0 < error < (1e-6 if dtype == torch.float32 else 4e-3)


def test_one_layers_activations_are_alive_at_a_time():
    """Nothing autograd saved in one layer is left when the next one is entered."""
    stage, live, entered, most = make_match(layers=4), weakref.WeakSet(), [], []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        held = Held(tensor)
        live.add(held)
        return held

    for layer in linear_attentions(stage.model).values():
        layer.register_forward_pre_hook(lambda *_: entered.append(len(live)))
        layer.register_forward_hook(lambda *_: most.append(len(live)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        stage.run({"input_ids": make_tokens(2, LENGTH)}, scale=0.5, backward=True)
    assert entered == [0, 0, 0, 0] and len(live) == 0
    assert len(most) == 4 and min(most) > 0 and max(most) == min(most)


def test_parameters_are_float32_in_a_bfloat16_model_whose_weights_stay(tmp_path):
    stage = make_match(dtype=torch.bfloat16, lr=1e-3)
    weights = {n: p.clone() for n, p in stage.model.named_parameters() if "linear_attn" not in n}
    before, sequences = parameters_of(stage), make_data(num_train=4).train
    result = run_train(stage, tmp_path, data=TokenData(sequences, sequences, "seen"), settings=settings_of(steps=12))
    assert result.best_error < result.first_error
    trained = [p for group in stage.groups for p in group.parameters]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert len(trained) == 12 and not any(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    for name, parameter in stage.model.named_parameters():
        if name in weights:
            assert parameter.dtype == torch.bfloat16 and parameter.grad is None
            assert torch.equal(parameter, weights[name]), name


def test_only_converted_layers_are_matched(tmp_path):
    model = linearize_(make_model("llama", num_hidden_layers=3), attention(keep_softmax=[1]))
    stage = MatchStage(model, MatchSettings(lr=1e-2))
    run_train(stage, tmp_path)
    assert [group.name for group in stage.groups] == ["layer 0", "layer 2"]
    assert all(len(r["layers"]) == 2 for r in records(tmp_path) if "layers" in r)


class PoisonedMatch(MatchStage):
    """Matching in which a parameter of layer 1 breaks in the backward pass of step 5."""

    value, num_passes = math.nan, 0

    def run(self, batch, *, scale, backward):
        self.num_passes += backward
        if self.num_passes == 5:
            self.layers[1].q_map.data[0, 0, 0] = self.value
        return super().run(batch, scale=scale, backward=backward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_layer(tmp_path, value):
    stage = PoisonedMatch(convert(make_model()), MatchSettings(lr=1e-2))
    stage.value = value
    with pytest.raises(TrainingError, match=r"match, step 5: not finite: .*layer 1") as caught:
        run_train(stage, tmp_path, settings=settings_of(steps=8), checkpoint_every=2)
    assert "layer 0" not in str(caught.value) and "match.pt" in str(caught.value)
    state = torch.load(tmp_path / "match.pt", weights_only=True)
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["parameters"])
    assert "layer 1" in records(tmp_path)[-1]["not_finite"]


def test_a_model_that_is_not_finite_is_refused_before_the_first_step(tmp_path):
    stage = make_match()
    stage.layers[1].key_center.data[0] = math.nan
    with pytest.raises(TrainingError, match=r"step 0: not finite: held-out layer 1, held-out loss; no checkpoint"):
        run_train(stage, tmp_path)
