"""RMSNorms as one kernel each while a model trains: transformers writes them as six, which a small model waits for."""

import inspect
from contextlib import contextmanager
from types import MethodType

import torch

from .instances import swapped


@contextmanager
def fused_norms(model):
    """Inside, RMSNorms of `model` run as torch.nn.functional.rms_norm: equal up to rounding, probed one by one."""
    norms = [m for m in model.modules() if is_rms_norm(m)]
    with swapped((m, "forward", MethodType(_rms_norm, m)) for m in norms):
        yield model


@torch.no_grad()
def is_rms_norm(module) -> bool:
    """Whether a module is x / rms(x) times a weight over the last dimension, told by its output, not its name."""
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or module.weight.dim() != 1 or _eps(module) is None or "forward" in vars(module):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # Qwen3-Next has one with a gate
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(module.weight), generator=generator).to(module.weight) * 1e-2  # eps shows, too
    expected, got = module(probe).float(), _rms_norm(module, probe).float()
    return expected.shape == got.shape and torch.allclose(got, expected, rtol=2e-2, atol=1e-4)


def _eps(module):
    return next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)


def _rms_norm(module, x):
    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, _eps(module))
