"""Finetuning: LoRA on named projections of the converted layers, their maps trained along.

Loss: next-token cross-entropy and/or KL to the teacher, which is the same model with adapters off and softmax on.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D  # a linear layer with its weight transposed, as in GPT-2

from .data import model_inputs
from .errors import RecipeError
from .modeling_linearized import LinearizedAttentionMixin, linear_attentions
from .train import ParameterGroup
from .variants import teacher

LOSS_CHUNK = 1024  # tokens whose logits are taken to float32 at a time


def add_lora(model, lora):
    """Wraps `model` with peft's LoRA on the projections `lora.targets` of every converted layer.

    Raises RecipeError unless every name is a linear projection of every converted layer.
    """
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
        target_modules=projection_names(model, lora.targets),
    )  # fmt: skip
    return get_peft_model(model, config)


def projection_names(model, targets: list[str]) -> list[str]:
    """Full names of the modules that `targets` name in each converted layer (its attention, or its MLP)."""
    attentions = [name for name, m in model.named_modules() if isinstance(m, LinearizedAttentionMixin)]
    names = []
    for attention in attentions:
        block = attention.rpartition(".")[0]
        by_last = {}
        for name, module in model.get_submodule(block).named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                by_last.setdefault(name.rpartition(".")[2], []).append(f"{block}.{name}")
        missing = [t for t in targets if t not in by_last]
        if missing:
            raise RecipeError(
                f"finetune.lora.targets: {', '.join(missing)} not in {block}. Its linear projections are "
                f"{', '.join(sorted(by_last))}; name some of these."
            )
        names += [full for t in targets for full in by_last[t]]
    return names


class FinetuneStage:
    """Finetuning as the training loop sees it. `model` is a peft model over a linearized one."""

    name = "finetune"
    order = 1

    def __init__(self, model, settings, *, gradient_checkpointing=False):
        self.model, self.loss = model, settings.loss
        maps = [p for layer in linear_attentions(model).values() for p in layer.parameters()]
        for parameter in maps:
            parameter.requires_grad_(settings.maps_lr > 0)
        lora = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        self.groups = [ParameterGroup("lora", lora, settings.lr)]
        if settings.maps_lr > 0:
            self.groups.append(ParameterGroup("maps", maps, settings.maps_lr))
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()

    def num_terms(self, batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def run(self, batch, *, scale, backward):
        inputs = model_inputs(batch)
        labels = batch["labels"][:, 1:]
        self.model.train(backward)
        reference = self.teacher_logits(inputs) if self.loss.kl else None
        with torch.set_grad_enabled(backward):
            with self.autocast(labels.device):
                logits = self.model(**inputs, use_cache=False).logits[:, :-1]
            ce, kl = token_losses(logits, labels, reference)
            loss = scale * (self.loss.ce * ce + self.loss.kl * kl)
            if backward:
                loss.backward()
        figures = {"loss": loss.detach(), "ce": scale * ce.detach()}
        return {**figures, "kl": scale * kl.detach()} if self.loss.kl else figures

    def autocast(self, device):
        """LoRA's float32 weights multiply in the base model's dtype; the maps see to themselves in float32."""
        dtype = self.model.dtype
        return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))

    @torch.no_grad()
    def teacher_logits(self, inputs):
        """[B, T - 1, vocabulary] of the base model: no second copy of it is needed."""
        training = self.model.training
        self.model.eval()
        with teacher(self.model):
            logits = self.model(**inputs, use_cache=False).logits[:, :-1]
        self.model.train(training)
        return logits


def token_losses(logits, labels, teacher=None):
    """Sums over tokens with a label: cross-entropy, and KL(teacher ‖ model), in float32, in nats.

    logits, teacher [B, T, vocabulary]; labels [B, T], -100 where there is nothing to predict. Only LOSS_CHUNK tokens'
    probabilities are in memory at a time; the backward pass computes them again.
    """
    flat, wanted = logits.flatten(0, 1), labels.flatten()
    reference = None if teacher is None else teacher.flatten(0, 1)
    ce = kl = flat.new_zeros((), dtype=torch.float32)
    for start in range(0, wanted.shape[0], LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        args = (flat[part], wanted[part], None if reference is None else reference[part])
        chunk_ce, chunk_kl = checkpoint(_chunk_losses, *args, use_reentrant=False)
        ce, kl = ce + chunk_ce, kl + chunk_kl
    return ce, kl


def _chunk_losses(logits, labels, teacher):
    log_p = logits.float().log_softmax(-1)
    seen = labels != -100
    ce = torch.nn.functional.nll_loss(log_p, labels, ignore_index=-100, reduction="sum")
    if teacher is None:
        return ce, ce.new_zeros(())
    log_t = teacher.float().log_softmax(-1)
    return ce, ((log_t.exp() * (log_t - log_p)).sum(-1) * seen).sum()
