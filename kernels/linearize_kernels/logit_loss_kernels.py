"""The Triton programs of `logit_losses`: one a token, which reads its logits once a direction, in float32.

N tokens, V vocabulary, BLOCK logits at a time

The backward pass computes softmax again from the logits and their log-sums, so that nothing of size [N, V] is kept
beyond what the caller keeps.
"""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8
NOTHING = tl.constexpr(-1e30)  # beyond the vocabulary: no weight, and finite in differences


@triton.jit
def losses_kernel(
    logits, teacher, labels, ce, kl, log_sums, teacher_log_sums, stride, teacher_stride, V,
    HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one token, and log Σ exp of its logits and the teacher's, with running maxima."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    top, total = -float("inf"), 0.0  # of the logits: maximum, sum relative to it
    teacher_top, teacher_total, ahead = -float("inf"), 0.0, 0.0  # ahead: Σ exp(t - teacher_top) (t - logit)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < V, other=NOTHING).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
        if HAS_TEACHER:
            t = tl.load(teacher + row * teacher_stride + at, mask=at < V, other=NOTHING).to(tl.float32)
            new = tl.maximum(teacher_top, tl.max(t, 0))
            weight, shrink = tl.exp(t - new), tl.exp(teacher_top - new)
            teacher_total = teacher_total * shrink + tl.sum(weight, 0)
            ahead = ahead * shrink + tl.sum(weight * (t - x), 0)
            teacher_top = new
    log_sum = top + tl.log(total)
    tl.store(log_sums + row, log_sum)
    counts = label >= 0
    wanted = tl.load(logits + row * stride + label, mask=counts, other=0.0).to(tl.float32)
    tl.store(ce + row, tl.where(counts, log_sum - wanted, 0.0))
    if HAS_TEACHER:
        teacher_log_sum = teacher_top + tl.log(teacher_total)
        tl.store(teacher_log_sums + row, teacher_log_sum)
        tl.store(kl + row, tl.where(counts, ahead / teacher_total - teacher_log_sum + log_sum, 0.0))


@triton.jit
def logit_gradient_kernel(
    logits, teacher, labels, log_sums, teacher_log_sums, ce_slope, kl_slope, out, stride, teacher_stride, V,
    HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one token's logits: ce_slope (p - [label]) + kl_slope (p - t). Slopes stand on the device."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = tl.where(label >= 0, 1.0, 0.0)
    by_ce, by_kl = tl.load(ce_slope) * counts, tl.load(kl_slope) * counts
    log_sum = tl.load(log_sums + row)
    if HAS_TEACHER:
        teacher_log_sum = tl.load(teacher_log_sums + row)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < V, other=NOTHING).to(tl.float32)
        p = tl.exp(x - log_sum)
        gradient = by_ce * (p - tl.where(at == label, 1.0, 0.0))
        if HAS_TEACHER:
            t = tl.load(teacher + row * teacher_stride + at, mask=at < V, other=NOTHING).to(tl.float32)
            gradient += by_kl * (p - tl.exp(t - teacher_log_sum))
        tl.store(out + row * V + at, gradient.to(out.dtype.element_ty), mask=at < V)


class LogitLosses(torch.autograd.Function):
    """`logit_losses` of logits [N, V], teacher [N, V] or None, in any floating dtypes; columns lie side by side."""

    @staticmethod
    def forward(ctx, logits, labels, teacher):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        other = logits if teacher is None else teacher if teacher.stride(1) == 1 else teacher.contiguous()
        rows = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
        ce, kl, log_sums, teacher_log_sums = rows
        losses_kernel[(len(logits),)](
            logits, other, labels, ce, kl, log_sums, teacher_log_sums, logits.stride(0), other.stride(0),
            logits.shape[1], HAS_TEACHER=teacher is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(logits, other, labels, log_sums, teacher_log_sums)
        ctx.has_teacher = teacher is not None
        return ce.sum(), kl.sum() if teacher is not None else ce.new_zeros(())

    @staticmethod
    def backward(ctx, ce_slope, kl_slope):
        logits, other, labels, log_sums, teacher_log_sums = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        logit_gradient_kernel[(len(logits),)](
            logits, other, labels, log_sums, teacher_log_sums, ce_slope.float().contiguous(),
            kl_slope.float().contiguous(), out, logits.stride(0), other.stride(0), logits.shape[1],
            HAS_TEACHER=ctx.has_teacher, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return out, None, None
