"""The decode step as a file of its own: run by torch alone, it goes on as the model does."""

import subprocess
import sys

import pytest
import torch
from pico import VOCABULARY, WINDOW, convert, logits_of, make_model, make_tokens

from linearize.errors import ModelError
from linearize.export_step import DecodeStep, flatten, save_step
from linearize.state import read

RUN = """
import sys
for name in ("transformers", "linearize", "linearize_kernels"):
    sys.modules[name] = None  # an import of it fails
import torch
program = torch.export.load("step.pt2")
(token, position, empty), _ = program.example_inputs
step, answers = program.module(), []
for job in torch.load("in.pt"):
    state, out, sizes = job.get("state", empty), [], set()
    for i in range(job["tokens"].shape[1]):
        logits, state = step(job["tokens"][:, i], torch.full_like(position, job["start"] + i), state)
        out.append(logits)
        sizes.add(sum(x.nbytes for x in state))
    assert len(sizes) == 1, sizes
    answers.append(torch.stack(out, 1))
torch.save(answers, "out.pt")
"""


def run_alone(folder, *jobs):
    """Logits [B, T, V] of the saved step over the tokens of each job, in a process with torch and nothing of ours."""
    torch.save(list(jobs), folder / "in.pt")
    result = subprocess.run([sys.executable, "-I", "-c", RUN], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "out.pt")


@torch.no_grad()
def run_eagerly(model, tokens):
    step, out = DecodeStep(model), []
    state = step.empty_state(len(tokens))
    for i in range(tokens.shape[1]):
        logits, state = step(tokens[:, i], torch.full((len(tokens),), i), state)
        out.append(logits)
    return torch.stack(out, 1)


def test_from_nothing_and_after_a_prompt_it_goes_on_as_the_model(tmp_path):
    model, tokens, start = convert(make_model("llama")), make_tokens(2, 6 * WINDOW, seed=7), 4 * WINDOW
    expected = logits_of(model, tokens)
    save_step(model, tmp_path / "step.pt2", batch=2)
    assert torch.equal(logits_of(model, tokens), expected), "the model is as it was"
    rest = {"tokens": tokens[:, start:], "start": start}
    before = flatten(read(model, tokens[:, :start]).cache)
    whole, after, forgot = run_alone(tmp_path, {"tokens": tokens, "start": 0}, {**rest, "state": before}, rest)
    assert whole.shape == (*tokens.shape, VOCABULARY)
    assert torch.equal(whole, run_eagerly(model, tokens)), "the eager step's own numbers"
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, expected[:, start:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[:, -1], forgot[:, -1], rtol=1e-2, atol=1e-2), "the state takes part"


@pytest.mark.parametrize("settings", [{"keep_softmax": [1]}, {"heads": [[0, 1]]}])
def test_memory_that_grows_is_refused(settings):
    with pytest.raises(ModelError, match="softmax layers or heads"):
        DecodeStep(convert(make_model("llama"), **settings))
    with pytest.raises(ModelError, match="softmax layers or heads"):
        DecodeStep(make_model("llama"))
