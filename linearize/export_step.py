"""The decode step of a converted model as one file that torch alone runs: `torch.export`, for devices without Python
packages, or without Python.

    save_step(model, "step.pt2")

    program = torch.export.load("step.pt2")                      # neither transformers nor linearize from here on
    (token, position, state), _ = program.example_inputs         # of a row that has seen nothing
    step = program.module()
    logits, state = step(token, position, state)                 # a prompt goes through token by token

The state goes in and comes out as tensors of constant size, so nothing is bound to a length.

B batch, V vocabulary
"""

from dataclasses import fields

import torch
from torch import nn

from .decoding import run_model
from .errors import ModelError
from .linear_attention import State
from .modeling_linearized import attention_modules, linear_attentions

NAMES = [f.name for f in fields(State)]


class DecodeStep(nn.Module):
    """One token a row through a model whose layers are all linear, by the reference attention; a pure function.

    Raises ModelError for a model with softmax layers or heads: their memory grows.
    """

    def __init__(self, model):
        super().__init__()
        linear = linear_attentions(model)
        if not linear or set(linear) != set(attention_modules(model)) or any(x.heads.kept for x in linear.values()):
            raise ModelError(
                f"{type(model).__name__} has softmax layers or heads, whose memory grows with the text; only a model "
                "whose layers are all converted has a step of constant size"
            )
        self.model = model

    def forward(self, token, position, state):
        """token, position [B] int64, state: a list of tensors -> (logits [B, V], the state after the token)."""
        cache = self.model.make_cache()
        for i, layer in enumerate(cache.layers):
            layer.state = State(*state[i * len(NAMES) : (i + 1) * len(NAMES)])
            layer.is_initialized = True
        return run_model(self.model, cache, token, position, None), flatten(cache)

    def empty_state(self, batch: int) -> list[torch.Tensor]:
        """The state of `batch` rows that have seen nothing."""
        states = []
        for linear in linear_attentions(self.model).values():
            k = torch.zeros(
                batch, linear.num_kv_heads, 1, linear.head_dim, dtype=self.model.dtype, device=self.model.device
            )
            states.append(linear.empty_state(k, k))
        return [getattr(state, name) for state in states for name in NAMES]


def flatten(cache) -> list[torch.Tensor]:
    """A converted model's cache as the step's list of tensors, e.g. `flatten(linearize.read(model, ids).cache)`."""
    return [getattr(layer.state, name) for layer in cache.layers for name in NAMES]


@torch.no_grad()
def export_step(model, *, batch: int = 1) -> torch.export.ExportedProgram:
    """The step of a model on a CPU, for a fixed number of rows; its example inputs are those of empty rows."""
    if model.device.type != "cpu":
        raise ModelError(f"the model is on {model.device}; export its step on a CPU: model.to('cpu')")
    step = DecodeStep(model.eval())
    token = torch.zeros(batch, dtype=torch.long)
    return torch.export.export(step, (token, token.clone(), step.empty_state(batch)), strict=False)


def save_step(model, path, *, batch: int = 1) -> None:
    """Writes `export_step` to a file (.pt2), the weights in it. Raises ModelError as `DecodeStep` does."""
    torch.export.save(export_step(model, batch=batch), path)
