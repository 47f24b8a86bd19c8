"""Perplexity by position against direct computation, bucket edges, and the KV cache's bytes."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from linearize.errors import ArchitectureError, DataError
from linearize_eval import perplexity as module
from linearize_eval.memory import MOST_TOKENS, forward_tokens, kv_cache_bytes
from linearize_eval.perplexity import (
    bucket_label,
    perplexity_by_position,
    position_edges,
    summarize_nll,
    token_nll,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **settings))


def random_rows(num_rows: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (num_rows, num_tokens), generator=torch.manual_seed(1))


def nll_by_hand(logits: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    """[N, T, V] logits -> [N, T - 1], one token at a time in float64."""
    result = np.zeros((rows.shape[0], rows.shape[1] - 1))
    for n, row in enumerate(rows.tolist()):
        for t in range(1, len(row)):
            scores = logits[n, t - 1].double().numpy()
            result[n, t - 1] = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row[t]]
    return result


class KnownNLL(torch.nn.Module):
    """Gives the token at position p the probability exp(-p / 1000), by reading the text it is asked about."""

    device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        probability = torch.exp(-torch.arange(1, input_ids.shape[1]) / 1000)
        logits = torch.zeros(*input_ids.shape, 11)
        others = ((1 - probability) / 10).log()
        logits[:, :-1] = others[None, :, None]
        logits[:, :-1].scatter_(
            2, input_ids[:, 1:, None], probability.log().expand(len(input_ids), -1)[..., None]
        )
        return CausalLMOutput(logits=logits)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_that_computed_by_hand(batch_size):
    model, rows = tiny_llama(), random_rows(5, 37)
    with torch.no_grad():
        expected = nll_by_hand(model.eval()(rows).logits, rows)
    result = perplexity_by_position(model, rows, edges=[1, 8, 37], batch_size=batch_size)
    assert result["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert result["nll"] == pytest.approx(expected.mean(), rel=1e-5)
    assert result["num_tokens"] == 5 * 36
    np.testing.assert_allclose(result["nll_by_position"], expected.mean(axis=0), rtol=1e-5)
    assert result["buckets"][0]["nll"] == pytest.approx(expected[:, :7].mean(), rel=1e-5)
    assert result["buckets"][1]["nll"] == pytest.approx(expected[:, 7:].mean(), rel=1e-5)


def test_slices_of_the_logits_change_nothing(monkeypatch):
    model, rows = tiny_llama(), random_rows(3, 37)
    whole = token_nll(model, rows)
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", 5 * SMALL["vocab_size"])
    torch.testing.assert_close(token_nll(model, rows), whole, rtol=1e-6, atol=0)


def test_log_softmax_is_float32_for_a_bfloat16_model():
    model, rows = tiny_llama().to(torch.bfloat16), random_rows(2, 37)
    with torch.no_grad():
        logits = model(rows).logits
    assert logits.dtype == torch.bfloat16
    np.testing.assert_allclose(token_nll(model, rows, batch_size=2), nll_by_hand(logits, rows), rtol=1e-5)


def test_softcapped_logits_are_those_of_the_full_forward():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.1, pad_token_id=0))
    rows = random_rows(2, 20)
    with torch.no_grad():
        logits = model.eval()(rows).logits
    assert logits.abs().max() <= 0.1
    np.testing.assert_allclose(token_nll(model, rows), nll_by_hand(logits, rows), rtol=1e-5)


def test_dropout_is_off_and_each_module_gets_its_mode_back():
    model, rows = tiny_llama(attention_dropout=0.5), random_rows(1, 20)
    model.train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    assert torch.equal(token_nll(model, rows), token_nll(model, rows))
    assert [part.training for part in model.modules()] == modes


def test_buckets_hold_exactly_their_positions():
    rows = torch.randint(0, 11, (3, 600), generator=torch.manual_seed(2))
    edges = position_edges(64, 600)
    assert edges == [1, 64, 256, 600]
    result = perplexity_by_position(KnownNLL(), rows, edges=edges)
    for bucket in result["buckets"]:
        positions = np.arange(bucket["start"], bucket["stop"])
        assert bucket["nll"] == pytest.approx(positions.mean() / 1000, rel=1e-4)
    np.testing.assert_allclose(result["nll_by_position"], np.arange(1, 600) / 1000, rtol=1e-3)


@pytest.mark.parametrize(
    ("window", "num_tokens", "edges"),
    [
        (64, 1024, [1, 64, 256, 1024]),
        (64, 4096, [1, 64, 256, 1024, 4096]),
        (64, 8192, [1, 64, 256, 1024, 4096, 8192]),
        (64, 200, [1, 64, 200]),
        (64, 40, [1, 40]),
        (256, 2048, [1, 256, 1024, 2048]),
        (512, 2048, [1, 512, 1024, 2048]),
        (250, 2048, [1, 250, 1024, 2048]),  # 250-256 would be noise
        (64, 1030, [1, 64, 256, 1030]),  # and so would 1024-1030
        (1, 512, [1, 256, 512]),
    ],
)
def test_edges_follow_the_window_and_the_row(window, num_tokens, edges):
    assert position_edges(window, num_tokens) == edges


def test_bucket_labels():
    assert [bucket_label(*span) for span in ((1, 64), (64, 256), (256, 1024), (1024, 4096), (256, 1000))] == [
        "<64",
        "64-256",
        "256-1k",
        "1k-4k",
        "256-1000",
    ]


@pytest.mark.parametrize("edges", [[1, 8], [0, 8, 20], [1, 8, 8, 20], [1, 9, 8, 20], [], [1, 8, 21]])
def test_edges_that_do_not_span_the_row_are_refused(edges):
    with pytest.raises(DataError, match="must rise from 1 to the row length, 20"):
        summarize_nll(torch.zeros(2, 19), edges)


@pytest.mark.parametrize("rows", [torch.zeros(0, 9), torch.zeros(3, 1), torch.zeros(9)])
def test_rows_without_a_predicted_token_are_refused(rows):
    with pytest.raises(DataError, match="at least one row of 2 tokens"):
        token_nll(KnownNLL(), rows.long())


def cached_bytes(model, length: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_rows(1, length), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


@pytest.mark.parametrize(
    ("model_class", "config", "num_sliding"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL), 0),
        (LlamaForCausalLM, LlamaConfig(**SMALL, head_dim=24), 0),
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=16), 2),
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None), 0),
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, sliding_window=16, pad_token_id=0), 1),
    ],
)
def test_kv_bytes_are_those_of_the_cache(model_class, config, num_sliding):
    model = build(model_class, config)
    head_dim = getattr(config, "head_dim", None) or 8
    assert kv_cache_bytes(config, 12, 4) == cached_bytes(model, 12)
    one_token = 2 * SMALL["num_key_value_heads"] * head_dim * 4
    # transformers' sliding layers keep one token less than the window
    assert kv_cache_bytes(config, 50, 4) == cached_bytes(model, 50) + num_sliding * one_token
    assert kv_cache_bytes(config, 50, 2) * 2 == kv_cache_bytes(config, 50, 4)


def test_layers_without_keys_and_values_count_nothing():
    config = Qwen3NextConfig(num_hidden_layers=4)
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    one_layer = 1024 * 2 * config.num_key_value_heads * config.head_dim * 2
    assert kv_cache_bytes(config, 1024, 2) == one_layer


def test_layers_of_unknown_kind_are_refused_by_name():
    config = LlamaConfig(**SMALL)
    config.layer_types = ["full_attention", "indexed_attention"]  # transformers before 5.23 refuses the name itself
    with pytest.raises(ArchitectureError, match="type indexed_attention; known types: full_attention"):
        kv_cache_bytes(config, 1024, 2)


def test_a_cpu_takes_as_many_tokens_as_training_did():
    assert forward_tokens(tiny_llama(), least=700) == 700


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_what_fits_and_no_less_than_training_did():
    model = tiny_llama().cuda()
    assert forward_tokens(model, least=700) == MOST_TOKENS
    assert forward_tokens(model, least=2 * MOST_TOKENS) == 2 * MOST_TOKENS
    model.config.hidden_size = 10**7  # gigabytes a token
    assert forward_tokens(model, least=1) < 1000
