"""Perplexity by position: how well a model predicts a token, by how much text it has seen before it.

N rows, T tokens a row, B rows a forward, V vocabulary. A token's position is its index in its row, from 0.
The token at position 0 has nothing before it and is not predicted, so a row yields T - 1 figures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from linearize.errors import DataError
from linearize.output_head import Halves

STANDARD_EDGES = (256, 1024, 4096, 16384, 65536, 262144)
# Logits in memory at a time, in float32. A whole row of them need not fit: 4,096 x 150,000 is 2.4 GB.
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
    halves: Halves | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Negative log-likelihood of every token but the first of each row, in nats: [N, T - 1], float32, on CPU.

    The logits are those of the model's own forward, so whatever it does to them (scaling, softcap) is in; they are
    made a slice at a time (see `nll_and_kl`), and the log-softmax is in float32 whatever the model's dtype.

    Args:
        model: causal LM of transformers; or any whose `model(input_ids [B, T], use_cache=False).logits` is [B, T, V].
        rows: token ids [N, T], int64, no padding.
        batch_size: rows a forward.
        halves: of the model, where the caller has them already: to make them takes two short forwards.
        on_batch: called after each of the ceil(N / batch_size) forwards.

    Raises DataError if `rows` is empty or not [N, T] with T >= 2.
    """
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise DataError(
            f"token rows have shape {list(rows.shape)}; needed is [N, T] with at least one row of 2 tokens"
        )
    batches = []
    with evaluation_mode(model):
        halves = halves or Halves(model)
        for batch in rows.split(batch_size):
            batch = batch.to(model.device)
            batches.append(nll_and_kl(halves.states(batch), batch, head=halves.head)[0].cpu())
            on_batch()
    return torch.cat(batches)


def nll_and_kl(
    states: torch.Tensor,
    ids: torch.Tensor,
    reference: torch.Tensor | None = None,
    *,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """states [B, T, size] of the ids [B, T] -> NLL and KL of each predicted token.

    head: what makes logits [., V] of states (see `Halves`). Both results are [B, T - 1], float32, in nats.
    KL(reference ‖ model) is None without `reference`, the states [B, T, size] of the model to compare with. At most
    LOGITS_AT_A_TIME logits of either are in memory at once, in float32 whatever the model's dtype.
    """
    targets = ids[:, 1:].to(states.device)
    step = max(1, LOGITS_AT_A_TIME // (states.shape[0] * head(states[:1, :1]).shape[-1]))
    nlls, kls = [], []
    for start in range(0, targets.shape[1], step):
        target = targets[:, start : start + step]
        part = slice(start, start + target.shape[1])
        log_p = head(states[:, part]).float().log_softmax(-1)
        nlls.append(-log_p.gather(-1, target[..., None])[..., 0])
        if reference is not None:
            log_r = head(reference[:, part]).float().log_softmax(-1)
            kls.append((log_r.exp() * (log_r - log_p)).sum(-1))
    return torch.cat(nlls, dim=1), torch.cat(kls, dim=1) if kls else None


def variants_nll_and_kl(
    model: torch.nn.Module,
    variants: Mapping[str, Callable[[], AbstractContextManager]],
    rows: torch.Tensor,
    *,
    reference: str,
    batch_size: int = 1,
    halves: Halves | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """`nll_and_kl` of every variant of `model` on `rows` [N, T]: name -> two [N, T - 1], float32, on CPU.

    variants: name -> factory of the context that makes the model that variant; none changes the output head.
    reference: the one that KL is taken to; where it is not among them, KL is None. A batch goes through all variants
    before the next, so that only its reference states are held. The other arguments as in `token_nll`.
    """
    order = sorted(variants, key=lambda name: name != reference)
    parts: dict[str, list] = {name: [] for name in variants}
    with evaluation_mode(model):
        halves = halves or Halves(model)
        for batch in rows.split(batch_size):
            batch, reference_states = batch.to(model.device), None
            for name in order:
                with variants[name]():
                    states = halves.states(batch)
                    reference_states = states if name == reference else reference_states
                    nll, kl = nll_and_kl(states, batch, reference_states, head=halves.head)
                del states  # before the next variant makes its own
                parts[name].append((nll.cpu(), None if kl is None else kl.cpu()))
                on_batch()
    joined = {}
    for name, pairs in parts.items():
        nlls, kls = zip(*pairs, strict=True)
        joined[name] = torch.cat(nlls), None if kls[0] is None else torch.cat(kls)
    return joined


def perplexity(nll: torch.Tensor) -> float:
    """exp of the mean of `nll` (nats, any shape), averaged in float64; inf where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll.double().mean().item()))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values: their sample deviation over the root of their number; None for one value."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


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
