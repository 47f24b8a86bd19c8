"""Softmax of packed rows text by text: the numbers are those with a mask, whatever the packing.

On a CPU scaled_dot_product_attention of one text after the other stands in for the kernel.
"""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pico import convert, make_model, make_tokens
from test_train import LENGTH, make_data, settings_of
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize import softmax_by_text
from linearize import train as train_module
from linearize.batch_graph import WARM_UP, BatchGraph
from linearize.compiled_layers import CompiledLayers
from linearize.errors import TrainingError
from linearize.finetune import FinetuneStage, add_lora
from linearize.match import MatchStage
from linearize.modeling_linearized import attention_modules
from linearize.recipe import FinetuneSettings, LoraSettings, LossSettings, MatchSettings, RunSettings
from linearize.run_log import RunLog
from linearize.sequences import PackedSequences, text_bounds
from linearize.softmax_by_text import BOUNDS, BY_TEXT, SoftmaxByText, by_torch, register, why_not
from linearize.train import train
from linearize.variants import softmax_attention

REFERENCE = "by_text_reference"
CUDA = torch.device("cuda")
WIDE = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)  # heads of 64, which the kernels take
LORA = LoraSettings(rank=4, targets=["q_proj", "v_proj", "down_proj"])
KEPT = dict(keep_softmax=[1], heads=[(2, 0)])  # of three layers: the first is linear, a head of the last is not
calls = []  # how many texts of at least a token each call of the stand-in saw


def by_sdpa(query, key, value, bounds, *, longest, scale):
    """What `by_torch` computes."""
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(query)
    pieces = [(first, last) for first, last in pairwise(bounds.tolist()) if first != last]
    assert all(0 < last - first <= longest for first, last in pieces)
    calls.append(len(pieces))
    texts = ([x[first:last].transpose(0, 1) for x in (query, key, value)] for first, last in pieces)
    outs = [scaled_dot_product_attention(*text, is_causal=True, scale=scale, enable_gqa=True) for text in texts]
    return torch.cat([out.transpose(0, 1) for out in outs])


register(REFERENCE, by_sdpa)


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def positions_of(*rows):
    """position_ids of rows whose texts have these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def rows_of(*lengths, row=LENGTH) -> PackedSequences:
    """Texts of these lengths, one after the other, in rows."""
    starts = np.cumsum([0, *lengths[:-1]])
    return PackedSequences(np.zeros(sum(lengths), "uint16"), starts, row, True, 0)


# ----------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [
        ([[6]], [0, 6, 6, 6, 6, 6]),
        ([[6], [6]], [0, 6, 12, 12, 12, 12]),
        ([[1, 5], [3, 2, 1]], [0, 1, 6, 9, 11, 12]),  # no place is left
        ([[1, 1, 1, 1]], [0, 1, 2, 3, 4, 4]),
    ],
)
def test_bounds_have_one_length_and_end_in_empty_texts(rows, bounds):
    got = text_bounds(positions_of(*rows), 5)
    assert got.tolist() == bounds and got.dtype == torch.int32


def test_more_texts_than_places_have_no_bounds():
    positions = positions_of([1, 5], [3, 2, 1])
    assert text_bounds(positions, 4) is None and text_bounds(positions, 5) is not None


def test_bounds_of_any_packing_are_those_of_its_texts():
    random = np.random.default_rng(0)
    for _ in range(50):
        cuts = [np.flatnonzero(random.random(31) < random.random()) + 1 for _ in range(3)]
        rows = [np.diff([0, *row, 32]).tolist() for row in cuts]
        expected = np.cumsum([0, *(length for row in rows for length in row)]).tolist()
        got = text_bounds(positions_of(*rows), 100).tolist()
        assert got == expected + [96] * (101 - len(expected))


def test_texts_of_rows_are_counted_as_batches_have_them():
    rows = rows_of(10, 14, 30, 1, 1, 16, 60, 5)  # 137 tokens: five rows, and 17 that are not used
    assert rows.texts_of_rows().tolist() == [2, 1, 4, 1, 1] and len(rows) == 5
    positions = rows.batch(range(5))["position_ids"]
    assert (positions == 0).sum(1).tolist() == [2, 1, 4, 1, 1]
    random = make_data(num_train=40).train
    assert random.texts_of_rows().tolist() == (random.batch(range(40))["position_ids"] == 0).sum(1).tolist()


def by_text_of(model, rows) -> SoftmaxByText:
    return SoftmaxByText(model, rows, REFERENCE)


def test_places_are_enough_for_what_rows_hold_and_no_more_than_they_can():
    model = convert(make_model())
    one_each, alike = rows_of(*[LENGTH] * 9), rows_of(*[8] * 30)
    assert by_text_of(model, one_each).most(4) == 4 and by_text_of(model, alike).most(4) == 12
    assert by_text_of(model, rows_of(*[LENGTH, 8, 8, 8] * 9)).most(1) == 3  # which is the mean and one deviation
    uneven = rows_of(*[LENGTH] * 200, *[1] * LENGTH)  # one row of 201 holds 24 texts
    assert by_text_of(model, uneven).most(1) < 24 and by_text_of(model, uneven).most(100) < 300
    random = make_data(num_train=400).train
    places, drawn = by_text_of(model, random), np.random.default_rng(1)
    totals = [drawn.choice(random.texts_of_rows(), 16).sum() for _ in range(500)]
    assert max(totals) <= places.most(16) < 16 * random.texts_of_rows().max()
    assert places.most(10**6) == softmax_by_text.MOST_TEXTS


def test_batches_of_one_shape_have_bounds_of_one_length_unless_they_need_none():
    by_text = by_text_of(convert(make_model()), rows_of(10, 14, 4, 20, 8, 8, 8, LENGTH))
    batches = [{"position_ids": positions_of(*rows)} for rows in ([[10, 14], [24]], [[8, 8, 8], [4, 20]])]
    assert {len(by_text.bounded(batch, always=False)[BOUNDS]) for batch in batches} == {by_text.most(2) + 1}
    whole = {"position_ids": positions_of([24], [24])}
    assert BOUNDS not in by_text.bounded(whole, always=False)
    assert by_text.bounded(whole, always=True)[BOUNDS].tolist() == [0, 24] + [48] * (by_text.most(2) - 1)
    many = {"position_ids": positions_of([1] * 24, [1] * 24)}
    assert BOUNDS not in by_text.bounded(many, always=True)


# ----------------------------------------------------------------------------------------------------- choice


def converted(name="llama", *, dtype=torch.bfloat16, **settings):
    return convert(make_model(name, dtype=dtype, **settings))


def test_the_device_is_looked_at_before_anything_else():
    assert why_not(torch.device("cpu"), None, None) == "it runs on cpu"


def test_reasons_against_it(monkeypatch):
    rows, capability = make_data().train, (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "smollm3"):
        assert why_not(CUDA, converted(name), rows) == "", name
    assert "packing" in why_not(CUDA, converted(), make_data(packing=False).train)
    assert "weights are torch.float32" in why_not(CUDA, converted(dtype=torch.float32), rows)
    assert "implementation is eager" in why_not(CUDA, converted(attn_implementation="eager"), rows)
    assert "window" in why_not(CUDA, converted("gemma3"), rows)
    assert "not of 4" in why_not(CUDA, converted(head_dim=4), rows)
    assert "not of 264" in why_not(CUDA, converted(head_dim=264), rows)
    assert "drops attention weights" in why_not(CUDA, converted(attention_dropout=0.1), rows)
    assert "drops attention weights" in why_not(CUDA, converted("gpt2"), rows)
    capped, sinks = converted(), converted()
    capped.config.attn_logit_softcapping = 30.0
    next(iter(attention_modules(sinks).values())).sinks = torch.nn.Parameter(torch.zeros(4))
    assert "caps" in why_not(CUDA, capped, rows) and "sinks" in why_not(CUDA, sinks, rows)
    capability = (7, 5)
    assert "8.0" in why_not(CUDA, None, None)
    monkeypatch.setattr(softmax_by_text, "OPTIONS", ("is_causal",))  # torch 2.10
    assert "no varlen_attn with" in why_not(CUDA, None, None)


def train_with(folder, choice, *, data=None):
    stage = MatchStage(convert(make_model(num_hidden_layers=3), **KEPT), MatchSettings(lr=1e-2))
    folder.mkdir()
    train(
        stage, data or make_data(), settings_of(steps=3), run=RunSettings(micro_batch=2, softmax_by_text=choice),
        accelerator=Accelerator(cpu=True), folder=folder, log=RunLog(folder / "log.jsonl"),
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for group in stage.groups for p in group.parameters])


def test_training_goes_by_text_where_it_can_and_says_so_once(tmp_path, monkeypatch, capsys):
    with pytest.raises(TrainingError, match="run.softmax_by_text: not in match: it runs on cpu. Set it to null"):
        train_with(tmp_path / "asked", True)
    expected = train_with(tmp_path / "never", False)
    assert torch.equal(train_with(tmp_path / "on a cpu", None), expected)
    assert "text by text" not in capsys.readouterr().out and not calls
    monkeypatch.setattr(train_module, "why_not_by_text", lambda *_: "")
    monkeypatch.setattr(train_module, "SoftmaxByText", partial(SoftmaxByText, implementation=REFERENCE))
    assert torch.equal(train_with(tmp_path / "forbidden", False), expected) and not calls
    got = train_with(tmp_path / "auto", None)
    assert (got - expected).norm() <= 1e-4 * expected.norm() and max(calls) > 2
    assert capsys.readouterr().out.count("match: softmax goes text by text in micro-batches of up to") == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_recorded_micro_batches_are_of_one_shape_though_some_need_no_bounds(recorded, tmp_path, monkeypatch):
    class Watching:
        """A BatchGraph that runs every micro-batch plainly."""

        def __init__(self, run, device):
            self.run = run

        def __call__(self, batch, *, scale):
            shapes.append({name: tuple(tensor.shape) for name, tensor in batch.items()})
            return self.run(batch, scale=scale)

    shapes, data = [], make_data()
    data = replace(data, train=rows_of(*[LENGTH] * 6, 8, 8, 8, LENGTH))
    monkeypatch.setattr(train_module, "why_not_by_text", lambda *_: "")
    monkeypatch.setattr(train_module, "SoftmaxByText", partial(SoftmaxByText, implementation=REFERENCE))
    if recorded:
        monkeypatch.setattr(train_module, "why_not", lambda *_: "")
        monkeypatch.setattr(train_module, "BatchGraph", Watching)
    train_with(tmp_path / "folder", None, data=data)
    assert len(shapes) == (6 if recorded else 0) and all(shape == shapes[0] and BOUNDS in shape for shape in shapes)
    assert {2, 4} <= set(calls) if recorded else 2 not in calls  # of the two rows, both are one text, or one is not


# ----------------------------------------------------------------------------------------------------- numbers


def make_matching(device="cpu", far_mass=0.0, kept=KEPT, **settings) -> MatchStage:
    model = convert(make_model(num_hidden_layers=3, **settings), **kept).to(device)
    return MatchStage(model, MatchSettings(far_mass=far_mass))


def make_finetuning(device="cpu", checkpointing=False, kept=KEPT, **settings) -> FinetuneStage:
    model = add_lora(convert(make_model(num_hidden_layers=3, **settings), **kept).to(device), LORA)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loss = FinetuneSettings(loss=LossSettings(ce=1.0, kl=1.0), lora=LORA)
    return FinetuneStage(model, loss, gradient_checkpointing=checkpointing)


PACKED = positions_of([9, 1, 14], [24], [3, 21])


def batch_of(positions, *, seed=0) -> dict[str, torch.Tensor]:
    tokens = make_tokens(*positions.shape, seed=seed)
    return {"input_ids": tokens, "position_ids": positions, "labels": torch.where(positions == 0, -100, tokens)}


def places(stage, implementation, most=9) -> SoftmaxByText:
    """For `most` texts, whatever rows there are."""
    by_text = SoftmaxByText(stage.model, make_data().train, implementation)
    by_text.most = lambda rows: most
    return by_text


def step(stage, batch, by_text=None, context=nullcontext, run=None):
    """(figures, gradients) of one micro-batch, each as one vector."""
    batch = by_text.bounded(batch, always=True) if by_text else batch
    batch = {name: tensor.to(stage.model.device) for name, tensor in batch.items()}
    parameters = [p for group in stage.groups for p in group.parameters]
    for parameter in parameters:
        parameter.grad = None if parameter.grad is None else parameter.grad.zero_()  # the very tensor, if recorded
    scale = torch.tensor(0.5, device=stage.model.device)
    with context(), by_text.on(batch) if by_text else nullcontext():
        figures = run(batch, scale=scale) if run else stage.run(batch, scale=scale, backward=True)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return tuple(torch.cat([x.detach().float().flatten() for x in part]) for part in (figures.values(), gradients))


def assert_close(got, wanted, figures=1e-5, gradients=1e-5):
    for name, tolerance, x, y in zip(("figures", "gradients"), (figures, gradients), got, wanted, strict=True):
        error = (x - y).norm() / y.norm()
        assert y.norm() > 0 and error <= tolerance, f"{name}: {error:.2g}"


STAGES = {
    "match": make_matching,
    "match far mass": partial(make_matching, far_mass=1.0),
    "finetune": make_finetuning,
    "finetune checkpointed": partial(make_finetuning, checkpointing=True),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_has_the_numbers_of_the_mask(name):
    stage, batch = STAGES[name](), batch_of(PACKED)
    wanted = step(stage, batch)
    assert not calls
    assert_close(step(stage, batch, places(stage, REFERENCE)), wanted)
    student = {"finetune": 2, "finetune checkpointed": 4}.get(name, 0)  # its kept layer and head; run again
    teacher = 5 if name == "match far mass" else 3  # both layers with linear heads attend to marks, too
    assert calls == [6] * (teacher + student)
    with pytest.raises(AssertionError, match="figures"):
        assert_close(step(stage, batch_of(positions_of([10, 14], [24], [3, 21]))), wanted)
    calls.clear()
    assert_close(step(stage, batch), wanted)  # nothing stays
    assert not calls and BY_TEXT not in str(vars(stage.model.config)) and REFERENCE not in str(vars(stage.model.config))


def test_a_batch_without_bounds_takes_the_mask():
    stage, batch = make_matching(), batch_of(PACKED)
    by_text = places(stage, REFERENCE, most=5)  # it has six
    assert torch.equal(step(stage, batch, by_text)[1], step(stage, batch)[1]) and not calls


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "granite", "smollm3", "gpt_neox", "qwen3_moe", "phi"])
def test_teachers_of_many_architectures_have_the_logits_of_the_mask(name):
    model, batch = convert(make_model(name)), batch_of(PACKED)
    inputs = {n: batch[n] for n in ("input_ids", "position_ids")}
    by_text = SoftmaxByText(model, rows_of(9, 1, 14, 24, 3, 21), REFERENCE)
    with torch.no_grad(), softmax_attention(model):
        wanted = model(**inputs, use_cache=False).logits
        inputs = by_text.bounded(inputs, always=True)
        with by_text.on(inputs):
            got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert calls == [6] * len(attention_modules(model))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("make", [make_matching, make_finetuning])
def test_compiled_layers_go_by_text(make):
    torch.compiler.reset()
    stage, batch = make(), batch_of(PACKED)
    wanted = step(stage, batch)
    assert_close(step(stage, batch, places(stage, REFERENCE), CompiledLayers(stage.model).on), wanted, 1e-4, 1e-4)
    assert len(calls) == (3 if make is make_matching else 5)


@pytest.mark.parametrize(
    "changes",
    [dict(softcap=30.0), dict(s_aux=torch.zeros(2)), dict(sliding_window=4), dict(dropout=0.1), dict(is_causal=False),
     dict(attention_mask=torch.ones(1, 1, 4, 4)), dict(text_bounds=None)],
)  # fmt: skip
def test_what_is_more_than_causal_softmax_is_refused(changes):
    options = {"attention_mask": None, "text_bounds": torch.tensor([0, 4], dtype=torch.int32)}
    attention, heads = ALL_ATTENTION_FUNCTIONS[REFERENCE], torch.randn(1, 2, 4, 8)
    assert attention(None, heads, heads, heads, **options)[0].shape == (1, 4, 2, 8)
    with pytest.raises(ValueError, match="Set run.softmax_by_text to false"):
        attention(None, heads, heads, heads, **{**options, **changes})


def test_padding_is_refused():
    model, tokens = convert(make_model()), make_tokens(1, 8)
    by_text = SoftmaxByText(model, make_data().train, REFERENCE)
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    with softmax_attention(model), by_text.on({BOUNDS: bounds}), pytest.raises(ValueError, match="no padding"):
        model(tokens, attention_mask=torch.ones_like(tokens), text_bounds=bounds, use_cache=False)


def test_heads_come_in_the_dtype_of_autocast_as_with_a_mask():
    def attend(query, key, value, bounds, *, longest, scale):
        assert {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
        return query

    register("by_text_in_half", attend)
    heads, bounds = torch.randn(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        ALL_ATTENTION_FUNCTIONS["by_text_in_half"](None, heads, heads, heads, None, text_bounds=bounds)


@pytest.mark.parametrize("options", [None, ("scale", "window_size")])  # this torch's, and one's without groups
def test_the_kernel_is_called_as_it_is_declared_and_compiles_in_one_graph(options, monkeypatch):
    if options:
        monkeypatch.setattr(softmax_by_text, "OPTIONS", options)
    half = dict(device="meta", dtype=torch.bfloat16, requires_grad=True)
    query, key, value = (torch.randn(32, heads, 16, **half) for heads in (4, 2, 2))
    bounds = torch.zeros(9, dtype=torch.int32, device="meta")

    def attend(*tensors):
        return by_torch(*tensors, longest=16, scale=0.3)

    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(query, key, value, bounds)
    out.sum().backward()
    assert out.shape == query.shape and key.grad.shape == key.shape and value.grad.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 64), (9, 3, 64), (4, 2, 128)])
def test_the_kernel_gives_what_a_mask_gives(heads, groups, dim):
    """bfloat16 against float32, forward and gradients; texts of one token, and empty ones at the end."""
    generator = torch.Generator().manual_seed(0)
    positions = positions_of([500], [1, 1, 130, 300, 68], [499, 1])
    bounds = text_bounds(positions, 40).to(CUDA)
    exact = [torch.randn(3, n, 500, dim, generator=generator).bfloat16().float() for n in (heads, groups, groups)]
    slope = torch.randn(3, 500, heads, dim, generator=generator).bfloat16().float().to(CUDA)
    segments = (positions == 0).cumsum(1).to(CUDA)
    mask = (segments[:, :, None] == segments[:, None]).tril()[:, None]

    def run(tensors, function, slope):
        tensors = [x.to(CUDA).requires_grad_() for x in tensors]
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, slope)]

    def masked(query, key, value):
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.1).transpose(1, 2)

    def by_text(*tensors):
        return ALL_ATTENTION_FUNCTIONS[BY_TEXT](None, *tensors, None, scaling=0.1, text_bounds=bounds)[0]

    wanted = run(exact, masked, slope)
    got = run([x.bfloat16() for x in exact], by_text, slope.bfloat16())
    for name, x, y in zip(("out", "query", "key", "value"), got, wanted, strict=True):
        error = (x.float() - y).norm() / y.norm()
        assert error <= 1e-2, f"{name}: {error:.2g}"


PACKINGS = [[60, 132], [192], [1, 1, 190], [96, 96], [192], [5, 100, 87], [30] * 6 + [12], [191, 1]]
HALF = dict(dtype=torch.bfloat16, **WIDE)
ONE_HEAD = dict(heads=[(1, 0)])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kept", [KEPT, ONE_HEAD])
@pytest.mark.parametrize("make", [make_matching, make_finetuning])
def test_recorded_steps_of_any_packing_have_the_numbers_of_the_mask(make, kept, compiled):
    torch.compiler.reset()
    stage = make(CUDA, kept=kept, **HALF)
    context = CompiledLayers(stage.model).on if compiled else nullcontext
    assert why_not(CUDA, stage.model, make_data().train) == ""
    recorded = BatchGraph(partial(stage.run, backward=True), CUDA)
    by_text = places(stage, BY_TEXT, most=16)
    for number, packing in enumerate(PACKINGS):
        batch = batch_of(positions_of(packing, packing[::-1]), seed=number)
        wanted = step(stage, batch, context=context)
        got = step(stage, batch, by_text, context, run=recorded)
        assert (recorded.graph is not None) == (number >= WARM_UP)
        assert_close(got, wanted, figures=2e-3, gradients=2e-2)


@pytest.mark.gpu
def test_training_on_a_gpu_goes_by_text(tmp_path, capsys):
    stage, data = make_matching(CUDA, kept=ONE_HEAD, **HALF), make_data(num_train=64, num_held_out=16)
    train(
        stage, data.at(192, name="rows"), MatchSettings(tokens=6 * 384, batch_tokens=384, evaluate_every=6),
        run=RunSettings(micro_batch=2), accelerator=Accelerator(), folder=tmp_path, log=RunLog(tmp_path / "log.jsonl"),
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "text by text" in printed and "become a CUDA graph" in printed and "not recorded" not in printed
