"""Random texts for the decode kernels, and their memory after a prompt: what both kernels' tests begin with."""

import torch

from linearize_kernels import State, attention_quadratic
from linearize_kernels.feature_maps import Taylor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(prompt=10, tokens=5, batch=2, heads=2, groups=1, head_dim=16, value_dim=None, map_dim=5, window=6, sinks=2,
         decay=False, pad=0, large=1.0, far_gate=None, dtype=torch.float32, far_dtype=torch.float32,
         seed=0):  # fmt: skip
    """(Tensors of prompt + tokens by name, options of attention_quadratic, valid [B, T] with `pad` left of row 0).

    q and k lie in memory as projections leave them, heads inside tokens. far_dtype: of mapped tensors and gate.
    """
    g = torch.Generator().manual_seed(seed)
    length = prompt + tokens

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    inputs = dict(
        q=draw(batch, length, heads, head_dim).transpose(1, 2) * large,
        k=draw(batch, length, groups, head_dim).transpose(1, 2) * large,
        v=draw(batch, groups, length, value_dim or head_dim),
        q_far=draw(batch, heads, length, map_dim, dtype=far_dtype) * 0.5,
        k_far=draw(batch, groups, length, map_dim, dtype=far_dtype) * 0.5,
        gate=draw(batch, heads, length, dtype=far_dtype),
    )  # fmt: skip
    if far_gate is not None:
        inputs["gate"] = torch.full_like(inputs["gate"], far_gate)
    valid = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    valid[0, :pad] = False
    decay = -torch.linspace(0.01, 0.1, groups, device=DEVICE) if decay else None
    return inputs, dict(scaling=head_dim**-0.5, window=window, sinks=sinks, log_decay=decay), valid


def part(inputs, start, stop):
    return {name: x[:, :, start:stop] for name, x in inputs.items()}


def prefilled(inputs, options, valid, prompt, **layout):
    """The DecodeState after the prompt; layout: what DecodeState.from_state takes."""
    from linearize_kernels.decode import DecodeState

    state = State.empty(
        inputs["k"], inputs["v"], inputs["k_far"], num_features=Taylor.num_features(inputs["k_far"].shape[-1]),
        sinks=options["sinks"], ring=options["window"] - 1,
    )  # fmt: skip
    if prompt:
        _, state = attention_quadratic(
            **part(inputs, 0, prompt), valid=valid[:, :prompt], **options, state=state, return_state=True
        )
    return DecodeState.from_state(state, window=options["window"], **layout)
