"""The decode step through torch.compile: the same tokens, few kernels, nothing copied that is changed in place."""

import functools
import re

import pytest
import torch
from conftest import fold_early_by
from pico import convert, make_model, make_tokens, relative_error
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import GenerationConfig

from linearize import graph_cache, linearized_cache
from linearize.decoding import Decoder, settle
from linearize.errors import LinearizeError
from linearize.static_cache import StaticError, StaticLinearLayer, StaticSoftmaxLayer

NEW, IDS = 4, make_tokens(1, 13)
CALL = r"^ +cpp_fused\w+\("  # of a kernel
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU adds is in test_decoding.py")


@pytest.fixture(scope="module", autouse=True)
def early():
    with pytest.MonkeyPatch.context() as monkeypatch:
        fold_early_by(monkeypatch)
        yield


def make(**settings):
    """Of one layer: a C++ compiler takes seconds for each kernel."""
    return convert(make_model("llama", num_hidden_layers=1), **settings)


def decode(decoder):
    return [decoder.prefill(IDS).item(), *decoder.decode_n(NEW)[0].tolist()]


@pytest.fixture(scope="module")
def compiled():
    """(model, its decoder, the code that torch.compile made of its step: of the model, of what ends rows)."""
    model = make()
    decoder, code = run_and_get_code(lambda: Decoder(model, batch=1, mode="static", disable_compile=False))
    return model, decoder, code


def test_tokens_and_logits_are_those_of_the_step_as_it_is(compiled):
    model, decoder, _ = compiled
    plain = Decoder(model, batch=1, mode="static")
    assert decoder.compile_seconds > 0 and plain.compile_seconds is None
    expected = decode(plain)
    assert len(set(expected)) > NEW / 2, "a constant answer would prove nothing"
    assert decode(decoder) == expected
    assert relative_error(decoder.logits, plain.logits) < 1e-5
    before = dict(counters["stats"])
    again = Decoder(model, batch=1, mode="static", disable_compile=False)
    assert dict(counters["stats"]) == before, "the second of a sort is not compiled again"
    assert decode(again) == expected


def test_memory_is_changed_in_place_by_few_kernels(compiled):
    _, _, (code, ends) = compiled
    (call,) = re.findall(r"= torch\.ops\.linearize\.decode\.default\((.*)\)", code)
    # maps, the seven tensors of a state that change, its offset and the decay: as they came in
    assert len(re.findall(r"\barg\d+_1", call)) == 11, call
    fused = re.findall(CALL, code, re.MULTILINE)
    products = len(re.findall(r"extern_kernels\.mm\(", code))
    assert products == 5, "q, k and v as one; what attention gives; gate and up as one; down; the head"
    assert len(re.findall(r"\bcos\(", code)) == 1, "of all kernels that read it, one makes it"
    assert len(fused) <= 6, "two norms, rotary of q and of k, the product of the MLP; the last norm"
    assert len(re.findall(CALL, ends, re.MULTILINE)) == 1 and "empty_strided" not in ends.partition("def call(")[2]


@pytest.mark.parametrize("ends", [[], [7, 8]])
def test_what_ends_rows_is_as_uncompiled(ends):
    """Rows that end by a token, by their length, twice, not yet, and that have ended."""
    picked = torch.tensor([7, 3, 8, 3, 3])
    last, pad = torch.tensor([99, 6, 6, 99, 99]), torch.tensor(1)
    found = []
    for function in (settle, torch.compile(settle, fullgraph=True, dynamic=False)):
        rows = torch.zeros(5, dtype=torch.long), torch.full((5,), 5), torch.arange(5) == 4
        function(picked, *rows, last, torch.tensor(ends, dtype=torch.long), pad)
        found.append([x.tolist() for x in rows])
    by_token = bool(ends)
    assert found[0] == found[1] == [[7, 3, 8, 3, 1], [6, 6, 6, 6, 5], [by_token, True, True, False, True]]


def test_slots_of_softmax_are_not_copied():
    options = dict(batch=2, heads=2, head_dim=4, slots=8, dtype=torch.float32, device="cpu")
    layer = StaticSoftmaxLayer(next_slot=torch.tensor([3, 5]), **options)
    k, v = torch.randn(2, 2, 2, 1, 4)
    (keys, values), (code,) = run_and_get_code(torch.compile(layer.update, fullgraph=True, dynamic=False), k, v)
    assert "empty_strided_cpu(" not in code.partition("def call(")[2], "nothing is allocated"
    for slots, new in ((keys, k), (values, v)):
        expected = torch.zeros(2, 2, 8, 4)
        expected[0, :, 3], expected[1, :, 5] = new[0, :, 0], new[1, :, 0]
        assert torch.equal(slots, expected)


def test_kept_softmax_is_compiled_with_the_rest(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    model = convert(make_model("llama"), keep_softmax=[0], heads=[(1, 1)])
    plain, decoder = (
        Decoder(model, batch=1, mode="static", max_length=24, disable_compile=off) for off in (None, False)
    )
    assert decode(decoder) == decode(plain)


def test_what_cannot_be_compiled_is_told(monkeypatch, caplog):
    attend = StaticLinearLayer.attend

    def breaks(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(StaticLinearLayer, "attend", breaks)
    model = make()
    with pytest.raises(RuntimeError, match="graph_break"):
        Decoder(model, batch=3, mode="static", disable_compile=False)
    decoder = Decoder(model, batch=3, mode="static")
    decoder._compile(must=False)  # as for a graph
    assert decoder.compile_seconds is None and "graph_break" in decoder.why_not_compiled
    assert "not compiled" in caplog.text
    decoder.decode_one()
    with pytest.raises(StaticError, match="needs a CUDA GPU"):
        Decoder(model, batch=3, disable_compile=False)
    with pytest.raises(LinearizeError, match="never compiled"):
        Decoder(model, batch=3, mode="eager", disable_compile=False)


@pytest.mark.parametrize("off", [None, True])
def test_generates_own_setting_reaches_the_graph(monkeypatch, off):
    given = {}
    monkeypatch.setattr(graph_cache, "GraphCache", lambda model, **options: given.update(options) or Made())
    config = GenerationConfig(cache_implementation="static", disable_compile=off, num_return_sequences=1)
    linearized_cache.chosen_cache(make(), config, linearized_cache.GenerationMode.GREEDY_SEARCH, 2, 30)
    assert given == dict(batch=2, max_length=30, disable_compile=off)


class Made:
    max_length = 30

    def reset(self):
        pass
