"""A causal LM in two halves, states and output head, so that the logits of a whole batch are never in memory.

B batch, T time, V vocabulary
"""

import torch

from .modeling_linearized import LINEARIZED, with_linear_context


def final_states(model, inputs):
    """[B, T, hidden] that a linearized model, or its teacher, hands to its output head."""
    if model.config._attn_implementation == LINEARIZED:
        inputs = {**inputs, **with_linear_context(model, **inputs, use_cache=False)}
    return model.get_decoder()(**{**inputs, "use_cache": False}).last_hidden_state


def output_head(model):
    """[., hidden] -> logits [., V] of a model, or None where it does more than is known here."""
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere; Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def head(states):
        logits = linear(states) * scale if scale != 1 else linear(states)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    probe = {"input_ids": torch.tensor([[0, 1, 2]], device=linear.weight.device)}
    with torch.no_grad():
        wanted, got = model(**probe, use_cache=False).logits, head(final_states(model, probe))
    return head if torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-3) else None


class Halves:
    """`model`, with or without LoRA adapters, as `states` and `head`; it may be switched to any variant afterwards.

    head: states [., size] -> logits [., V]. Where the model's own is not known (see `output_head`), `states` gives
    the logits and `head` changes nothing.
    """

    def __init__(self, model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = output_head(base) if hasattr(base, "get_decoder") else None
        self.model, self.known, self.head = base, head is not None, head or torch.nn.Identity()

    def states(self, input_ids):
        """input_ids [B, T], no padding -> [B, T, size] of the model as it stands."""
        if self.known:
            return final_states(self.model, {"input_ids": input_ids})
        return self.model(input_ids, use_cache=False).logits
