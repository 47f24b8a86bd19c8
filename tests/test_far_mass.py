"""match.far_mass: the far keys' share of the attention against a dense computation, and what matching it does."""

import copy
import math

import numpy
import pytest
import torch
from pico import attention, convert, make_model, make_tokens, pad
from test_train import records, run_train, settings_of

from linearize.errors import RecipeError
from linearize.match import SMALLEST_SHARE, MatchStage
from linearize.modeling_linearized import FEATURE_MAPS, linear_attentions
from linearize.recipe import MatchSettings, load_recipe
from linearize.sequences import PackedSequences, TokenData
from linearize.variants import softmax_attention

TOKENS = make_tokens(2, 24)


def figures_of(model, *, far_mass=1.0, backward=False, **batch):
    stage = MatchStage(model, MatchSettings(far_mass=far_mass))
    return stage.run(batch, scale=1 / batch["input_ids"].shape[0], backward=backward)


def dense_shares(model, tokens) -> dict:
    """By layer, [B, H, T] each: far share and sinks' share in the teacher's softmax, then in the layer's weights."""
    layers, found, index = linear_attentions(model), {}, torch.arange(tokens.shape[1])

    def observer(module, q, k, v, out, *, scaling, **_):
        layer = layers[module.layer_idx]
        q, k = layer.heads.linear_part(q, k)
        q_far, k_far, gate = layer.project(q, k)
        ratio = q.shape[1] // k.shape[1]
        k, k_far = k.repeat_interleave(ratio, 1), k_far.repeat_interleave(q.shape[1] // k_far.shape[1], 1)
        softmax = torch.exp(scaling * q.double() @ k.double().mT).tril()
        sink, far = index < layer.sinks, (index[:, None] - index >= layer.window) & (index >= layer.sinks)
        series = FEATURE_MAPS["taylor"].similarity(q_far.double(), k_far.double()) * torch.exp(gate.double())[..., None]
        found[module.layer_idx] = []
        for weights in (softmax, torch.where(far, series, softmax)):
            found[module.layer_idx] += [(weights * part).sum(-1) / weights.sum(-1) for part in (far, sink)]

    with torch.no_grad(), softmax_attention(model):
        model.get_decoder()(input_ids=tokens, use_cache=False, observer=observer)
    return found


@pytest.mark.parametrize("kept", [[], [(1, 0)]])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_the_error_is_that_of_a_dense_computation(kept, per):
    model = convert(make_model(), decay=False, heads=kept, per=per)
    with_mass, without = (figures_of(model, far_mass=w, input_ids=TOKENS) for w in (0.5, 0.0))
    assert "far_mass" not in without
    expected = []
    for layer, (far, sinks, our_far, our_sinks) in dense_shares(model, TOKENS).items():
        assert far[..., 10:].mean() > 0.01 and (far - our_far).abs().max() > 0.05, "something to match"
        # exact keys weigh the same in both, so the sinks' shares differ as what the far keys leave over
        torch.testing.assert_close(our_sinks / sinks, (1 - our_far) / (1 - far))
        expected.append(((our_sinks + SMALLEST_SHARE) / (sinks + SMALLEST_SHARE)).log().square().mean())
        own = with_mass[f"layer {layer}"] - without[f"layer {layer}"]
        assert own.item() == pytest.approx(0.5 * expected[-1].item(), rel=1e-3)
    assert with_mass["far_mass"].item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-3)
    inside = figures_of(model, input_ids=TOKENS[:, :7])  # window 5 and 2 sinks: no key is far
    assert inside["far_mass"] < 1e-10 < with_mass["far_mass"]


def test_packed_and_padded_rows_count_as_if_apart():
    model = convert(make_model(), decay=False)
    long, short = TOKENS[:1], TOKENS[1:, :15]
    a, b = (figures_of(model, input_ids=x)["far_mass"].item() for x in (long, short))
    assert abs(a - b) > 0.01 * a
    positions = torch.cat([torch.arange(24), torch.arange(15)])[None]
    packed = figures_of(model, input_ids=torch.cat([long, short], 1), position_ids=positions)
    assert packed["far_mass"].item() == pytest.approx((24 * a + 15 * b) / 39, rel=1e-3)
    for side in ("left", "right"):
        ids, mask = pad([long[0], short[0]], side=side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        padded = figures_of(model, input_ids=ids, attention_mask=mask, position_ids=positions)
        assert padded["far_mass"].item() == pytest.approx((a + b) / 2, rel=1e-3), side


def test_matching_it_brings_the_layers_share_to_the_teachers(tmp_path):
    """The gates begin far too low: outputs alone bring them back more slowly than outputs and shares."""
    start, gaps = convert(make_model(), decay=False), {}
    tokens = TOKENS.repeat(4, 1).flatten().numpy().astype("uint16")  # one document a row
    rows = PackedSequences(tokens, numpy.array([0]), 24, True, 0)
    data = TokenData(rows, rows.first(2), "the same two rows")
    for layer in linear_attentions(start).values():
        layer.gate_bias.data -= 4.0

    def gap(model) -> float:
        errors = [(far - ours).abs().mean() for far, _, ours, _ in dense_shares(model, TOKENS).values()]
        return sum(errors).item() / len(errors)

    for weight in (0.0, 1.0):
        model, folder = copy.deepcopy(start), tmp_path / str(weight)
        folder.mkdir()
        stage = MatchStage(model, MatchSettings(far_mass=weight, lr=0.1))
        run_train(stage, folder, settings=settings_of(steps=30), data=data)
        gaps[weight] = gap(model)
    assert gaps[1.0] < 0.9 * gaps[0.0] < gap(start)
    assert [r["far_mass"] for r in records(tmp_path / "1.0") if "lr" in r][-1] < 1 and math.isfinite(gaps[1.0])


def test_it_needs_sinks():
    def recipe(*overrides):
        return load_recipe("default", ["model.id=a/b", "data.source=x.txt", "match.far_mass=0.1", *overrides])

    assert recipe().match.far_mass == 0.1 and attention().sinks
    with pytest.raises(RecipeError, match="match.far_mass: is measured against the sinks' share"):
        recipe("attention.sinks=0")
