"""Perplexity by position: how well a model predicts a token, by how much text it has seen before it.

N rows, T tokens a row, B rows a forward, V vocabulary. A token's position is its index in its row, from 0.
The token at position 0 has nothing before it and is not predicted, so a row yields T - 1 figures.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from linearize.errors import DataError

STANDARD_EDGES = (256, 1024, 4096, 16384, 65536, 262144)
# Logits turned into float32 at a time. A whole row of them need not fit: 4,096 x 150,000 is 2.4 GB.
LOGITS_AT_A_TIME = 2**24


def position_edges(window: int, num_tokens: int) -> list[int]:
    """Edges of the buckets for rows of `num_tokens` tokens: bucket i is edges[i] <= position < edges[i + 1].

    Starts at 1, ends at `num_tokens`; between them the window and 256, 1024, 4096, ... where they fall. A
    bucket narrower than an eighth of its start is joined to its neighbour: it would only show noise.

    Raises DataError if the rows hold fewer than two tokens.
    """
    if num_tokens < 2:
        raise DataError(f"rows of {num_tokens} token(s) predict nothing: give rows of 2 tokens or more")
    edges = [1]
    for edge in (window, *(edge for edge in STANDARD_EDGES if edge > window)):
        far_enough = len(edges) == 1 or edge - edges[-1] >= edges[-1] / 8
        if 1 < edge < num_tokens and far_enough:
            edges.append(edge)
    if len(edges) > 1 and num_tokens - edges[-1] < edges[-1] / 8:
        edges.pop()
    return [*edges, num_tokens]


def position_label(position: int) -> str:
    """`position` as people write it: 64, 1000, 1k, 32k."""
    return f"{position // 1024}k" if position % 1024 == 0 and position > 0 else str(position)


def bucket_label(start: int, stop: int) -> str:
    """Name of the bucket start <= position < stop: "<64", "64-256", "256-1k"."""
    if start <= 1:
        return f"<{position_label(stop)}"
    return f"{position_label(start)}-{position_label(stop)}"


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; each module's own mode is given back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def token_nll(
    model: torch.nn.Module,
    rows: torch.Tensor,
    *,
    batch_size: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Negative log-likelihood of every token but the first of each row, in nats: [N, T - 1], float32, on CPU.

    The logits are those of the model's own full forward, so whatever it does to them (scaling, softcap) is
    in; the log-softmax is in float32 whatever the model's dtype.

    Args:
        model: causal LM; `model(input_ids [B, T], use_cache=False).logits` is [B, T, V].
        rows: token ids [N, T], int64, no padding.
        batch_size: rows a forward.
        on_batch: called after each of the ceil(N / batch_size) forwards.

    Raises DataError if `rows` is empty or not [N, T] with T >= 2.
    """
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise DataError(
            f"token rows have shape {list(rows.shape)}; needed is [N, T] with at least one row of 2 tokens"
        )
    batches = []
    with evaluation_mode(model):
        for batch in rows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(batch, use_cache=False).logits
            batches.append(_nll_in_slices(logits, batch).cpu())
            on_batch()
    return torch.cat(batches)


def _nll_in_slices(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """logits [B, T, V] and the ids [B, T] they were computed from -> [B, T - 1] float32 nats."""
    targets = ids[:, 1:].to(logits.device)
    step = max(1, LOGITS_AT_A_TIME // (logits.shape[0] * logits.shape[2]))
    slices = []
    for start in range(0, targets.shape[1], step):
        target = targets[:, start : start + step]
        part = logits[:, start : start + target.shape[1]].float()
        nll = F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none")
        slices.append(nll.view_as(target))
    return torch.cat(slices, dim=1)


def perplexity(nll: torch.Tensor) -> float:
    """exp of the mean of `nll` (nats, any shape), averaged in float64; inf where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll.double().mean().item()))


def summarize_nll(nll: torch.Tensor, edges: Sequence[int]) -> dict:
    """Means of `nll` [N, T - 1] (see `token_nll`), overall, by bucket and by position.

    Returns {"nll", "perplexity", "num_tokens", "buckets": [{"start", "stop", "nll", "perplexity"}],
    "nll_by_position": T - 1 floats, the first that of position 1}. Positions of a bucket: start <= p < stop.

    Raises DataError unless `edges` rise from 1 to T.
    """
    num_tokens = nll.shape[1] + 1
    edges = list(edges)
    if edges[:1] != [1] or edges[-1] != num_tokens or edges != sorted(set(edges)):
        raise DataError(f"bucket edges {edges} must rise from 1 to the row length, {num_tokens}")
    nll = nll.double()
    buckets = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = nll[:, start - 1 : stop - 1]
        buckets.append(
            {"start": start, "stop": stop, "nll": part.mean().item(), "perplexity": perplexity(part)}
        )
    return {
        "nll": nll.mean().item(),
        "perplexity": perplexity(nll),
        "num_tokens": nll.numel(),
        "buckets": buckets,
        "nll_by_position": nll.mean(dim=0).tolist(),
    }


def perplexity_by_position(
    model: torch.nn.Module, rows: torch.Tensor, *, edges: Sequence[int], batch_size: int = 1
) -> dict:
    """Perplexity of `rows` [N, T] overall, by bucket of positions and by position.

    `edges` from `position_edges`; the other arguments and DataError as in `token_nll`, the result as in
    `summarize_nll`.
    """
    return summarize_nll(token_nll(model, rows, batch_size=batch_size), edges)
