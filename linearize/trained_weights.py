"""A model's own weights while they train: float32 masters beside them, and the originals to go back to.

The model computes in its own dtype throughout. Gradients add up in the masters, so that a bfloat16 model loses no
update, and none of several micro-batches, to rounding.
"""

from contextlib import contextmanager
from functools import partial

import torch


class TrainedWeights:
    """Masters and originals of every weight of `model` but its embeddings, its output head and linear attention.

    Embeddings and head stay, so that teacher and model share them. model.trained_weights is set to this.
    """

    def __init__(self, model):
        fixed = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
        named = ((name, p) for name, p in model.named_parameters() if id(p) not in fixed)
        self.weights = [p for name, p in named if ".linear_attn." not in name]
        self.masters = [torch.nn.Parameter(p.detach().clone().float()) for p in self.weights]
        self.originals = [p.detach().clone() for p in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(partial(_move_gradient, master))
        model.trained_weights = self

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the masters into the model."""
        torch._foreach_copy_(self.weights, self.masters)

    @contextmanager
    def undone(self):
        """The model has its original weights inside; no graph of a forward pass may be waiting for its backward."""
        trained = [p.data for p in self.weights]
        self._hold(self.originals)
        try:
            yield
        finally:
            self._hold(trained)

    def _hold(self, values) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.data = value


@torch.no_grad()
def _move_gradient(master, weight) -> None:
    """What one backward pass left in a weight goes to its master."""
    gradient = weight.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    weight.grad = None
