"""Assisted decoding of one left-padded row gives the plain greedy tokens (all architectures: test_cache.py)."""

import copy

import pytest
import torch
from pico import convert, make_model, make_tokens

NEW = 40


@pytest.mark.parametrize("padding", [0, 7])
def test_a_converted_model_drafts_for_its_teacher(padding):
    teacher, draft = make_model("llama"), convert(make_model("llama"))
    check(teacher, padding, assistant_model=draft)


@pytest.mark.parametrize("padding", [0, 7])
def test_prompt_lookup_for_a_converted_model(padding):
    check(convert(make_model("llama")), padding, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)


def check(model, padding, **how):
    """The row after padding tokens that mean something to whoever looks at them."""
    row = make_tokens(1, 20, seed=3)
    row = torch.cat([row, row[:, 4:12]], 1)  # something for prompt lookup to find
    ids = torch.cat([make_tokens(1, padding, seed=9), row], 1)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    options, calls = dict(do_sample=False, max_new_tokens=NEW), []
    expected = copy.deepcopy(model).generate(row, **options)[:, row.shape[1] :]
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assisted = model.generate(ids, attention_mask=mask, **options, **how)
    assert torch.equal(assisted[:, ids.shape[1] :], expected)
    assert len(calls) < NEW, "some drafted tokens were taken"
