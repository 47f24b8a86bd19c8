"""Cross-entropy and KL divergence of a row of logits a token, in one pass over them: what finetuning minimises.

N tokens, V vocabulary

    p, t = softmax(logits), softmax(teacher)
    ce = Σ_n -log p_n[label_n]        kl = Σ_n Σ_v t_n[v] (log t_n[v] - log p_n[v])
"""

import torch

from .dispatch import can_run_losses, requested

IGNORED = -100  # label of a token that does not count


def logit_losses(logits, labels, teacher=None, *, implementation="auto"):
    """Sums over the tokens with a label: (cross-entropy, KL(teacher ‖ logits)), float32 scalars in nats.

    logits, teacher [N, V]; labels [N] int64, IGNORED where there is nothing to predict. Without a teacher KL is 0.
    Differentiable in logits. "auto" takes Triton on a GPU where `can_run_losses` agrees; the reference makes float32
    copies of all logits. Raises ValueError for an unknown implementation, RuntimeError where a forced one cannot run.
    """
    chosen = requested(implementation)
    if chosen == "cuda":
        reason = "there is no CUDA kernel, Triton has one"
        raise RuntimeError(f"losses of logits were asked to run in cuda, and cannot: {reason}")
    verdict = can_run_losses(logits, teacher) if chosen == "triton" or chosen == "auto" and logits.is_cuda else None
    if chosen == "triton" and not verdict:
        raise RuntimeError(f"losses of logits were asked to run in triton, and cannot: {verdict.reason}")
    if not verdict:
        return logit_losses_reference(logits, labels, teacher)
    from .logit_loss_kernels import LogitLosses

    with torch.cuda.device_of(logits):
        return LogitLosses.apply(logits, labels, teacher)


def logit_losses_reference(logits, labels, teacher=None):
    """`logit_losses` by torch's own functions."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    ce = torch.nn.functional.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="sum")
    if teacher is None:
        return ce, ce.new_zeros(())
    with torch.no_grad():
        log_t = teacher.to(log_p.dtype).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
    return ce, (kl * (labels != IGNORED)).sum()
