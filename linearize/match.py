"""Matching: each converted layer learns to give the output of the softmax it replaces.

One forward of the teacher drives all layers: every layer passes the teacher's output on, so each learns alone. Loss
and backward run inside the layer, so one layer's activations live at a time. The loss of a layer is its error power
over the teacher's output power, per sequence (attention transfer of LoLCATs, arXiv 2410.10254, normalised).

B batch, T time, H query heads, D head dim
"""

import torch

from .modeling_linearized import linear_attentions, with_linear_context
from .sequences import model_inputs
from .train import ParameterGroup
from .variants import softmax_attention


class MatchStage:
    """Matching as the training loop sees it; parameters are those of the LinearAttentions."""

    name = "match"
    order = 0

    def __init__(self, model, settings):
        self.model, self.layers = model, linear_attentions(model)
        model.requires_grad_(False).eval()
        for layer in self.layers.values():
            layer.requires_grad_(True)
        self.groups = [
            ParameterGroup(f"layer {index}", list(layer.parameters()), settings.lr)
            for index, layer in self.layers.items()
        ]

    def num_terms(self, batch) -> int:
        return batch["input_ids"].shape[0]

    def run(self, batch, *, scale, backward):
        inputs = model_inputs(batch)
        context = with_linear_context(self.model, **inputs, use_cache=False)["linear_context"]
        valid, segments = context.valid, context.segments
        figures = {}

        def observer(module, q, k, v, out, *, scaling, softcap, sink_logits, **_):
            layer = self.layers[module.layer_idx]
            q, k, v, out = layer.heads.linear_part(q, k, v, out.transpose(1, 2))
            (sink_logits,) = layer.heads.linear_part(sink_logits, dim=0)
            with torch.set_grad_enabled(backward):
                predicted, _ = layer(
                    q, k, v, scaling=scaling, valid=valid, segments=segments, softcap=softcap, sink_logits=sink_logits
                )
                loss = scale * relative_error(predicted, out, valid).sum()
                if backward:
                    loss.backward()
            figures[f"layer {module.layer_idx}"] = loss.detach()

        with torch.no_grad(), softmax_attention(self.model):
            self.model.get_decoder()(**inputs, use_cache=False, observer=observer)
        figures["loss"] = torch.stack(list(figures.values())).mean()
        return figures


def relative_error(predicted, target, valid=None):
    """Error power over output power of each sequence: [B, H, T, D] twice, valid [B, T] bool -> [B] float32."""
    difference = predicted.float() - target
    if valid is not None:
        difference, target = (x * valid[:, None, :, None] for x in (difference, target))
    return _power(difference) / _power(target).clamp_min(1e-12)


def _power(x):
    """Sum of squares of each sequence, [B] float32, without a float32 copy of x."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.float32).square()
