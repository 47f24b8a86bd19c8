"""Starting values of the maps, the key centre and the far gate, in closed form from the teacher's own statistics.

One forward of the teacher over a few sequences; each layer is done when it is reached, and nothing is kept. No
gradient is taken. Per kv head, over its far pairs (i, j):

    centre   k̄ = the mean far key, and its share of the gate: scaling · q·k̄
    maps     A, B minimise the mean of (A q·B (k - k̄) - scaling q·(k - k̄))²: an SVD of the two second moments
    gate     log(the teacher's far mass / the series' far mass), regressed on the query by weighted ridge regression;
             then a bias, down to "off", per query head by its effect on the layer's output error

so that a layer starts no worse than window + sinks, on the text it was calibrated on.

B batch, T time, H query heads, G kv heads, R = H / G, D head dim, d map dim
"""

from dataclasses import dataclass

import torch

from .modeling_linearized import FEATURE_MAPS, linear_attentions, with_linear_context
from .variants import softmax_attention

GATE_OFF = -30.0  # a log weight that leaves nothing of the far term
BIAS_SHIFTS = (*torch.linspace(-4.0, 1.0, 21).tolist(), GATE_OFF)
GATE_RIDGE = 0.1  # of the mean second moment of a query's coordinates


@torch.no_grad()
def calibrate(model, inputs) -> dict[int, dict[str, float]]:
    """Sets every LinearAttention of `model` from one batch of text.

    inputs: keyword arguments of the model's forward, input_ids [B, T] and perhaps attention_mask or position_ids.
    Returns {layer: {"error": ..., "window_error": ...}}: error power over the teacher's output power, calibrated and
    with the far term off. A layer that sees no far pair in this text is left as it is.
    """
    layers, report = linear_attentions(model), {}
    context = with_linear_context(model, **inputs, use_cache=False)["linear_context"]
    allowed = _allowed_pairs(inputs["input_ids"], context.valid, context.segments)

    def observer(module, q, k, v, out, *, scaling, softcap, sink_logits, **_):
        linear = layers[module.layer_idx]
        q, k, v, out = (x.float() for x in linear.heads.linear_part(q, k, v, out.transpose(1, 2)))
        (sink_logits,) = linear.heads.linear_part(sink_logits, dim=0)
        options = {"scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
        per_group = [_calibrate_group(linear, g, q, k, v, out, allowed, **options) for g in range(linear.num_kv_heads)]
        power = out.square().sum().item()
        error, window_error = (sum(x) / power for x in zip(*per_group, strict=True))
        report[module.layer_idx] = {"error": error, "window_error": window_error}

    with softmax_attention(model):
        model.get_decoder()(**inputs, use_cache=False, observer=observer)  # no output head: its logits serve nobody
    return dict(sorted(report.items()))


def _allowed_pairs(ids, valid, segments) -> torch.Tensor:
    """[B, T, T] bool: query i may see key j at all (causal, same document, no padding)."""
    batch, length = ids.shape
    index = torch.arange(length, device=ids.device)
    allowed = (index[:, None] >= index).expand(batch, -1, -1)
    if valid is not None:
        allowed = allowed & valid[:, None, :] & valid[:, :, None]
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    return allowed


@dataclass
class _Group:
    """The far pairs of one kv head and its R query heads, with the teacher's sums over exact and far keys."""

    q: torch.Tensor  # [B, R, T, D]
    k: torch.Tensor  # [B, T, D]
    v: torch.Tensor  # [B, T, D]
    far: torch.Tensor  # [B, T, T] bool
    scaling: float
    shift: torch.Tensor  # [B, R, T] the largest score; every mass below is relative to exp(shift)
    exact_sum: torch.Tensor  # [B, R, T, D]
    exact_mass: torch.Tensor  # [B, R, T]
    far_sum: torch.Tensor  # [B, R, T, D]
    far_mass: torch.Tensor  # [B, R, T]

    @property
    def has_far(self) -> torch.Tensor:
        return self.far.any(-1)[:, None]


def _calibrate_group(linear, g, q, k, v, teacher, allowed, *, scaling, softcap, sink_logits):
    """Sets the parameters of kv head g; returns (error, error with the far term off), both as power."""
    ratio = linear.num_heads // linear.num_kv_heads
    heads = slice(g * ratio, (g + 1) * ratio)
    group = _teacher_sums(linear, q[:, heads], k[:, g], v[:, g], allowed, scaling, softcap,
                          None if sink_logits is None else sink_logits[heads].float())  # fmt: skip
    teacher = teacher[:, heads]
    window_error = (group.exact_sum / group.exact_mass[..., None].clamp_min(1e-30) - teacher).square().sum((0, 2, 3))
    if not group.far.any():
        return window_error.sum().item(), window_error.sum().item()
    center, q_map, k_map = _maps(group, linear)
    far_heads = slice(g, g + 1) if linear.k_map.shape[0] == linear.num_kv_heads else heads
    linear.key_center[far_heads], linear.k_map[far_heads], linear.q_map[heads] = center, k_map, q_map
    similarity = FEATURE_MAPS[linear.feature_map].similarity(group.q @ q_map, ((group.k - center) @ k_map)[:, None])
    similarity = similarity * group.far[:, None]
    weight, bias = _gate(group, center, similarity)
    shift, error = _best_shift(group, weight, bias, similarity, teacher)
    linear.gate_weight[heads], linear.gate_bias[heads] = weight, bias + shift
    return error.sum().item(), window_error.sum().item()


def _teacher_sums(linear, q, k, v, allowed, scaling, softcap, sink_logits) -> _Group:
    index = torch.arange(q.shape[2], device=q.device)
    first = allowed.long().argmax(-1)  # the first token a query may see: where its document begins
    near = index[:, None] - index < linear.window
    is_sink = (index - first[..., None] >= 0) & (index - first[..., None] < linear.sinks)
    exact, far = allowed & (near | is_sink), allowed & ~(near | is_sink)
    scores = scaling * q @ k[:, None].transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~allowed[:, None], -torch.inf)
    shift = scores.amax(-1).clamp_min(-1e30)  # finite for padding, whose row is empty
    weights = scores.sub_(shift[..., None]).exp_()  # in place, here and below: [T, T] a head is most of the memory
    exact_weights = weights * exact[:, None]
    far_weights = weights.sub_(exact_weights)  # what is allowed is exact or far
    exact_mass = exact_weights.sum(-1)
    if sink_logits is not None:
        exact_mass = exact_mass + torch.exp(sink_logits[:, None] - shift)
    values = v[:, None]
    return _Group(q, k, v, far, scaling, shift, exact_weights @ values, exact_mass,
                  far_weights @ values, far_weights.sum(-1))  # fmt: skip


def _maps(group: _Group, linear):
    """Centre [D] and maps [D, d] of the best rank-d bilinear form, both sides scaled to equal power."""
    counts = group.far.sum(1).float()  # [B, T] how many queries see a key as far
    center = (counts[..., None] * group.k).sum((0, 1)) / counts.sum()
    keys = group.k - center
    key_moment = torch.einsum("bt,btd,bte->de", counts, keys, keys) / counts.sum()
    seeing = group.has_far.expand(group.q.shape[:3]).float()
    query_moment = torch.einsum("brt,brtd,brte->de", seeing, group.q, group.q) / seeing.sum()
    key_root, key_inverse = _roots(key_moment.cpu())  # small, and every decomposition on a GPU waits for it
    query_root, _ = _roots(query_moment.cpu())
    _, singular, right = torch.linalg.svd(group.scaling * query_root @ key_root)
    dim = min(linear.q_map.shape[-1], singular.shape[0])
    singular, right = singular[:dim].clamp_min(1e-12), right[:dim].mT
    maps = group.scaling * key_root @ right * singular.rsqrt(), key_inverse @ right * singular.sqrt()
    pad = [0, linear.q_map.shape[-1] - dim]
    return center, *(torch.nn.functional.pad(each, pad).to(center.device) for each in maps)


def _roots(moment):
    """Square root and inverse square root of a symmetric matrix; eigenvalues count as 1e-6 of the largest at least."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values.max() * 1e-6)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def _gate(group: _Group, center, similarity):
    """gate_weight [R, D], gate_bias [R]: ridge regression of the log mass ratio, towards scaling · k̄.

    A query counts by how much its output moves with the gate: (p (1 - p) |far mean - exact mean|)², p its far share.
    """
    ratio = torch.log(group.far_mass.clamp_min(1e-30)) + group.shift - torch.log(similarity.sum(-1).clamp_min(1e-30))
    target = ratio - group.scaling * group.q @ center
    share = group.far_mass / (group.far_mass + group.exact_mass).clamp_min(1e-30)
    far_mean = group.far_sum / group.far_mass.clamp_min(1e-30)[..., None]
    exact_mean = group.exact_sum / group.exact_mass.clamp_min(1e-30)[..., None]
    weight = (share * (1 - share)).square() * (far_mean - exact_mean).square().sum(-1) * group.has_far
    weight = weight / weight.sum((0, 2), keepdim=True).clamp_min(1e-30)
    inputs = torch.nn.functional.pad(group.q, [0, 1], value=1.0)  # [B, R, T, D + 1]
    gram = torch.einsum("brt,brtd,brte->rde", weight, inputs, inputs)
    moment = torch.einsum("brt,brtd,brt->rd", weight, inputs, target)
    size = center.shape[0]
    penalty = torch.full((size + 1,), GATE_RIDGE, device=center.device) * gram.diagonal(dim1=1, dim2=2)[:, :size].mean(
        -1, keepdim=True
    )
    penalty[:, size] = 1e-6
    system = gram + torch.diag_embed(penalty)
    solution = torch.linalg.solve(system.cpu(), moment[..., None].cpu())[..., 0].to(center.device)
    return group.scaling * center + solution[:, :size], solution[:, size]


def _best_shift(group: _Group, weight, bias, similarity, teacher):
    """Per query head the bias shift with the least output error: ([R], [R] error power)."""
    gate = torch.einsum("brtd,rd->brt", group.q, weight) + bias[:, None] - group.shift
    gate = gate.masked_fill(~group.has_far, -torch.inf).clamp_max(60.0)
    mass, total = similarity.sum(-1), similarity @ group.v[:, None]
    errors = []
    for shift in BIAS_SHIFTS:
        far = torch.exp(gate + shift)
        out = (group.exact_sum + far[..., None] * total) / (group.exact_mass + far * mass).clamp_min(1e-30)[..., None]
        errors.append((out - teacher).square().sum((0, 2, 3)))
    error, index = torch.stack(errors).min(0)
    return torch.tensor(BIAS_SHIFTS, device=error.device)[index], error
