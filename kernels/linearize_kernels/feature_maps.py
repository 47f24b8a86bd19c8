"""Feature maps of the far term: a similarity of two mapped vectors and its expansion into an inner product.

    similarity(x, y) == expand(x) @ expand(y)        x, y: [..., d]        expand(x): [..., F]
"""

import torch


class Taylor:
    """exp(x·y) to second order: T(x·y) = 1 + x·y + (x·y)²/2 (BASED, arXiv 2402.18668, eq. 4).

    The square is symmetric, so each pair i < j is kept once: F = 1 + d + d(d+1)/2, which is 153 at d = 16.
    """

    name = "taylor"

    @staticmethod
    def num_features(dim: int) -> int:
        return 1 + dim + dim * (dim + 1) // 2

    @staticmethod
    def expand(x: torch.Tensor) -> torch.Tensor:
        dim = x.shape[-1]
        i, j = torch.triu_indices(dim, dim, device=x.device)
        weight = 1 - (1 - 0.5**0.5) * (i == j).to(x.dtype)  # the diagonal stands once, halved
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], -1)

    @staticmethod
    def similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., T, d], y [..., L, d] -> [..., T, L], never below 1/2."""
        dot = x @ y.transpose(-1, -2)
        return 1 + dot + 0.5 * dot * dot


class Hedgehog:
    """[softmax(x), softmax(-x)] (Hedgehog, arXiv 2402.04347; the map of LoLCATs). F = 2d, values positive."""

    name = "hedgehog"

    @staticmethod
    def num_features(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def expand(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    @staticmethod
    def similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., T, d], y [..., L, d] -> [..., T, L], positive."""
        return Hedgehog.expand(x) @ Hedgehog.expand(y).transpose(-1, -2)


FEATURE_MAPS = {"taylor": Taylor, "hedgehog": Hedgehog}
