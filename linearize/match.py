"""Matching: each converted layer learns to give the output of the softmax it replaces.

One forward of the teacher drives all layers: every layer passes the teacher's output on, so each learns alone. Loss
and backward run inside the layer, so one layer's activations live at a time. The loss of a layer is its error power
over the teacher's output power, per sequence (attention transfer of LoLCATs, arXiv 2410.10254, normalised).

With `far_mass` how much a query attends to far keys is matched too. Exact keys weigh the same in teacher and layer, so
the share of any of them, here of the sinks, differs by the ratio of the two normalisers, which is all that far keys
change: the loss is the square of its log. A second attention over values that mark the sinks gives the shares, in
O(T) as the first.

B batch, T time, H query heads, G kv heads, D head dim
"""

import torch

from .modeling_linearized import linear_attentions, with_linear_context
from .sequences import model_inputs
from .train import ParameterGroup
from .variants import softmax_attention

SMALLEST_SHARE = 1e-4


class MatchStage:
    """Matching as the training loop sees it; parameters are those of the LinearAttentions."""

    name = "match"
    order = 0

    def __init__(self, model, settings):
        self.model, self.layers, self.far_mass = model, linear_attentions(model), settings.far_mass
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
        figures, far_errors = {}, []

        def observer(module, q, k, v, out, *, scaling, softcap, sink_logits, attend, **_):
            layer = self.layers[module.layer_idx]
            if self.far_mass:
                marks = sink_marks(v, layer.sinks, valid, segments)
                marks, shares = layer.heads.linear_part(marks, attend(marks)[..., 0].transpose(1, 2))
            q, k, v, out = layer.heads.linear_part(q, k, v, out.transpose(1, 2))
            (sink_logits,) = layer.heads.linear_part(sink_logits, dim=0)
            options = {"scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
            options |= {"valid": valid, "segments": segments}
            with torch.set_grad_enabled(backward):
                predicted, _ = layer(q, k, v, **options)
                loss = scale * relative_error(predicted, out, valid).sum()
                if self.far_mass:
                    far_error = scale * share_error(layer(q, k, marks, **options)[0][..., 0], shares, valid).sum()
                    far_errors.append(far_error.detach())
                    loss = loss + self.far_mass * far_error
                if backward:
                    loss.backward()
            figures[f"layer {module.layer_idx}"] = loss.detach()

        with torch.no_grad(), softmax_attention(self.model):
            self.model.get_decoder()(**inputs, use_cache=False, observer=observer)
        figures["loss"] = torch.stack(list(figures.values())).mean()
        return {**figures, "far_mass": torch.stack(far_errors).mean()} if far_errors else figures


def sink_marks(v, sinks: int, valid, segments):
    """Values like v [B, G, T, D]: 1 where a token is one of its document's first `sinks`, else 0.

    All D columns are alike, and one is looked at: so the kernels are those of the values themselves.
    """
    batch, _, length, _ = v.shape
    index = torch.arange(length, device=v.device).expand(batch, -1)
    first = torch.zeros_like(index)
    if segments is not None:
        begins = torch.nn.functional.pad(segments.diff(dim=1) != 0, [1, 0], value=True)
        first = torch.where(begins, index, 0).cummax(1).values
    if valid is not None:
        first = torch.maximum(first, valid.int().argmax(1, keepdim=True))  # padding stands before or behind
    marked = (index - first < sinks) & (index >= first)
    return marked.to(v.dtype)[:, None, :, None].expand_as(v).contiguous()


def share_error(ours, teacher, valid=None):
    """Mean squared log ratio of two shares of the attention: [B, H, T] twice, valid [B, T] bool -> [B] float32.

    Shares below SMALLEST_SHARE hardly count: their digits are noise in bfloat16.
    """
    ratio = torch.log((ours.float() + SMALLEST_SHARE) / (teacher.float() + SMALLEST_SHARE)).square()
    if valid is None:
        return ratio.mean((1, 2))
    return (ratio * valid[:, None]).sum((1, 2)) / (valid.sum(1) * ratio.shape[1]).clamp_min(1)


def relative_error(predicted, target, valid=None):
    """Error power over output power of each sequence: [B, H, T, D] twice, valid [B, T] bool -> [B] float32.

    Differentiable in predicted. The difference is kept in the dtype of the two.
    """
    difference = predicted - target
    if valid is not None:
        difference, target = (x * valid[:, None, :, None] for x in (difference, target))
    return _Power.apply(difference) / _Power.apply(target).clamp_min(1e-12)


class _Power(torch.autograd.Function):
    """Sum of squares of each sequence, [B] float32, one pass forward and one backward, without a float32 copy of x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.float32).square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.mul(x, 2 * gradient[:, None, None, None], out=torch.empty_like(x))
