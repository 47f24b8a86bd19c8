"""Attention operations of linearize. `reference` holds the definition; fast kernels stand beside it."""

from .dispatch import attention, can_decode, can_run
from .feature_maps import FEATURE_MAPS
from .logit_losses import logit_losses
from .plan import segments_of
from .reference import attention_chunked, attention_quadratic
from .state import State

__all__ = [
    "FEATURE_MAPS", "State", "attention", "attention_chunked", "attention_quadratic", "can_decode", "can_run",
    "logit_losses", "segments_of",
]  # fmt: skip
