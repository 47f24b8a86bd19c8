"""The definition of hybrid attention in plain PyTorch, for any float dtype, differentiable.

B batch, T new tokens, H query heads, G kv heads, M heads of the far term (G or H), D head dim, V value dim,
d map dim, F expanded features, w window, n sinks, L keys that one query chunk sees directly, C chunk

For query i, with s_ij = scaling · q_i·k_j (soft-capped where asked) and f(x, y) the feature map's similarity:

    exact(i) = { j <= i : i - j < w } ∪ { j <= i : j is one of the row's first n tokens }
    far(i)   = all other j <= i
    c_i      = max( max over exact(i) of s_ij , gate_i if far(i) is not empty )
    num_i    = Σ_exact exp(s_ij - c_i) v_j  +  exp(gate_i - c_i) Σ_far exp(log_decay (i - j)) f(q_far_i, k_far_j) v_j
    den_i    = the same sums with 1 for v_j  +  exp(sink_logit - c_i)        out_i = num_i / den_i  (0 if den_i = 0)

`attention_quadratic` is the definition. `attention_chunked` computes the same in O(T) time and memory.
Both take a `State` for the past and return the next one, so a text may be cut anywhere. `attention_step` is
`attention_quadratic` for one token, in a quarter of the operations.
"""

from typing import NamedTuple

import torch

from .feature_maps import FEATURE_MAPS
from .state import State, accumulation_dtype


def attention_quadratic(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None,
                        segments=None, log_decay=None, softcap=None, sink_logits=None, state=None,
                        return_state=False):  # fmt: skip
    """Hybrid attention by its definition; time and memory O(T · (T + w)).

    q [B, H, T, D], k [B, G, T, D], v [B, G, T, V]: after norms and rotary embedding.
    q_far [B, H, T, d], k_far [B, M, T, d]: mapped queries and (centred) keys.
    gate [B, H, T]: log weight of the far term.      scaling: factor of the exact scores.
    valid [B, T] bool: False for padding, which no query sees; a row with nothing visible gives 0.
    segments [B, T] int: documents packed in one row; none attends into another. Not with `state`.
    log_decay [M] <= 0: far weight decays by exp(log_decay) a token.  softcap: s -> softcap · tanh(s / softcap).
    sink_logits [H]: learned logits that take part in the denominator only (GPT-OSS).
    state: the past of these rows, or None.          Returns (out [B, H, T, V] of q's dtype, State or None).
    """
    features = FEATURE_MAPS[feature_map]
    past = _past(k, v, k_far, state, segments, features=features, window=window, sinks=sinks)
    new = _new_tokens(k, v, k_far, valid, segments, past)
    num_old = sinks + past.ring_k.shape[2]
    keys = torch.cat([past.sink_k, past.ring_k, k], 2)
    values = torch.cat([past.sink_v, past.ring_v, v], 2)
    mapped = torch.cat([past.ring_far.new_zeros(*k_far.shape[:2], sinks, k_far.shape[3]), past.ring_far, k_far], 2)
    usable = torch.cat([past.sink_valid, past.ring_usable, new.usable], 1)
    is_sink = torch.cat([torch.ones_like(past.sink_valid), torch.zeros_like(past.ring_valid), new.is_sink], 1)
    length, device = q.shape[2], q.device
    distance = torch.arange(length, device=device)[:, None] + num_old - torch.arange(num_old + length, device=device)
    visible = usable[:, None, :] & (distance >= 0)
    if segments is not None:
        old = segments.new_full((segments.shape[0], num_old), -1)
        visible = visible & (segments[:, :, None] == torch.cat([old, segments], 1)[:, None, :])
    exact = visible & ((distance < window) | is_sink[:, None, :])
    out = _combine(
        q, keys, values, q_far, mapped, gate, _features(features, q_far), exact=exact, far=visible & ~exact,
        distance=distance, total=past.total, sees_total=past.has_folded[:, None].expand(-1, length),
        scaling=scaling, features=features, log_decay=log_decay, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    return out, _advance(past, new, features, log_decay) if return_state else None


def attention_chunked(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, feature_map="taylor", valid=None,
                      segments=None, log_decay=None, softcap=None, sink_logits=None, state=None,
                      return_state=False, chunk=64):  # fmt: skip
    """Hybrid attention in O(T): arguments and result as `attention_quadratic`.

    Queries go in chunks of C. A chunk sees the P + C newest tokens directly (P: the ring, at least w - 1),
    the row's sinks, and the sum of everything older.
    """
    features = FEATURE_MAPS[feature_map]
    past = _past(k, v, k_far, state, segments, features=features, window=window, sinks=sinks)
    new = _new_tokens(k, v, k_far, valid, segments, past)
    batch, length = q.shape[0], q.shape[2]
    num_chunks, ring = -(-length // chunk), past.ring_k.shape[2]
    tail = num_chunks * chunk - length
    line = _timeline(past, new, tail)
    totals, sees_total = _chunk_totals(line, past, features, log_decay, chunk, num_chunks)

    def fold_chunks(x):  # [B, heads, N * C, ...] -> [B * N, heads, C, ...]
        x = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 3) + [0, tail])
        return x.unflatten(2, (num_chunks, chunk)).transpose(1, 2).flatten(0, 1)

    def local(x):  # [B, heads, P + N * C, size] -> [B * N, heads, P + C, size]
        return x.unfold(2, ring + chunk, chunk).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def local_flags(x):  # [B, P + N * C] -> [B, N, P + C]
        return x.unfold(1, ring + chunk, chunk)

    sink_k, sink_v, sink_ok, sink_segment = _older_sinks(past, line, chunk, num_chunks)
    keys = torch.cat([sink_k, local(line.k)], 2)
    values = torch.cat([sink_v, local(line.v)], 2)
    mapped = torch.nn.functional.pad(local(line.k_far), [0, 0, sinks, 0])
    usable = torch.cat([sink_ok, local_flags(line.usable)], -1)[:, :, None, :]
    is_sink = torch.cat([torch.ones_like(sink_ok), local_flags(line.is_sink)], -1)[:, :, None, :]
    segment = torch.cat([sink_segment, local_flags(line.segment)], -1)[:, :, None, :]
    query_segment = line.segment[:, ring:].unflatten(1, (num_chunks, chunk))
    slots = torch.arange(-sinks, ring + chunk, device=q.device)
    distance = torch.arange(chunk, device=q.device)[:, None] + ring - slots
    visible = usable & (distance >= 0) & (query_segment[..., None] == segment)
    exact = visible & ((distance < window) | is_sink)
    far, q_far = visible & ~exact, fold_chunks(q_far)
    out = _combine(
        fold_chunks(q), keys, values, q_far, mapped, fold_chunks(gate[..., None])[..., 0], _features(features, q_far),
        exact=exact.flatten(0, 1), far=far.flatten(0, 1), distance=distance,
        total=totals, sees_total=sees_total.flatten(0, 1),
        scaling=scaling, features=features, log_decay=log_decay, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    out = out.unflatten(0, (batch, num_chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    return out, _advance(past, new, features, log_decay) if return_state else None


def attention_step(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, state, feature_map="taylor", valid=None,
                   log_decay=None, softcap=None, sink_logits=None):  # fmt: skip
    """`attention_quadratic` for one new token after a state whose ring is the window, of window - 1 >= 1 slots.

    All keys in sight are exact then, and what is far is in the sum. Returns (out [B, H, 1, V], the next State).
    """
    features, ring, usable = FEATURE_MAPS[feature_map], window - 1, state.ring_usable
    assert q.shape[2] == 1 and state.ring_k.shape[2] == ring >= 1 and state.num_sinks == sinks, "see the docstring"
    if valid is None:
        valid = torch.ones(k.shape[0], 1, dtype=torch.bool, device=k.device)
    keys = torch.cat([state.sink_k, state.ring_k, k], 2)
    values = torch.cat([state.sink_v, state.ring_v, v], 2)
    expanded = _features(features, torch.cat([q_far, state.ring_far[:, :, :1]], 1))  # of what comes and what leaves
    out = _combine(
        q, keys, values, None, None, gate, expanded[:, : q.shape[1]], far=None, distance=None, total=state.total,
        exact=torch.cat([state.sink_valid, usable, valid], 1)[:, None],
        sees_total=(state.length - sinks > usable.sum(-1))[:, None],
        scaling=scaling, features=features, log_decay=None, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    total = state.total
    if log_decay is not None:
        total = total * torch.exp(log_decay.to(total.dtype))[:, None, None]
    leaving = _fold(expanded[:, q.shape[1] :], state.ring_v[:, :, :1], usable[:, :1], window, log_decay)
    arrived = (state.length[:, None] == torch.arange(sinks, device=k.device)) & valid
    arrived = arrived[:, None, :, None]
    return out, State(
        total=total + leaving,
        sink_k=torch.where(arrived, k, state.sink_k), sink_v=torch.where(arrived, v, state.sink_v),
        ring_k=keys[:, :, sinks + 1 :], ring_v=values[:, :, sinks + 1 :],
        ring_far=torch.cat([state.ring_far[:, :, 1:], k_far], 2),
        ring_valid=torch.cat([state.ring_valid[:, 1:], valid], 1), length=state.length + valid[:, 0],
    )  # fmt: skip


def attention_reference(q, *args, chunk=64, state=None, segments=None, return_state=False, **options):
    """`attention_step` where it can be, `attention_quadratic` for at most two chunks of new tokens, else
    `attention_chunked`: whichever is cheapest.
    """
    ring = options["window"] - 1
    if q.shape[2] == 1 and state is not None and state.ring_k.shape[2] == ring >= 1 and segments is None:
        out, state = attention_step(q, *args, **options, state=state)
        return out, state if return_state else None
    options |= dict(state=state, segments=segments, return_state=return_state)
    if q.shape[2] <= 2 * chunk:
        return attention_quadratic(q, *args, **options)
    return attention_chunked(q, *args, **options, chunk=chunk)


def _combine(q, k, v, q_far, k_far, gate, q_features, *, exact, far, distance, total, sees_total, scaling, features,
             log_decay, softcap, sink_logits):  # fmt: skip
    """One softmax-like average over exact keys, far keys and the sum of older ones.

    exact, far [B, T, L] bool (far None: no key in sight is); distance [T, L] (a query's slot minus a key's);
    q_features [B, H, T, F]; total [B, M, F, V + 1]; sees_total [B, T] bool. Scores are taken in float32 or better, and
    shifted by c_i before any exp.
    """
    length, out_dtype, dtype = q.shape[2], q.dtype, accumulation_dtype(q.dtype)
    q, k, v, gate, q_features, total = (x.to(dtype) for x in (q, k, v, gate, q_features, total))
    scores = scaling * _by_group(torch.matmul, q, k.transpose(-1, -2))  # [B, H, T, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(exact[:, None], scores, -torch.inf)
    sees_any = sees_total[:, None] if far is None else far[:, None].any(-1) | sees_total[:, None]
    gate = torch.where(sees_any, gate, -torch.inf)
    shift = torch.maximum(scores.amax(-1), gate)
    if sink_logits is not None:
        sink_logits = sink_logits.to(dtype)[None, :, None]
        shift = torch.maximum(shift, sink_logits)
    shift = shift.detach().masked_fill(shift == -torch.inf, 0)
    far_weight = torch.exp(gate - shift)[..., None]  # [B, H, T, 1]
    weights = torch.exp(scores - shift[..., None])
    if far is not None:
        similarity = _by_group(features.similarity, q_far.to(dtype), k_far.to(dtype))
        if log_decay is not None:
            decayed = torch.exp(log_decay.to(dtype)[:, None, None] * distance.clamp_min(0))  # [M, T, L]
            similarity = similarity * decayed.repeat_interleave(q.shape[1] // k_far.shape[1], 0)
        weights = weights + far_weight * similarity.masked_fill(~far[:, None], 0)
    older = far_weight * _by_group(torch.matmul, q_features, total)  # [B, H, T, V + 1]
    if log_decay is not None:
        decayed = torch.exp(log_decay.to(dtype)[:, None] * torch.arange(length, device=q.device))  # [M, T]
        older = older * decayed.repeat_interleave(q.shape[1] // total.shape[1], 0)[..., None]
    if far is not None:  # else the gate says so
        older = older.masked_fill(~sees_total[:, None, :, None], 0)
    sums = _by_group(torch.matmul, weights, v) + older[..., :-1]
    denominator = weights.sum(-1, keepdim=True) + older[..., -1:]
    if sink_logits is not None:
        denominator = denominator + torch.exp(sink_logits - shift)[..., None]
    empty = denominator == 0
    out = sums / denominator.masked_fill(empty, 1)
    return out.masked_fill(empty, 0).to(out_dtype)


def _by_group(function, x, y):
    """function(x, y) of each query head with its group's y: x [B, H, T, a], y [B, G, ...] -> [B, H, T, b].

    The heads of a group are rows of one product, so that y is not repeated.
    """
    batch, heads, length, size = x.shape
    rows = function(x.reshape(batch, y.shape[1], -1, size), y)
    return rows.reshape(batch, heads, length, rows.shape[-1])


class _Tokens(NamedTuple):
    """Keys in the order of time, with what decides who sees them."""

    k: torch.Tensor  # [B, G, T, D]
    v: torch.Tensor  # [B, G, T, V]
    k_far: torch.Tensor  # [B, M, T, d]
    valid: torch.Tensor  # [B, T] bool, not padding
    usable: torch.Tensor  # [B, T] bool, valid and not held elsewhere
    is_sink: torch.Tensor  # [B, T] bool
    rank: torch.Tensor  # [B, T] number of valid tokens of the row (or segment) before this one
    segment: torch.Tensor  # [B, T] int64, all 0 where rows are not packed


def _past(k, v, k_far, state, segments, *, features, window, sinks) -> State:
    """The given state, or one that has seen nothing."""
    if state is None:
        return State.empty(
            k, v, k_far, num_features=features.num_features(k_far.shape[-1]), sinks=sinks, ring=max(window - 1, 0)
        )
    assert segments is None, "packed rows have no common past"
    assert state.num_sinks == sinks and state.ring_k.shape[2] >= window - 1, "a state of another layout"
    return state


def _new_tokens(k, v, k_far, valid, segments, past: State) -> _Tokens:
    """The new tokens with their rank in the row (or in their segment), which says which ones are sinks."""
    batch, length = k.shape[0], k.shape[2]
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=k.device)
    count = valid.long().cumsum(-1)
    rank = past.length[:, None] + count - 1
    if segments is None:
        segments = torch.zeros_like(count)
    else:
        starts = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], [1, 0], value=True)
        rank = rank - torch.where(starts, count - valid.long(), 0).cummax(-1).values
    return _Tokens(k, v, k_far, valid, valid, valid & (rank < past.num_sinks), rank, segments.long())


def _timeline(past: State, new: _Tokens, tail: int) -> _Tokens:
    """Ring and new tokens as one line of P + T + tail slots; the tail is padding."""

    def join(old, x, dim):
        pad = [0, 0] * (x.ndim - dim - 1) + [0, tail]
        return torch.nn.functional.pad(torch.cat([old, x], dim), pad)

    none, zero = torch.zeros_like(past.ring_valid), torch.zeros_like(past.ring_valid, dtype=torch.long)
    return _Tokens(
        k=join(past.ring_k, new.k, 2),
        v=join(past.ring_v, new.v, 2),
        k_far=join(past.ring_far, new.k_far, 2),
        valid=join(past.ring_valid, new.valid, 1),
        usable=join(past.ring_usable, new.usable, 1),
        is_sink=join(none, new.is_sink, 1),
        rank=join(zero, new.rank, 1),
        segment=join(zero, new.segment, 1),
    )


def _features(features, mapped):
    """Features of mapped queries or keys [B, ., T, d], in float32 or better -> [B, ., T, F]."""
    return features.expand(mapped.to(accumulation_dtype(mapped.dtype)))


def _fold(expanded, v, select, age, log_decay):
    """Sum of k's features [B, M, T, F] ⊗ [v | 1] over tokens. select [B, T] bool, age [T] or one
    number of slots -> [B, M, F, V + 1].
    """
    dtype = expanded.dtype
    expanded = expanded * select[:, None, :, None]
    if log_decay is not None:
        expanded = expanded * torch.exp(log_decay.to(dtype)[:, None] * age)[..., None]
    v = v.to(dtype)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    groups, far_heads = v.shape[1], expanded.shape[1]
    expanded = expanded.unflatten(1, (groups, far_heads // groups)).transpose(-1, -2)
    return (expanded @ values[:, :, None]).flatten(1, 2)


def _chunk_totals(line: _Tokens, past: State, features, log_decay, chunk, num_chunks):
    """What lies before each chunk's direct view, summed: totals [B * N, M, F, V + 1], sees_total [B, N, C].

    Chunk c sees slots c·C ... c·C + P + C - 1 of the line directly. Of what is older, a packed row keeps only the
    document that reaches into the chunk.
    """
    batch, num_folded, ring = line.segment.shape[0], (num_chunks - 1) * chunk, past.ring_k.shape[2]
    first = line.segment[:, ring : ring + 1] if num_folded else line.segment[:, :1]
    segment = torch.cat([first, line.segment[:, chunk - 1 : num_folded : chunk]], 1)  # [B, N]

    def blocks(x, dim):  # [B, ..., line, ...] -> [B * (N - 1), ..., C, ...]
        x = x.narrow(dim, 0, num_folded).unflatten(dim, (num_chunks - 1, chunk))
        return x.movedim(dim, 1).flatten(0, 1)

    folded = _Tokens(*(blocks(x, 2 if x.ndim == 4 else 1) for x in line))
    select = folded.usable & ~folded.is_sink & (folded.segment == segment[:, 1:].reshape(-1, 1))
    age = chunk + ring - torch.arange(chunk, device=segment.device)
    sums = _fold(_features(features, folded.k_far), folded.v, select, age, log_decay)
    sums = sums.unflatten(0, (batch, num_chunks - 1))
    counts = select.sum(-1).unflatten(0, (batch, num_chunks - 1))
    same = segment[:, 1:] == segment[:, :-1]

    total, count = past.total, past.has_folded.long()
    totals, seen = [total], [count]
    for c in range(num_chunks - 1):
        if log_decay is not None:
            total = total * torch.exp(log_decay.to(total.dtype) * chunk)[:, None, None]
        total = total * same[:, c, None, None, None] + sums[:, c]
        count = count * same[:, c] + counts[:, c]
        totals.append(total)
        seen.append(count)
    query_segment = line.segment[:, ring:].unflatten(1, (num_chunks, chunk))
    sees_total = (torch.stack(seen, 1) > 0)[..., None] & (query_segment == segment[..., None])
    return torch.stack(totals, 1).flatten(0, 1), sees_total


def _older_sinks(past: State, line: _Tokens, chunk, num_chunks):
    """Each chunk's sinks that lie before its direct view: k, v [B * N, G, n, ·], usable and segment [B, N, n]."""
    sinks, batch = past.num_sinks, line.segment.shape[0]
    flags = torch.cat([past.sink_valid, line.usable & line.is_sink], 1)
    segment = torch.nn.functional.pad(line.segment, [sinks, 0])
    order = torch.argsort(~flags, dim=1, stable=True)  # slots of the sinks first, in order of time
    starts = sinks + chunk * torch.arange(num_chunks, device=flags.device)
    before = torch.nn.functional.pad(flags.long().cumsum(-1), [1, 0])[:, starts]  # [B, N] sinks before the view
    index = before[..., None] - sinks + torch.arange(sinks, device=flags.device)
    slot = order.gather(1, index.clamp_min(0).flatten(1))  # [B, N * n]

    def pick(old, x):  # [B, G, n, size], [B, G, P + T, size] -> [B * N, G, n, size]
        x = torch.cat([old, x], 2)
        x = x.gather(2, slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return x.unflatten(2, (num_chunks, sinks)).transpose(1, 2).flatten(0, 1)

    picked = segment.gather(1, slot).unflatten(1, (num_chunks, sinks)) if sinks else index
    assert index.shape == (batch, num_chunks, sinks)
    return pick(past.sink_k, line.k), pick(past.sink_v, line.v), index >= 0, picked


def _advance(past: State, new: _Tokens, features, log_decay) -> State:
    """The state after the new tokens: as many slots as came in leave the ring and are folded."""
    line, ring, length = _timeline(past, new, 0), past.ring_k.shape[2], new.k.shape[2]
    leaving = _Tokens(*(x.narrow(2 if x.ndim == 4 else 1, 0, length) for x in line))
    age = length + ring - torch.arange(length, device=new.rank.device)
    total = past.total
    if log_decay is not None:
        total = total * torch.exp(log_decay.to(total.dtype) * length)[:, None, None]
    expanded, select = _features(features, leaving.k_far), leaving.usable & ~leaving.is_sink
    total = total + _fold(expanded, leaving.v, select, age, log_decay)
    wanted = torch.arange(past.num_sinks, device=new.rank.device)[:, None]
    chosen = (new.rank[:, None, :] == wanted) & new.valid[:, None, :]  # [B, n, T]
    arrived = chosen.any(-1)[:, None, :, None]

    def newest(x, dim):
        return x.narrow(dim, length, ring)

    return State(
        total=total,
        sink_k=torch.where(arrived, chosen[:, None].to(new.k.dtype) @ new.k, past.sink_k),
        sink_v=torch.where(arrived, chosen[:, None].to(new.v.dtype) @ new.v, past.sink_v),
        ring_k=newest(line.k, 2),
        ring_v=newest(line.v, 2),
        ring_far=newest(line.k_far, 2),
        ring_valid=newest(line.valid, 1),
        length=past.length + new.valid.sum(-1),
    )
