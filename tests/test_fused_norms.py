"""RMSNorms in one kernel: which modules are swapped, that nothing changes but rounding, and that they come back."""

import pytest
import torch
from pico import make_model

from linearize.fused_norms import fused_norms, is_rms_norm

NORMS = {"llama": 2, "qwen3": 4, "gpt2": 0, "gemma2": 0, "qwen3_next": 0}


@pytest.mark.parametrize(("name", "a_layer"), NORMS.items())
def test_rms_norms_are_known_by_what_they_do(name, a_layer):
    """Gemma's and Qwen3-Next's multiply by 1 + weight or have a gate, GPT-2's takes the mean off: they stay."""
    model = make_model(name)
    count = a_layer and a_layer * model.config.num_hidden_layers + 1
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert sum(map(is_rms_norm, model.modules())) == count
    tokens = torch.arange(40).view(2, 20) % model.config.vocab_size
    before = model(tokens, use_cache=False).logits
    with fused_norms(model):
        swapped = [m for m in model.modules() if "forward" in vars(m)]
        inside = model(tokens, use_cache=False).logits
    assert len(swapped) == count
    assert not any("forward" in vars(m) for m in model.modules())
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)


def test_an_rms_norm_without_its_weight_is_another_thing():
    class Other(torch.nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) * self.weight

    assert is_rms_norm(torch.nn.RMSNorm(8, eps=1e-6))
    other = Other(8, eps=1e-6)
    other.weight.data.fill_(1.3)
    assert not is_rms_norm(other)
