"""The reference attention against a direct float64 transcription of its definition, and against itself."""

import math

import pytest
import torch

from linearize_kernels import (
    FEATURE_MAPS,
    State,
    attention,
    attention_chunked,
    attention_quadratic,
    reference,
    segments_of,
)

F64 = {"dtype": torch.float64}


def make_inputs(batch=2, heads=4, groups=2, length=37, head_dim=8, map_dim=3, per="kv_head", seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    far_heads = groups if per == "kv_head" else heads
    return dict(
        q=draw(batch, heads, length, head_dim) * 2, k=draw(batch, groups, length, head_dim) * 2,
        v=draw(batch, groups, length, head_dim), q_far=draw(batch, heads, length, map_dim),
        k_far=draw(batch, far_heads, length, map_dim), gate=draw(batch, heads, length),
    )  # fmt: skip


def by_definition(x, *, scaling, window, sinks, feature_map, valid, segments, log_decay, softcap, sink_logits):
    """Loops over every query and key, as the formula reads."""
    q, k, v = x["q"], x["k"], x["v"]
    batch, heads, length, _ = q.shape
    groups, far_heads = k.shape[1], x["k_far"].shape[1]
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    expand = FEATURE_MAPS[feature_map].expand
    for b in range(batch):
        for h in range(heads):
            g, m = h * groups // heads, h * far_heads // heads
            for i in range(length):
                num, den = torch.zeros(v.shape[-1], **F64), torch.zeros((), **F64)
                if sink_logits is not None:
                    den = den + sink_logits[h].exp()
                rank = 0
                for j in range(i + 1):
                    if segments is not None and segments[b, j] != segments[b, i]:
                        continue
                    if not valid[b, j]:
                        continue
                    s = scaling * (q[b, h, i] @ k[b, g, j])
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    if i - j < window or rank < sinks:
                        weight = s.exp()
                    else:
                        weight = x["gate"][b, h, i].exp() * (expand(x["q_far"][b, h, i]) @ expand(x["k_far"][b, m, j]))
                        if log_decay is not None:
                            weight = weight * torch.exp(log_decay[m] * (i - j))
                    rank += 1
                    num, den = num + weight * v[b, g, j], den + weight
                if den > 0:
                    out[b, h, i] = num / den
    return out


CASES = {
    "plain": {},
    "no sinks": {"sinks": 0},
    "window 1": {"window": 1},
    "wide window": {"window": 64},
    "per query head": {"per": "query_head"},
    "hedgehog": {"feature_map": "hedgehog"},
    "decay": {"decay": True},
    "decay per query head": {"decay": True, "per": "query_head"},
    "softcap and sink logits": {"softcap": 3.0, "sink_logits": True},
    "left padding": {"pad": "left"},
    "right padding": {"pad": "right"},
    "segments": {"segments": True},
    "segments, decay, no sinks": {"segments": True, "decay": True, "sinks": 0},
}


def make_case(window=5, sinks=2, per="kv_head", feature_map="taylor", decay=False, softcap=None, sink_logits=False,
              pad=None, segments=False, length=37, **shape):  # fmt: skip
    x = make_inputs(per=per, length=length, **shape)
    batch, dtype = x["q"].shape[0], x["q"].dtype
    valid = torch.ones(batch, length, dtype=torch.bool)
    if pad:
        valid[0, : length // 3] = False
        valid = valid.flip(-1) if pad == "right" else valid
    segment_ids = None
    if segments:
        starts = torch.zeros(batch, length, dtype=torch.long)
        starts[0, [1, 2, 20]] = 1
        starts[1, [9, 11, 12, 36 if length > 36 else length - 1]] = 1
        segment_ids = starts.cumsum(-1)
    options = dict(
        scaling=0.3, window=window, sinks=sinks, feature_map=feature_map, valid=valid, segments=segment_ids,
        log_decay=-torch.linspace(0.02, 0.2, x["k_far"].shape[1], dtype=dtype) if decay else None,
        softcap=softcap, sink_logits=torch.linspace(-1, 1, x["q"].shape[1], dtype=dtype) if sink_logits else None,
    )  # fmt: skip
    return x, options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quadratic_is_the_definition(case):
    x, options = make_case(**CASES[case])
    out, _ = attention_quadratic(**x, **options)
    torch.testing.assert_close(out, by_definition(x, **options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_equals_quadratic_with_gradients(case, chunk):
    x, options = make_case(**CASES[case])
    results = []
    for function, extra in ((attention_quadratic, {}), (attention_chunked, {"chunk": chunk})):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        out, _ = function(**leaves, **options, **extra)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * weight).sum().backward()
        results.append([out.detach()] + [leaves[name].grad for name in x])
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0 or case == "wide window"  # there the far term has no key and no gradient
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("splits", [[1] * 37, [20, 17], [3, 1, 1, 30, 2], [36, 1]], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("segments")], ids=str)
def test_any_split_gives_the_same_outputs_and_state(case, splits):
    x, options = make_case(**CASES[case])
    valid = options.pop("valid")
    whole, final = attention_quadratic(**x, valid=valid, **options, return_state=True)
    chunked, cheapest = (lambda **kw: attention_chunked(**kw, chunk=8)), reference.attention_reference
    for function in (attention_quadratic, chunked, cheapest):
        state, outputs, start = None, [], 0
        for size in splits:
            part = {name: t[:, :, start : start + size] for name, t in x.items()}
            past = {"state": state, "return_state": True}
            out, state = function(**part, valid=valid[:, start : start + size], **options, **past)
            outputs.append(out)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-9, atol=1e-9)
        for name in vars(final):
            torch.testing.assert_close(getattr(state, name), getattr(final, name), rtol=1e-9, atol=1e-9, msg=name)


def test_one_token_after_a_state_takes_the_short_way(monkeypatch):
    x, options = make_case(per="query_head", decay=True, pad="left")
    valid, steps = options.pop("valid"), []
    expected, _ = attention_quadratic(**x, valid=valid, **options)
    short = reference.attention_step
    monkeypatch.setattr(reference, "attention_step", lambda *a, **kw: steps.append(1) or short(*a, **kw))
    for extra in (0, 3):  # a ring with more slots than the window holds keys that are far, which the short way lacks
        empty = State.empty(x["k"], x["v"], x["k_far"], num_features=10, sinks=2, ring=4 + extra)
        state, outputs = empty, []
        for i in range(37):
            part = {name: t[:, :, i : i + 1] for name, t in x.items()}
            out, state = reference.attention_reference(
                **part, valid=valid[:, i : i + 1], **options, state=state, return_state=True
            )
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=1e-9, atol=1e-9)
        assert len(steps) == 37
        assert all(getattr(state, name).shape == t.shape for name, t in vars(empty).items())


def test_state_has_constant_bytes_and_late_folding_is_the_same_function():
    x, options = make_case()
    valid = options.pop("valid")
    whole, _ = attention_quadratic(**x, valid=valid, **options)
    state = State.empty(x["k"], x["v"], x["k_far"], num_features=10, sinks=2, ring=4 + 9)
    sizes, outputs = set(), []
    for i in range(37):
        part = {name: t[:, :, i : i + 1] for name, t in x.items()}
        out, state = attention_quadratic(**part, valid=valid[:, i : i + 1], **options, state=state, return_state=True)
        outputs.append(out)
        sizes.add(state.num_bytes())
    assert len(sizes) == 1
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [1, 3, 20])
def test_crop_forgets_exactly_the_newest_tokens(start):
    """Tokens seen and cropped again leave no trace, sinks of a short row included."""
    x, options = make_case(sinks=2)
    options.pop("valid")

    def run(state, lo, hi):
        part = {name: t[:, :, lo:hi] for name, t in x.items()}
        return attention_quadratic(**part, **options, state=state, return_state=True)

    _, state = run(State.empty(x["k"], x["v"], x["k_far"], num_features=10, sinks=2, ring=4 + 6), 0, start)
    _, longer = run(state, start + 5, start + 11)
    out, _ = run(longer.crop(6), start, start + 4)
    expected, _ = run(state, start, start + 4)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_short_text_is_softmax_whatever_the_gate():
    x, _ = make_case(length=9)
    x["gate"] = x["gate"] + 300.0
    out, _ = attention_quadratic(**x, scaling=0.3, window=7, sinks=2)
    k, v = (x[n].repeat_interleave(2, 1) for n in "kv")
    expected = torch.nn.functional.scaled_dot_product_attention(x["q"], k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_gate_of_minus_infinity_is_window_and_sinks():
    x, _ = make_case()
    x["gate"] = torch.full_like(x["gate"], -torch.inf)
    out, _ = attention_quadratic(**x, scaling=0.3, window=5, sinks=2)
    i, j = torch.arange(37)[:, None], torch.arange(37)
    mask = (j <= i) & ((i - j < 5) | (j < 2))
    k, v = (x[n].repeat_interleave(2, 1) for n in "kv")
    expected = torch.nn.functional.scaled_dot_product_attention(x["q"], k, v, mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_later_tokens_and_neighbours_change_nothing():
    x, options = make_case(pad="left")
    out, _ = attention_chunked(**x, **options, chunk=8)
    changed = {name: t.clone() for name, t in x.items()}
    for t in changed.values():
        t[:, :, 30:] += 1.0
        t[1] += 1.0
        t[0, :, :12] = 50.0  # the padding of row 0
    again, _ = attention_chunked(**changed, **options, chunk=8)
    torch.testing.assert_close(again[0, :, 12:30], out[0, :, 12:30], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(again[0, :, 30:], out[0, :, 30:])
    assert (out[0, :, :12] == 0).all()


def test_gradients_match_finite_differences_through_both_terms():
    x, options = make_case(length=11, batch=1, heads=2, groups=1, head_dim=3, map_dim=2)
    options["valid"] = None
    options["log_decay"] = torch.tensor([-0.1], dtype=torch.float64)
    names = list(x)

    def run(decay, *leaves):
        return attention_chunked(**dict(zip(names, leaves, strict=True)), **{**options, "log_decay": decay}, chunk=4)[0]

    leaves = [options["log_decay"].requires_grad_()] + [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_expand_to_their_similarity(name):
    features = FEATURE_MAPS[name]
    x, y = torch.randn(2, 5, 6, **F64), torch.randn(2, 7, 6, **F64)
    assert features.expand(x).shape[-1] == features.num_features(6)
    torch.testing.assert_close(features.similarity(x, y), features.expand(x) @ features.expand(y).mT)


def test_taylor_counts():
    assert FEATURE_MAPS["taylor"].num_features(16) == 153
    assert FEATURE_MAPS["taylor"].similarity(torch.tensor([[-1.0]]), torch.tensor([[1.0]])).item() == 0.5


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_and_large_scores(dtype, tolerance):
    x, options = make_case(length=80, window=16)
    x["q"], x["k"] = x["q"] * 4, x["k"] * 4  # scores up to about 60
    expected, _ = attention_quadratic(**{n: t.to(dtype).double() for n, t in x.items()}, **options)
    out, _ = attention_chunked(**{n: t.to(dtype) for n, t in x.items()}, **options, chunk=16)
    error = (out.double() - expected).norm() / expected.norm()
    assert out.dtype == dtype and math.isfinite(error) and error < tolerance


def test_texts_by_cu_seqlens_are_those_texts_alone():
    """Of lengths 5, 0, 1 and 20, and a rest that is a text of its own."""
    cu_seqlens, inputs = torch.tensor([0, 5, 5, 6, 26], dtype=torch.int32), make_inputs(batch=1, length=30)
    options = dict(scaling=0.3, window=4, sinks=2)
    segments = segments_of(cu_seqlens, 30)
    out, _ = attention_chunked(**inputs, **options, segments=segments)
    for start, end in [(0, 5), (5, 6), (6, 26), (26, 30)]:
        alone, _ = attention_chunked(**{name: x[:, :, start:end] for name, x in inputs.items()}, **options)
        torch.testing.assert_close(out[:, :, start:end], alone)


@pytest.mark.parametrize("name", ["valid", "segments"])
def test_masks_of_another_batch_are_refused(name):
    """They would be read beyond their end."""
    mask = torch.ones(1, 30, dtype=torch.bool if name == "valid" else torch.long)
    inputs = make_inputs(batch=2, length=30)
    with pytest.raises(ValueError, match=rf"{name} is \[1, 30\]: \[rows, tokens\] of q, \[2, 30\]; expand it"):
        attention(**inputs, scaling=0.3, window=4, sinks=2, **{name: mask})
    attention(**inputs, scaling=0.3, window=4, sinks=2, **{name: mask.expand(2, -1)})
